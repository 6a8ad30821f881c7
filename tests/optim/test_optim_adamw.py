"""AdamW against torch.optim.AdamW and bitsandbytes.optim.AdamW8bit, and what it does with bf16, fp16, paging and its own state."""

import logging
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.log import logger
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.paged import resident
from halfbyte.optim.state_storage import int8_moments, new_moments


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, nn.Parameter]:
    start = torch.randn(*shape) * 0.02
    return nn.Parameter(start.to(dtype)), nn.Parameter(start.clone())


def train(parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer], steps: int, scale: float = 1.0) -> None:
    for _ in range(steps):
        gradient = torch.randn(parameters[0].shape) * scale
        for parameter in parameters:
            parameter.grad = gradient.to(parameter.dtype).clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1,), (7, 13), (100, 100)])
def test_float32_state_equals_torch(shape: tuple[int, ...], weight_decay: float) -> None:
    ours, theirs = pair(*shape)
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    train([ours, theirs], [AdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)], 50)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-8)


def test_int8_state_is_close_to_bitsandbytes_and_to_float32() -> None:
    """The three walks stay together; 8 bits cost about as much as they cost in bitsandbytes."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    start = torch.randn(96, 128) * 0.02
    ours, theirs, exact = (nn.Parameter(start.clone()) for _ in range(3))
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    eight_bit = [AdamW([ours], state="int8", **settings), bitsandbytes.optim.AdamW8bit([theirs], **settings)]
    train([ours, theirs, exact], [*eight_bit, torch.optim.AdamW([exact], **settings)], 30)
    walked = (exact - start).norm()
    ours_off, theirs_off = (ours - exact).norm() / walked, (theirs - exact).norm() / walked
    assert 0 < ours_off < 0.05
    assert ours_off < 1.5 * theirs_off
    assert (ours - theirs).norm() / walked < 0.05


def test_int8_state_takes_two_bytes_a_parameter_and_small_tensors_stay_exact() -> None:
    large, small = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(4095))
    optimizer = AdamW([("large", large), ("small", small)], state="int8")
    optimizer.allocate()
    state = optimizer.state_tensors()
    assert sum(value.nbytes for name, value in state.items() if name.startswith("large.")) == 2 * 4096 + 2 * 4 * 16 + 4
    assert {state["small.m"].dtype, state["small.v"].dtype} == {torch.float32}


def test_int8_second_moment_above_zero_is_never_stored_as_zero() -> None:
    """One huge gradient and many tiny ones in a block, then silence: the tiny ones must not move by 1 / eps."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = AdamW([parameter], lr=1e-3, state="int8")
    gradient = torch.full((64, 64), 1e-4)
    gradient.view(-1)[::256] = 1.0
    for scale in (1.0, 0.0, 0.0):
        parameter.grad = gradient * scale
        optimizer.step()
    assert parameter.abs().max() < 0.01


def test_int8_update_covers_every_chunk_and_odd_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked or at once, the update is the same to the bit."""
    start = torch.randn(3, 2777)
    walks = []
    monkeypatch.setenv("HALFBYTE_KERNELS", "reference")
    for chunk in (256, 1 << 22):
        monkeypatch.setattr("halfbyte.kernels.adamw.reference.CHUNK", chunk)
        torch.manual_seed(3)
        parameter = nn.Parameter(start.clone())
        train([parameter], [AdamW([parameter], lr=1e-2, state="int8")], 5)
        walks.append(parameter.detach().clone())
    assert torch.equal(*walks)
    assert (walks[0] != start).all()


def test_int8_updates_a_transposed_parameter() -> None:
    plain = nn.Parameter(torch.randn(80, 60))
    turned = nn.Parameter(plain.detach().t().contiguous().t())
    assert not turned.is_contiguous()
    train([plain, turned], [AdamW([plain], state="int8"), AdamW([turned], state="int8")], 3)
    torch.testing.assert_close(plain, turned)


@pytest.mark.parametrize("state", ["float32", "int8"])
def test_bf16_parameters_keep_float32_masters(state: str) -> None:
    """T38: a rate of 2e-5 moves a bf16 weight of 0.02, whose own steps are 1.2e-4 apart."""
    bf16 = nn.Parameter(torch.full((64, 64), 0.02, dtype=torch.bfloat16))
    exact = nn.Parameter(torch.full((64, 64), 0.02, dtype=torch.bfloat16).float())
    optimizers = [AdamW([bf16], lr=2e-5, weight_decay=0.1, state=state), AdamW([exact], lr=2e-5, weight_decay=0.1, state=state)]
    for _ in range(100):
        bf16.grad, exact.grad = torch.ones_like(bf16), torch.ones_like(exact)
        for optimizer in optimizers:
            optimizer.step()
    assert exact.max() < 0.0185
    assert torch.equal(bf16, exact.to(torch.bfloat16))


def test_weight_decay_alone_moves_bf16_parameters() -> None:
    """T38: decay by lr * wd = 2e-6 a step is below bf16's resolution and must not be lost."""
    parameter = nn.Parameter(torch.full((8, 8), 1.0, dtype=torch.bfloat16))
    optimizer = AdamW([parameter], lr=1e-2, weight_decay=0.1)
    for _ in range(20):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert torch.equal(parameter, torch.full((8, 8), (1 - 1e-3) ** 20).to(torch.bfloat16))


def test_fp16_parameters_are_refused() -> None:
    """T37."""
    with pytest.raises(UnsupportedError) as caught:
        AdamW([("layer.lora_a", nn.Parameter(torch.zeros(4, 4, dtype=torch.float16)))])
    assert caught.value.code == "E-UNSUP-301"
    assert caught.value.place == "layer.lora_a"


