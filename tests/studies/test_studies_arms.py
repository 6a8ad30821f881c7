"""Named settings of a comparison: the rows and seeds that all share, names that make files, and keys that have an effect in some only."""

from pathlib import Path

import pytest

from halfbyte.errors import ConfigError
from halfbyte.studies.arms import METHODS, NAME, arms_of


def refused(file: Path, text: str) -> str:
    file.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        arms_of(None, [], {"data": "rows.jsonl"}, file=file)
    return str(caught.value)


@pytest.mark.parametrize(
    "text", ["data.max_tokens: 57", "data.long_rows: cut-prompt", "data.train_on: all", "data: {skip_bad_rows: 3}", "train.seed: 3",
             "model.task: sequence-classification"]
)  # fmt: skip
def test_what_decides_rows_labels_and_seeds_is_the_same_for_all(text: str, tmp_path: Path) -> None:
    """# T72 a setting that leaves out the long rows is judged by other held-out rows than its neighbours."""
    assert "E-CONF-423" in refused(tmp_path / "arms.yaml", f"a: {{method: lora, {text}}}")


def test_the_folder_is_the_studys() -> None:
    with pytest.raises(ConfigError, match="E-CONF-421"):
        arms_of(None, ["out=x"], {"data": "rows.jsonl"}, methods=["lora"])


def test_a_named_setting_has_no_folder_of_its_own(tmp_path: Path) -> None:
    assert "E-CONF-421" in refused(tmp_path / "arms.yaml", "a: {method: lora, out: elsewhere}")


@pytest.mark.parametrize("name", ["r8.json", "r8.yaml", "r8.log", "r.8.json"])
def test_no_name_is_that_of_a_file_beside_another_settings_folder(name: str, tmp_path: Path) -> None:
    """sweep/r8.json is the sweep of r8, and would be the folder of r8.json."""
    said = refused(tmp_path / "arms.yaml", f"r8: {{method: lora}}\n{name}: {{method: lora}}")
    assert "E-CONF-412" in said and ".json" in said
    assert NAME.match("r8.json5") and NAME.match("r8.jsonl") and NAME.match("json")


def test_a_key_for_the_calibration_goes_where_something_is_calibrated() -> None:
    """# T44 given for all, it has an effect in one of the four settings; without that one it has none and is refused."""
    made = {one.name: one.config for one in arms_of(None, ["quant.calibration_rows=20"], {"data": "rows.jsonl"}, methods=list(METHODS))}
    assert made["qlora-calibrated"].quant.calibration_rows == 20 and made["qlora-calibrated"].quant.calibrate is True
    assert all("calibration_rows" not in made[name].quant.model_fields_set for name in ("full", "lora", "qlora"))
    assert made["qlora"].quant.calibrate is False
    with pytest.raises(ConfigError, match="E-CONF-170"):
        arms_of(None, ["quant.calibration_rows=20"], {"data": "rows.jsonl"}, methods=["full", "lora", "qlora"])
    with pytest.raises(ConfigError, match="E-CONF-"):
        arms_of(None, ["quant.calibration_rows=no"], {"data": "rows.jsonl"}, methods=list(METHODS))
