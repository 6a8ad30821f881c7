"""Logits that are computed when somebody looks at them.

    model(input_ids, labels=...).loss         in training: no logits are made, the loss comes from kernels/linear_cross_entropy
    outputs.logits.argmax(-1)                 the logits, made then

In training the output layer answers with hidden states and weight instead of their product.  What transformers' own loss does with
logits (cast, view, scale, soft-cap, cross entropy) is noted or answered; any other use of them makes them.  So a plain loop,
transformers.Trainer and whoever reads `outputs.logits` work as before, and the usual case holds no (tokens, vocabulary) tensor.
What is made is kept, so that what somebody writes into the logits, or into a part of them, is there for the next reader.  They have their
own place in the graph: a gradient that comes back to them by way of a foreign autograd function reaches hidden states and weight.
They are the logits of the weight that was there when they were promised; where an optimizer has moved it since, they are refused.

The output layer is taken over like a decoder layer: an instance of a subclass of its own class with the same parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte import surgery
from halfbyte.errors import UnsupportedError
from halfbyte.kernels.gemv import gemv
from halfbyte.kernels.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class _Settings:
    """What stands between the product and the logits; `bent`: the tanh has been taken, the factor behind it not yet."""

    shape: torch.Size
    dtype: torch.dtype
    scale: float = 1.0
    softcap: float | None = None
    bent: bool = False

    def of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The logits, differentiable."""
        logits = F.linear(hidden, weight, bias).to(self.dtype).reshape(self.shape)
        logits = logits if self.scale == 1.0 else logits * self.scale
        if self.bent:
            return torch.tanh(logits)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class _Promise(torch.autograd.Function):
    """The place of lazy logits in the graph: a gradient of logits that comes here is carried on, through logits made for it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
        ctx.parts, ctx.settings, ctx.state = (hidden, weight, bias), settings, _state(weight)
        made: Any = torch.Tensor._make_wrapper_subclass(LazyLogits, settings.shape, dtype=settings.dtype, device=hidden.device)
        return made

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        _require_unmoved(ctx.parts[1], ctx.state)
        needed = ctx.needs_input_grad[:3]
        leaves = [part if part is None else part.detach().requires_grad_(need) for part, need in zip(ctx.parts, needed)]
        asked = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        with torch.enable_grad():
            logits = ctx.settings.of(*leaves)
        found = iter(torch.autograd.grad(logits, asked, upstream[0]))
        return *(next(found) if need else None for need in needed), None


class LazyLogits(Tensor):
    """softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), not computed yet; (..., V) like the logits it stands for."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: _Settings
    state: tuple[int, int]
    source: "LazyLogits | None"
    held: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> "LazyLogits":
        """hidden (..., H), weight (V, H), bias (V,)."""
        made: Any = _Promise.apply(hidden, weight, bias, settings)
        made.hidden, made.weight, made.bias, made.settings, made.state = hidden, weight, bias, settings, _state(weight)
        made.source = made.held = None
        return made

    def with_(self, **changes: Any) -> "LazyLogits":
        """The same with other settings."""
        settings = replace(self.settings, **changes)
        made = LazyLogits.of(self.hidden, self.weight, self.bias, settings)
        made.state, made.source = self.state, self if settings == replace(self.settings, shape=settings.shape) else None  # or a view of it
        return made

    def kept(self) -> Tensor | None:
        """The logits where they, or those they are a view of, have been made."""
        whole = None if self.held is not None or self.source is None else self.source.kept()
        return self.held if whole is None else whole.view(self.settings.shape)

    def made(self) -> Tensor:
        """The logits, differentiable; made once, from then on every use is of this tensor."""
        kept = self.kept()
        if kept is None:
            _require_unmoved(self.weight, self.state)
            with torch.enable_grad():
                if self.source is None:
                    kept = self.held = self.settings.of(self.hidden, self.weight, self.bias)
                else:
                    kept = self.held = self.source.made().view(self.settings.shape)
        return kept

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        named, name = kwargs or {}, getattr(function, "__name__", "")
        lazy = args[0] if args and isinstance(args[0], LazyLogits) else None
        if lazy is not None and lazy.kept() is None:
            read = getattr(getattr(function, "__self__", None), "__name__", "") if name == "__get__" else ""
            if name in _SIZES or (read and read not in ("data", "grad")):  # shape, dtype, device, requires_grad ...
                with torch._C.DisableTorchFunctionSubclass():
                    return function(*args, **named)
            answer = _answer(function, args, named)
            if answer is not None:
                return answer
        return function(*_real(args), **_real(named))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return function(*_real(args), **_real(kwargs or {}))


def _state(weight: Tensor) -> tuple[int, int]:
    """Changes when the weight is written into, and when it is given other memory."""
    return weight._version, weight.data_ptr()


