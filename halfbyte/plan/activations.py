"""What a layer keeps for its backward pass, and what that pass holds while it runs: one table of data, in elements per token.

    bytes = tokens * layers * sum over the kept rows of (sum of their words) * (width, or that of the compute type)

A row's words are sizes of the layer: `hidden` H, `queries` and `keys` (heads times head width), `inner` F and `visits` H (for a mixture of
experts those of all experts a token visits), `heads`, `scores` (heads times the tokens of a row), `ranks` (ranks of the layer's adapters
together), `inputs` and `outputs` (widths of the adapted matrices together), `one`.  The groups say when a row counts: a policy keeps
groups; `module` and `normed` rows come where a linear layer is called as a module (its weight is trained, its adapter has dropout or DoRA,
or a norm follows): autograd then keeps its input too.

    keep            no product is computed twice
    recompute_mlp   gate and up are computed again
    recompute       a layer's input is kept, the layer is computed again
    offload         the same, with the input in host memory

Sources: halfbyte/models/decoder_layer.py and halfbyte/kernels (what they save); for layers that stay transformers' own
the rows are what their modules save with adapters on all matrices.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from halfbyte.plan.setting import Setting, adapted, trained_biases
from halfbyte.quant.storage_cost import WIDTHS
from halfbyte.shape import ModelShape


@dataclass(frozen=True)
class Kept:
    """One tensor of a layer: elements per token as words, bytes of an element (0: of the compute type), the group it belongs to."""

    name: str
    words: tuple[str, ...]
    width: int = 0
    group: str = "attention"


ATTENTION = (
    Kept("x", ("hidden",), group="input"),
    Kept("1/rms of x", ("one",), 4),
    Kept("q", ("queries",)), Kept("k", ("keys",)), Kept("v", ("keys",)), Kept("o", ("queries",)),
    Kept("log sum of exponentials", ("heads",), 4),
    Kept("normed x", ("hidden",), group="normed_x"),
    Kept("q and k before their norms", ("queries", "keys"), group="qk_norm"),
    Kept("1/rms of their heads", ("heads", "kv_heads"), 4, "qk_norm"),
)  # fmt: skip
SCORES = (Kept("scores, where attention has dropout", ("scores",) * 4, group="scores"),)  # then attention is not the fused one
SPREAD = (Kept("keys and values of each query head", ("queries", "queries"), group="spread"),)  # float32 on a GPU knows no shared ones
SANDWICH = (Kept("what attention adds", ("hidden",), group="sandwich"), Kept("what the MLP adds", ("hidden",), group="sandwich"))
ANGLES = (Kept("sines and cosines of the positions", ("head_dim", "head_dim")),)  # once for all layers
STREAM = (Kept("s", ("hidden",), group="stream"), Kept("1/rms of s", ("one",), 4, "stream"))
MLPS = {
    "gated": (
        *STREAM, Kept("gate", ("inner",), group="inner"), Kept("up", ("inner",), group="inner"),
        Kept("normed s", ("hidden",), group="normed"), Kept("act(gate) up", ("inner",), group="module"),
    ),
    "plain": (
        *STREAM, Kept("normed s", ("hidden",), group="stream"),
        Kept("up", ("inner",), group="inner"), Kept("act(up)", ("inner",), group="inner"),
        Kept("inside the activation", ("inner", "inner"), group="inner"),
    ),
    "experts": (
        *STREAM, Kept("normed s", ("hidden",), group="stream"), Kept("rows of each expert", ("visits",), group="inner"),
        Kept("gate and up", ("inner", "inner"), group="inner"), Kept("act(gate)", ("inner",), group="inner"),
        Kept("act(gate) up", ("inner",), group="inner"), Kept("answers of each expert", ("visits",), group="inner"),
        Kept("inputs in the adapter's type", ("visits", "inner"), 4, "cast"),
    ),
}  # fmt: skip
ADAPTERS = (
    Kept("x A^T", ("ranks",), group="module"),
    Kept("dropped inputs", ("inputs",), group="dropout"), Kept("dropout masks", ("inputs",), 1, "dropout"),
    Kept("inputs in fp32", ("inputs",), 4, "dora"), Kept("updates in fp32", ("outputs",), 4, "dora"),
    Kept("results", ("outputs",), group="dora"),
    Kept("inputs in the adapter's type", ("inputs",), 4, "cast_inputs"),
)  # fmt: skip
BACKWARD = {
    "mlp": (
        Kept("d out", ("hidden",)), Kept("normed s", ("hidden",)), Kept("d s", ("hidden",)),
        Kept("d h", ("inner",)), Kept("h", ("inner",)), Kept("d gate", ("inner",)), Kept("d up", ("inner",)),
    ),
    "attention": (
        Kept("d out", ("hidden",)), Kept("normed x", ("hidden",)), Kept("d x", ("hidden",)),
        Kept("d o", ("queries",)), Kept("d q", ("queries",)), Kept("d k", ("keys",)), Kept("d v", ("keys",)),
    ),
}  # fmt: skip

EXTRA = ("module", "normed", "normed_x", "qk_norm", "scores", "spread", "cast", "cast_inputs", "sandwich", "dropout", "dora")
SCORES_AT_ONCE = 6  # s, p, dp, ds and two temporaries in the backward pass of kernels/packed_attention/reference.py


@dataclass(frozen=True)
class Policy:
    """Groups of rows that stay on the device from forward to backward, groups that wait in host memory, and what it costs."""

    name: str
    keeps: tuple[str, ...]
    host: tuple[str, ...] = ()
    cost: str = ""


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("keep", ("input", "attention", "stream", "inner", *EXTRA), cost="nothing is computed twice"),
        Policy("recompute_mlp", ("input", "attention", "stream", *EXTRA), cost="gate and up are computed twice"),
        Policy("recompute", ("input",), cost="every layer is computed twice"),
        Policy("offload", (), ("input",), cost="every layer is computed twice, and its input travels to host memory and back"),
    )
}


def mlp_kind(shape: ModelShape) -> str:
    """ "gated", "plain" or "experts": what stands behind attention."""
    if "experts" in shape.sizes:
        return "experts"
    return "gated" if has(shape, "gate_proj", "gate_up_proj") else "plain"


def has(shape: ModelShape, *ends: str) -> bool:
    """Whether a weight's name ends so."""
    return any(weight.name.endswith(ends) for weight in shape.weights)


