"""What a load gives: the same numbers as transformers, packed layers where they belong, exact rotary frequencies, nothing run."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte import host
from halfbyte.config.patterns import skips
from halfbyte.config.quant import QuantConfig
from halfbyte.errors import ModelError
from halfbyte.models import load, quantizer
from halfbyte.models.load import choose_dtype, load_model, load_tokenizer, token_limit
from halfbyte.models.quantizer import layers_to_quantize
from halfbyte.models.rope import exact_buffers, restore, rotary_modules
from halfbyte.models.source import Source
from halfbyte.quant.experts import QuantExperts, dense_expert
from halfbyte.quant.linear import QuantLinear
from tests.models.small_models import CONFIGS, make_model, write_folder

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "quantized_layers.json"
IDS = torch.arange(24)[None] * 11 % 320
FAMILIES = sorted(CONFIGS)


def nf4(**settings: Any) -> QuantConfig:
    return QuantConfig(format="nf4", **settings)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_dense_load_is_bitwise_transformers(kind: str, tmp_path: Path) -> None:
    """Several shards, fused experts and Conv1D included."""
    source = write_folder(tmp_path, kind, shard="100KB")
    loaded = load_model(source, dtype="float32")
    assert not loaded.training and len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(loaded(IDS).logits, make_model(kind)(IDS).logits)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_packing_on_arrival_equals_packing_afterwards(kind: str, format: str, tmp_path: Path) -> None:
    """Every packed layer holds what QuantLinear or QuantExperts make of the loaded weight, bit for bit; the rest is untouched."""
    source = write_folder(tmp_path, kind, shard="100KB")
    dense, packed = load_model(source, dtype="float32"), load_model(source, dtype="float32", quant=QuantConfig(format=format))
    seen = 0
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            old = dense.get_submodule(name)
            if not isinstance(old, nn.Linear):
                old, base = nn.Linear(1, 1), old
                old.weight, old.bias = nn.Parameter(base.weight.T), base.bias
            wanted = QuantLinear.from_linear(old, format)
            assert torch.equal(module.dequantize(), wanted.dequantize()) and module.blocksize == wanted.blocksize
            assert (module.bias is None) == (old.bias is None) and (old.bias is None or torch.equal(module.bias, old.bias))
            seen += 1
        if isinstance(module, QuantExperts):
            wanted_experts = QuantExperts.from_experts(dense.get_submodule(name), format)
            for key in module.shapes:
                assert all(torch.equal(dense_expert(module, key, e), dense_expert(wanted_experts, key, e)) for e in range(4))
            seen += 1
    assert seen == {"llama": 14, "mixtral": 10, "gpt2": 8}[kind]
    for name, parameter in packed.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)), name
    assert not any(tensor.is_meta for tensor in [*packed.parameters(), *packed.buffers()])
    assert torch.isfinite(packed(IDS).logits).all()


def twelve() -> dict[str, Any]:
    """Configs of twelve architectures, small."""
    import transformers as t

    common = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    moe = {**common, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return {
        "llama": t.LlamaConfig(**common), "mistral": t.MistralConfig(**common), "qwen2": t.Qwen2Config(**common),
        "qwen3": t.Qwen3Config(**common),
        "gemma2": t.Gemma2Config(**common, head_dim=16), "phi3": t.Phi3Config(**common), "granite": t.GraniteConfig(**common),
        "gpt2": CONFIGS["gpt2"](), "mixtral": CONFIGS["mixtral"](),
        "qwen2_moe": t.Qwen2MoeConfig(**moe, shared_expert_intermediate_size=64), "qwen3_moe": t.Qwen3MoeConfig(**moe),
        "mamba": t.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=320, state_size=8),
    }  # fmt: skip


def packed_names(kind: str) -> list[str]:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(twelve()[kind])
    return [name for name in layers_to_quantize(model) if ".0." not in name]


@pytest.mark.parametrize("kind", sorted(twelve()))
def test_what_is_packed_is_the_golden_list(kind: str) -> None:
    """# T56  Heads, routers, shared-expert gates, embeddings and layers whose raw weight is read stay out; layer 0 is not listed."""
    assert packed_names(kind) == json.loads(GOLDEN.read_text())[kind]


