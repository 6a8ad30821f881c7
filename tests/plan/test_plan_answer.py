"""What a plan answers: a folder that is packed, a card without bfloat16, the card to take instead, the rows of a step."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.plan import hardware, question
from halfbyte.plan.answer import answer
from halfbyte.plan.memory import packed_bytes, plan_memory
from halfbyte.plan.question import ask
from halfbyte.plan.setting import Setting
from halfbyte.plan.text import _card
from halfbyte.shape import ModelShape
from tests.plan.asked import SMALL, plan


@pytest.mark.parametrize(
    ("block", "format"),
    [({"load_in_8bit": True}, "int8"), ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4"),
     ({"load_in_4bit": True}, "fp4")],
)  # fmt: skip
def test_a_packed_folder_is_planned_as_it_is(tmp_path: Path, block: dict[str, Any], format: str) -> None:
    packed = {**SMALL, "quantization_config": {"quant_method": "bitsandbytes", **block}}
    (tmp_path / "config.json").write_text(json.dumps(packed), encoding="utf-8")
    code, text, _ = plan(tmp_path, "--gpu", "H100")
    assert code == 0 and "1. qlora" in text and "2. " not in text and f"packed already in {format}" in text
    said = json.loads(plan(tmp_path, "--gpu", "H100", "--json")[1])
    shape, double = ModelShape.from_config(packed), "bnb_4bit_use_double_quant" in block
    wanted = packed_bytes(shape, Setting(format=format, double_quant=double))
    assert [term["bytes"] for term in said["methods"]["qlora"]["terms"] if term["name"] == "weights, packed"] == [wanted]
    assert list(said["methods"]) == ["qlora"]
    code, _, err = plan(tmp_path, "--gpu", "H100", "--method", "lora")
    assert code == 2 and err.startswith("error E-CONF-409")


def test_a_card_without_bfloat16_is_planned_in_float32(config: Path) -> None:
    """T4 and V100 would only emulate it."""
    dense = {
        name: next(term["bytes"] for term in json.loads(plan(config, "--gpu", name, "--json")[1])["methods"]["lora"]["terms"]
                   if term["name"] == "weights, dense")
        for name in ("T4", "L4")
    }  # fmt: skip
    assert dense["T4"] == 2 * dense["L4"]


def test_a_card_that_is_named_is_planned_as_a_card(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor's heap and program are not a card's, whose smallest sizes would do for more."""
    small = hardware.Hardware(hardware.PROCESSOR, "cpu", 700 << 20)
    monkeypatch.setattr(question, "this_machine", lambda: small)
    text = plan(config, "--method", "full")[1]
    assert "nothing of this fits" in text and "take a card with 8 GB" in text
    heavy = replace(ask(str(config), method="full"), hardware=small)
    one = answer(heavy).found["full"]
    longer = replace(one, setting=replace(one.setting, tokens=8192, micro_batch_size=2, policy="keep"))
    on_cpu = plan_memory(heavy.shape, longer.setting, small.program_bytes).total
    on_card = plan_memory(heavy.shape, replace(longer.setting, device="gpu"), hardware.PROGRAM_BYTES["gpu"]).total
    assert on_card < on_cpu and f"{_size_for(on_card)} GB" in _card(answer(heavy), longer) and _size_for(on_card) < _size_for(on_cpu)


def _size_for(needed: int) -> int:
    return min(card.gb for card in hardware.CARDS.values() if card.memory_bytes >= 1.05 * needed)


def test_a_micro_batch_that_was_given_divides_the_step(config: Path) -> None:
    assert "time for steps of 16 rows" in plan(config, "--gpu", "H100", "--micro-batch-size", 8)[1]
    assert "time for steps of 24 rows" in plan(config, "--gpu", "H100", "--micro-batch-size", 12)[1]
