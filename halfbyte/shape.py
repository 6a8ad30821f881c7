"""ModelShape: every weight of a decoder model by name and size, from its config.json alone; counts that add up, without torch.

A family is a table: the tensors of one layer, and those around the layers, with sizes as words (`hidden`, `queries`, `inner` ...) that the
config turns into numbers.  Families built alike share rows.  The sum over the rows is the parameter count, checked in
the tests against transformers' own modules, tensor by tensor.

    ModelShape.read(folder).total_params                          what the model holds
    ModelShape.read(folder).lora_params(rank=8, targets=("q_proj", "v_proj"))

Does not know: bytes (quant/storage_cost.py), activations, speed, architectures outside FAMILIES.
Sources: https://github.com/huggingface/transformers (modeling files of each family); sizes of GPT-3: https://arxiv.org/abs/2005.14165
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from halfbyte.errors import ModelError, UnsupportedError, nearest

MAX_CONFIG_BYTES = 1_000_000


@dataclass(frozen=True)
class Row:
    """One weight of a family.  `sizes` are words, (out, in) for linear layers; `bias` is true, false, or the config key that decides."""

    name: str
    kind: str  # linear, experts, router, embedding, head, norm
    sizes: tuple[str, ...]
    bias: bool | str = False


@dataclass(frozen=True)
class Family:
    """`layers` is the name of the layer list; `keys` says where the config keeps a number under another name, or one of two."""

    layers: str
    layer: tuple[Row, ...]
    around: tuple[Row, ...]
    keys: Mapping[str, str]
    tied: bool = False


@dataclass(frozen=True)
class Weight:
    """One module of a model: its full name, kind, size and number of parameters.  `tied` shares its numbers with another and counts 0."""

    name: str
    kind: str
    size: tuple[int, ...]
    bias: bool
    tied: bool = False

    @property
    def params(self) -> int:
        """Parameters, bias included."""
        if self.tied:
            return 0
        count = 1
        for side in self.size:
            count *= side
        return count + (self.size[-2] if self.bias and len(self.size) > 1 else self.size[0] if self.bias else 0)


def _linear(name: str, out: str, inner: str, bias: bool | str = False) -> Row:
    return Row(name, "linear", (out, inner), bias)


def _norms(*names: str, size: str = "hidden", bias: bool | str = False) -> tuple[Row, ...]:
    return tuple(Row(name, "norm", (size,), bias) for name in names)


def _attention(bias: bool | str = False, out_bias: bool | str = False, out: str = "o_proj") -> tuple[Row, ...]:
    return (
        _linear("self_attn.q_proj", "queries", "hidden", bias), _linear("self_attn.k_proj", "keys", "hidden", bias),
        _linear("self_attn.v_proj", "keys", "hidden", bias), _linear(f"self_attn.{out}", "hidden", "queries", out_bias),
    )  # fmt: skip


def _gated(bias: bool | str = False) -> tuple[Row, ...]:
    return (
        _linear("mlp.gate_proj", "inner", "hidden", bias), _linear("mlp.up_proj", "inner", "hidden", bias),
        _linear("mlp.down_proj", "hidden", "inner", bias),
    )  # fmt: skip


def _experts(router: str, experts: str) -> tuple[Row, ...]:
    return (
        Row(router, "router", ("experts", "hidden")), Row(f"{experts}.gate_up_proj", "experts", ("experts", "twice_expert", "hidden")),
        Row(f"{experts}.down_proj", "experts", ("experts", "hidden", "expert")),
    )  # fmt: skip


def _around(embed: str, norm: str, norm_bias: bool = False, head_bias: bool = False) -> tuple[Row, ...]:
    head = Row("lm_head", "head", ("vocab", "hidden"), head_bias)
    return Row(embed, "embedding", ("vocab", "hidden")), *_norms(norm, bias=norm_bias), head


_TWO = _norms("input_layernorm", "post_attention_layernorm")
_FOUR = (*_TWO, *_norms("pre_feedforward_layernorm", "post_feedforward_layernorm"))
_AFTER = _norms("post_attention_layernorm", "post_feedforward_layernorm")
_HEAD_NORMS = _norms("self_attn.q_norm", "self_attn.k_norm", size="head_dim")
_WIDE_NORMS = (*_norms("self_attn.q_norm", size="queries"), *_norms("self_attn.k_norm", size="keys"))
_MODEL = _around("model.embed_tokens", "model.norm")
_PLAIN = {"experts": "num_local_experts", "expert": "intermediate_size"}
_GPT2 = {"hidden": "n_embd", "layers": "n_layer", "heads": "n_head", "inner": "n_inner", "positions": "n_positions"}
_QWEN_MOE = {"experts": "num_experts|num_local_experts", "expert": "moe_intermediate_size"}
_OPT_LAYER = (
    *_attention(bias=True, out_bias=True, out="out_proj"), _linear("fc1", "inner", "hidden", True), _linear("fc2", "hidden", "inner", True),
    *_norms("self_attn_layer_norm", "final_layer_norm", bias=True),
)  # fmt: skip
_GPT2_LAYER = (
    _linear("attn.c_attn", "thrice_hidden", "hidden", True), _linear("attn.c_proj", "hidden", "hidden", True),
    _linear("mlp.c_fc", "inner", "hidden", True), _linear("mlp.c_proj", "hidden", "inner", True), *_norms("ln_1", "ln_2", bias=True),
)  # fmt: skip
_NEOX_LAYER = (
    _linear("attention.query_key_value", "thrice_hidden", "hidden", "attention_bias"),
    _linear("attention.dense", "hidden", "hidden", "attention_bias"),
    _linear("mlp.dense_h_to_4h", "inner", "hidden", True), _linear("mlp.dense_4h_to_h", "hidden", "inner", True),
    *_norms("input_layernorm", "post_attention_layernorm", bias=True),
)  # fmt: skip
_PHI_LAYER = (
    *_attention(bias=True, out_bias=True, out="dense"), _linear("mlp.fc1", "inner", "hidden", True),
    _linear("mlp.fc2", "hidden", "inner", True), *_norms("input_layernorm", bias=True),
)  # fmt: skip
_PHI3_LAYER = (
    _linear("self_attn.qkv_proj", "queries_keys_values", "hidden"), _linear("self_attn.o_proj", "hidden", "queries"),
    _linear("mlp.gate_up_proj", "twice_inner", "hidden"), _linear("mlp.down_proj", "hidden", "inner"), *_TWO,
)  # fmt: skip
_STARCODER2_LAYER = (
    *_attention("use_bias", "use_bias"), _linear("mlp.c_fc", "inner", "hidden", "use_bias"),
    _linear("mlp.c_proj", "hidden", "inner", "use_bias"), *_norms("input_layernorm", "post_attention_layernorm", bias=True),
)  # fmt: skip


def _decoder(*layer: Row, around: tuple[Row, ...] = _MODEL, keys: Mapping[str, str] | None = None, tied: bool = False) -> Family:
    return Family("model.layers", layer, around, keys or {}, tied)


_LLAMA = _decoder(*_attention("attention_bias", "attention_bias"), *_gated("mlp_bias"), *_TWO)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA, "granite": _LLAMA, "smollm3": _decoder(*_LLAMA.layer, tied=True),
    "mistral": _decoder(*_attention(), *_gated(), *_TWO),
    "qwen2": _decoder(*_attention(bias=True), *_gated(), *_TWO),
    "qwen3": _decoder(*_attention("attention_bias", "attention_bias"), *_HEAD_NORMS, *_gated(), *_TWO),
    "gemma": _decoder(*_attention("attention_bias", "attention_bias"), *_gated(), *_TWO, tied=True),
    "gemma2": _decoder(*_attention("attention_bias", "attention_bias"), *_gated(), *_FOUR, tied=True),
    "gemma3_text": _decoder(*_attention("attention_bias", "attention_bias"), *_HEAD_NORMS, *_gated(), *_FOUR, tied=True),
    "olmo2": _decoder(*_attention("attention_bias", "attention_bias"), *_WIDE_NORMS, *_gated(), *_AFTER),
    "exaone4": _decoder(*_attention(), *_HEAD_NORMS, *_gated(), *_AFTER),
    "phi3": _decoder(*_PHI3_LAYER),
    "phi": _decoder(*_PHI_LAYER, around=_around("model.embed_tokens", "model.final_layernorm", norm_bias=True, head_bias=True)),
    "starcoder2": _decoder(*_STARCODER2_LAYER, around=_around("model.embed_tokens", "model.norm", norm_bias=True), tied=True),
    "mixtral": _decoder(*_attention(), *_experts("mlp.gate", "mlp.experts"), *_TWO, keys=_PLAIN),
    "olmoe": _decoder(*_attention("attention_bias", "attention_bias"), *_WIDE_NORMS, *_experts("mlp.gate", "mlp.experts"), *_TWO,
                      keys={"experts": "num_experts|num_local_experts", "expert": "intermediate_size"}),
    "qwen3_moe": _decoder(*_attention("attention_bias", "attention_bias"), *_HEAD_NORMS, *_experts("mlp.gate", "mlp.experts"), *_TWO,
                          keys=_QWEN_MOE),
    "opt": Family("model.decoder.layers", _OPT_LAYER, (
        *_around("model.decoder.embed_tokens", "model.decoder.final_layer_norm", norm_bias=True),
        Row("model.decoder.embed_positions", "embedding", ("positions_and_two", "hidden"))), {"inner": "ffn_dim"}, tied=True),
    "gpt2": Family("transformer.h", _GPT2_LAYER, (
        *_around("transformer.wte", "transformer.ln_f", norm_bias=True),
        Row("transformer.wpe", "embedding", ("positions", "hidden"))), _GPT2, tied=True),
    "gpt_neox": Family("gpt_neox.layers", _NEOX_LAYER, _around("gpt_neox.embed_in", "gpt_neox.final_layer_norm", norm_bias=True), {}),
}  # fmt: skip

_COMMON_KEYS = {
    "hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "inner": "intermediate_size",
    "vocab": "vocab_size", "positions": "max_position_embeddings",
}  # fmt: skip
# Configs may leave out what their family's code fills in (transformers' configuration files).
_BIAS_UNSAID = {"gpt_neox": True, "starcoder2": True}
_HEAD_DIM_UNSAID = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128}
_USED_UNSAID = {"mixtral": 2, "olmoe": 8, "qwen3_moe": 8}
_UNEVEN = ("mlp_only_layers", "decoder_sparse_step")


@dataclass(frozen=True, eq=False)
class ModelShape:
    """A model's sizes and all its weights; `sizes` holds every number by its word (queries, keys, inner, experts ...).

    packed  its files hold few bits a weight already
    stored  (nf4, fp4 or int8; whether the scales are in 8 bits themselves), where bitsandbytes packed it; else ("", False)
    """

    model_type: str
    hidden: int
    layers: int
    vocab: int
    max_positions: int
    weights: tuple[Weight, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    packed: bool = False
    stored: tuple[str, bool] = ("", False)

    @classmethod
    def read(cls, folder: Path) -> "ModelShape":
        """The shape of a model folder, or of a config file by itself; raises ModelError for a missing or unreadable one."""
        path = Path(folder) if Path(folder).suffix == ".json" else Path(folder) / "config.json"
        if not path.is_file():
            raise ModelError("a model folder has a config.json", code="E-MODEL-901", place=str(path), remedy="name another folder")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError("a config.json has at most 1 MB", code="E-MODEL-902", place=str(path), found=f"{path.stat().st_size:,} bytes")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError("a config.json is JSON text", code="E-MODEL-903", place=str(path), found=str(error)[:120]) from None
        return cls.from_config(values, place=str(path))

    @classmethod
    def from_config(cls, values: Mapping[str, Any], place: str = "config.json") -> "ModelShape":
        """The shape from the content of a config.json."""
        kind = values.get("model_type") if isinstance(values, Mapping) else None
        family = FAMILIES.get(str(kind))
        if family is None:
            raise UnsupportedError(
                "the sizes of this model family are not known", code="E-UNSUP-901", place=f"{place}, model_type", found=str(kind),
                expected=", ".join(FAMILIES), remedy=nearest(str(kind), FAMILIES),
            )  # fmt: skip
        if values.get("mlp_only_layers") or values.get("decoder_sparse_step", 1) != 1:
            raise UnsupportedError(
                "layers of different kinds in one model are not counted", code="E-UNSUP-902", place=place,
                found=", ".join(key for key in _UNEVEN if key in values),
            )  # fmt: skip
        require_readable(values, place)
        sizes = _sizes(values, family, place)
        layer = [
            weight
            for number in range(sizes["layers"])
            for weight in _weights(family.layer, sizes, values, f"{family.layers}.{number}.", place)
        ]  # fmt: skip
        around = _weights(family.around, sizes, values, "", place)
        if _switch(values, "tie_word_embeddings", family.tied, place):
            around = [Weight(w.name, w.kind, w.size, w.bias, tied=True) if w.kind == "head" else w for w in around]
        if not _switch(values, "do_layer_norm_before", True, place):
            around = [weight for weight in around if weight.kind != "norm"]
        return cls(
            str(kind), sizes["hidden"], sizes["layers"], sizes["vocab"], sizes["positions"], (*around, *layer), sizes,
            "quantization_config" in values, _stored(values.get("quantization_config")),
        )  # fmt: skip

    @property
    def total_params(self) -> int:
        """All parameters; shared ones count once."""
        return sum(weight.params for weight in self.weights)

    @property
    def linears(self) -> tuple[Weight, ...]:
        """The linear layers inside the decoder layers: what `all-linear` adapts and what 4-bit formats store (head and router excluded)."""
        return tuple(weight for weight in self.weights if weight.kind == "linear")

    def params_of(self, kind: str) -> int:
        """Parameters of one kind: linear, experts, router, embedding, head or norm."""
        return sum(weight.params for weight in self.weights if weight.kind == kind)

    def lora_params(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """Parameters of an adapter: rank * (in + out) for each linear layer whose name ends in a target; experts are not counted."""
        chosen = self.linears if targets == "all-linear" else [w for w in self.linears if w.name.rpartition(".")[2] in targets]
        return sum(rank * (weight.size[0] + weight.size[1]) for weight in chosen)


def _stored(block: object) -> tuple[str, bool]:
    """What a config's quantization_config says, in the words of quant.format; its storage is read for good by models/packed_folder.py."""
    if not isinstance(block, Mapping) or block.get("quant_method") != "bitsandbytes":
        return "", False
    if block.get("load_in_8bit"):
        return "int8", False
    kind = block.get("bnb_4bit_quant_type", "fp4")
    return (str(kind) if kind in ("nf4", "fp4") else "", bool(block.get("bnb_4bit_use_double_quant")))