def _require_unmoved(weight: Tensor, state: tuple[int, int]) -> None:
    if _state(weight) != state:
        raise UnsupportedError(
            "logits of training are made when they are looked at, with the weight of the output layer that gave them", code="E-UNSUP-062",
            place="outputs.logits", found="the weight was changed after the forward pass", expected="the same weight",
            remedy="look at the logits before optimizer.step(), or call the model again",
        )


# what asks for sizes and kinds alone
_SIZES = {"size", "dim", "ndimension", "numel", "nelement", "element_size", "__len__", "is_floating_point", "is_complex", "get_device"}


def _real(value: Any) -> Any:
    """Every lazy tensor in a structure of arguments, made."""
    if isinstance(value, LazyLogits):
        return value.made()
    if isinstance(value, (tuple, list)):
        return type(value)(_real(item) for item in value)
    return {key: _real(item) for key, item in value.items()} if isinstance(value, dict) else value


def _answer(function: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What stays lazy, and the loss; None for everything else, and where nothing is recorded, as inside a foreign autograd function."""
    lazy = args[0]
    if not torch.is_grad_enabled():
        return None
    settings: _Settings = lazy.settings
    if function is Tensor.float and settings.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return lazy.with_(dtype=torch.float32)
    if function in (Tensor.view, Tensor.reshape) and not named and all(isinstance(size, int) for size in args[1:]):
        sizes, vocabulary = args[1:], settings.shape[-1]
        if len(sizes) == 2 and sizes[1] == vocabulary and sizes[0] in (-1, settings.shape.numel() // vocabulary):
            return lazy.with_(shape=torch.Size([settings.shape.numel() // vocabulary, vocabulary]))
    if function in (Tensor.mul, Tensor.__mul__, Tensor.div, Tensor.__truediv__, torch.mul, torch.div) and len(args) == 2 and not named:
        return _times(lazy, args[1], function in (Tensor.div, Tensor.__truediv__, torch.div))
    if function in (torch.tanh, Tensor.tanh) and not settings.bent and settings.softcap is None:
        return lazy.with_(bent=True)
    if function is F.cross_entropy:
        return _loss(*args, **named)
    return None


def _times(lazy: LazyLogits, factor: Any, divided: bool) -> LazyLogits | None:
    settings = lazy.settings
    if not isinstance(factor, (int, float)) or settings.softcap is not None or not factor:
        return None
    if not settings.bent:
        return lazy.with_(scale=settings.scale / factor if divided else settings.scale * factor)
    if divided:
        return None
    return lazy.with_(bent=False, softcap=float(factor), scale=settings.scale * factor)


def _loss(
    lazy: LazyLogits, labels: Tensor, weight: Any = None, size_average: Any = None, ignore_index: int = -100, reduce: Any = None,
    reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor | None:  # fmt: skip
    """F.cross_entropy of lazy logits (N, V); None where it is asked for something the fused loss does not do."""
    if weight is not None or size_average is not None or reduce is not None or label_smoothing or reduction not in ("mean", "sum"):
        return None
    settings = lazy.settings
    if ignore_index != -100 or settings.bent or len(settings.shape) != 2 or labels.ndim != 1 or labels.is_floating_point():
        return None
    _require_unmoved(lazy.weight, lazy.state)
    hidden = lazy.hidden.reshape(-1, lazy.hidden.shape[-1])
    total = linear_cross_entropy(hidden, lazy.weight, labels, bias=lazy.bias, softcap=settings.softcap, scale=settings.scale)
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


class LazyHead:
    """The forward of an output layer in training; `class_for` joins it with the layer's own class."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., V), lazily where gradients are recorded in training mode; of one token at the speed of reading the weight."""
        if self.training and torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):  # type: ignore[attr-defined]
            weight: Tensor = self.weight  # type: ignore[attr-defined]
            settings = _Settings(torch.Size([*x.shape[:-1], weight.shape[0]]), x.dtype)
            return LazyLogits.of(x, weight, self.bias, settings)  # type: ignore[attr-defined]
        if x.numel() == x.shape[-1] and x.device.type == "cpu" and not torch.is_grad_enabled():
            return gemv(x, self.weight, self.bias)  # type: ignore[attr-defined]
        return super().forward(x)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """How it is copied and sent to another process, where its class is made again."""
        return empty, (type(self).__mro__[2],), self.__dict__


@cache
def class_for(original: Any) -> Any:
    """The subclass of an output layer's class that answers lazily."""
    return type(original.__name__, (LazyHead, original), {"__module__": __name__})  # by name it is found as the one it stands for


def empty(original: Any) -> Any:
    """An instance of the subclass without anything in it."""
    kind = class_for(original)
    return kind.__new__(kind)


def make_lazy(model: Any) -> bool:
    """Let the output layer of a language model answer lazily; False where it is not a plain dense linear layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, LazyHead):
        return True
    if type(head) is not nn.Linear:
        return False
    name = next(name for name, module in model.named_modules() if module is head)
    lazy = empty(type(head))
    lazy.__dict__.update(head.__dict__)
    surgery.replace(model, name, lazy)
    return True
