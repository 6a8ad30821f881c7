"""Reading and writing settings: YAML 1.2, precedence, notes, round trips, and any bytes at all."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.config import RunConfig, load_config, read_settings, to_yaml
from halfbyte.config.field_problems import setting_names
from halfbyte.config.rules import value_at
from halfbyte.config.yaml_text import dump, parse, scalar
from halfbyte.errors import ConfigError


def _load(tmp_path: Path, text: str, *overrides: str, **flags: Any) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides, {key.replace("__", "."): value for key, value in flags.items()})


def test_short_forms_and_defaults(tmp_path: Path) -> None:
    config = _load(tmp_path, "model: some/folder\ndata: rows.jsonl\n")
    assert (config.model.name, config.data.path, config.method, config.lora.rank) == ("some/folder", "rows.jsonl", "qlora", 16)
    assert config.quant_format == "nf4"


def test_command_line_beats_file_beats_default(tmp_path: Path) -> None:
    config = _load(tmp_path, "data: rows.jsonl\nlora: {rank: 8, alpha: 64}\n", "lora.rank=4", train__seed=7)
    assert (config.lora.rank, config.lora.alpha, config.train.seed) == (4, 64, 7)


@pytest.mark.parametrize(
    ("file", "said", "other", "default"),
    [
        ("train: {epochs: 3}", "train.max_steps=7", "train.epochs", 1.0),
        ("train: {max_steps: 7}", "train.epochs=3", "train.max_steps", None),
        ("optim: {warmup_share: 0.2}", "optim.warmup_steps=2", "optim.warmup_share", None),
        ("eval-path: held.jsonl", "data.eval_rows=9", "data.eval_path", None),
    ],
)  # fmt: skip
def test_the_command_line_takes_the_place_of_the_other_half_in_the_file(
    file: str, said: str, other: str, default: object, tmp_path: Path
) -> None:
    """And what is written of the settings names only the one in force; in one place both are refused, and null drops nothing."""
    text = f"data: {{path: rows.jsonl, {file}}}\n" if file.startswith("eval") else f"data: rows.jsonl\n{file}\n"
    config = _load(tmp_path, text, said)
    key, value = said.split("=")
    assert str(value_at(config, key)) in (value, f"{value}.0")
    assert other.rpartition(".")[2] not in value_at(config, other.split(".")[0]).model_fields_set
    if default is not None:
        assert value_at(config, other) == default
    assert _load(tmp_path, to_yaml(config)) == config
    assert ("epochs" in to_yaml(config)) == (key == "train.epochs" or not key.startswith("train"))
    with pytest.raises(ConfigError, match="E-CONF-170"):
        _load(tmp_path, "data: rows.jsonl\n", "train.max_steps=7", "train.epochs=3")
    with pytest.raises(ConfigError, match="E-CONF-170"):
        _load(tmp_path, "data: rows.jsonl\ntrain: {max_steps: 7, epochs: 3}\n")
    assert _load(tmp_path, "data: rows.jsonl\ntrain: {epochs: 3}\n", "train.max_steps=null").train.epochs == 3


def test_an_override_of_a_group_keeps_the_rest_of_the_file(tmp_path: Path) -> None:
    config = _load(tmp_path, "data: {path: rows.jsonl, packing: true}\n", "data=other.jsonl")
    assert (config.data.path, config.data.packing) == ("other.jsonl", True)


def test_the_same_flag_and_override_with_one_value_agree(tmp_path: Path) -> None:
    assert _load(tmp_path, "data: rows.jsonl\n", "model=folder", model__name="folder").model.name == "folder"


def test_none_is_the_value_null_of_a_setting_and_no_group(tmp_path: Path) -> None:
    config = _load(tmp_path, "data: rows.jsonl\nlora: {rank: 8}\n", optim__clip_norm=None, train={"eval_every_steps": None}, lora=None)
    assert (config.optim.clip_norm, config.train.eval_every_steps, config.lora.rank) == (None, None, 8)
    assert _load(tmp_path, "data: rows.jsonl\n", "optim.clip_norm=null") == _load(tmp_path, "data: rows.jsonl\n", optim__clip_norm=None)
    with pytest.raises(ConfigError, match=r"lora\.rank"):
        _load(tmp_path, "data: rows.jsonl\n", lora__rank=None)


def test_a_path_object_is_a_text(tmp_path: Path) -> None:
    assert load_config(None, flags={"data.path": tmp_path / "rows.jsonl"}).data.path == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("5e-4", 5e-4), (".5", 0.5), ("2.", 2.0), ("010", 10), ("+3", 3), ("yes", "yes"), ("no", "no"),
        ("on", "on"), ("off", "off"), ("true", True), ("False", False), ("null", None), ("~", None), ("2026-01-01", "2026-01-01"),
        ("12:30", "12:30"), ("1_000", "1_000"), ("0x1F", "0x1F"), ("1e", "1e"), ("NO", "NO"),
    ],
)  # fmt: skip
def test_words_are_read_as_yaml_1_2(text: str, value: object) -> None:
    assert scalar(text) == value and type(scalar(text)) is type(value)
    assert parse(f"a: {text}\n", "x")[0] == {"a": value}


@pytest.mark.parametrize("text", ["1e-4", "5E-4", "0.0001", '"1e-4"', "'0.0001'"])
def test_a_learning_rate_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    assert _load(tmp_path, f"data: rows.jsonl\noptim: {{learning_rate: {text}}}\n").optim.learning_rate in (1e-4, 5e-4)


def test_a_number_in_quotes_is_accepted_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text('data: rows.jsonl\nlora:\n  rank: "16"\n', encoding="utf-8")
    loaded = read_settings(path)
    assert loaded.config.lora.rank == 16
    assert loaded.notes == ['run.yaml line 3, lora.rank: the text "16" was read as the number 16']


def test_dashes_and_underscores_are_the_same(tmp_path: Path) -> None:
    config = _load(tmp_path, "data: rows.jsonl\ntrain: {micro-batch-size: 4}\n", "train.global-batch-size=8")
    assert (config.train.micro_batch_size, config.train.global_batch_size) == (4, 8)


def test_patterns_keep_their_own_spelling(tmp_path: Path) -> None:
    config = _load(tmp_path, "data: rows.jsonl\nlora: {ranks: {my-layer: 4}}\n", "lora.ranks.model.layers.0.q_proj=8")
    assert config.lora.ranks == {"my-layer": 4, "model.layers.0.q_proj": 8}


def test_lists_on_the_command_line(tmp_path: Path) -> None:
    config = _load(tmp_path, "data: rows.jsonl\n", "lora.targets=[q_proj, v_proj]", "lora.layers=[0, 2]", "optim.betas=[0.9, 0.95]")
    assert (config.lora.targets, config.lora.layers, config.optim.betas) == (("q_proj", "v_proj"), (0, 2), (0.9, 0.95))


def test_a_value_with_an_equals_sign_or_colon_is_kept_whole(tmp_path: Path) -> None:
    config = _load(tmp_path, "data: rows.jsonl\n", "out=runs/a=b", "model=C:/models/x")
    assert (config.out, config.model.name) == ("runs/a=b", "C:/models/x")


def test_an_empty_group_is_the_default_group(tmp_path: Path) -> None:
    assert _load(tmp_path, "data: rows.jsonl\nlora:\n").lora.rank == 16


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("\ufeffdata: rows.jsonl\r\nlora:\r\n  rank: 8\r\n".encode())
    assert load_config(tmp_path / "run.yaml").lora.rank == 8


@pytest.mark.parametrize(
    "overrides",
    [
        [], ["method=lora", "optim.learning_rate=3e-4"], ["method=full", "optim.schedule=constant"],
        ["model.task=sequence-classification", 'model.labels=[no, yes, "1e-4", "null"]'], ["quant.format=int8", "lora.rslora=true"],
        ["train.max_steps=50", "optim.warmup_steps=5", "train.save_every_steps=null"], ["data.eval_path=held.jsonl", "lora.ranks={a.b: 4}"],
        ["lora.fully_trained=[embed_tokens]", "optim.embedding_lr=1e-5", "out='2026'"], ["lora.init=loftq", "lora.loftq_iterations=3"],
    ],
)  # fmt: skip
def test_what_is_written_reads_back_equal_and_plainly(overrides: list[str], tmp_path: Path) -> None:
    import yaml

    config = load_config(None, ["data=rows.jsonl", *overrides])
    text = to_yaml(config)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert to_yaml(again) == text
    assert "!!" not in text
    assert yaml.safe_load(text)["data"]["path"] == "rows.jsonl"


EVERY_SETTING = """
method: qlora
out: runs/every
model:
  {name: folder, revision: abc, allow_download: true, dtype: float32, device: cpu, attention: eager, layers: original,
   template: chat.jinja}
