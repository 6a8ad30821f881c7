"""The public door: its names, and that it opens without starting anything."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import halfbyte

NAMES = [
    "HalfbyteError", "Run", "SaveAdapter", "eject", "evaluate", "generate", "inject", "label", "load", "load_adapter", "merge",
    "quantize", "save_adapter", "train",
]  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert halfbyte.__all__ == NAMES == dir(halfbyte)
    assert all(getattr(halfbyte, name).__doc__ for name in NAMES)


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'; it has HalfbyteError"):
        halfbyte.trian  # noqa: B018


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, halfbyte; sys.exit(bool({'torch', 'transformers', 'numba', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_folder_without_a_run_is_refused(tmp_path: object) -> None:
    with pytest.raises(halfbyte.HalfbyteError, match="a run is a folder that `halfbyte train` wrote"):
        halfbyte.Run.open(str(tmp_path))


def test_a_wrong_setting_names_the_nearest() -> None:
    import torch

    with pytest.raises(halfbyte.HalfbyteError, match=r"did you mean (lora\.)?rank"):
        halfbyte.inject(torch.nn.Linear(2, 2), rnak=4)


def test_a_package_with_the_name_of_a_function_can_be_called() -> None:
    code = (
        "import halfbyte as hb, halfbyte.train.loop, halfbyte.evaluate.loss\n"
        "assert hb.train.loop.run and hb.evaluate.loss.evaluate_loss\n"
        "train, judge = (lambda: hb.train(data='none.jsonl', model='no-such')), (lambda: hb.evaluate('no-such', 'x.jsonl'))\n"
        "for call in (train, judge):\n"
        "    try:\n        call()\n    except hb.HalfbyteError as error:\n        assert error.code == 'E-MODEL-001', error\n"
        "    else:\n        raise AssertionError('not refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


def test_a_value_that_is_no_text_is_named_in_the_error(tmp_path: Path) -> None:
    import torch

    from tests.models.small_models import write_folder

    hb: Any = halfbyte
    write_folder(tmp_path / "model")
    calls: list[tuple[str, str, Callable[[], object]]] = [
        ("E-CONF-083", "torch.bfloat16", lambda: hb.merge("no-run", tmp_path / "out", dtype=torch.bfloat16)),
        ("E-CONF-084", "4", lambda: hb.quantize(tmp_path / "model", tmp_path / "out", format=4)),
        ("E-CONF-082", "4", lambda: hb.load(tmp_path / "model", quant=4)),
        ("E-CONF-082", "False", lambda: hb.load(tmp_path / "model", quant=False)),
    ]
    for code, found, call in calls:
        with pytest.raises(halfbyte.HalfbyteError) as caught:
            call()
        assert caught.value.code == code and f"  found:    {found}\n" in str(caught.value)


def test_none_is_a_value_of_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte import api

    given: list[Any] = []
    monkeypatch.setattr(api, "train_config", lambda config, resume: given.append(config))
    train: Any = api.train
    train(data=tmp_path / "rows.jsonl", out=None, **{"optim.clip_norm": None})
    assert given[0].optim.clip_norm is None and given[0].out == "runs/run"
    with pytest.raises(halfbyte.HalfbyteError, match="E-CONF-022"):
        train(data="rows.jsonl", **{"lora.rank": None})


@pytest.mark.parametrize("seed", ["x", 1.5, None, -1, 2**64])
def test_inject_refuses_a_seed_that_is_none(seed: Any) -> None:
    import torch

    with pytest.raises(halfbyte.HalfbyteError) as caught:
        halfbyte.inject(torch.nn.Sequential(torch.nn.Linear(2, 2)), seed=seed)
    assert caught.value.place == "seed" and str(caught.value).endswith("Nothing was injected.")


def test_a_model_that_is_open_takes_no_options_of_opening(tmp_path: Path) -> None:
    from halfbyte.evaluate.opened import open_model
    from tests.models.small_models import write_folder

    write_folder(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 4)
    opened = open_model(tmp_path / "model")
    with pytest.raises(halfbyte.HalfbyteError) as caught:
        halfbyte.evaluate(opened, tmp_path / "rows.jsonl", adapter=tmp_path, quant="nf4")
    assert caught.value.code == "E-CONF-099" and caught.value.place == "adapter, quant"
    assert halfbyte.evaluate(opened, tmp_path / "rows.jsonl", adapter=None, force_base=False, max_rows=2)["loss"] > 0


def test_an_adapter_belongs_to_the_weights_it_was_trained_on(tmp_path: Path) -> None:
    """The weights of the folder a model came from are noted and compared, whether halfbyte or transformers loaded it."""
    import json

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from tests.models.small_models import write_folder

    source, other = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    held = load_file(other.folder / "model.safetensors")
    held["model.norm.weight"] += 0.25
    save_file(held, other.folder / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = halfbyte.load(source.folder)[0], AutoModelForCausalLM.from_pretrained(source.folder)
    for name, model in (("ours", ours), ("theirs", theirs)):
        halfbyte.inject(model, rank=2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.constant_(parameter, 0.5)
        if name == "ours":
            halfbyte.save_adapter(model, tmp_path / name)
        else:
            state: Any = SimpleNamespace(is_world_process_zero=True)
            nothing: Any = None
            halfbyte.SaveAdapter(tmp_path / name).on_train_end(nothing, state, nothing, model=model)
        assert json.loads((tmp_path / name / "halfbyte.json").read_text())["base_digest"] == source.weights != other.weights
        wrong = AutoModelForCausalLM.from_pretrained(other.folder)
        with pytest.raises(halfbyte.HalfbyteError) as caught:
            halfbyte.load_adapter(wrong, tmp_path / name)
        assert caught.value.code == "E-ADAPT-060" and "force_base=True" in str(caught.value)
        assert halfbyte.load_adapter(wrong, tmp_path / name, force_base=True).names
        assert halfbyte.load_adapter(halfbyte.load(source.folder)[0], tmp_path / name).names
    built = type(theirs)(type(theirs.config)(**{**theirs.config.to_dict(), "name_or_path": ""}))
    assert halfbyte.load_adapter(built, tmp_path / "theirs").names  # a model from no folder: its weights are not known


def test_an_untrained_adapter_is_kept_only_where_it_is_meant(tmp_path: Path) -> None:
    """By name in save_adapter and load_adapter; Trainer's own saves may come before the first step that changes anything."""
    from tests.models.small_models import write_folder

    source, nothing = write_folder(tmp_path / "a"), None
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=1)
    model = halfbyte.load(source.folder)[0]
    halfbyte.inject(model, rank=2)
    saver: Any = halfbyte.SaveAdapter(tmp_path / "end")
    place = SimpleNamespace(output_dir=tmp_path / "out")
    for save in (lambda: halfbyte.save_adapter(model, tmp_path / "end"), lambda: saver.on_train_end(place, state, nothing, model=model)):
        with pytest.raises(halfbyte.HalfbyteError) as caught:
            save()
        assert caught.value.code == "E-ADAPT-043" and caught.value.nothing_done == "Nothing was saved."
        assert "allow_untrained=True" in caught.value.remedy
    assert not (tmp_path / "end").exists()
    saver.on_save(place, state, nothing, model=model)
    early = halfbyte.save_adapter(model, tmp_path / "early", allow_untrained=True)
    for folder in (early, tmp_path / "out" / "checkpoint-1" / "adapter"):
        with pytest.raises(halfbyte.HalfbyteError, match="Nothing was loaded"):
            halfbyte.load_adapter(halfbyte.load(source.folder)[0], folder)
        assert halfbyte.load_adapter(halfbyte.load(source.folder)[0], folder, allow_untrained=True).names


