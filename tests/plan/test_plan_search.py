"""What fits, in which order, what to change; cards and sizes; work and calibrated time."""

from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.errors import ConfigError
from halfbyte.plan import hardware, speed
from halfbyte.plan.answer import Question, answer, as_dict, peak_of
from halfbyte.plan.hardware import CARDS, Hardware, card, known_as, parse_driver, size_bytes, sized
from halfbyte.plan.search import (
    FITS,
    HEADROOM,
    NOT,
    TIGHT,
    Option,
    best,
    best_of_each,
    first_change,
    needed_text,
    option,
    options,
    order,
    roomy,
)  # fmt: skip
from halfbyte.plan.setting import Setting
from halfbyte.shape import ModelShape
from tests.plan.asked import SMALL
from tests.plan.test_plan_memory import LLAMA_8B


def _found(place: Hardware) -> dict[str, Option]:
    return best_of_each({name: options(LLAMA_8B, Setting().with_method(name), place) for name in ("qlora", "lora", "full")}, place)


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
    ("name", "ranking"), [("H200", ["lora", "qlora", "full"]), ("RTX 4090", ["lora", "qlora"]), ("RTX 3060", ["qlora"])]
)
def test_order_of_methods(name: str, ranking: list[str]) -> None:
    assert [method for method, _ in order(_found(card(name)), card(name))] == ranking


def test_lora_takes_the_first_setting_that_leaves_a_fifth() -> None:
    """The largest micro-batch that fits leaves less; that is no reason to give up lora."""
    place = card("RTX 4090")
    tried = options(LLAMA_8B, Setting().with_method("lora"), place)
    greedy, room = best(tried), roomy(tried, place)
    assert greedy.verdict == FITS and greedy.headroom(place) < HEADROOM
    assert room is not None and room.headroom(place) >= HEADROOM
    assert _found(place)["lora"] == room and best_of_each({"lora": tried}, place)["lora"] == greedy


def test_little_host_memory_hides_no_setting_that_is_tight() -> None:
    """Paged state takes the least of the card, and is not there for the host; one that does without it is tight."""
    place = Hardware("x", "gpu", int(6.9 * 2**30), int(2.2 * 2**30))
    given = answer(Question("m", LLAMA_8B, place, Setting(device="gpu")))
    assert [method for method, _ in given.ranking] == ["qlora"] and given.found["qlora"].verdict == TIGHT
    assert {one.setting.method for one in given.listed} == {"qlora"}
    smallest = min(options(LLAMA_8B, Setting(), place), key=lambda one: one.memory.total)
    assert (smallest.verdict, smallest.short) == (NOT, "host")


def test_what_is_short_is_named() -> None:
    setting = Setting(policy="offload", tokens=8192, micro_batch_size=64)
    on_host = option(LLAMA_8B, setting, Hardware("x", "gpu", 2**60, 2**33))
    assert on_host.short == "host" and on_host.largest.name == "layer inputs on the host" and "host memory" in needed_text(on_host)
    change = first_change(LLAMA_8B, on_host, Hardware("x", "gpu", 2**60, 2**33))
    assert change is not None and change.option.verdict == FITS and change.text.startswith("train.activations=keep")
    on_card = option(LLAMA_8B, setting, Hardware("x", "gpu", 2**33, 2**33))
    assert on_card.short == "device" and on_card.needed == on_card.memory.total
    paged = option(LLAMA_8B, Setting(paged=True, device="gpu"), Hardware("x", "gpu", 2**60, 9 * 2**28))
    change = first_change(LLAMA_8B, paged, Hardware("x", "gpu", 2**60, 9 * 2**28))
    assert paged.short == "host" and change is not None and change.text in ("optim.state=int8", "optim.paged=false")


def test_micro_batches_of_an_answer_divide_the_global_batch() -> None:
    """64 rows of 128 tokens would keep an accelerator busy, and training refuses them with 16 rows a step."""
    given = answer(Question("m", LLAMA_8B, card("H200"), Setting(device="gpu", tokens=128)))
    assert {one.setting.micro_batch_size for one in given.listed} == {16, 8, 4, 2, 1}
    twelve = Question("m", LLAMA_8B, card("H200"), Setting(device="gpu", tokens=128, global_batch_size=12), global_batch_size=12)
    assert all(12 % one.setting.micro_batch_size == 0 for one in answer(twelve).listed)


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
    assert all(card(name).memory_bytes == CARDS[name].memory_bytes <= CARDS[name].gb * 10**9 for name in CARDS)
    assert size_bytes("24") == size_bytes("24 GB") == 24 * 10**9 and size_bytes("1.5gib") == 3 * 2**29


