"""A Hub id is fetched only where `--allow-download` was given, and the refusal says so; nothing here reaches a network."""

import io
from pathlib import Path

import huggingface_hub
import pytest

from halfbyte.cli.main import run
from tests.models.small_models import write_folder

HUB = "someone/some-model"


def commands(tmp_path: Path) -> dict[str, list[str]]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "completion": "2"}\n' * 4)
    return {
        "eval": ["eval", HUB, "--data", str(rows)],
        "generate": ["generate", HUB, "hi", "--max-new-tokens", "2"],
        "chat": ["chat", HUB, "--max-new-tokens", "2"],
        "merge": ["merge", str(tmp_path / "adapter"), "--model", HUB, "--out", str(tmp_path / "merged"), "--dtype", "float32"],
        "quantize": ["quantize", HUB, "--out", str(tmp_path / "small")],
    }


@pytest.mark.parametrize("name", ["eval", "generate", "chat", "merge", "quantize"])
def test_a_download_is_asked_for_by_a_flag(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfbyte.adapters.folder import save_adapter
    from halfbyte.config import LoraConfig
    from halfbyte.lora.inject import inject
    from halfbyte.models.load import load_model

    source, asked = write_folder(tmp_path / "hub"), []
    if name == "merge":
        model = load_model(source, dtype="float32")
        inject(model, LoraConfig(rank=2, targets="q_proj"))
        model.get_submodule("model.layers.0.self_attn.q_proj").lora_b.data.fill_(0.01)
        save_adapter(model, tmp_path / "adapter", base_name=HUB)

    def fetch(repository: str, **options: object) -> str:
        asked.append(repository)
        return str(source.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    words = commands(tmp_path)[name]
    assert run(words) == 2
    said = capsys.readouterr().err
    assert "E-MODEL-003" in said and "--allow-download" in said and "model.allow_download=true" in said and not asked
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run([*words, "--allow-download"]) == 0, capsys.readouterr().err
    assert set(asked) == {HUB}
