"""Terms of a memory plan: exact bytes of weights, adapters and optimizer state against real modules; published figures; golden totals."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from halfbyte.errors import TargetError
from halfbyte.plan import memory, published, speed
from halfbyte.plan.memory import dense_bytes, packed_bytes, plan_memory, state_bytes
from halfbyte.plan.setting import Setting, trained_params
from halfbyte.shape import ModelShape

LLAMA_8B = ModelShape.from_config({
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
})  # fmt: skip
PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"


@pytest.mark.parametrize(("name", "shape", "rank", "targets", "count"), published.COUNTS)
def test_published_parameter_counts(name: str, shape: ModelShape, rank: int, targets: tuple[str, ...], count: int) -> None:
    assert trained_params(shape, Setting(rank=rank, targets=targets)) == count


@pytest.mark.parametrize("figure", published.figures(), ids=lambda figure: figure.name)
def test_published_totals(figure: published.Figure) -> None:
    assert abs(figure.difference) <= figure.bound
    assert figure.bound == 0.10 or "7B" in figure.name


def test_the_required_figures_are_there() -> None:
    wanted = {"QLoRA paper, LLaMA 13B": 11.3, "QLoRA paper, LLaMA 33B": 24.7, "QLoRA paper, LLaMA 65B": 45.0}
    found = {figure.name: figure.published for figure in published.figures()}
    assert wanted.items() <= found.items()
    assert 17.86 in found.values() and 6.9 in found.values()


def test_the_7b_difference_is_the_papers_weight_term() -> None:
    seven = next(figure for figure in published.figures() if "7B" in figure.name)
    assert (seven.ours - seven.terms["weights"] + 5.046) / seven.published == pytest.approx(1, abs=0.05)


def test_the_page_shows_these_numbers() -> None:
    assert PAGE.read_text(encoding="utf-8") == published.page(PAGE), "run: python -m halfbyte.plan.published"


def _bytes(model: torch.nn.Module) -> int:
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    return sum(held.values())


@pytest.mark.parametrize("format", ["nf4", "int8", "none"])
@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"lora_bias": True}, {"targets": ("q_proj", "embed_tokens"), "ranks": {"q_proj": 3}}])
def test_bytes_of_a_real_model(tiny_llama: Any, format: str, lora: dict[str, Any]) -> None:
    """Weights and adapters as they lie in memory, to the byte (less the rotary frequencies)."""
    from halfbyte.config.lora import LoraConfig
    from halfbyte.lora.inject import inject
    from halfbyte.models.quantizer import layers_to_quantize
    from halfbyte.quant.linear import QuantLinear
    from halfbyte.surgery import replace as put

    model = tiny_llama()
    if format != "none":
        for name in layers_to_quantize(model):
            put(model, name, QuantLinear.from_linear(model.get_submodule(name), format))
    made = inject(model, LoraConfig(rank=4, **lora), seed=0)
    shape = ModelShape.from_config(model.config.to_dict())
    given = {**lora, "ranks": tuple(lora.get("ranks", {}).items())}
    setting = Setting(format=format, method="lora" if format == "none" else "qlora", dtype="float32", rank=4, **given)
    assert trained_params(shape, setting) == made.trainable_params
    rotary = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if "inv_freq" in name)
    predicted = packed_bytes(shape, setting) + dense_bytes(shape, setting) + 4 * trained_params(shape, setting)
    assert _bytes(model) - rotary == predicted


@pytest.mark.parametrize("state", ["float32", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_real_optimizer_state(tiny_llama: Any, state: str, dtype: str) -> None:
    from halfbyte.config.lora import LoraConfig
    from halfbyte.lora.inject import inject
    from halfbyte.optim.adamw import AdamW

    model = tiny_llama(hidden_size=128, intermediate_size=512)
    inject(model, LoraConfig(rank=16, dtype=dtype), seed=0)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], state=state)
    optimizer.allocate()
    real = sum(value.numel() * value.element_size() for name, value in optimizer.state_tensors().items() if not name.endswith(".step"))
    shape = ModelShape.from_config(model.config.to_dict())
    assert state_bytes(shape, Setting(rank=16, lora_dtype=dtype, state=state)) == real


def test_numbers_of_the_code_are_the_codes() -> None:
    from halfbyte.kernels.adamw import reference
    from halfbyte.kernels.linear_cross_entropy import chunks
    from halfbyte.models import heads
    from halfbyte.optim import state_storage

    assert memory.CHUNK_BYTES == chunks.CHUNK_BYTES
    assert speed.ROUNDED_TO == heads.ROUND_CPU
    assert memory.UPDATE_CHUNK == reference.CHUNK
    assert (memory.INT8_BLOCKSIZE, memory.SMALLEST_INT8) == (state_storage.BLOCKSIZE, state_storage.SMALLEST_INT8)


# method, policy, state, rows at once: GB at the peak for Llama-3.1-8B, rank 16, 2,048 tokens, bfloat16; golden: changes only on purpose.
GOLDEN = [
    ("qlora", "keep", "float32", 4, 32.37), ("qlora", "recompute", "float32", 1, 7.49), ("lora", "keep", "float32", 1, 23.20),
    ("lora", "recompute_mlp", "int8", 4, 27.80), ("full", "recompute", "int8", 1, 86.46),
]  # fmt: skip


@pytest.mark.parametrize(("method", "policy", "state", "rows", "gigabytes"), GOLDEN)
def test_golden_totals(method: str, policy: str, state: str, rows: int, gigabytes: float) -> None:
    setting = Setting(policy=policy, state=state, micro_batch_size=rows, tokens=2048, device="gpu").with_method(method)
    assert plan_memory(LLAMA_8B, setting).total / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_static_parts_of_an_8b_model() -> None:
    """NF4 3.60 GB, embeddings and head 2.10 GB, adapters with 32-bit Adam 0.67 GB."""
    plan = plan_memory(LLAMA_8B, Setting())
    assert plan.named("weights, packed") / 1e9 == pytest.approx(3.60, abs=0.005)
    assert plan.named("weights, dense") / 1e9 == pytest.approx(2.10, abs=0.005)
    assert sum(plan.named(name) for name in ("adapters", "gradients", "optimizer")) / 1e9 == pytest.approx(0.67, abs=0.005)


def test_the_total_is_the_largest_moment() -> None:
    plan = plan_memory(LLAMA_8B, Setting(), program_bytes=1000)
    sums = {moment: sum(term.bytes for term in plan.at(moment)) for moment in memory.MOMENTS}
    assert plan.total == max(sums.values()) == sums[plan.peak]
    assert plan.total - plan_memory(LLAMA_8B, Setting()).total == 1000
    assert plan.largest.bytes == max(term.bytes for term in plan.at(plan.peak))


def test_layers_that_are_skipped_stay_dense(tiny_llama: Any) -> None:
    """To the byte, by the patterns of loading; of an 8B model the down projections alone are 2.6 GiB."""
    from halfbyte.models.quantizer import layers_to_quantize

    model = tiny_llama()
    shape = ModelShape.from_config(model.config.to_dict())
    for skip in (("*down_proj",), ("mlp",), ("q_proj", "o_proj"), ("model.layers.0",)):
        names = [weight.name for weight in memory.packed(shape, Setting(skip=skip))]
        assert names and sorted(names) == sorted(layers_to_quantize(model, skip))
    more = plan_memory(LLAMA_8B, Setting(skip=("*down_proj",))).total - plan_memory(LLAMA_8B, Setting()).total
    assert more / 2**30 == pytest.approx(2.60, abs=0.01)


class _Held(TorchDispatchMode):
    """Counts the bytes of all tensors that live while it is on, and the most there were."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.now = self.most = 0
        for tensor in (*model.parameters(), *model.buffers()):
            self._add(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return made

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", ["all-linear", ("down_proj", "q_proj")])
def test_the_start_of_loftq_holds_the_dense_matrices(tiny_llama: Any, dtype: str, targets: Any) -> None:
    """Against every tensor that lives in it; what is inside the decomposition (LAPACK's copy and its work) is not a tensor."""
    from halfbyte.config.lora import LoraConfig
    from halfbyte.config.quant import QuantConfig
    from halfbyte.lora.inject import inject

    model = tiny_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=3).to(getattr(torch, dtype))
    shape = ModelShape.from_config(model.config.to_dict())
    rotary = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    with _Held(model) as held:
        inject(model, LoraConfig(rank=4, init="loftq", targets=targets), seed=0, quant=QuantConfig(format="nf4"))
    setting = Setting(rank=4, init="loftq", targets=targets, dtype=dtype, tokens=8)
    plan = plan_memory(shape, setting)
    assert _bytes(model) - rotary == packed_bytes(shape, setting) + dense_bytes(shape, setting) + plan.named("adapters")
    inside = 4 * 128 * 256 + 16 * 128**2
    assert plan.peak == "start" and plan.total - inside == pytest.approx(held.most - rotary, rel=0.01)
    assert plan_memory(shape, replace(setting, init="default")).total < plan.total / 1.5
    assert not plan_memory(shape, setting.with_method("full")).named("start")