def test_float64_parameters_are_updated_in_float64() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 20, dtype=torch.float64)) for _ in range(2))
    for parameter, optimizer in ((ours, AdamW([ours])), (theirs, torch.optim.AdamW([theirs], weight_decay=0.0))):
        for step in range(5):
            parameter.grad = torch.cos(torch.arange(20, dtype=torch.float64) + step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_a_closure_is_run_with_gradients_and_its_loss_returned() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter], lr=0.5)

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 3.0
    assert optimizer.step() is None and bool((parameter < 1).all())


def test_decay_is_decoupled_with_either_state() -> None:
    """T43: without a gradient a weight shrinks by exactly lr * wd, whatever keeps the moments."""
    for state in ("float32", "int8"):
        parameter = nn.Parameter(torch.ones(64, 64))
        optimizer = AdamW([parameter], lr=1e-2, weight_decay=0.1, state=state)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), torch.full((64, 64), 1 - 1e-3), rtol=1e-7, atol=0)


def test_betas_and_eps_have_an_effect() -> None:
    """T44: each option changes the walk."""
    ends = []
    for settings in ({}, {"betas": (0.5, 0.999)}, {"betas": (0.9, 0.9)}, {"eps": 1e-2}, {"weight_decay": 0.5}, {"state": "int8"}):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.ones(64, 64))
        train([parameter], [AdamW([parameter], lr=1e-2, **settings)], 5)
        ends.append(parameter.detach().clone())
    assert all(not torch.equal(ends[i], ends[j]) for i in range(len(ends)) for j in range(i))


def test_paged_says_what_it_does_on_the_cpu(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """T44: the option is not silently ignored, and the numbers are the same."""
    monkeypatch.setattr(logger(), "propagate", True)
    paged, plain = pair(64, 64)
    with caplog.at_level(logging.INFO, logger="halfbyte"):
        optimizer = AdamW([paged], paged=True)
    assert "paging does nothing on the CPU" in caplog.text
    train([paged, plain], [optimizer, AdamW([plain])], 3)
    assert torch.equal(paged, plain)


def test_paged_state_visits_the_device_and_comes_back() -> None:
    """The visit itself, with the meta device standing in for an accelerator's absence of host memory."""
    state = {"m": torch.ones(3), "step": torch.zeros(())}
    with resident(state, torch.device("cpu")) as here:
        assert here is state
    with resident(state, torch.device("meta")) as here:
        assert here["m"].device.type == "meta"
        assert here["step"] is state["step"]
        here["m"] = torch.full((3,), 5.0)
    assert torch.equal(state["m"], torch.full((3,), 5.0))


@pytest.mark.parametrize("state", ["float32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["tensors", "state_dict"])
def test_restored_state_goes_on_to_the_bit(state: str, dtype: torch.dtype, way: str) -> None:
    """T70: step counts, moments and masters come back whole."""
    first, _ = pair(96, 64, dtype=dtype)
    optimizer = AdamW([("w", first)], lr=1e-3, state=state)
    train([first], [optimizer], 4)
    second = nn.Parameter(first.detach().clone())
    resumed = AdamW([("w", second)], lr=1e-3, state=state)
    if way == "tensors":
        resumed.load_state_tensors({name: value.clone() for name, value in optimizer.state_tensors().items()})
    else:
        resumed.load_state_dict(optimizer.state_dict())
    train([first, second], [optimizer, resumed], 4)
    assert torch.equal(first, second)
    assert all(torch.equal(value, resumed.state_tensors()[name]) for name, value in optimizer.state_tensors().items())


def test_state_of_other_parameters_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(4, 4))
    optimizer = AdamW([("w", parameter)])
    optimizer.allocate()
    good = optimizer.state_tensors()
    for broken, code in (
        ({**good, "w.m": torch.zeros(4, 5)}, "E-CKPT-301"), ({name: value for name, value in good.items() if name != "w.v"}, "E-CKPT-301"),
        ({**good, "other.m": torch.zeros(2)}, "E-CKPT-302"), ({**good, "w.v": good["w.v"].bfloat16()}, "E-CKPT-301"),
    ):
        with pytest.raises(CheckpointError) as caught:
            AdamW([("w", nn.Parameter(torch.zeros(4, 4)))]).load_state_tensors(broken)
        assert caught.value.code == code


class Seen(TorchDispatchMode):
    """Counts the operations of PyTorch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_the_step_goes_to_the_device_as_one_number_for_all_that_share_it() -> None:
    """A copy of a CPU tensor per parameter would wait for the device each time.  A parameter without a gradient falls one step behind."""
    pairs = [pair(3, 4) for _ in range(5)]
    ours, theirs = (list(side) for side in zip(*pairs))
    optimizers = AdamW(ours), torch.optim.AdamW(theirs, weight_decay=0.0)
    for step in range(3):
        for number, both in enumerate(pairs):
            gradient = torch.randn(3, 4)
            for parameter in both:
                parameter.grad = None if number == 4 and step == 0 else gradient.clone()
        with Seen() as seen:
            optimizers[0].step()
        optimizers[1].step()
        assert seen.count["aten.full.default"] == (1 if step == 0 else 2)
        assert not seen.count["aten._to_copy.default"] and not seen.count["aten.clone.default"]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=5e-8)
    assert [int(optimizers[0].state[parameter]["step"]) for parameter in ours] == [3, 3, 3, 3, 2]


def test_codebooks_are_copied_to_a_device_once() -> None:
    books = []
    for _ in range(2):
        state = new_moments(torch.empty(64, 64, device="meta"), "int8")
        books.append(int8_moments(state)[4:])
    assert books[0][0] is books[1][0] and books[0][1] is books[1][1] and books[0][0].is_meta
