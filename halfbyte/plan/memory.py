"""Memory of a training step, term by term, from shapes and types alone; nothing here was fitted to a measurement.

    peak = what always lies there + the largest of four moments

    always    weights, adapters, gradients, optimizer state, the program itself
    start     the dense matrices that init loftq quantizes, held until all are; neither gradients nor optimizer state are there yet
    head      activations of all layers + what the output layer and the loss need        (end of the forward pass)
    layer     activations of all layers + the backward pass of one layer                  (its first layer)
    update    what the optimizer's update needs; the activations are gone

Gradients always lie there where a step takes several micro-batches.  Where it takes one they grow while the activations go, so the most is
at one of the two ends: without them at `head` and `layer`, with all of them at `update`, which then is also the backward of the last layer.

Terms carry their formula.  Bytes of packed weights are exact (quant/storage_cost.py), as are those of adapters, gradients and
optimizer state; activations are what the ops save (activations.py).  The program's own memory is the one measured number: see hardware.py.

Does not count: pages of mapped model files that are not weights in use, which are given back while the model loads; fragmentation of a
device allocator; batches of token ids; evaluation, which keeps no activations.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from halfbyte.config.patterns import skips
from halfbyte.plan.activations import gap_bytes, host_bytes, kept_bytes, scores_bytes, started_params, words, working_bytes
from halfbyte.plan.setting import Setting, adapted, trained_params, trained_tensors, whole
from halfbyte.quant.storage_cost import WIDTHS, bytes_of, bytes_of_experts
from halfbyte.shape import ModelShape, Weight

CHUNK_BYTES = 96 << 20  # fp32 logits of one chunk (kernels/linear_cross_entropy)
UPDATE_CHUNK = 4 << 20  # elements updated at once with 8-bit state (kernels/adamw/reference.py; its fast kernels need less)
INT8_BLOCKSIZE, SMALLEST_INT8 = 256, 4096  # optim/state_storage
PINNED = "each tensor in a block of a power of two"
PRESENT = {
    "head": ("loaded", "always", "activations", "head"), "layer": ("loaded", "always", "activations", "layer"),
    "update": ("loaded", "always", "update"), "start": ("loaded", "start"),
}  # fmt: skip
"""Moment -> `when` of the terms that lie in memory then."""
MOMENTS = tuple(PRESENT)


@dataclass(frozen=True)
class Term:
    """Bytes under a name; `when` is loaded (from the start on), always (in every step), start, head, layer, update, activations (head and
    layer) or host."""

    name: str
    bytes: int
    when: str
    formula: str


@dataclass(frozen=True)
class Memory:
    """All terms of one setting; bytes are of the device that trains, apart from those of host terms."""

    terms: tuple[Term, ...]

    def at(self, moment: str) -> tuple[Term, ...]:
        """The terms that lie in memory at a moment."""
        return tuple(term for term in self.terms if term.when in PRESENT[moment] and term.bytes)

    @property
    def peak(self) -> str:
        """The moment with the most memory."""
        return max(MOMENTS, key=lambda moment: sum(term.bytes for term in self.at(moment)))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(term.bytes for term in self.at(self.peak))

    @property
    def host(self) -> int:
        """Bytes of host memory beside the device's."""
        return sum(term.bytes for term in self.terms if term.when == "host")

    @property
    def largest(self) -> Term:
        """The largest term at the peak."""
        return max(self.at(self.peak), key=lambda term: term.bytes)

    @property
    def largest_on_host(self) -> Term:
        """The largest term of the host's memory beside a device."""
        return max((term for term in self.terms if term.when == "host"), key=lambda term: term.bytes)

    def named(self, name: str) -> int:
        """Bytes of a term; 0 where there is none."""
        return sum(term.bytes for term in self.terms if term.name == name)


def packed(shape: ModelShape, setting: Setting) -> list[Weight]:
    """The weights that are stored in few bits: linear layers and experts, and the head where that is asked for; not those of quant.skip.

    Init loftq packs what it adapts, and that alone.
    """
    if setting.method == "full" or setting.format == "none":
        return []
    if setting.init == "loftq":
        return [weight for weight, _ in adapted(shape, setting) if not weight.tied]
    kinds = ("linear", "experts", "head") if setting.quantize_head else ("linear", "experts")
    return [weight for weight in shape.weights if weight.kind in kinds and not weight.tied and not _skipped(weight, setting.skip)]