def test_cards_have_what_a_program_is_shown() -> None:
    """Sizes that PyTorch reports; a card of GDDR memory with error correction shows less than it is sold with."""
    shown = {"T4": 14.56, "A10": 21.99, "L40": 44.40, "L40S": 44.53, "RTX 6000 Ada": 44.43, "A100 40GB": 39.50, "H100": 79.11}
    for name, gib in shown.items():
        assert card(name).memory_bytes <= gib * 2**30 < 1.07 * card(name).memory_bytes
    assert card("MI250X").memory_bytes == 64 * 10**9  # two devices of a card
    assert [name for name in CARDS if not card(name).native_bf16] == ["RTX 2080 Ti", "T4", "P100", "V100 16GB", "V100 32GB"]


def test_what_the_driver_says_follows_what_cuda_shows() -> None:
    text = "0, GPU-aa, Tesla T4, 15000, 7.5\n1, GPU-bb, NVIDIA H100 80GB HBM3, 81000, 9.0\n"
    first, second = ("Tesla T4", 15000 << 20, False), ("NVIDIA H100 80GB HBM3", 81000 << 20, True)
    assert [parse_driver(text, visible) for visible in (None, "0", "1,0", "GPU-bb")] == [first, first, second, second]
    assert [parse_driver(text, hidden) for hidden in ("", "-1", "7")] == [None] * 3
    assert parse_driver("No devices were found") is None and parse_driver("0, GPU-aa, Tesla T4, [N/A], 7.5") is None


def test_a_driver_that_does_not_answer_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nsleep 5\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(hardware, "torch_uses_gpus", lambda: True)
    monkeypatch.setattr(hardware, "DRIVER_SECONDS", 0.05)
    assert hardware._driver_says() is None
    program.write_text("#!/bin/sh\necho '0, GPU-aa, Tesla T4, 15000, 7.5'\n", encoding="utf-8")
    monkeypatch.setattr(hardware, "DRIVER_SECONDS", 20)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here = hardware.this_machine()
    assert (here.name, here.memory_bytes, here.native_bf16) == ("Tesla T4", 15000 << 20, False)
    monkeypatch.setattr(hardware, "torch_uses_gpus", lambda: False)
    assert hardware._driver_says() is None


def test_a_card_is_known_by_its_drivers_name() -> None:
    names = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100 80GB", "Tesla V100-SXM2-16GB": "V100 16GB", "NVIDIA L4": "L4",
             "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada", "NVIDIA GeForce RTX 2080 Ti": "RTX 2080 Ti", "NVIDIA A10G": "A10G",
             "NVIDIA GeForce RTX 3090 Ti": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None, "a card with 24 GB": None}  # fmt: skip
    assert {name: known_as(name) for name in names} == names
    assert peak_of(Hardware("NVIDIA H100 80GB HBM3", "gpu", 80 * 10**9)) == 989e12
    here = answer(Question("m", LLAMA_8B, Hardware("NVIDIA H100 80GB HBM3", "gpu", 80 * 10**9), Setting(device="gpu")))
    assert as_dict(here)["methods"]["qlora"]["seconds_per_step_estimate"] > 0


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


def test_adapters_of_experts_count_where_a_token_visits() -> None:
    """Qwen3-30B-A3B, 8 of 128 experts: all adapters would be a third of the linear work."""
    shape = ModelShape.from_config({
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False,
    })  # fmt: skip
    work = speed.work_of(shape, Setting(tokens=1024))
    per_expert = 16 * ((2048 + 2 * 768) + (768 + 2048))
    attention = 16 * (2048 + 4096 + 2 * (2048 + 512) + 4096 + 2048)
    assert work.adapters == 6 * 1024 * 48 * (8 * per_expert + attention) and work.beyond == 0
    assert 0.02 < work.adapters / work.linear < 0.04


def test_small_models_fit_this_processor() -> None:
    shape = ModelShape.from_config(SMALL)
    place = Hardware("x", "cpu", 4 << 30)
    assert all(best(options(shape, Setting(tokens=512).with_method(method), place)).verdict == FITS for method in ("qlora", "lora"))
