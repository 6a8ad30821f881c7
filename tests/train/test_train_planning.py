"""A run makes its plan before a weight is loaded: it refuses, chooses, says why, and a resumed run keeps what was chosen."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config import RunConfig, load_config
from halfbyte.errors import DoesNotFitError, UnsupportedError
from halfbyte.plan import rates
from halfbyte.plan.decide import Choice, applied, lines
from halfbyte.plan.hardware import PROCESSOR, Hardware
from halfbyte.plan.rates import keep, widths_of
from halfbyte.shape import ModelShape
from halfbyte.train import from_config, loop, planning
from tests.plan.test_plan_rates import RATES
from tests.train.small_run import Stage
from tests.train.tiny_runs import Quiet, data, uneven

AUTO = {"train.micro_batch_size": "auto", "train.save_every_steps": 1, "train.eval_every_steps": None}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "stage", changes=AUTO).prepare()


def here(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(planning, "place_of", lambda device: Hardware("this machine's processor", "cpu", memory))


def with_train(config: RunConfig, **values: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def test_what_cannot_fit_is_refused_before_anything_is_loaded(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, 100 << 20)
    monkeypatch.setattr(from_config, "assemble", lambda config: pytest.fail("the model was loaded"))
    with pytest.raises(DoesNotFitError, match="E-FIT-401") as caught:
        from_config.prepare(stage.config(tmp_path / "run"))
    assert "the largest term is program" in str(caught.value) and not (tmp_path / "run").exists()


def test_choices_and_reasons_are_told_and_kept(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, 64 << 30)
    out, ear = tmp_path / "run", Quiet()
    asked = with_train(stage.config(out), max_steps=1).model_copy(update={"method": "auto"})
    from_config.train_from_config(asked, observers=[ear])
    saved = load_config(out / "config.yaml")
    assert (saved.method, saved.train.micro_batch_size, saved.train.activations) == ("lora", 4, "keep")
    kept = json.loads((out / "plan.json").read_text())
    assert {one["key"]: one["value"] for one in kept["chosen"]} == {
        "method": "lora", "train.micro_batch_size": 4, "train.activations": "keep"}  # fmt: skip
    assert all(one["reason"] for one in kept["chosen"])
    said = [text for label, text in ear.header.lines if label == "chosen"]
    assert len(said) == 3 and said[0].startswith("method=lora: it needs")
    assert any(label == "plan" and "estimate" in text for label, text in ear.header.lines)


def test_a_resumed_run_keeps_what_its_start_chose(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other memory a fresh start would choose otherwise; a resume neither does nor is refused for it."""
    here(monkeypatch, 64 << 30)
    out = tmp_path / "run"
    asked = stage.config(out).model_copy(update={"method": "auto"})
    from_config.train_from_config(with_train(asked, max_steps=1), observers=[Quiet()])
    here(monkeypatch, 100 << 20)
    ear = Quiet()
    result = from_config.train_from_config(with_train(asked, max_steps=2), resume=True, observers=[ear])
    assert result.steps == 2 and load_config(out / "config.yaml").method == "lora"
    assert any("more than is there" in text for label, text in ear.header.lines if label == "plan")


def test_a_packed_length_that_the_plan_chose_is_the_length_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path / "stage", "lora, packed, 2 workers", changes={**AUTO, "data.max_tokens": "auto", "data.workers": 0}).prepare()
    here(monkeypatch, 64 << 30)
    config = stage.config(tmp_path / "run")
    roomy = from_config.prepare(config)
    assert roomy.config.data.max_tokens == roomy.data.report.max_tokens == 64  # the model's limit
    assert roomy.plan is not None
    shorter = Choice("data.max_tokens", 32, "for this test")
    plan = replace(roomy.plan, config=applied(roomy.config, [shorter]), choices=(shorter,))
    monkeypatch.setattr(planning, "decide", lambda *given: plan)
    short = from_config.prepare(config)
    assert short.data.digest == roomy.data.digest
    packed = loop.items_of(short.config, short.data)
    assert max(len(row.input_ids) for row in packed) <= 32 and len(packed) > len(loop.items_of(roomy.config, roomy.data))