def _skipped(weight: Weight, patterns: tuple[str, ...]) -> bool:
    """Fused experts are skipped by the name of their module, which holds several."""
    name = weight.name.rpartition(".")[0] if weight.kind == "experts" else weight.name
    return any(skips(pattern, name) for pattern in patterns)


def start_bytes(shape: ModelShape, setting: Setting) -> int:
    """The constant start that init pissa takes off again: a copy of every adapter of a linear layer as it began."""
    return WIDTHS[setting.lora_dtype] * started_params(shape, setting)


def init_bytes(shape: ModelShape, setting: Setting) -> int:
    """What init loftq or pissa holds beside what it makes, w bytes an element.

    loftq   every dense matrix until the last is packed; of the largest, (O, I) and k the smaller, w + 4 an element (part and rest; 4 more
            where w is 2); with more rounds one product more
    pissa   of the largest, w an element where the base is packed (read back), and 4 where w is 2
    both    4 an element of LAPACK's copy, 4 k (O + I) of singular vectors, 16 k k of LAPACK's work
            (https://www.netlib.org/lapack/explore-html, dgesdd)
    """
    if setting.method == "full" or setting.init not in ("loftq", "pissa"):
        return 0
    width = WIDTHS[setting.dtype]
    held = [weight.size[-2:] for weight in packed(shape, setting)] if setting.init == "loftq" else []
    sizes = held or [weight.size[-2:] for weight, _ in adapted(shape, setting) if weight.kind == "linear"]
    each = 4 + (0 if width == 4 else 4) + (width + 4 if held else width if packed(shape, setting) else 0)
    work = [each * rows * columns + 4 * min(rows, columns) * (rows + columns) + 16 * min(rows, columns) ** 2 for rows, columns in sizes]
    return width * sum(prod(size) for size in held) + max(work, default=0)


def packed_bytes(shape: ModelShape, setting: Setting) -> int:
    """Exact bytes of the packed matrices: for nf4 with double quantization n/2 + n/64 + n/4096 and a few per matrix."""
    return _packed_bytes(shape, setting.of_weights)


@lru_cache(maxsize=64)
def _packed_bytes(shape: ModelShape, setting: Setting) -> int:
    how = (setting.format, setting.blocksize, setting.double_quant, setting.dtype)
    return sum(bytes_of_experts(w.size, *how) if len(w.size) == 3 else bytes_of(w.size, *how) for w in packed(shape, setting))


def dense_bytes(shape: ModelShape, setting: Setting) -> int:
    """width * parameters of all that is not packed: embeddings, head, norms, routers, biases."""
    inside = sum(prod(weight.size) for weight in packed(shape, setting))
    return WIDTHS[setting.dtype] * (shape.total_params - inside)


def trained_dtype(setting: Setting) -> str:
    """The type that trained parameters are kept in."""
    return setting.dtype if setting.method == "full" else setting.lora_dtype


def state_bytes(shape: ModelShape, setting: Setting) -> int:
    """Of everything that is trained; see `bytes_of_state`."""
    return bytes_of_state(trained_tensors(shape, setting), setting.state, trained_dtype(setting))


def pinned(count: int) -> int:
    """Bytes that PyTorch takes for a block of pinned memory: the next power of two.

    >>> pinned(41_000_000), pinned(1 << 20), pinned(0)
    (67108864, 1048576, 0)
    """
    return 1 << (count - 1).bit_length() if count else 0


