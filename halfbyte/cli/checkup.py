"""The texts of `halfbyte doctor`: machine, versions, ops, and a model."""

import math

from halfbyte import devices
from halfbyte.cli.terminal import pairs, table
from halfbyte.kernels import listing
from halfbyte.quant.storage_cost import bytes_of
from halfbyte.shape import ModelShape
from halfbyte.units import bytes_text, count_text

FORMATS = ("nf4", "fp4", "int8")


def machine_text() -> str:
    """What this machine has, and the versions a result depends on."""
    seen = devices.describe()
    gpus = ", ".join(f"{gpu.name} {bytes_text(gpu.memory_bytes)} (compute capability {gpu.capability})" for gpu in seen.gpus)
    from halfbyte.models.load import choose_dtype

    dtype, reason = choose_dtype()
    rows = [
        ("system", seen.system),
        ("processor", f"{seen.cpu}, {seen.usable_cores} of {seen.cores} cores usable"),
        ("instruction sets", ", ".join(seen.isa) or "none of those that matter here"),
        ("memory", f"{bytes_text(seen.available_bytes)} available of {bytes_text(seen.memory_bytes)}"),
        ("accelerators", gpus or "none that this torch can use"),
        ("compute type", f"{str(dtype).removeprefix('torch.')}: {reason}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in devices.versions().items())),
    ]
    return pairs("this machine", rows)


def ops_text() -> str:
    """Op x implementation x device with the reason, then what is missing for the implementations that do not serve."""
    rows = listing.table()
    ops = table(
        ("op", "implementation", "device", "serves", "why"),
        [(row.op, row.implementation, row.device, "yes" if row.serves else "-", row.reason) for row in rows],
    )
    return ops + "\n\n" + "\n".join([*attention_lines(), *_missing()])


def attention_lines() -> list[str]:
    """Of each GPU, whether attention takes a batch in one call; heads of 128 in bfloat16 stand for what models have."""
    import torch

    from halfbyte.kernels.packed_attention.gpu import lacking, not_in_one_call

    lines = []
    for gpu in (gpu for gpu in devices.describe().gpus if gpu.capability):
        major, minor = (int(part) for part in gpu.capability.split("."))
        reason = not_in_one_call((major, minor), 128, torch.bfloat16, lacking())
        lines.append(f"packed_attention on {gpu.name}: one call per {f'sample: {reason}' if reason else 'batch'}")
    return lines


def _missing() -> list[str]:
    """One line for each thing that would let more serve."""
    found = devices.versions()
    lines = []
    if not devices.describe().gpus:
        lines.append(
            "missing for the cuda rows: a GPU that torch can use, and a torch built for it; everything runs on the processor until then"
        )
    if "numba" not in found:
        lines.append("missing for the cpu rows: the package numba (pip install numba); the reference serves until then")
    if "triton" not in found:
        lines.append('missing for Triton kernels: the package triton (pip install "halfbyte[gpu]")')
    lines.append("not needed to run: peft and bitsandbytes; their files are read and written without them")
    return lines


def model_text(name: str) -> str:
    """What a model is, and the bytes of its weights in each storage."""
    from halfbyte.errors import UnsupportedError
    from halfbyte.models.load import load_tokenizer, token_limit
    from halfbyte.models.source import resolve
    from halfbyte.models.structure import examine

    source = resolve(name)
    tokenizer = load_tokenizer(source)
    rows = [
        ("folder", str(source.folder)),
        ("digest", source.digest[:16]),
        ("tokens at most", f"{token_limit(source) or 'not said'}"),
        ("vocabulary", f"{len(tokenizer):,} tokens, ends with {tokenizer.eos_token}"),
        ("chat template", "yes" if tokenizer.chat_template else "none: conversations need --template"),
        ("decoder layers", str(examine(source.folder))),
    ]
    try:
        shape = ModelShape.read(source.folder)
    except UnsupportedError as unknown:
        rows.append(("sizes", f"not known for {unknown.found}; the model can be used all the same"))
    else:
        rows += _sizes(shape)
    return pairs(f"model {name}", rows)


def _sizes(shape: ModelShape) -> list[tuple[str, str]]:
    """Parameters, and bytes of the weights in each storage."""
    packed = [weight for weight in shape.weights if weight.kind in ("linear", "experts")]
    rest = shape.total_params - sum(weight.params for weight in packed)
    biases = sum(weight.params for weight in packed) - sum(math.prod(weight.size) for weight in packed)
    rows = [
        ("family", f"{shape.model_type}, {shape.layers} layers, width {shape.hidden}"),
        ("parameters", f"{count_text(shape.total_params)} ({shape.total_params:,})"),
        ("weights, bfloat16", bytes_text(2 * shape.total_params)),
    ]
    for name in FORMATS:
        stored = sum(bytes_of(weight.size, name) for weight in packed) + 2 * (rest + biases)
        rows.append((f"weights, {name}", bytes_text(stored)))
    rows.append(("adapter, rank 16", f"{count_text(shape.lora_params(16))} parameters on all linear layers"))
    return rows
