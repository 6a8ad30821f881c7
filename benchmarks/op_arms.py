"""What benchmarks/bench_ops.py times: one function per op and side, each giving a run, the bytes and floating-point operations it needs,
and a check of its result that the sides can be compared by.

bytes   what must cross the memory bus once: inputs read, outputs written
flops   of the matrix products
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCKS = 1 / 64 + 4 / 64 / 256  # bytes of double-quantized scales per element


@dataclass(frozen=True)
class Arm:
    """`run` does it once; `check` tells about the result what must agree between the sides: exact text, or numbers within a tolerance."""

    run: Callable[[], object]
    bytes: float
    flops: float
    check: Callable[[], object]


def digest(tensor: Tensor) -> str:
    """Of every bit."""
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def sample(tensor: Tensor) -> list[float]:
    """64 values spread over the tensor, and its norm."""
    flat = tensor.detach().float().reshape(-1)
    return [*flat[:: max(1, flat.numel() // 64)][:64].tolist(), float(flat.norm())]


# ---- dequantize


def _packed_by_bitsandbytes(case: dict[str, Any]) -> tuple[Tensor, Any]:
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    return bnb.quantize_4bit(torch.randn(case["shape"]).to(torch.bfloat16), quant_type="nf4", compress_statistics=True)


def dequantize(side: str, case: dict[str, Any]) -> Arm:
    """NF4 with double quantization to bfloat16.  `halfbyte` writes into a buffer that is there, as its linear layer does;
    `halfbyte-new` makes a tensor each time, as bitsandbytes always does; `copy` moves the same number of bytes."""
    rows, columns = case["shape"]
    count = rows * columns
    moved = count * (0.5 + BLOCKS + 2)
    if side == "copy":
        source, target = (torch.ones(int(moved / 2), dtype=torch.uint8) for _ in range(2))
        return Arm(lambda: target.copy_(source), moved, 0, lambda: "")
    packed, state = _packed_by_bitsandbytes(case)
    if side == "bitsandbytes":
        import bitsandbytes.functional as bnb

        def theirs() -> Tensor:
            return bnb.dequantize_4bit(packed, state)

        return Arm(theirs, moved, 0, lambda: digest(theirs()))
    from halfbyte.kernels.dequantize_blockwise import dequantize_blockwise, dequantize_into

    arguments = (packed.view(-1), state.absmax, state.code, 64)
    nested = (state.state2.absmax, state.state2.code, state.offset)
    out = torch.empty((rows, columns), dtype=torch.bfloat16)

    def ours() -> Tensor:
        if side == "halfbyte-new":
            return dequantize_blockwise(*arguments, count, torch.bfloat16, nested).view(rows, columns)
        return dequantize_into(out, *arguments, nested)

    return Arm(ours, moved, 0, lambda: digest(ours()))


# ---- a frozen linear layer, forward and backward to its input


def linear4bit(side: str, case: dict[str, Any]) -> Arm:
    """x (T, I) -> y (T, O) -> dx; `gemm` is the two matrix products alone."""
    tokens, inner, outer = case["shape"]
    torch.manual_seed(0)
    dense = torch.nn.Linear(inner, outer, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x, dy = torch.randn(tokens, inner).to(torch.bfloat16), torch.randn(tokens, outer).to(torch.bfloat16)
    flops = 4.0 * tokens * inner * outer
    if side == "gemm":
        y, dx = torch.empty(tokens, outer, dtype=torch.bfloat16), torch.empty(tokens, inner, dtype=torch.bfloat16)
        weight = dense.weight
        return Arm(lambda: (torch.mm(x, weight.T, out=y), torch.mm(dy, weight, out=dx)), 0, flops, lambda: sample(dx))
    layer = {"bf16": lambda: dense, "halfbyte": lambda: _ours(dense), "bitsandbytes": lambda: _theirs(dense)}[side]()
    x.requires_grad_()

    def run() -> Tensor:
        return torch.autograd.grad(layer(x), x, dy)[0]

    return Arm(run, 0, flops, lambda: sample(run()))


def _ours(dense: torch.nn.Linear) -> torch.nn.Module:
    from halfbyte.quant.linear import QuantLinear

    return QuantLinear.from_linear(dense)


def _theirs(dense: torch.nn.Linear) -> torch.nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, False, torch.bfloat16, compress_statistics=True, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(dense.weight.data.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4")
    return layer.to("cpu")


# ---- one token at a time

DECODE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
PROMPT = 32


def make_decode_model(folder: Path, case: dict[str, Any]) -> None:
    """Write the random model, once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{**DECODE, **case.get("model", {})}, dtype="bfloat16")
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(previous)


