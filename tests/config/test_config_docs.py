"""docs/config.md and docs/config.schema.json are what the settings say now; every setting says what it is for."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config import RunConfig, json_schema, load_config, markdown
from halfbyte.config.field_problems import setting_names
from halfbyte.config.inert import INERT
from halfbyte.config.rules import LORA_CLASHES, RUN_CLASHES, value_at

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == markdown(), "run: python -m halfbyte.config.docs"


def test_the_schema_is_current() -> None:
    kept = json.loads((ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8"))
    assert kept == json_schema(), "run: python -m halfbyte.config.docs"


def test_every_setting_has_a_docstring_and_stands_on_the_page() -> None:
    page = markdown()
    names = setting_names(RunConfig)
    assert len(names) > 75
    for name, field in names.items():
        assert field.description and field.description.endswith("."), name
        if "." in name:
            assert f"| `{name}` |" in page


def test_the_rules_name_settings_that_exist() -> None:
    config = load_config(None, ["data=rows.jsonl"])
    for clash in (*LORA_CLASHES, *RUN_CLASHES):
        for key in clash.keys:
            value_at(config, key)
    for row in INERT:
        for key in (*row.keys, row.because):
            value_at(config, key.removesuffix(".*"))
    codes = [clash.code for clash in (*LORA_CLASHES, *RUN_CLASHES)]
    assert len(set(codes)) == len(codes)


def test_the_schema_knows_the_short_forms_and_forbids_unknown_keys() -> None:
    schema = json_schema()
    assert {"type": "string"} in schema["properties"]["data"]["anyOf"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["LoraConfig"]["properties"]["rank"]["maximum"] == 4096


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_valid_and_explains_itself(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    config: Any = load_config(path)
    assert config.data.path
    assert text.startswith("#") and text.count("#") >= 8