def test_the_users_list_is_added_to_the_defaults(tmp_path: Path) -> None:
    """# T56"""
    model = load_model(write_folder(tmp_path, "mixtral"), dtype="float32", quant=nf4(skip=("layers.0", "*.v_proj")))
    packed = [name for name, module in model.named_modules() if isinstance(module, (QuantLinear, QuantExperts))]
    assert packed == [f"model.layers.1.self_attn.{part}_proj" for part in "qko"] + ["model.layers.1.mlp.experts"]
    assert type(model.lm_head) is nn.Linear and model.model.layers[1].mlp.gate.weight.is_floating_point()


def test_bfloat16_that_a_gpu_only_emulates_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the processor can do says nothing about the card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(load.host, "native_bf16", lambda: "amx_bf16")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, native=native: native or including_emulation)
        assert choose_dtype()[0] == dtype


def test_a_name_part_is_matched_whole() -> None:
    """# T56  "gate" is a router's name and not the beginning of gate_proj."""
    model = make_model()
    assert layers_to_quantize(model, ("gate_proj",)) == [name for name in layers_to_quantize(model) if not name.endswith("gate_proj")]
    assert not skips("gate", "model.layers.11.mlp.gate_proj") and not skips("layers.1", "model.layers.11.mlp.gate_proj")
    with pytest.raises(ModelError, match="E-MODEL-041"):
        layers_to_quantize(model, ("gate",))


def test_the_head_only_when_asked_and_not_when_tied(tmp_path: Path) -> None:
    """# T56"""
    asked = load_model(write_folder(tmp_path / "a"), dtype="float32", quant=nf4(quantize_head=True))
    tied = load_model(write_folder(tmp_path / "b", tie_word_embeddings=True), dtype="float32", quant=nf4(quantize_head=True))
    assert isinstance(asked.lm_head, QuantLinear) and tied.lm_head.weight is tied.model.embed_tokens.weight


def angles(module: nn.Module, position: int) -> torch.Tensor:
    cos, sin = module(torch.zeros(1, 1, 16), torch.tensor([[position]]))
    return torch.cat([cos, sin]).double().flatten()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_angles_are_exact_whatever_the_dtype(dtype: str, tmp_path: Path) -> None:
    """# T40  cos and sin at far positions against float64, after a load from the meta device and after a cast of the whole model."""
    model = load_model(write_folder(tmp_path), dtype=dtype, quant=nf4())
    model.to(torch.bfloat16)
    assert restore(model) == 1
    ((_, module),) = rotary_modules(model)
    frequency = 1.0 / 10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    for position in (0, 257, 15_962):
        angle = torch.cat([position * frequency] * 2)
        exact = torch.cat([angle.cos(), angle.sin()])
        assert (angles(module, position) - exact).abs().max() < 2e-3 * max(1.0, position / 15_962), position
    assert all(buffer.dtype == torch.float32 for buffer in module.buffers())


def test_a_cast_frequency_would_be_seen() -> None:
    """# T40  The tolerance above tells bfloat16 frequencies apart."""
    model = make_model()
    ((_, module),) = rotary_modules(model)
    good = angles(module, 15_962)
    module.inv_freq = module.inv_freq.bfloat16().float()
    assert (angles(module, 15_962) - good).abs().max() > 0.5
    assert exact_buffers(module)["inv_freq"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_a_bitsandbytes_folder_is_read_to_the_bit(format: str, kind: str, tmp_path: Path) -> None:
    """What transformers + bitsandbytes saved in 4 or 8 bits dequantizes to equal bits here."""
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = write_folder(tmp_path / "dense", kind)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": format, "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**(four if format != "int8" else {"load_in_8bit": True}))
    theirs = AutoModelForCausalLM.from_pretrained(source.folder, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "packed")
    ours = load_model(Source("folder", tmp_path / "packed", "packed", ""), dtype="float32")
    seen = 0
    for name, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            dense = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(dense, ours.get_submodule(name).dequantize())
            seen += 1
        elif isinstance(module, bnb.nn.Linear8bitLt):
            assert torch.equal(module.weight.data, ours.get_submodule(name).weight)
            assert torch.equal(module.weight.SCB, ours.get_submodule(name).absmax)
            seen += 1
    assert seen == len([1 for module in ours.modules() if isinstance(module, QuantLinear)]) > 0