def test_the_start_of_pissa_lies_beside_its_factors(tiny_llama: Any) -> None:
    from halfbyte.config.lora import LoraConfig
    from halfbyte.lora.inject import inject

    model = tiny_llama()
    inject(model, LoraConfig(rank=4, init="pissa"), seed=0)
    shape = ModelShape.from_config(model.config.to_dict())
    real = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name.endswith(("start_a", "start_b")))
    assert plan_memory(shape, Setting(rank=4, init="pissa")).named("start factors") == real > 0
    assert plan_memory(shape, Setting(rank=4)).named("start factors") == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_singular_vectors_of_pissa_are_counted(tiny_llama: Any, dtype: str) -> None:
    """As those of loftq are; no dense matrix is held beside the base."""
    from halfbyte.config.lora import LoraConfig
    from halfbyte.lora.inject import inject

    model = tiny_llama(hidden_size=128, intermediate_size=1024, num_hidden_layers=1).to(getattr(torch, dtype))
    before, targets = _bytes(model), ("down_proj",)
    with _Held(model) as held:
        inject(model, LoraConfig(rank=4, init="pissa", targets=targets), seed=0)
    shape = ModelShape.from_config(model.config.to_dict())
    setting = Setting(method="lora", format="none", rank=4, init="pissa", targets=targets, dtype=dtype, tokens=8)
    inside = 4 * 128 * 1024 + 16 * 128**2
    start = plan_memory(shape, setting).named("start")
    assert held.most - before == pytest.approx(start - inside, rel=0.1)
    assert not plan_memory(shape, replace(setting, init="default")).named("start")


