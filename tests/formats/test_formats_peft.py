"""The PEFT folder: what is written key by key, and every broken or hostile folder refused with its own error."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file, save_file

from halfbyte.config.lora import LoraConfig
from halfbyte.errors import AdapterError, HalfbyteError, StorageError
from halfbyte.formats import peft
from halfbyte.formats.peft_config import DEFAULTS, safe_pattern

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
P = "base_model.model."


def tensors(rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {f"{Q}.lora_a": draw(rank, 8), f"{Q}.lora_b": draw(8, rank), f"{V}.lora_a": draw(rank, 8), f"{V}.lora_b": draw(4, rank)}


def write(folder: Path, config: LoraConfig | None = None, given: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
    return peft.save(folder, given or tensors(), config or LoraConfig(rank=2, alpha=4, targets=("q_proj", "v_proj")),
                     **{"kinds": {Q: "linear", V: "linear"}, "targets": ("q_proj", "v_proj"), **settings})  # fmt: skip


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "<gone>"}))


def edit_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    save_file({key: tensor.contiguous() for key, tensor in change(held).items()}, path, {"format": "pt"})


def test_the_folder_is_what_peft_writes(tmp_path: Path) -> None:
    """41 keys, sorted, indent 2, no newline at the end; metadata exactly {"format": "pt"}; values as PEFT's own for the same settings."""
    from safetensors import safe_open

    folder = write(tmp_path / "adapter", base_name="some/model")
    text = (folder / "adapter_config.json").read_text()
    theirs = PeftConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", base_model_name_or_path="some/model")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    expected.update(inference_mode=True, target_modules=["q_proj", "v_proj"])
    assert json.loads(text) == expected
    assert text == json.dumps(expected, indent=2, sort_keys=True)
    assert set(expected) == set(DEFAULTS)
    assert len(DEFAULTS) == 41
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(f"{P}{name}.lora_{part}.weight" for name in (Q, V) for part in "AB")
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nbase_model: "some/model"\nlibrary_name: peft\n')


def test_all_defaults_are_pefts(tmp_path: Path) -> None:
    PeftConfig(target_modules=["q"]).save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {**written, "target_modules": None, "inference_mode": True} == {**DEFAULTS, "peft_version": written["peft_version"]}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    """T29: ranks and alphas per module survive; T65: every bit does."""
    config = LoraConfig(rank=3, alpha=5, rslora=True, dropout=0.25, ranks={V: 2}, alphas={Q: 1.5})
    given = tensors(2) | {f"{Q}.lora_a": torch.randn(3, 8), f"{Q}.lora_b": torch.randn(8, 3)}
    adapter = peft.read(write(tmp_path / "adapter", config, given, base_digest="sha256:abc", base_name="b"))
    assert {name: torch.equal(given[name], adapter.tensors[name]) for name in given} == dict.fromkeys(given, True)
    assert (adapter.config.rank, adapter.config.alpha, adapter.config.rslora, adapter.config.dropout) == (3, 5, True, 0.25)
    assert (adapter.config.ranks, adapter.config.alphas) == ({V: 2}, {Q: 1.5})
    assert (adapter.base_digest, adapter.base_name, adapter.task) == ("sha256:abc", "b", "causal-lm")


@pytest.mark.parametrize("config", [
    LoraConfig(rank=2, alpha=1e6, dropout=0.9995, alphas={Q: 1e-3}), LoraConfig(rank=2, alpha=1e6, rslora=True, dropout=1 - 1e-9),
])  # fmt: skip
def test_what_a_setting_may_be_an_adapter_may_be(config: LoraConfig, tmp_path: Path) -> None:
    """The bounds stand once: what training accepts at its start is saved at its end."""
    read = peft.read(write(tmp_path / "adapter", config)).config
    assert (read.alpha, read.dropout, read.alphas) == (config.alpha, config.dropout, config.alphas)


