"""TrainedParts: some parameters of a frozen module are trained, the module itself stays as it was loaded.

The trained values live in the wrapper (float32 by default, so that small steps are not rounded away) and stand in for the
originals during the call, cast to the originals' type.  It serves modules that are trained whole (a classifier head, an embedding) and
biases that are trained beside an adapter; taking it out gives the original back to the bit.

Does not train quantized weights: they are buffers without a gradient, and asking for them raises.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from halfbyte.errors import AdapterError


class TrainedParts(nn.Module):
    """`base` with its own parameters `names` replaced by trained copies."""

    def __init__(self, base: nn.Module, names: tuple[str, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        own = dict(base.named_parameters())
        missing = [name for name in names if name not in own or not own[name].is_floating_point()]
        if missing or not names:
            raise AdapterError(
                "only parameters in floating point can be trained", code="E-ADAPT-001", place=type(base).__name__,
                found=", ".join(missing) or "no parameter", expected="a dense layer", remedy="load this module without quantization",
            )  # fmt: skip
        self.base = base
        self.names = names
        self.parts = nn.ParameterList([nn.Parameter(own[name].detach().to(dtype, copy=True)) for name in names])

    def current(self) -> dict[str, Tensor]:
        """name -> trained value in the type of the original; differentiable."""
        own = dict(self.base.named_parameters())
        return {name: part.to(own[name].dtype) for name, part in zip(self.names, self.parts)}

    def trained(self) -> dict[str, nn.Parameter]:
        """name -> the parameter that is trained."""
        return dict(zip(self.names, self.parts))

    @property
    def weight(self) -> Tensor:
        """What acts as the weight: for code that asks a head or an embedding for it."""
        return self.current()["weight"] if "weight" in self.names else self.base.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """What acts as the bias, or None."""
        return self.current()["bias"] if "bias" in self.names else getattr(self.base, "bias", None)

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding: for code that asks one for them."""
        return int(self.base.num_embeddings)  # type: ignore[arg-type]

    def forward(self, *inputs: object, **named: object) -> object:
        """The base's own forward with the trained values in place."""
        return functional_call(self.base, self.current(), inputs, named)

    def extra_repr(self) -> str:
        return f"trained={list(self.names)}"
