"""What fits, in which order, what to change; cards and sizes; work and calibrated time; the estimate of row lengths."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.data.lengths import lengths
from halfbyte.errors import ConfigError
from halfbyte.plan import hardware, speed
from halfbyte.plan.hardware import CARDS_GB, Hardware, card, parse_driver, size_bytes, sized
from halfbyte.plan.search import FITS, NOT, TIGHT, Option, best, first_change, option, options, order
from halfbyte.plan.setting import Setting
from halfbyte.shape import ModelShape
from tests.plan.test_plan_memory import LLAMA_8B

SMALL = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip


def _found(place: Hardware) -> dict[str, Option]:
    return {method: best(options(LLAMA_8B, Setting().with_method(method), place)) for method in ("qlora", "lora", "full")}


def test_fits_keeps_the_margin_and_tight_is_within_it() -> None:
    needed = option(LLAMA_8B, Setting(), Hardware("x", "gpu", 2**60)).memory.total
    for share, verdict in ((1.06, FITS), (1.04, TIGHT), (1.001, TIGHT), (0.999, NOT)):
        assert option(LLAMA_8B, Setting(), Hardware("x", "gpu", int(needed * share))).verdict == verdict


def test_a_host_without_room_for_what_is_offloaded_does_not_fit() -> None:
    setting = Setting(policy="offload", tokens=8192, micro_batch_size=64)
    assert option(LLAMA_8B, setting, Hardware("x", "gpu", 2**60, 2**60)).verdict == FITS
    assert option(LLAMA_8B, setting, Hardware("x", "gpu", 2**60, 2**33)).verdict == NOT


def test_the_first_that_fits_recomputes_least() -> None:
    large, small = card("H200"), sized("8.5GB")
    assert best(options(LLAMA_8B, Setting(), large)).setting.policy == "keep"
    tried = options(LLAMA_8B, Setting(), small)
    chosen = best(tried)
    assert chosen.verdict == FITS and chosen.setting.policy != "keep"
    before = tried[: tried.index(chosen)]
    assert before and all(one.verdict != FITS for one in before)


def test_what_is_fixed_stays() -> None:
    base = Setting(policy="recompute", state="int8", micro_batch_size=2)
    tried = options(LLAMA_8B, base, card("H100"), frozenset({"policy", "state", "micro_batch_size"}))
    assert [(one.setting.policy, one.setting.state, one.setting.micro_batch_size) for one in tried] == [("recompute", "int8", 2)]


@pytest.mark.parametrize(
    ("name", "ranking"), [("H200", ["lora", "qlora", "full"]), ("RTX 4090", ["qlora", "lora"]), ("RTX 3060", ["qlora"])]
)
def test_order_of_methods(name: str, ranking: list[str]) -> None:
    assert [method for method, _ in order(_found(card(name)), card(name))] == ranking


def test_the_first_change_is_the_cheapest_that_is_enough() -> None:
    place = sized("24GB")
    one = option(LLAMA_8B, Setting(tokens=8192, micro_batch_size=1), place)
    assert one.verdict == NOT and one.memory.largest.name == "activations"
    change = first_change(LLAMA_8B, one, place)
    assert change is not None and change.text.startswith("train.activations=recompute_mlp") and change.option.verdict == FITS
    assert change.saved == one.memory.total - change.option.memory.total


def test_where_one_change_is_not_enough_the_largest_saving_is_named() -> None:
    place = sized("8GB")
    one = option(LLAMA_8B, Setting(policy="offload", state="int8", paged=True).with_method("full"), place)
    change = first_change(LLAMA_8B, one, place)
    assert one.memory.largest.name == "weights, dense" and change is not None and change.text == "method=qlora"


def test_cards_and_sizes() -> None:
    assert card("GeForce RTX 3090").memory_bytes == 24 * 10**9 and card("h100").name == "H100"
    assert all(card(name).memory_bytes == gigabytes * 10**9 for name, gigabytes in CARDS_GB.items())
    assert size_bytes("24") == size_bytes("24 GB") == 24 * 10**9 and size_bytes("1.5gib") == 3 * 2**29
    assert parse_driver("NVIDIA H100 80GB HBM3, 81000\nsecond, 5") == ("NVIDIA H100 80GB HBM3", 81000 << 20)
    assert parse_driver("No devices were found") is None


@pytest.mark.parametrize("text", ["", "-3", "24 apples", "nan", "1e9", "0.01", "9999999", "24GiB24"])
def test_a_size_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="E-CONF-401"):
        size_bytes(text)


def test_an_unknown_card_brings_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean A100 40GB, A100 80GB"):
        card("A100")


def test_this_machine_without_a_driver_is_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_driver_says", lambda: None)
    monkeypatch.setattr(hardware.host, "memory_bytes", lambda: (8 << 30, 5 << 30))
    assert hardware.this_machine() == Hardware("this machine's processor", "cpu", 5 << 30)


# Accounting of an 8B model, rank 16, 8,192 tokens: 263 TF as 4 x 2,048, 310 TF as 1 x 8,192; linear 228.7, head 17.2, adapters 2.1 TF.
@pytest.mark.parametrize(("tokens", "rows", "attention", "total"), [(2048, 4, 15.4, 263), (8192, 1, 61.6, 310)])
def test_work_of_a_step(tokens: int, rows: int, attention: float, total: float) -> None:
    work = speed.work_of(LLAMA_8B, Setting(tokens=tokens, micro_batch_size=rows))
    parts = (work.linear / 1e12, work.head / 1e12, work.adapters / 1e12, work.attention / 1e12)
    assert parts == pytest.approx((228.7, 17.2, 2.06, attention), rel=0.005)
    assert work.model / 1e12 == pytest.approx(total, abs=0.6)
    assert work.again == 0 and work.unpacked == 2 * LLAMA_8B.params_of("linear")


def test_what_a_policy_repeats() -> None:
    base = Setting(tokens=2048, micro_batch_size=4)
    mlp = speed.work_of(LLAMA_8B, replace(base, policy="recompute_mlp"))
    whole = speed.work_of(LLAMA_8B, replace(base, policy="recompute"))
    gate_up, down = 2 * 4096 * 14336 * 32, 4096 * 14336 * 32
    assert mlp.again == 2.0 * 8192 * gate_up
    assert whole.again == 2.0 * 8192 * (LLAMA_8B.params_of("linear") - down) + mlp.attention / 3.5
    assert mlp.model == whole.model
    full = speed.work_of(LLAMA_8B, base.with_method("full"))
    assert full.linear / whole.linear == 1.5 and full.unpacked == full.adapters == 0


def test_lengths_of_rows(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "x" * 292}, {"role": "assistant", "content": "yes"}]}, {"text": "a" * 30}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    found = lengths(str(path))
    assert found.tokens == (-(-(292 + 4 + 9 + 3 + 3) // 3) + 32 + 16, 10 + 32 + 8)
    assert found.longest == found.tokens[0] and "characters" in found.how


def test_small_models_fit_this_processor() -> None:
    shape = ModelShape.from_config(SMALL)
    place = Hardware("x", "cpu", 4 << 30)
    assert all(best(options(shape, Setting(tokens=512).with_method(method), place)).verdict == FITS for method in ("qlora", "lora"))