quant: {format: fp4, blocksize: 128, double_quant: false, skip: [gate], quantize_head: true}
lora:
  {rank: 8, alpha: 24.0, dropout: 0.1, targets: [q_proj, v_proj], exclude: [o_proj], rslora: true, dora: true, init: loftq,
   loftq_iterations: 2, ranks: {k_proj: 4}, alphas: {k_proj: 2.0}, lora_bias: false, train_bias: lora_only,
   fully_trained: [embed_tokens], dtype: bfloat16, layers: [0, 2]}
data:
  {path: rows.jsonl, eval_rows: 20, shape: messages, max_tokens: 256, long_rows: cut-prompt, packing: true, train_on: last-assistant,
   skip_bad_rows: 3, max_rows: 900, workers: 2, strict: true}
optim:
  {learning_rate: 0.003, schedule: linear, final_lr_share: 0.2, warmup_share: 0.1, betas: [0.8, 0.95], eps: 1e-7, weight_decay: 0.01,
   clip_norm: 0.5, state: int8, paged: true, lora_plus_ratio: 4.0, embedding_lr: 0.0001}
train:
  {epochs: 2.5, micro_batch_size: 2, global_batch_size: 8, activations: recompute, eval_every_steps: 5, save_every_steps: 7,
   log_every_steps: 2, keep_checkpoints: 4, early_stop_patience: 6, keep_best: false, seed: 11, trackers: [tensorboard],
   on_nan: rollback, threads: 2, sample_prompts: 1, verify_checkpoints: false}