def test_keys_that_choose_code_files_or_kernels_are_dropped(tmp_path: Path) -> None:
    """Private keys, auto_map, another weight file, kernels: none reaches transformers; no file of the folder is run or imported."""
    source = write_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "_attn_implementation_internal": "owner/kernel", "_attn_implementation": "owner/kernel",
        "auto_map": {"AutoModelForCausalLM": "evil.Evil"},
        "transformers_weights": "other.safetensors", "fusion_config": {"x": 1}, "attn_implementation": "owner/kernel",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('the code of the folder ran')")
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("raise SystemExit('the code of the folder ran')")
    opened: list[str] = []
    watching = [True]  # a hook stays for the life of the process
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if watching and event == "open" and given else None)
    model = load_model(source, dtype="float32")
    load_tokenizer(source)
    watching.clear()
    assert any(path.endswith("config.json") for path in opened)
    assert not [path for path in opened if str(tmp_path) in path and path.endswith(".py")]
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.config, "auto_map") and "evil" not in sys.modules


def test_a_classifier_gets_the_labels_and_the_same_new_head(tmp_path: Path) -> None:
    """The head is new, dense, and equal each time; the backbone is packed."""
    source = write_folder(tmp_path)
    options: dict[str, Any] = {"dtype": "float32", "quant": nf4(), "task": "sequence-classification", "labels": ("no", "yes", "maybe")}
    first, second = load_model(source, **options), load_model(source, **options)
    assert torch.equal(first.score.weight, second.score.weight) and type(first.score) is nn.Linear and first.score.out_features == 3
    assert first.config.id2label == {0: "no", 1: "yes", 2: "maybe"} and isinstance(first.model.layers[0].mlp.up_proj, QuantLinear)


def test_packed_layers_train_adapters_in_bfloat16(tmp_path: Path) -> None:
    """The default dtype of a machine with native bfloat16 learns one row as float32 does."""
    from halfbyte.config.lora import LoraConfig
    from halfbyte.lora.inject import inject

    source = write_folder(tmp_path)

    def losses(dtype: str) -> list[float]:
        model = load_model(source, dtype=dtype, quant=nf4())
        inject(model, LoraConfig(rank=8))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        seen = []
        for _ in range(12):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        return seen

    half, single = losses("bfloat16"), losses("float32")
    assert single[-1] < 0.9 * single[0] and abs(half[-1] - single[-1]) < 0.02 * single[0]


def test_a_family_without_fused_attention_gets_the_eager_one(tmp_path: Path) -> None:
    """Gemma 2's soft cap inside attention is not in PyTorch's fused kernel; asked for sdpa it still loads."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(twelve()["gemma2"]).save_pretrained(tmp_path)
    model = load_model(Source("folder", tmp_path, "", ""), dtype="float32", attention="sdpa")
    assert model.config._attn_implementation == "eager"


def test_the_tokenizer_pads_and_the_limit_is_the_configs(tmp_path: Path) -> None:
    source = write_folder(tmp_path)
    assert load_tokenizer(source).pad_token_id == 0 and token_limit(source) == 512


def test_the_choice_of_dtype_says_why() -> None:
    dtype, why = choose_dtype("auto")
    assert dtype in (torch.bfloat16, torch.float32) and why
    assert choose_dtype("float32") == (torch.float32, "asked for")


def write_golden() -> None:
    """Write the golden list anew; read the difference."""
    GOLDEN.write_text(json.dumps({kind: packed_names(kind) for kind in sorted(twelve())}, indent=1) + "\n")


if __name__ == "__main__":
    write_golden()


def _mapped_bytes(file: Path) -> int:
    """Resident pages of a mapped file in this process."""
    blocks = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    held = [size for block in blocks if f"{file}\n" in block for size in re.findall(r"^Rss: +(\d+) kB", block, re.MULTILINE)]
    return sum(int(size) << 10 for size in held)


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="this system does not tell what is mapped")
def test_pages_of_the_files_go_back_while_a_model_is_packed_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 2048}
    make_model(**sizes).to(torch.bfloat16).save_pretrained(tmp_path)  # of the dtype it is used in: embeddings stay in the mapped file
    held, real = [], host.drop_mapped_pages

    def seen(files: Any) -> None:
        real(files)
        held.append(_mapped_bytes(tmp_path / "model.safetensors"))

    monkeypatch.setattr(host, "drop_mapped_pages", seen)
    monkeypatch.setattr(quantizer, "KEPT_PAGES", 1 << 20)
    model = load_model(tmp_path, quant=QuantConfig(format="nf4"), dtype="bfloat16")
    assert len(held) > 4 and max(held) <= 1 << 20 < (tmp_path / "model.safetensors").stat().st_size // 8
    assert _mapped_bytes(tmp_path / "model.safetensors") <= 1 << 16
    assert torch.isfinite(model(torch.arange(3, 9)[None]).logits).all()
    assert _mapped_bytes(tmp_path / "model.safetensors") > 0