def broken_bin(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def nan(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    held[f"{P}{Q}.lora_A.weight"][0, :3] = float("nan")
    return held


def rename(old: str, new: str) -> Any:
    return lambda folder: edit_tensors(folder, lambda held: {key.replace(old, new): value for key, value in held.items()})


def drop(part: str) -> Any:
    return lambda folder: edit_tensors(folder, lambda held: {key: value for key, value in held.items() if part not in key})


def config_with(**changes: Any) -> Any:
    return lambda folder: edit(folder, **changes)


BROKEN: dict[str, tuple[Any, str, str]] = {
    "pickled only": (broken_bin, "E-ADAPT-039", "adapter_model.bin"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "E-ADAPT-040", "no adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "E-ADAPT-040", "no adapter_model.safetensors"),
    "config is no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "E-ADAPT-032", "adapter_config.json"),
    "config is a list": (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "E-ADAPT-032", "list"),
    "config is deep": (lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000), "E-ADAPT-032", "adapter_config.json"),
    "config is huge": (lambda folder: (folder / "adapter_config.json").write_text(" " * 4_000_001), "E-ADAPT-032", "4000001 bytes"),
    "key stands twice": (
        lambda folder: (folder / "adapter_config.json").write_text('{"r": 2, "r": 2, "peft_type": "LORA"}'), "E-ADAPT-032", "twice",
    ),
    "NaN in the config": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}'), "E-ADAPT-032",
            "NaN",
    ),
    "unknown key": (config_with(use_dorra=True), "E-ADAPT-034", "did you mean use_dora"),
    "other method": (config_with(peft_type="ADALORA"), "E-ADAPT-033", "ADALORA"),
    "no method": (config_with(peft_type="<gone>"), "E-ADAPT-033", "None"),
    "alpha missing": (config_with(lora_alpha="<gone>"), "E-ADAPT-035", "no lora_alpha"),
    "rank missing": (config_with(r="<gone>"), "E-ADAPT-035", "no r"),
    "rank too large": (config_with(r=4097), "E-ADAPT-037", "4097"),
    "rank zero": (config_with(r=0), "E-ADAPT-037", "0"),
    "rank is a switch": (config_with(r=True), "E-ADAPT-037", "True"),
    "rank is text": (config_with(r="2"), "E-ADAPT-037", "'2'"),
    "alpha negative": (config_with(lora_alpha=-1), "E-ADAPT-037", "-1"),
    "alpha huge": (config_with(lora_alpha=1e300), "E-ADAPT-037", "1e+300"),
    "pattern rank too large": (config_with(rank_pattern={"q_proj": 10**6}), "E-ADAPT-037", "rank_pattern"),
    "pattern that explodes": (config_with(alpha_pattern={"(a+)+$": 4}), "E-ADAPT-037", "(a+)+$"),
    "dropout below zero": (config_with(lora_dropout=-1e-10), "E-ADAPT-037", "lora_dropout"),
    "dropout is a switch": (config_with(lora_dropout=False), "E-ADAPT-037", "lora_dropout"),
    "dropout of one": (config_with(lora_dropout=1.0), "E-ADAPT-037", "lora_dropout"),
    "bias of another kind": (config_with(bias="boft_only"), "E-ADAPT-037", "boft_only"),
    "task of another kind": (config_with(task_type="SEQ_2_SEQ_LM"), "E-ADAPT-037", "SEQ_2_SEQ_LM"),
    "library to import": (config_with(auto_mapping={"base_model_class": "x", "parent_library": "os"}), "E-ADAPT-037", "parent_library"),
    "library beside": (config_with(auto_mapping={"parent_library": "transformers_evil"}), "E-ADAPT-037", "transformers_evil"),
    "core to import": (config_with(megatron_core="os.path"), "E-ADAPT-038", "os.path"),
    "megatron": (config_with(megatron_config={"a": 1}), "E-ADAPT-038", "megatron_config"),
    "token adapters": (config_with(trainable_token_indices=[1]), "E-ADAPT-038", "trainable_token_indices"),
    "replicated layers": (config_with(layer_replication=[[0, 2]]), "E-ADAPT-038", "layer_replication"),
    "runtime config": (config_with(runtime_config={}), "E-ADAPT-034", "runtime_config"),
    "unconverted pissa": (config_with(init_lora_weights="pissa_niter_4"), "E-ADAPT-036", "path_initial_model_for_weight_conversion"),
    "scale edited: rslora": (config_with(use_rslora=True), "E-ADAPT-045", "2.82843"),
    "scale edited: alpha": (config_with(lora_alpha=8), "E-ADAPT-045", "2.0 by halfbyte.json"),
    "rank edited": (config_with(r=4, lora_alpha=8), "E-ADAPT-041", "config says 4, lora_A has 2 rows"),
    "dora without magnitudes": (config_with(use_dora=True), "E-ADAPT-054", "magnitude"),
    "bias without bias": (config_with(lora_bias=True), "E-ADAPT-054", "lora_bias"),
    "saved module without tensors": (config_with(modules_to_save=["lm_head"]), "E-ADAPT-046", "lm_head"),
    "compiled": (rename("model.layers", "_orig_mod.model.layers"), "E-ADAPT-050", "torch.compile"),
    "no prefix": (rename(P, "model."), "E-ADAPT-051", "model.model.layers.0"),
    "adapter name in the key": (rename(".weight", ".default.weight"), "E-ADAPT-051", "default"),
    "no factors": (lambda folder: edit_tensors(folder, lambda held: {}), "E-ADAPT-053", "none among 0 tensors"),
    "only a stranger": (rename("lora_A", "vera_lambda"), "E-ADAPT-051", "vera_lambda"),
    "lonely magnitude": (
        lambda folder: edit_tensors(folder, lambda held: held | {P + "x.lora_magnitude_vector": torch.ones(2)}), "E-ADAPT-054", "module x",
    ),
    "half of the pairs": (drop("lora_B"), "E-ADAPT-054", "lora_a, lora_b"),
    "one torn pair": (drop("v_proj.lora_A"), "E-ADAPT-054", "v_proj"),
    "NaN": (lambda folder: edit_tensors(folder, nan), "E-ADAPT-042", "3 of 16 values"),
    "dead": (
        lambda folder: edit_tensors(folder, lambda held: {key: t * ("lora_A" in key) for key, t in held.items()}), "E-ADAPT-043",
            "2 of 2 modules",
    ),
    "conv factors": (lambda folder: edit_tensors(folder, lambda held: {key: t[..., None] for key, t in held.items()}), "E-ADAPT-055",
    "(2, 8, 1)"),
    "whole numbers": (lambda folder: edit_tensors(folder, lambda held: {key: t.int() for key, t in held.items()}), "E-ADAPT-055",
    "floating"),
    "ranks disagree": (
        lambda folder: edit_tensors(folder, lambda held: held | {f"{P}{V}.lora_B.weight": torch.ones(4, 3)}), "E-ADAPT-041",
            "lora_B 3 columns",
    ),
    "stranger beside": (lambda folder: edit_tensors(folder, lambda held: held | {P + "x.weight": torch.ones(2)}), "E-ADAPT-051",
    "x.weight"),
    "truncated": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes()[:-9]),
        "E-WEIGHT-039", "adapter_model.safetensors",
    ),
    "own facts broken": (lambda folder: (folder / "halfbyte.json").write_text("{}"), "E-ADAPT-044", "base_digest"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_by_name(case: str, tmp_path: Path) -> None:
    """T28, T60, T65 and S4: each fault has its own error that names what is wrong; nothing is imported or run."""
    damage, code, said = BROKEN[case]
    folder = write(tmp_path / "adapter")
    damage(folder)
    with pytest.raises(HalfbyteError) as caught:
        peft.read(folder)
    assert caught.value.code == code, str(caught.value)
    assert said in str(caught.value)


def test_hostile_configs_end_quickly_in_a_typed_error(tmp_path: Path) -> None:
    """S4: any JSON value under any key is accepted in its place or refused, within a second, and never crashes."""
    folder = write(tmp_path / "adapter")
    values = [None, True, -1, 10**30, 1e308, "", "x" * 10_000, "../../etc/passwd", [], [[]], ["a"] * 1000, {}, {"a": {"b": []}},
        {"(x*)*y": 1},
              {"a{1000}{1000}": 2}, {"\\1(a)": 2}, [None], "os.system"]  # fmt: skip
    text = (folder / "adapter_config.json").read_text()
    began, refused = time.monotonic(), 0
    for key in DEFAULTS:
        for value in values:
            (folder / "adapter_config.json").write_text(json.dumps({**json.loads(text), key: value}))
            try:
                peft.read(folder)
            except HalfbyteError:
                refused += 1
    assert refused > 500
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", "a{1,1000}{1,1000}", ".*.*.*.*x", "(a|a)*$", "(?=a)*", "x" * 600, "("])
def test_patterns_that_could_hang_are_refused(pattern: str) -> None:
    assert not safe_pattern(pattern)


def test_an_untrained_adapter_is_saved_only_on_demand(tmp_path: Path) -> None:
    """T65: all lora_b zero is an error at save already, and nothing is left behind."""
    given = {name: tensor * name.endswith("lora_a") for name, tensor in tensors().items()}
    broken = {name: tensor * float("nan") for name, tensor in given.items()}
    for name, code, tensors_given in (("adapter", "E-ADAPT-043", given), ("nan", "E-ADAPT-042", broken)):
        with pytest.raises(AdapterError, match=code) as caught:
            write(tmp_path / name, given=tensors_given)
        said = str(caught.value)
        assert f"where:    {tmp_path / name}" in said and ".part" not in said
        assert "Nothing was saved." in said and "loaded" not in said
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "adapter", given=given, allow_untrained=True)
    assert peft.read(tmp_path / "adapter", allow_untrained=True).config.rank == 2


def test_what_does_not_read_back_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T65: a writer that loses a bit is caught before the old adapter is touched."""
    folder = write(tmp_path / "adapter")
    real = peft.save_tensors

    def losing(path: Path, held: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        real(path, {key: tensor + 1e-3 for key, tensor in held.items()}, metadata)

    monkeypatch.setattr(peft, "save_tensors", losing)
    with pytest.raises(AdapterError, match="4 of 4 tensors differ"):
        write(folder, given=tensors(seed=1))
    assert torch.equal(peft.read(folder).tensors[f"{Q}.lora_a"], tensors()[f"{Q}.lora_a"])
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "halfbyte.json",
    ]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("moment", range(6))
def test_a_crash_while_saving_leaves_the_old_or_a_refused_folder(
    fresh: bool, moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at the n-th rename: the folder is the old adapter, the new one, or refused; never a mixture."""
    folder = tmp_path / "adapter"
    if not fresh:
        write(folder)
    (tmp_path / "beside.txt").write_text("kept")
    left = [moment]
    real = {name: getattr(os, name) for name in ("replace", "rename")}

    class Crash(BaseException):
        pass

    def counted(name: str) -> Any:
        def move(source: Any, target: Any) -> None:
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            real[name](source, target)

        return move

    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    with contextlib.suppress(Crash):
        write(folder, given=tensors(seed=1))
    try:
        found = peft.read(folder).tensors[f"{Q}.lora_a"]
        assert any(torch.equal(found, tensors(seed=seed)[f"{Q}.lora_a"]) for seed in (0, 1))
    except AdapterError as error:
        assert error.code in ("E-ADAPT-031", "E-ADAPT-040")
    assert (tmp_path / "beside.txt").read_text() == "kept"


def test_what_a_killed_save_left_does_not_stop_the_next(tmp_path: Path) -> None:
    """In a container the process has the same number again."""
    (tmp_path / f".adapter.{os.getpid()}.part").mkdir()
    (tmp_path / "adapter" / f".adapter.{os.getpid()}.part").mkdir(parents=True)
    write(tmp_path / "adapter")
    (tmp_path / "adapter").rename(tmp_path / "moved")
    write(tmp_path / "adapter")
    assert peft.read(tmp_path / "adapter").config == peft.read(tmp_path / "moved").config


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    write(folder)
    write(folder, given=tensors(seed=2))
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert torch.equal(peft.read(folder).tensors[f"{Q}.lora_a"], tensors(seed=2)[f"{Q}.lora_a"])


def test_a_disk_that_refuses_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft, "_write", full)
    with pytest.raises(StorageError, match="No space left"):
        write(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "said"), [("config.json", "holds no adapter"), ("adapter_config.json", "an interrupted save")])
def test_a_folder_without_an_adapter_is_told_from_half_of_one(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(AdapterError, match=said) as caught:
        peft.read(tmp_path)
    assert caught.value.code == "E-ADAPT-040"
