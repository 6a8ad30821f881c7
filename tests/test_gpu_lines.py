"""What of the GPU benchmarks can be looked at without a GPU: their order, and the plan of each setting whose memory is measured."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_memory, gpu_run, train_inputs
from halfbyte.plan.hardware import card


def test_the_arms_that_matter_end_all_rounds_before_any_other_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    line = SimpleNamespace(
        name="step-8b", tiny=False, device="cuda", work=tmp_path, found={}, finish=lambda **summary: 0,
        child=lambda name, words, seconds: asked.append(name),
    )  # fmt: skip
    monkeypatch.setattr(gpu_run, "missing", lambda arm: [])
    monkeypatch.setattr(gpu_run, "model_folder", lambda line, shape: tmp_path)
    monkeypatch.setattr(train_inputs, "prepare", lambda work, settings: {"counts": {"all": {"tokens": [1] * settings.windows}}})
    monkeypatch.setattr(gpu_run, "gpu", lambda device: {"gpu": "NVIDIA H100"})
    assert gpu_run.step_8b(line) == 0  # type: ignore[arg-type]
    assert asked[:6] == [f"4x2048-{number}-{arm}-nf4" for number in range(3) for arm in ("train", "peft")]
    assert len(asked) == len(set(asked)) == 24


def test_every_setting_whose_memory_is_measured_has_a_plan(tmp_path: Path) -> None:
    """Twelve different ones, which fit the card they are measured on and are made from sizes alone."""
    settings = gpu_memory.settings()
    assert len({gpu_memory.name_of(setting) for setting in settings}) == 12
    totals = []
    for setting in settings:
        folder = tmp_path / setting["model"]
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **gpu_memory.SIZES[setting["model"]]}))
        said = gpu_memory.predict(setting, folder)
        assert "program" not in said["terms"] and said["predicted_bytes"] > 2**28
        totals.append(said["predicted_bytes"])
    assert len(set(totals)) == 12 and max(totals) < 0.9 * card("H100").memory_bytes
    assert set(gpu_run.LINES) >= {"memory-plan"} and gpu_run.RESULT_FILES["memory-plan"] == "memory-gpu"
