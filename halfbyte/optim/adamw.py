"""AdamW over a chosen state storage, with fp32 masters for bf16 parameters.

    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr wd)                      decoupled decay, before the update
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

A bf16 parameter has 8 bits of mantissa, so a step below 1/256 of its value would round to nothing: such parameters are updated in a
float32 master and copied back.  fp16 parameters are refused.  There is one class: 8 bits and paging are choices of the storage, not of the
algorithm.  Source: https://arxiv.org/abs/1711.05101.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.kernels.adamw import adamw_, adamw_int8_
from halfbyte.log import logger
from halfbyte.optim import state_storage
from halfbyte.optim.paged import host_copy, resident


class AdamW(torch.optim.Optimizer):
    """AdamW; `groups` are dicts of params, lr and weight_decay as `param_groups.groups` makes them, or plain parameters.

    state   "float32" or "int8" (blockwise, 256)
    paged   keep the state in host memory between updates; without effect on the CPU, which is logged

    Raises UnsupportedError for fp16 parameters.
    """

    def __init__(
        self, groups: Iterable[Any], *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, state: str = "float32", paged: bool = False,
    ) -> None:
        self.kind, self.paged = state, paged
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        for name, parameter in self.named():
            if parameter.dtype == torch.float16:
                raise UnsupportedError(
                    "fp16 parameters cannot be trained: small gradients and updates are lost in them", code="E-UNSUP-301", place=name,
                    found="float16", expected="float32 or bfloat16", remedy="set model.dtype or lora.dtype to float32",
                    nothing_done="Nothing was trained.",
                )
        if paged and all(parameter.device.type == "cpu" for _, parameter in self.named()):
            logger().info("optim.paged: the optimizer state is in host memory already; paging does nothing on the CPU")

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) of all groups in order; parameters given without names are numbered."""
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"group{number}.{index}" for index in range(len(group["params"]))]
            yield from zip(names, group["params"])

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's state, made at zero when it has none yet."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update(state_storage.new_moments(parameter, self.kind))
            if parameter.dtype != torch.float32 and parameter.dtype != torch.float64:
                state["master"] = parameter.detach().float()
            if self.paged:
                state.update({key: host_copy(value) for key, value in state.items()})
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; what the closure returned, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            plain: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state_of(parameter)
                if self.paged or state_storage.is_int8(state) or "master" in state:
                    with resident(state, parameter.device) as here:
                        self._update_one(parameter, here, group)
                else:
                    plain.append((parameter, parameter.grad, state))
            _update_float32(plain, group)
            # kernels write through pointers: whoever kept a parameter for later (autograd, lazy logits) must be able to see it
            torch.autograd.graph.increment_version([parameter for parameter in group["params"] if parameter.grad is not None])
        return loss

    def allocate(self) -> None:
        """Make all state now, so that a lack of memory shows before the first update and not in its middle."""
        for _, parameter in self.named():
            self.state_of(parameter)

    def _update_one(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        if "master" not in state and not state_storage.is_int8(state):
            _update_float32([(parameter, parameter.grad, state)], group)
            return
        values = state.get("master", parameter)
        state["step"] += 1
        rest = group["lr"], *group["betas"], group["eps"], group["weight_decay"], int(state["step"])
        if state_storage.is_int8(state):
            adamw_int8_(values, parameter.grad, *state_storage.int8_moments(state), *rest)
        else:
            adamw_(values, parameter.grad, state["m"], state["v"], *rest)
        if values is not parameter:
            parameter.copy_(values)

    def state_tensors(self) -> dict[str, Tensor]:
        """All state as one flat dict "<parameter name>.<part>" -> tensor, where it lives; parameters without state are left out."""
        if self.paged and torch.cuda.is_available():
            torch.cuda.synchronize()
        return {f"{name}.{part}": value for name, p in self.named() if p in self.state for part, value in self.state[p].items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave; raises CheckpointError when names, shapes or dtypes do not agree with the parameters."""
        left = dict(tensors)
        for name, parameter in self.named():
            if f"{name}.step" not in left:
                self.state.pop(parameter, None)
                continue
            self.state[parameter] = {}
            for part, value in self.state_of(parameter).items():
                stored = left.pop(f"{name}.{part}", None)
                if stored is None or stored.shape != value.shape or stored.dtype != value.dtype:
                    found = "nothing" if stored is None else f"{stored.dtype} {tuple(stored.shape)}"
                    raise CheckpointError(
                        "the optimizer state must fit the parameters", code="E-CKPT-301", place=f"{name}.{part}", found=found,
                        expected=f"{value.dtype} {tuple(value.shape)}", remedy="resume with the settings the run was started with",
                    )
                value.copy_(stored)
        if left:
            raise CheckpointError(
                "every optimizer tensor must belong to a parameter", code="E-CKPT-302", place=next(iter(left)),
                found=f"{len(left)} tensors without a parameter", expected="the parameters of this run",
                remedy="resume with the settings the run was started with",
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`; tensors keep their dtype (the inherited method would cast 32-bit moments to a bf16 parameter's type)."""
        ordered = [parameter for group in self.param_groups for parameter in group["params"]]
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})
        for index, saved_state in state_dict["state"].items():
            self.state[ordered[index]] = {}
            state = self.state_of(ordered[index])
            for part, value in saved_state.items():
                state[part].copy_(value)


def _update_float32(members: list[tuple[Tensor, Tensor, dict[str, Tensor]]], group: dict[str, Any]) -> None:
    """PyTorch's fused AdamW: one pass over memory instead of about ten.

    It counts the step on the parameters' device; ours is counted on the CPU, where reading it waits for no device.  Parameters that have
    taken equally many steps are updated together: their count goes to the device as a number, written there once.
    """
    beta1, beta2 = group["betas"]
    together: dict[tuple[torch.device, float], list[tuple[Tensor, Tensor, dict[str, Tensor]]]] = {}
    for member in members:
        together.setdefault((member[0].device, member[2]["step"].item()), []).append(member)
    for (device, count), some in together.items():
        steps = torch.full((len(some),), count, dtype=torch.float32, device=device)
        adamw(
            [values for values, _, _ in some], [gradient for _, gradient, _ in some], [state["m"] for _, _, state in some],
            [state["v"] for _, _, state in some], [], list(steps.unbind()), fused=True, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )
        for _, _, state in some:
            state["step"] += 1