def pinned_inputs_bytes(shape: ModelShape, setting: Setting) -> int:
    """The input of every layer in a block of its own (models/decoder_layer.py)."""
    return shape.layers * pinned(-(-host_bytes(shape, setting) // shape.layers))


def pinned_state_bytes(shape: ModelShape, setting: Setting) -> int:
    """Every tensor of the state in a block of its own (optim/paged.py): two moments, with 8 bits the scales of each, the fp32 master."""
    return sum(
        pinned(part) for count in trained_tensors(shape, setting) for part in _state_parts(count, setting.state, trained_dtype(setting))
    )


def _state_parts(count: int, state: str, dtype: str) -> list[int]:
    """Bytes of each tensor of the state of a trained tensor with so many elements."""
    small = state == "float32" or count < SMALLEST_INT8
    moments = [4 * count] * 2 if small else [count, 4 * -(-count // INT8_BLOCKSIZE)] * 2
    return moments + ([] if dtype == "float32" else [4 * count])


def bytes_of_state(tensors: Iterable[int], state: str, dtype: str) -> int:
    """fp32: 8 n; int8: 2 n + 8 ceil(n / 256) for tensors of 4096 elements or more; + 4 n of fp32 masters where the parameters are bf16."""
    return sum(sum(_state_parts(count, state, dtype)) for count in tensors)


def update_bytes(shape: ModelShape, setting: Setting) -> int:
    """Largest tensor n: 8-bit state 16 min(n, 4 Mi) for the moments in fp32; a bf16 parameter's gradient in fp32, 4 n; paged state 8 n."""
    largest = max(trained_tensors(shape, setting), default=0)
    needed = 16 * min(largest, UPDATE_CHUNK) if setting.state == "int8" else 0
    needed += 0 if trained_dtype(setting) == "float32" else 4 * largest
    if setting.paged and setting.device == "gpu":
        needed += 8 * largest if setting.state == "float32" else 2 * largest + 8 * -(-largest // INT8_BLOCKSIZE)
    return needed


def _labelled(setting: Setting) -> int:
    return max(1, round(setting.batch_tokens * setting.trained_share))


def chunk_bytes(shape: ModelShape, setting: Setting) -> int:
    """The buffer of logits: w V for each of as many rows as have 96 MiB of logits in fp32; none where the head gives all logits at once."""
    rows = min(_labelled(setting), max(1, CHUNK_BYTES // (4 * shape.vocab)))
    return rows * shape.vocab * WIDTHS[setting.dtype] if setting.head_dense else 0


def head_bytes(shape: ModelShape, setting: Setting) -> int:
    """What stands between the last layer and the loss, for N tokens of which M carry a label, width w; the buffer of logits apart.

    states   4 w H N: input and output of the last norm, the gradient and once more scaled; 2 w H M where not all tokens carry a label
    trained  a head that is trained: its gradient in fp32 and once more scaled, 8 V H, and in bfloat16, where that is its type, 2 V H
    all      a head that is adapted or packed gives all logits: M V (2 w + 12)
    """
    labelled, width = _labelled(setting), WIDTHS[setting.dtype]
    states = width * shape.hidden * (4 * setting.batch_tokens + (2 * labelled if labelled < setting.batch_tokens else 0))
    if not setting.head_dense:
        return states + labelled * shape.vocab * (2 * width + 12)
    each = 8 + (0 if trained_dtype(setting) == "float32" else 2)
    return states + (each * shape.vocab * shape.hidden if _head_trains(shape, setting) else 0)


def _head_trains(shape: ModelShape, setting: Setting) -> bool:
    heads = {weight.name for weight in shape.weights if weight.kind in ("head", "embedding")}
    return setting.method == "full" or any(weight.name in heads for weight in whole(shape, setting))


def workspace_bytes(shape: ModelShape, setting: Setting) -> int:
    """Backward of one layer (activations.working_bytes), its largest matrix read back to w bytes an element, its adapters in that type.

    Fused experts that are trained are chosen one by one, and the gradient of a choice is as large as all of them: one that is added to and
    one that arrives.  Attention that holds all scores of a sample does so for one sample at a time (activations.scores_bytes).
    """
    width = WIDTHS[setting.dtype]
    matrices = [prod(weight.size[-2:]) for weight in packed(shape, setting) if weight.kind != "head"]
    dense = width * max(matrices, default=0)
    casts = 0
    if setting.method != "full" and setting.lora_dtype != setting.dtype:
        inside = [rank * sum(weight.size[-2:]) for weight, rank in adapted(shape, setting) if weight.kind == "linear"]
        casts = width * sum(inside) // shape.layers * (2 if setting.init == "pissa" else 1)
    chosen = 2 * width * max((prod(w.size) for w in shape.weights if w.kind == "experts"), default=0) if setting.method == "full" else 0
    return working_bytes(shape, setting) + scores_bytes(shape, setting) + dense + casts + chosen


def plan_memory(shape: ModelShape, setting: Setting, program_bytes: int = 0) -> Memory:
    """All terms of a training step with this setting; `program_bytes` is what the program takes before a model is loaded."""
    count, trained = trained_params(shape, setting), trained_dtype(setting)
    state = state_bytes(shape, setting)
    away = setting.paged and setting.device == "gpu"
    update = update_bytes(shape, setting)
    update = update if setting.accumulates else max(update, workspace_bytes(shape, setting))
    scales = f"{'with' if setting.double_quant else 'without'} double quantization, blocks of {setting.blocksize}"
    few = "int8 and a scale for each row" if setting.format == "int8" else f"{setting.format} {scales}"
    adapters = 0 if setting.method == "full" else count * WIDTHS[trained]
    terms = [
        Term("weights, packed", packed_bytes(shape, setting), "loaded", few),
        Term("weights, dense", dense_bytes(shape, setting), "loaded", f"{WIDTHS[setting.dtype]} bytes a parameter"),
        Term("adapters", adapters, "loaded", f"{WIDTHS[trained]} bytes a trained parameter"),
        Term("start factors", start_bytes(shape, setting), "loaded", "the start of init pissa, which is taken off again"),
        Term("start", init_bytes(shape, setting), "start", "init loftq: dense matrices until all are packed; work on the largest"),
        Term("gradients", count * WIDTHS[trained], *_gradients(setting, WIDTHS[trained])),
        Term("optimizer", 0 if away else state, "always", _state_text(setting)),
        Term("activations", kept_bytes(shape, setting), "activations", _kept_text(shape, setting)),
        Term("heap gaps", gap_bytes(shape, setting), "activations", "one hole of a layer's largest block, for every layer"),
        Term("head", head_bytes(shape, setting), "head", "last states and their gradients; that of the head where it is trained"),
        Term("logits", chunk_bytes(shape, setting), "head" if setting.device == "gpu" else "always", "one chunk of 96 MiB in float32"),
        Term("workspace", workspace_bytes(shape, setting), "layer", "backward of one layer, and its largest matrix in full"),
        Term("update", update, "update", "temporaries of the optimizer's update, or the backward of the last layer"),
        Term("program", program_bytes, "loaded", f"{'measured' if setting.device == 'cpu' else 'an estimate'}: interpreter and libraries"),
        Term(
            "layer inputs on the host",
            pinned_inputs_bytes(shape, setting) if setting.device == "gpu" else 0,
            "host",
            f"offloaded; {PINNED}",
        ),
        Term("optimizer on the host", pinned_state_bytes(shape, setting) if away else 0, "host", f"{_state_text(setting)}; {PINNED}"),
    ]
    if setting.device == "cpu" and setting.policy == "offload":  # host and device are one memory
        terms.append(Term("layer inputs", host_bytes(shape, setting), "activations", "offloaded to the memory they came from"))
    return Memory(tuple(term for term in terms if term.bytes))


def _gradients(setting: Setting, width: int) -> tuple[str, str]:
    """When gradients lie there, and their formula."""
    each = f"{width} bytes a trained parameter"
    return ("always", each) if setting.accumulates else ("update", f"{each}; a step of one micro-batch frees them before the next")


def _state_text(setting: Setting) -> str:
    each = "8 bytes" if setting.state == "float32" else "2 bytes and a scale for 256"
    master = "" if trained_dtype(setting) == "float32" else ", 4 more for the fp32 master"
    return f"{each} a trained parameter{master}"


def _kept_text(shape: ModelShape, setting: Setting) -> str:
    sizes = words(shape, setting)
    return f"policy {setting.policy}, {setting.batch_tokens:,} tokens, {shape.layers} layers of width {sizes['hidden']:.0f}"