@pytest.mark.parametrize("biases", ["all", "lora_only"])
def test_trained_biases_are_counted(biases: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from halfbyte.config.lora import LoraConfig
    from halfbyte.lora.inject import inject

    config = AutoConfig.for_model(
        "qwen2", hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
        max_position_embeddings=64,
    )  # fmt: skip
    made = inject(AutoModelForCausalLM.from_config(config), LoraConfig(rank=4, train_bias=biases, targets=("q_proj", "o_proj")), seed=0)
    setting = Setting(rank=4, train_bias=biases, targets=("q_proj", "o_proj"))
    assert trained_params(ModelShape.from_config(config.to_dict()), setting) == made.trainable_params


def test_a_trained_head_in_bfloat16_is_scaled_and_rounded() -> None:
    """fp32 gradient, the same scaled, and its rounding: 4, 4 and 2 bytes; without the last in fp32."""
    for dtype, each, width in (("bfloat16", 10, 2), ("float32", 8, 4)):
        setting = Setting(dtype=dtype, tokens=256).with_method("full")
        assert memory.head_bytes(LLAMA_8B, setting) == each * 128256 * 4096 + 4 * width * 4096 * 256


def test_a_soft_cap_holds_the_scores_of_a_sample_on_a_gpu() -> None:
    gemma = ModelShape.from_config({
        "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192,
    })  # fmt: skip
    setting = Setting(tokens=4096, device="gpu")
    more = memory.workspace_bytes(gemma, setting) - memory.workspace_bytes(gemma, replace(setting, device="cpu"))
    assert more == 6 * 2**30 == memory.workspace_bytes(gemma, replace(setting, micro_batch_size=2)) - (
        memory.workspace_bytes(gemma, replace(setting, micro_batch_size=2, device="cpu")))  # fmt: skip
    assert memory.workspace_bytes(LLAMA_8B, setting) == memory.workspace_bytes(LLAMA_8B, replace(setting, device="cpu"))


def test_attention_of_a_gpu_in_float32_spreads_shared_keys() -> None:
    setting = Setting(tokens=4096, dtype="float32")
    more = plan_memory(LLAMA_8B, replace(setting, device="gpu")).named("activations") - plan_memory(LLAMA_8B, setting).named("activations")
    assert more == 32 * 4096 * 4 * 2 * 4096


def test_experts_trained_whole_get_gradients_of_their_whole_size() -> None:
    mixtral = ModelShape.from_config({
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 128, "max_position_embeddings": 64,
    })  # fmt: skip
    full = Setting(tokens=16).with_method("full")
    same = replace(full, method="lora", rank=1)
    more = memory.workspace_bytes(mixtral, full) - memory.working_bytes(mixtral, full)
    assert more == 2 * 2 * 4 * 192 * 64 and memory.workspace_bytes(mixtral, same) < memory.workspace_bytes(mixtral, full)


def test_pinned_memory_comes_in_powers_of_two() -> None:
    """An A of 16 x 14,336 in fp32 is 896 KiB and takes a block of 1 MiB; twice for its two moments."""
    one = Setting(paged=True, device="gpu", targets=("down_proj",), layers=(0,))
    assert plan_memory(LLAMA_8B, one).host == 2 * (2**20 + 4 * 16 * 4096)
    int8 = plan_memory(LLAMA_8B, replace(one, state="int8")).host
    assert int8 == 2 * (2**18 + 2**12) + 2 * (2**16 + 2**10)
    inputs = plan_memory(LLAMA_8B, Setting(policy="offload", device="gpu", tokens=5000)).host
    assert inputs == 32 * 2**26 > 32 * 5000 * 4096 * 2


def test_paged_state_is_on_the_host_of_a_gpu_only() -> None:
    on_gpu = plan_memory(LLAMA_8B, Setting(paged=True, device="gpu"))
    on_cpu = plan_memory(LLAMA_8B, Setting(paged=True))
    assert on_gpu.named("optimizer") == 0 and on_cpu.host == 0
    assert 2 * on_cpu.named("optimizer") > on_gpu.host >= on_cpu.named("optimizer") > 0


def test_a_tied_head_counts_once_and_experts_one_by_one() -> None:
    tied = ModelShape.from_config({
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 128, "max_position_embeddings": 64, "tie_word_embeddings": True,
    })  # fmt: skip
    one = memory.bytes_of((192, 64), "nf4") + memory.bytes_of((64, 96), "nf4")
    dense = sum(memory.bytes_of(weight.size, "nf4") for weight in tied.weights if weight.kind == "linear")
    assert packed_bytes(tied, Setting()) == dense + 2 * (4 * one - 2 * 3 * (64 + 1024))
    assert dense_bytes(tied, Setting()) == 2 * (tied.total_params - tied.params_of("linear") - tied.params_of("experts"))
    assert trained_params(tied, Setting(rank=2, targets=("experts.down_proj",))) == 2 * 4 * 2 * (64 + 96)


def test_patterns_are_those_of_training() -> None:
    assert trained_params(LLAMA_8B, Setting(layers=(0, 5))) * 16 == trained_params(LLAMA_8B, Setting())
    assert trained_params(LLAMA_8B, Setting(targets=r".*\.[qv]_proj")) == trained_params(LLAMA_8B, Setting(targets=("q_proj", "v_proj")))
    assert trained_params(LLAMA_8B, Setting(exclude=("mlp.down_proj",))) < trained_params(LLAMA_8B, Setting())
    with pytest.raises(TargetError, match="did you mean q_proj"):
        trained_params(LLAMA_8B, Setting(targets=("q_projj",)))


def test_full_trains_each_weight_once(tiny_llama: Any) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    shape = ModelShape.from_config(model.config.to_dict())
    setting = Setting(dtype="float32").with_method("full")
    assert trained_params(shape, setting) == sum(parameter.numel() for parameter in model.parameters()) == shape.total_params
    plan = plan_memory(shape, setting)
    assert plan.named("weights, dense") == plan.named("gradients") == 4 * shape.total_params == plan.named("optimizer") // 2


def test_holes_of_the_heap_are_one_block_a_layer_on_a_processor_only() -> None:
    """2,048 tokens of 14,336 inner columns in bfloat16 and 32 layers; where only layer inputs stay, 4,096 columns."""
    setting = Setting(tokens=2048)
    assert plan_memory(LLAMA_8B, setting).named("heap gaps") == 32 * 2048 * 14336 * 2
    assert plan_memory(LLAMA_8B, replace(setting, policy="recompute")).named("heap gaps") == 32 * 2048 * 4096 * 2
    assert plan_memory(LLAMA_8B, replace(setting, policy="offload")).named("heap gaps") == 32 * 2048 * 4096 * 2
    assert plan_memory(LLAMA_8B, replace(setting, device="gpu")).named("heap gaps") == 0