def own_layers(shape: ModelShape) -> bool:
    """Whether the family's decoder layers run on own ops (models/structure.py): no LayerNorm, whose weight comes with a bias."""
    return not any(weight.kind == "norm" and weight.bias for weight in shape.weights) and mlp_kind(shape) != "plain"


def fused(shape: ModelShape, setting: Setting) -> bool:
    """Whether attention and MLP are one op each: plain frozen matrices with plain adapters, no norm after them."""
    plain = setting.method != "full" and not setting.dropout and not setting.dora and not setting.lora_bias
    plain = plain and not any(weight.kind == "linear" and ".mlp." in weight.name for weight in trained_biases(shape, setting))
    return plain and mlp_kind(shape) == "gated" and not has(shape, "post_feedforward_layernorm")


def words(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """word -> elements per token of one layer, in the mean over the layers."""
    return {**_words(shape, setting.of_weights), "scores": shape.sizes["heads"] * setting.tokens}


@lru_cache(maxsize=64)
def _words(shape: ModelShape, setting: Setting) -> dict[str, float]:
    sizes, layers = shape.sizes, shape.layers
    inside = [(weight, rank) for weight, rank in adapted(shape, setting) if weight.kind == "linear"]
    used = sizes.get("experts_per_token", 0)
    return {
        "one": 1, "hidden": sizes["hidden"], "queries": sizes["queries"], "keys": sizes["keys"], "heads": sizes["heads"],
        "head_dim": sizes["head_dim"], "kv_heads": sizes["keys"] // sizes["head_dim"],
        "inner": used * sizes["expert"] if used else sizes["inner"], "visits": used * sizes["hidden"],
        "ranks": (2 if setting.init == "pissa" else 1) * sum(rank for _, rank in inside) / layers,
        "inputs": sum(weight.size[1] for weight, _ in inside) / layers,
        "widest": max((max(weight.size) for weight, _ in inside), default=0),
        "outputs": sum(weight.size[0] for weight, _ in inside) / layers,
    }  # fmt: skip


def bytes_per_token(rows: tuple[Kept, ...], sizes: dict[str, float], dtype: str) -> float:
    """Bytes that these rows take for one token of one layer.

    >>> bytes_per_token(ATTENTION[:1], {"hidden": 4096}, "bfloat16")
    8192
    """
    return sum(sum(sizes[word] for word in row.words) * (row.width or WIDTHS[dtype]) for row in rows)


def rows_of(shape: ModelShape, setting: Setting, groups: tuple[str, ...]) -> tuple[Kept, ...]:
    """The rows of one layer that the groups keep under this setting."""
    plain = fused(shape, setting)
    apart = not plain or any(weight.kind == "linear" for weight in trained_biases(shape, setting))
    inner = "inner" in groups or (not plain and "stream" in groups)  # only the gated block of own ops can leave gate and up out
    counted = {
        "inner": inner, "module": not plain, "normed": not plain and has(shape, "input_layernorm"),
        "normed_x": apart and has(shape, "input_layernorm"), "dropout": setting.dropout > 0,
        "dora": setting.dora, "cast_inputs": setting.lora_bias and not setting.dora and setting.lora_dtype != setting.dtype,
        "spread": setting.device == "gpu" and setting.dtype == "float32" and shape.sizes["keys"] < shape.sizes["queries"],
        "cast": setting.method != "full" and setting.lora_dtype != setting.dtype,
        "scores": bool(shape.sizes["attention_dropout"]), "qk_norm": has(shape, "self_attn.q_norm"),
        "sandwich": has(shape, "post_feedforward_layernorm"),
    }  # fmt: skip
    table = (*ATTENTION, *SCORES, *SPREAD, *SANDWICH, *MLPS[mlp_kind(shape)], *ADAPTERS)
    return tuple(row for row in table if (row.group in groups or row.group == "inner") and counted.get(row.group, True))


def kept_bytes(shape: ModelShape, setting: Setting) -> int:
    """Bytes of all layers on the device between forward and backward of one micro-batch."""
    rows, sizes = rows_of(shape, setting, POLICIES[setting.policy].keeps), words(shape, setting)
    layer, once = bytes_per_token(rows, sizes, setting.dtype), bytes_per_token(ANGLES, sizes, setting.dtype)
    joined = joined_bytes(shape, setting) if "attention" in POLICIES[setting.policy].keeps else 0
    return ceil(setting.batch_tokens * (shape.layers * layer + once)) + joined


@lru_cache(maxsize=64)
def _linear_adapter_params(shape: ModelShape, setting: Setting) -> int:
    return sum(rank * sum(weight.size[-2:]) for weight, rank in adapted(shape, setting) if weight.kind == "linear")


def started_params(shape: ModelShape, setting: Setting) -> int:
    """Elements of the factors that begin at a constant start which is taken off again (init pissa); 0 for every other init."""
    return _linear_adapter_params(shape, setting.of_weights) if setting.init == "pissa" and setting.method != "full" else 0


def joined_bytes(shape: ModelShape, setting: Setting) -> int:
    """Factors laid together with their start, made in the forward pass and kept for the backward pass: 2 R rows each."""
    return 2 * WIDTHS[setting.lora_dtype] * started_params(shape, setting)


def scores_bytes(shape: ModelShape, setting: Setting) -> int:
    """What attention with a soft cap holds on a GPU, where the reference computes it: (heads, T, T) in fp32 of the longest sample."""
    if setting.device != "gpu" or not shape.sizes["softcap"]:
        return 0
    return SCORES_AT_ONCE * 4 * shape.sizes["heads"] * setting.tokens**2


def gap_bytes(shape: ModelShape, setting: Setting) -> int:
    """What the heap of a CPU cannot use again between the blocks of a layer: one as large as the largest it keeps, for every layer.

    A layer also makes blocks that go at once, the largest as large as the largest that stays (act(gate) up beside gate and up).  The hole
    such a one leaves among blocks that stay is not filled by the next layer's: for an aligned block glibc looks for a free piece some
    bytes longer, and what it cuts off gets in the way (https://sourceware.org/bugzilla/show_bug.cgi?id=30723).
    """
    if setting.device != "cpu":
        return 0
    sizes, policy = words(shape, setting), POLICIES[setting.policy]
    rows = rows_of(shape, setting, policy.keeps or policy.host)
    one = {**sizes, "inputs": sizes["widest"], "outputs": sizes["widest"]}  # of what stands for several blocks, the widest
    largest = max(one[word] * (row.width or WIDTHS[setting.dtype]) for row in rows for word in row.words)
    return ceil(shape.layers * setting.batch_tokens * largest)


def host_bytes(shape: ModelShape, setting: Setting) -> int:
    """Bytes that wait in host memory instead."""
    rows = rows_of(shape, setting, POLICIES[setting.policy].host)
    return ceil(setting.batch_tokens * shape.layers * bytes_per_token(rows, words(shape, setting), setting.dtype))


def working_bytes(shape: ModelShape, setting: Setting) -> int:
    """Bytes the backward pass of one layer holds beside what was kept: gradients, and what is computed again."""
    sizes = words(shape, setting)
    again = set(rows_of(shape, setting, POLICIES["keep"].keeps)) - set(rows_of(shape, setting, POLICIES[setting.policy].keeps))
    extra = bytes_per_token(tuple(again), sizes, setting.dtype)
    moving = 2 * bytes_per_token(ATTENTION[:1], sizes, setting.dtype) if POLICIES[setting.policy].host else 0.0
    largest = max(bytes_per_token(rows, sizes, setting.dtype) for rows in BACKWARD.values())
    joined = 0 if "attention" in POLICIES[setting.policy].keeps else joined_bytes(shape, setting) // shape.layers
    return ceil(setting.batch_tokens * (largest + extra + moving)) + joined
