"""Measure the rates of this machine with the program's own ops, in a process of its own: a few seconds, kept in the cache folder.

    python -m halfbyte.plan.calibration '{"hidden": 576, ..., "vocab": 49152, "dtype": "bfloat16"}'

What is timed is what training does: forward and backward of decoder layers of these widths with adapters (and with every weight
trained), attention, the output layer with the loss, packed weights read back, the optimizer's update.  Each is done once to warm up and
then until SECONDS are spent or RUNS done; the median counts.  Processors only: a GPU's rates are not measured yet.
"""

import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from halfbyte import devices
from halfbyte.config.lora import LoraConfig
from halfbyte.data.batches import Batch
from halfbyte.kernels.linear_cross_entropy import linear_cross_entropy
from halfbyte.kernels.packed_attention import packed_attention
from halfbyte.lora.inject import inject
from halfbyte.models.heads import head_of
from halfbyte.models.sample_layers import VOCABULARY, sample_model
from halfbyte.models.structure import fuse
from halfbyte.models.token_loss import token_loss_sum
from halfbyte.optim.adamw import AdamW
from halfbyte.plan.hardware import PROCESSOR
from halfbyte.plan.rates import Curve, Rates, Widths, keep
from halfbyte.plan.speed import RANK
from halfbyte.quant.blockwise import dequantize, quantize

LAYERS, HIGH_RANK = 2, 128
TOKENS, SEGMENT = (64, 256, 1024), 256
HEAD_ROWS, HEAD_ELEMENTS = (64, 512), 64 << 20
UPDATED, TENSORS = 1 << 22, 64
SECONDS, RUNS = 0.5, 5


def timed(work: Callable[[], object]) -> float:
    """Median seconds of `work`, after one run that does not count."""
    work()
    seen: list[float] = []
    while not seen or (sum(seen) < SECONDS and len(seen) < RUNS):
        began = time.perf_counter()
        work()
        seen.append(time.perf_counter() - began)
    return statistics.median(seen)


def _both_ways(forward: Callable[[], Tensor]) -> None:
    """A forward pass and the backward pass of its sum."""
    forward().sum().backward()


def attention_operations(widths: Widths, tokens: int, segment: int) -> float:
    """Operations of one layer's attention, forward and backward."""
    return 3.5 * 2.0 * tokens * segment * widths.queries