def decode(side: str, case: dict[str, Any]) -> Arm:
    """One token behind a prompt of 32, keys and values kept; the whole model, output head in 16 bit (32 for fp32) on every side."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

    folder = Path(case["folder"])
    model: Any
    if side == "halfbyte":
        from halfbyte.config.quant import QuantConfig
        from halfbyte.models.load import load_model
        from halfbyte.models.source import Source

        model = load_model(Source("folder", folder, str(folder), ""), dtype="bfloat16", quant=QuantConfig(format="nf4"))
    elif side == "bitsandbytes":
        packing = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=packing, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[side])
    if side == "halfbyte":
        from halfbyte.models.lazy_logits import make_lazy
        from halfbyte.models.structure import fuse

        fuse(model)
        make_lazy(model)
    model.eval()
    ids = torch.arange(3, 3 + PROMPT)[None]
    cache, token = DynamicCache(config=model.config), torch.tensor([[7]])
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    held = sum(tensor.nbytes for tensor in {one.data_ptr(): one for one in [*model.parameters(), *model.buffers()]}.values())
    embedding = model.get_input_embeddings().weight.nbytes

    @torch.no_grad()
    def run() -> Tensor:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)  # the token just read
        return logits[0, -1]

    return Arm(run, held - embedding, 0, lambda: sample(run()))


# ---- output head and loss


def head(side: str, case: dict[str, Any]) -> Arm:
    """Loss of all tokens and its gradient to the hidden states, the head frozen; `gemm` is the two matrix products alone."""
    tokens, hidden, vocabulary = case["shape"]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[case["dtype"]]
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, hidden).to(dtype), (torch.randn(vocabulary, hidden) * hidden**-0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,))
    flops = 4.0 * tokens * hidden * vocabulary
    if side == "gemm":
        rows = min(tokens, 256)
        z, dx = torch.empty(rows, vocabulary, dtype=dtype), torch.empty(rows, hidden, dtype=dtype)

        def products() -> None:
            for start in range(0, tokens - rows + 1, rows):
                torch.mm(x[start : start + rows], weight.T, out=z)
                torch.mm(z, weight, out=dx)

        return Arm(products, 0, flops, lambda: "")
    x.requires_grad_()
    if side == "halfbyte":
        from halfbyte.kernels.linear_cross_entropy import linear_cross_entropy

        def loss() -> Tensor:
            return linear_cross_entropy(x, weight, labels) / tokens
    else:
        from transformers.loss.loss_utils import ForCausalLMLoss

        def loss() -> Tensor:
            logits = torch.nn.functional.linear(x, weight)[None]
            return ForCausalLMLoss(logits, labels[None], vocabulary, shift_labels=labels[None])

    def run() -> tuple[Tensor, Tensor]:
        value = loss()
        return value, torch.autograd.grad(value, x)[0]

    def check() -> list[float]:
        value, gradient = run()
        return [float(value), float(gradient.float().norm())]

    return Arm(run, 0, flops, check)


OPS: dict[str, Callable[[str, dict[str, Any]], Arm]] = {"dequantize": dequantize, "linear4bit": linear4bit, "decode": decode, "head": head}