"""
EVERY_OTHER_SETTING = """
data: {path: rows.csv, eval_path: held.csv, shape: classification, text_field: body, label_field: kind}
model: {task: sequence-classification, labels: [a, b]}
optim: {warmup_steps: 3}
quant: {calibrate: true, calibration_rows: 20}
train: {max_steps: 30}
"""


def test_every_setting_survives_writing(tmp_path: Path) -> None:  # T44
    """Two files that together set every setting to something else than its default; each comes back whole."""
    default = load_config(None, ["data=-"])
    changed: set[str] = set()
    for text in (EVERY_SETTING, EVERY_OTHER_SETTING):
        config = _load(tmp_path, text)
        (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        assert load_config(tmp_path / "config.yaml") == config
        changed |= {name for name in setting_names(RunConfig) if value_at(config, name) != value_at(default, name)}
    assert set(setting_names(RunConfig)) - changed == {"method", "lora.lora_bias"}


def test_a_run_with_resolved_values_still_reads_back(tmp_path: Path) -> None:
    config = load_config(None, ["data=rows.jsonl", "train.max_steps=40"])
    resolved = config.model_copy(update={
        "optim": config.optim.model_copy(update={"learning_rate": 5e-4}), "train": config.train.model_copy(update={"micro_batch_size": 4}),
    })  # fmt: skip
    (tmp_path / "config.yaml").write_text(to_yaml(resolved), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == resolved


def test_settings_cannot_be_changed_afterwards() -> None:
    config = load_config(None, ["data=rows.jsonl"])
    with pytest.raises(ValueError, match="frozen"):
        config.method = "lora"


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=4), max_leaves=12,
)  # fmt: skip
_GROUP = st.sampled_from(["model", "data", "lora", "optim", "train", "quant", "method", "out", "x"])
_SETTING = st.sampled_from(["rank", "path", "ranks", "betas", "epochs", "targets"])
_QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@_QUICK
@given(st.text(alphabet=st.characters(codec="ascii", min_codepoint=32), max_size=30))
def test_any_text_survives_writing(text: str) -> None:
    assert parse(dump({"a": text}), "x")[0] == {"a": text}


def _settings_text(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, allow_unicode=True)


@_QUICK
@given(st.dictionaries(_GROUP, _PLAIN | st.dictionaries(_SETTING, _PLAIN, max_size=4)))
def test_any_values_are_accepted_or_refused_with_our_error(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "run.yaml").write_text(_settings_text(values), encoding="utf-8")
    try:
        load_config(tmp_path / "run.yaml")
    except ConfigError as error:
        assert error.code.startswith("E-CONF-")


@_QUICK
@given(st.binary(max_size=200) | st.text(alphabet="{}[]:,-&*!|>'\"#%@`\t\n a0", max_size=60).map(str.encode))
def test_any_bytes_are_accepted_or_refused_with_our_error(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(raw)
    try:
        load_config(tmp_path / "run.yaml")
    except ConfigError as error:
        assert error.nothing_done == "Nothing was trained."


@pytest.mark.parametrize("text", ["[" * 500_000, "a: {" * 200_000, "- " * 400_000, "? " * 400_000, '"' + "\\n" * 499_000, "&a " * 300_000])
def test_hostile_files_of_one_megabyte_are_refused_quickly(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    start = time.process_time()
    with pytest.raises(ConfigError):
        load_config(tmp_path / "run.yaml")
    assert time.process_time() - start < 5
