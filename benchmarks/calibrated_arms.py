"""What bench_calibrated compares: the texts, the rotated basis, and each way to make a 4-bit model.

prose   pydoc_data.topics, the language reference that Python carries as text; even topics calibrate, odd ones are held out
code    modules of Python's standard library
gsm8k   word problems with their solutions; the train file calibrates, the test file is held out

An arm is a dict: layer name -> (packed weight, state, low-rank product or None), put into the same dense model in turn.
"""

import importlib
import inspect
import json
import pydoc_data.topics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from halfbyte.calibrate.layer import Update, calibrate_layer, start_on
from halfbyte.calibrate.low_rank import leading
from halfbyte.calibrate.moments import collect
from halfbyte.config.quant import QuantConfig
from halfbyte.lora.init import leading_factors
from halfbyte.models.quantizer import layers_to_quantize
from halfbyte.quant import blockwise
from halfbyte.quant.dense import dense_weight
from halfbyte.surgery import replace

LENGTH, CALIBRATION_ROWS, HELD_OUT_ROWS, RANK, LOFTQ_ROUNDS = 256, 20, 12, 16, 2
CODE = ("argparse", "heapq", "csv", "textwrap", "calendar", "fractions", "difflib", "shlex", "statistics", "tarfile")
NF4 = QuantConfig(format="nf4")
Made = tuple[Tensor, Any, Tensor | None]
Arm = dict[str, Made]


def texts(name: str, part: str) -> str:
    """The text of a domain; `part` is "calibration" or "held out"."""
    if name == "prose":
        topics = sorted(pydoc_data.topics.topics)
        return "\n\n".join(pydoc_data.topics.topics[topic].strip() for topic in topics[0 if part == "calibration" else 1 :: 2])
    if name == "code":
        return "\n\n".join(inspect.getsource(importlib.import_module(module)) for module in CODE)
    file = record.SHARED / name / ("train.jsonl" if part == "calibration" else "test.jsonl")
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    return "\n\n".join("\n".join(message["content"] for message in row["messages"]) for row in rows[:1500])


def rows_of(tokenizer: Any, name: str, part: str, count: int, seed: int = 0) -> list[list[int]]:
    """`count` pieces of LENGTH tokens, none twice, drawn with the seed."""
    ids = tokenizer(texts(name, part), add_special_tokens=False).input_ids
    pieces = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pieces[number] for number in order[:count]]


@torch.no_grad()
def rotate(model: Any, seed: int) -> None:
    """The same function in another basis: norm gains folded into the layers after them, the residual stream turned by a random Q.

    For layers of the Llama kind.  The output head is parted from the embedding.
    """
    backbone, width = model.model, model.config.hidden_size
    q, r = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    turn = (q * r.diagonal().sign()).float()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False

    def reads(linear: nn.Linear, norm: nn.Module) -> None:
        linear.weight.copy_(linear.weight * norm.weight @ turn)

    def writes(linear: nn.Linear) -> None:
        linear.weight.copy_(turn.T @ linear.weight)

    for layer in backbone.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            reads(part, layer.input_layernorm)
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            reads(part, layer.post_attention_layernorm)
        writes(layer.self_attn.o_proj)
        writes(layer.mlp.down_proj)
        layer.input_layernorm.weight.fill_(1)
        layer.post_attention_layernorm.weight.fill_(1)
    reads(model.lm_head, backbone.norm)
    backbone.norm.weight.fill_(1)
    backbone.embed_tokens.weight.copy_(backbone.embed_tokens.weight @ turn)


def weights_of(model: Any) -> dict[str, Tensor]:
    """name -> dense weight of each layer that is packed."""
    return {name: dense_weight(model.get_submodule(name)) for name in layers_to_quantize(model)}


def plain(weights: Mapping[str, Tensor]) -> Arm:
    """NF4 with double quantization."""
    return {name: (*blockwise.quantize(weight), None) for name, weight in weights.items()}


def loftq(weights: Mapping[str, Tensor]) -> Arm:
    """LoftQ: quantize and factor the rest of the weight, in LOFTQ_ROUNDS turns."""
    made: Arm = {}
    for name, weight in weights.items():
        product = torch.zeros_like(weight)
        for _ in range(LOFTQ_ROUNDS):
            packed, state = blockwise.quantize(weight - product)
            u, s, vh = leading(weight - blockwise.dequantize(packed, state), RANK, torch.Generator().manual_seed(0))
            product = (u * s) @ vh
        made[name] = (packed, state, product)
    return made


def qpissa(weights: Mapping[str, Tensor]) -> Arm:
    """QPiSSA: the leading directions of the weight are the adapter, what is left is quantized."""
    made: Arm = {}
    for name, weight in weights.items():
        lora_b, lora_a = leading_factors(weight, RANK, name)
        made[name] = (*blockwise.quantize(weight - lora_b @ lora_a), lora_b @ lora_a)
    return made


def calibrated(model: Any, weights: Mapping[str, Tensor], rows: Sequence[Sequence[int]], seed: int) -> dict[str, Arm]:
    """Three arms from one collection of moments: the scales alone, the low-rank start alone, both."""
    arms: dict[str, Arm] = {"scales": {}, "start": {}, "scales and start": {}}
    update = Update(RANK, 1.0)
    for group in collect(model, list(weights), rows):
        for name, seen in group.items():
            both = calibrate_layer(name, weights[name], seen, NF4, update, seed)
            packed, state = blockwise.quantize(weights[name])
            alone, _ = start_on(weights[name] - blockwise.dequantize(packed, state), seen, update, torch.Generator().manual_seed(seed))
            arms["scales"][name] = (both.packed, both.state, None)
            arms["start"][name] = (packed, state, product(alone))
            arms["scales and start"][name] = (both.packed, both.state, product(both.factors))
    return arms


def product(factors: tuple[Tensor, Tensor] | None) -> Tensor | None:
    return None if factors is None else factors[1] @ factors[0]


@contextmanager
def put_in(model: Any, arm: Arm) -> Iterator[None]:
    """The model with the arm's layers inside the block, the dense ones afterwards."""
    dense = {name: model.get_submodule(name) for name in arm}
    try:
        for name, (packed, state, added) in arm.items():
            weight = blockwise.dequantize(packed, state)
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight if added is None else weight + added, requires_grad=False)
            replace(model, name, layer)
        yield
    finally:
        for name, layer in dense.items():
            replace(model, name, layer)


@torch.inference_mode()
def states_of(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The last hidden states (T, H) of each row."""
    return [model.base_model(input_ids=torch.tensor([list(row)]), use_cache=False).last_hidden_state[0] for row in rows]


@torch.inference_mode()
def compare(model: Any, rows: Sequence[Sequence[int]], reference: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    """Mean KL(reference || found) over all positions in nats, and perplexity over those that predict a token of the row."""
    kl, nll, positions, scored = 0.0, 0.0, 0, 0
    for row, old, new in zip(rows, reference, found, strict=True):
        wanted, given = (torch.log_softmax(model.lm_head(states).float(), dim=-1) for states in (old, new))
        kl += float((wanted.exp() * (wanted - given)).sum(dtype=torch.float64))
        nll -= float(given[:-1].gather(1, torch.tensor(list(row[1:]))[:, None]).sum(dtype=torch.float64))
        positions, scored = positions + len(row), scored + len(row) - 1
    return {"kl_nats": kl / positions, "perplexity": float(torch.tensor(nll / scored).exp()), "positions": positions}


ONCE: dict[str, Callable[[Mapping[str, Tensor]], Arm]] = {"nf4": plain, "loftq": loftq, "qpissa": qpissa}
"""Arms that read no text."""