def attention_curve(widths: Widths, dtype: torch.dtype) -> Curve:
    """Rate of attention over the length of a sample, at the largest of TOKENS at once."""
    tokens, points = TOKENS[-1], []
    for segment in (64, SEGMENT, tokens):
        q, k, v = (
            torch.randn(tokens, width // widths.head_dim, widths.head_dim).to(dtype).requires_grad_()
            for width in (widths.queries, widths.keys, widths.keys)
        )
        starts = torch.arange(0, tokens + 1, segment, dtype=torch.int32)
        seconds = timed(partial(_both_ways, partial(packed_attention, q, k, v, starts, widths.head_dim**-0.5)))
        points.append((float(segment), attention_operations(widths, tokens, segment) / seconds))
    return Curve(tuple(points))


def layers_of(widths: Widths, dtype: torch.dtype, rank: int) -> nn.Module:
    """Layers on own ops with adapters of a rank; rank 0 trains every weight."""
    model = sample_model(
        hidden=widths.hidden, inner=widths.inner, heads=widths.queries // widths.head_dim, groups=widths.keys // widths.head_dim,
        head_dim=widths.head_dim, layers=LAYERS, dtype=dtype,
    )  # fmt: skip
    if rank:
        inject(model, LoraConfig(rank=rank), seed=0)
    fuse(model)
    return model


def pass_seconds(model: nn.Module, tokens: int) -> float:
    """Seconds of a forward and backward pass over so many tokens, in samples of SEGMENT."""
    head, width = head_of(model), min(tokens, SEGMENT)
    ids = torch.arange(tokens).reshape(-1, width) % VOCABULARY
    batch = Batch(ids, ids, None, None, None, list(range(len(ids))))

    def once() -> None:
        token_loss_sum(model, head, batch)[0].backward()
        model.zero_grad(set_to_none=True)

    return timed(once)


def adapter_elements(widths: Widths, rank: int) -> int:
    """Parameters of one layer's adapters."""
    ends = 2 * (widths.hidden + widths.queries) + 2 * (widths.hidden + widths.keys) + 3 * (widths.hidden + widths.inner)
    return rank * ends


def layer_curve(widths: Widths, dtype: torch.dtype, rank: int, attention: Curve) -> tuple[Curve, list[float]]:
    """Rate of a layer without its attention, over the tokens at once; and the seconds it was made from."""
    model, points, seconds = layers_of(widths, dtype, rank), [], []
    for tokens in TOKENS:
        segment = min(tokens, SEGMENT)
        seconds.append(pass_seconds(model, tokens) / LAYERS)
        aside = attention_operations(widths, tokens, segment) / attention.at(segment)
        operations = tokens * ((4.0 if rank else 6.0) * widths.params + 6.0 * adapter_elements(widths, rank))
        points.append((float(tokens), operations / max(seconds[-1] - aside, 0.1 * seconds[-1])))
    return Curve(tuple(points)), seconds


def adapter_rate(widths: Widths, dtype: torch.dtype, usual: float, layer: Curve) -> float:
    """Rate of what a higher rank adds, from one more measurement at the most tokens."""
    tokens = TOKENS[-1]
    more = pass_seconds(layers_of(widths, dtype, HIGH_RANK), tokens) / LAYERS - usual
    operations = 6.0 * tokens * (adapter_elements(widths, HIGH_RANK) - adapter_elements(widths, RANK))
    fastest = 4 * layer.at(tokens)
    return min(operations / more, fastest) if more > 0 else fastest


def head_curve(hidden: int, vocab: int, dtype: torch.dtype) -> Curve:
    """Rate of the output layer with the loss, over labelled tokens; a vocabulary beyond HEAD_ELEMENTS is cut."""
    vocab = max(1024, min(vocab, HEAD_ELEMENTS // hidden))
    weight, points = torch.randn(vocab, hidden).to(dtype), []
    for rows in HEAD_ROWS:
        states = torch.randn(rows, hidden).to(dtype).requires_grad_()
        labels = torch.arange(rows) % vocab
        seconds = timed(partial(_both_ways, partial(linear_cross_entropy, states, weight, labels)))
        points.append((float(rows), 4.0 * rows * vocab * hidden / seconds))
    return Curve(tuple(points))


def unpack_rate(widths: Widths, dtype: torch.dtype) -> float:
    """Elements of a packed matrix read back in a second."""
    packed, state = quantize(torch.randn(widths.inner, widths.hidden).to(dtype))
    return widths.inner * widths.hidden / timed(lambda: dequantize(packed, state))


def update_rates() -> dict[str, float]:
    """Parameters updated in a second, by kind of state."""
    rates = {}
    kinds = {"float32": (torch.float32, "float32"), "int8": (torch.float32, "int8"), "master": (torch.bfloat16, "float32")}
    for name, (dtype, state) in kinds.items():
        parameters = [nn.Parameter(torch.zeros(UPDATED // TENSORS, dtype=dtype)) for _ in range(TENSORS)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer = AdamW(parameters, lr=1e-3, state=state)
        rates[name] = UPDATED / timed(optimizer.step)
    return rates


def calibrate(widths: Widths, vocab: int, hidden: int, dtype_name: str) -> Rates:
    """All rates for one type; `hidden` is the model's own width, which the head has even where layers are measured at half."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    attention = attention_curve(widths, dtype)
    layer, seconds = layer_curve(widths, dtype, RANK, attention)
    trained, _ = layer_curve(widths, dtype, 0, attention)
    return Rates(
        device=PROCESSOR, date=datetime.date.today().isoformat(), dtype=dtype_name, threads=torch.get_num_threads(), widths=widths,
        layer=layer, trained=trained, adapter=adapter_rate(widths, dtype, seconds[-1], layer), attention=attention,
        head=head_curve(hidden, vocab, dtype), unpack=unpack_rate(widths, dtype), update=update_rates(),
    )  # fmt: skip


def main(text: str) -> None:
    """Measure what the arguments name, and keep it."""
    asked = json.loads(text)
    devices.set_threads(asked["threads"])
    began = time.monotonic()
    rates = calibrate(Widths(**asked["widths"]), asked["vocab"], asked["hidden"], asked["dtype"])
    path = keep(rates)
    print(json.dumps({"seconds": time.monotonic() - began, "kept_in": str(path), "rates": asdict(rates)}))


if __name__ == "__main__":
    main(sys.argv[1])