@pytest.mark.parametrize("settings", [{}, {"init": "pissa"}, {"dora": True, "fully_trained": ["embed_tokens"]}])
def test_an_adapter_is_taken_out_and_leaves_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    """Every weight and the model's answers are as before, and the errors that say so lead there: another adapter can be put in."""
    import torch

    from tests.models.small_models import write_folder

    model: Any = halfbyte.load(write_folder(tmp_path / "a").folder, dtype="float32")[0]
    ids = torch.arange(40)[None]
    before, logits = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(ids).logits
    assert halfbyte.eject(model) == 0
    halfbyte.inject(model, rank=2, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.constant_(parameter, 0.5)
    halfbyte.save_adapter(model, tmp_path / "adapter")
    for again in (lambda: halfbyte.inject(model, rank=2), lambda: halfbyte.load_adapter(model, tmp_path / "adapter")):
        with pytest.raises(halfbyte.HalfbyteError, match=r"hb\.eject\(model\)"):
            again()
    assert not torch.allclose(model(ids).logits, logits, atol=1e-3)
    assert halfbyte.eject(model) > 0
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)
    assert halfbyte.load_adapter(model, tmp_path / "adapter").names


def test_training_loads_neither_peft_nor_bitsandbytes() -> None:
    """They are beside this program in many environments; transformers' trainer would bring them in, some 55 MiB and a warning of theirs."""
    code = "import sys; from halfbyte import api; print([name for name in ('peft', 'bitsandbytes') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