def _whole(values: Mapping[str, Any], key: str, place: str) -> int:
    value = next((values[name] for name in key.split("|") if name in values), None)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**40:
        raise ModelError(
            "a size in config.json is a whole number over 0", code="E-MODEL-904", place=f"{place}, {key}",
            found="no such key" if not any(name in values for name in key.split("|")) else json.dumps(value, default=str)[:80],
            expected="a whole number over 0, without quotes", remedy=_misspelt(values, key.split("|")[0]),
        )  # fmt: skip
    return value


def _misspelt(values: Mapping[str, Any], key: str) -> str:
    """A key that is there, is of no use and is nearly this one, where this one is missing."""
    if key in values:
        return ""
    used = {name for keys in (_COMMON_KEYS, *(family.keys for family in FAMILIES.values())) for name in "|".join(keys.values()).split("|")}
    others = [name for name, value in values.items() if name not in used and isinstance(value, int | float | str)]
    near = get_close_matches(key, others, n=1, cutoff=0.8)
    return f"rename {near[0]}, which is there, to {key}" if near else ""


def _switch(values: Mapping[str, Any], key: str, unsaid: bool, place: str) -> bool:
    """true or false; null counts as false, as in the families' own code."""
    value = values.get(key, unsaid)
    if value is not None and not isinstance(value, bool):
        raise ModelError("a switch in config.json is true or false", code="E-MODEL-906", place=f"{place}, {key}", found=repr(value)[:80],
                         expected="true or false")  # fmt: skip
    return bool(value)