def test_a_family_that_no_plan_knows_is_left_to_loading(stage: Stage, tmp_path: Path) -> None:
    config = stage.config(tmp_path / "run")
    path = stage.root / "model" / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"unheard_of"'), encoding="utf-8")
    with pytest.raises(UnsupportedError, match="E-UNSUP-901"):
        planning.plan_of(config.model_copy(update={"method": "auto"}), path.parent, data(uneven(8)))
    assert planning.plan_of(config, path.parent, data(uneven(8))) is None


def test_memory_that_this_program_holds_already_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.host, "memory_bytes", lambda: (8 << 30, 5 << 30))
    monkeypatch.setattr(planning.host, "rss_anon_bytes", lambda: 1 << 30)
    assert planning.place_of("cpu") == Hardware("this machine's processor", "cpu", 6 << 30)


def test_the_context_that_a_card_holds_already_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA says is free is without the context that asking makes; what this process holds on the host is the program's too."""
    monkeypatch.setattr(planning.devices, "compute_device", lambda device: "cuda")
    monkeypatch.setattr(planning.torch.cuda, "mem_get_info", lambda: (7 << 30, 8 << 30))
    monkeypatch.setattr(planning.torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(planning.host, "memory_bytes", lambda: (8 << 30, 5 << 30))
    monkeypatch.setattr(planning.host, "rss_anon_bytes", lambda: 1 << 30)
    place = planning.place_of("cuda")
    assert place == Hardware("NVIDIA L4", "gpu", (7 << 30) + place.program_bytes, 6 << 30)
    monkeypatch.setattr(planning.torch.cuda, "mem_get_info", lambda: (8 << 30, 8 << 30))
    assert planning.place_of("cuda").memory_bytes == 8 << 30


@pytest.fixture
def long_run(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> planning.Decision:
    """A decision for a run that counts as long, on an idle machine without rates; `measure` must not be called unless a test allows it."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(planning, "LONG_RUN_SECONDS", 0.0)
    monkeypatch.setattr(rates.host, "processor_share", lambda: 1.0)
    monkeypatch.setattr(planning, "measure", lambda shape, dtype, threads: pytest.fail("measured"))
    here(monkeypatch, 64 << 30)
    return planning.decide(
        stage.config(tmp_path / "run"), ModelShape.read(stage.root / "model"), planning.place_of("cpu"), planning.rows_of(data(uneven(8))),
        "bfloat16",
    )  # fmt: skip


def test_a_long_run_on_an_idle_machine_measures_it_once(long_run: planning.Decision, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(RATES, widths=widths_of(long_run.shape), device=PROCESSOR, threads=rates.threads_of(long_run.config.train.threads))
    monkeypatch.setattr(planning, "measure", lambda shape, dtype, threads: keep(mine))
    assert planning.rates_for(long_run, "bfloat16") == mine
    monkeypatch.setattr(planning, "measure", lambda shape, dtype, threads: pytest.fail("measured twice"))
    kept = planning.rates_for(long_run, "bfloat16")
    said = dict(lines(planning.with_time(long_run, kept)))
    assert "an epoch (estimate from this machine's rates, measured on 2026-11-02)" in said["time"]
    assert "time" not in dict(lines(planning.with_time(long_run, None)))


def test_short_runs_busy_machines_and_gpus_are_not_measured(long_run: planning.Decision, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = replace(long_run, place=Hardware("NVIDIA L4", "gpu", 20 << 30))
    assert planning.rates_for(gpu, "bfloat16") is None
    monkeypatch.setattr(rates.host, "processor_share", lambda: 0.3)
    assert planning.rates_for(long_run, "bfloat16") is None
    monkeypatch.setattr(planning, "LONG_RUN_SECONDS", 1e9)
    monkeypatch.setattr(rates.host, "processor_share", lambda: 1.0)
    assert planning.rates_for(long_run, "bfloat16") is None


def test_a_damaged_calibration_of_this_machine_stops_no_run(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    here(monkeypatch, 64 << 30)
    path = keep(RATES)
    path.write_text("{", encoding="utf-8")
    config = stage.config(tmp_path / "run")
    decision = planning.plan_of(config, Path(config.model.name), data(uneven(4)))
    assert decision is not None and decision.seconds_per_step is None