def require_readable(values: Mapping[str, Any], place: str) -> None:
    """A folder that is quantized already must be so in a format that is read here.  Raises ModelError."""
    block = values.get("quantization_config")
    method = block.get("quant_method") if isinstance(block, Mapping) else None
    if block is not None and method != "bitsandbytes":
        raise ModelError(
            "a model that is already quantized must be in bitsandbytes' 4-bit or 8-bit format", code="E-MODEL-009",
            place=f"{place}, key quantization_config", found=f"quant_method {method!r}"[:80], expected="bitsandbytes",
            remedy="use the model's 16-bit folder and let it be quantized while loading",
        )  # fmt: skip


def _require_divides(many: int, few: int, place: str) -> None:
    if many % few:
        raise ModelError("heads share the width evenly, and heads for keys and values the heads", code="E-MODEL-907", place=place,
                         found=str(few), expected=f"a divisor of {many:,}")  # fmt: skip


def _sizes(values: Mapping[str, Any], family: Family, place: str) -> dict[str, int]:
    """The numbers behind the size words of a family."""
    keys = {**_COMMON_KEYS, **family.keys}
    kind = str(values["model_type"])
    if kind == "gpt2" and values.get("n_inner") is None:
        values = {**values, "n_inner": 4 * _whole(values, "n_embd", place)}
    if kind == "qwen3_moe":
        keys = {**keys, "inner": "moe_intermediate_size"}
    sizes = {word: _whole(values, key, place) for word, key in keys.items()}
    if sizes["layers"] > 10_000:
        raise ModelError("a model has at most 10,000 layers", code="E-MODEL-905", place=f"{place}, {keys['layers']}",
                         found=str(sizes["layers"]))  # fmt: skip
    head_dim = values.get("head_dim") or _HEAD_DIM_UNSAID.get(kind) or sizes["hidden"] // sizes["heads"]
    sizes["head_dim"] = _whole({"head_dim": head_dim}, "head_dim", place)
    groups = values.get("num_key_value_heads")
    kv_heads = sizes["heads"] if groups is None else _whole(values, "num_key_value_heads", place)
    _require_divides(sizes["heads"], kv_heads, f"{place}, num_key_value_heads")
    if not values.get("head_dim") and kind not in _HEAD_DIM_UNSAID:
        _require_divides(sizes["hidden"], sizes["heads"], f"{place}, {keys['heads']}")
    sizes["queries"], sizes["keys"] = sizes["heads"] * sizes["head_dim"], kv_heads * sizes["head_dim"]
    sizes["queries_keys_values"] = sizes["queries"] + 2 * sizes["keys"]
    sizes["thrice_hidden"], sizes["twice_inner"] = 3 * sizes["hidden"], 2 * sizes["inner"]
    sizes["twice_expert"] = 2 * sizes.get("expert", 0)
    dropped = values.get("attn_pdrop", 0.1 if kind == "gpt2" else values.get("attention_dropout", 0.0))
    sizes["attention_dropout"] = int(bool(dropped))
    sizes["softcap"] = int(bool(values.get("attn_logit_softcapping", kind == "gemma2")))
    if "experts" in sizes:
        used = values.get("num_experts_per_tok") or _USED_UNSAID.get(kind, 2)
        sizes["experts_per_token"] = min(_whole({"num_experts_per_tok": used}, "num_experts_per_tok", place), sizes["experts"])
    sizes["positions_and_two"] = sizes["positions"] + 2  # OPT keeps two unused rows before the first position
    return sizes


def _weights(rows: Sequence[Row], sizes: Mapping[str, int], values: Mapping[str, Any], prefix: str, place: str) -> list[Weight]:
    unsaid = _BIAS_UNSAID.get(str(values["model_type"]), False)
    made = []
    for row in rows:
        bias = _switch(values, row.bias, unsaid, place) if isinstance(row.bias, str) else row.bias
        made.append(Weight(prefix + row.name, row.kind, tuple(sizes[word] for word in row.sizes), bias))
    return made
