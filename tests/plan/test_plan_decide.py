"""What a plan chooses where a run leaves it open, with which reason, and what it refuses before anything is loaded."""

import json
from dataclasses import replace
from typing import Any

import pytest

from halfbyte.config import RunConfig
from halfbyte.errors import ConfigError, DoesNotFitError
from halfbyte.plan.decide import Decision, RowsSeen, applied, decide, lines, require_room, row_lengths
from halfbyte.plan.hardware import Hardware, card
from halfbyte.plan.search import BATCH_TOKENS, FITS, HEADROOM, NOT, TIGHT, option
from halfbyte.plan.setting import Setting
from halfbyte.shape import ModelShape
from tests.plan.asked import SMALL
from tests.plan.test_plan_memory import LLAMA_8B

SHAPE = ModelShape.from_config(SMALL)
ROWS = RowsSeen((100, 300, 256), 200, 0.5, 1024)
ROOMY = Hardware("x", "cpu", 64 << 30)


def config(**settings: Any) -> RunConfig:
    return RunConfig.model_validate({"data": {"path": "rows.jsonl"}, **settings})


def chosen(decision: Decision) -> dict[str, Any]:
    return {choice.key: choice.value for choice in decision.choices}


def place_for(setting: Setting, share: float) -> Hardware:
    """A processor with `share` of what this setting needs."""
    return Hardware("x", "cpu", int(option(SHAPE, setting, ROOMY).memory.total * share))


def base(method: str = "lora", **changes: Any) -> Setting:
    return replace(Setting(tokens=300, trained_share=0.5).with_method(method), **changes)


def test_with_room_nothing_is_computed_twice() -> None:
    decision = decide(config(), SHAPE, ROOMY, ROWS, "bfloat16")
    assert chosen(decision) == {"train.micro_batch_size": 2, "train.activations": "keep"}
    assert (decision.config.train.micro_batch_size, decision.config.train.activations) == (2, "keep")
    assert decision.option.verdict == FITS and decision.option.setting.tokens == 300 and decision.option.setting.trained_share == 0.5
    assert all(choice.reason for choice in decision.choices)


def test_micro_batches_divide_the_global_batch_and_keep_to_the_token_budget() -> None:
    for longest in (3, 64, 100, 1000, 5000):
        rows = RowsSeen((longest,), 0, 1.0, 8192)
        size = chosen(decide(config(train={"global_batch_size": 12}), SHAPE, ROOMY, rows, "bfloat16"))["train.micro_batch_size"]
        assert 12 % size == 0 and (size == 1 or size * longest <= BATCH_TOKENS["cpu"])


def test_held_out_rows_count_for_the_longest() -> None:
    rows = RowsSeen((10, 20), 900, 1.0, 1024)
    assert decide(config(), SHAPE, ROOMY, rows, "bfloat16").option.setting.tokens == 900


def test_what_was_written_down_stays() -> None:
    decision = decide(config(train={"micro_batch_size": 16, "activations": "recompute"}), SHAPE, ROOMY, ROWS, "bfloat16")
    assert decision.choices == () and decision.config == config(train={"micro_batch_size": 16, "activations": "recompute"})
    assert (decision.option.setting.micro_batch_size, decision.option.setting.policy) == (16, "recompute")


def test_a_smaller_micro_batch_comes_before_computing_twice() -> None:
    """One row at a time still keeps everything; only with less memory than that is something computed again."""
    one = option(SHAPE, base(micro_batch_size=1), ROOMY).memory.total
    two = option(SHAPE, base(micro_batch_size=2), ROOMY).memory.total
    between = Hardware("x", "cpu", int((one + two) / 2 * 1.1))
    asked = config(method="lora")
    assert chosen(decide(asked, SHAPE, between, ROWS, "bfloat16")) == {"train.micro_batch_size": 1, "train.activations": "keep"}
    long = RowsSeen((4096,), 0, 1.0, 4096)
    less = place_for(base(tokens=4096, trained_share=1.0), 0.9)
    found = decide(asked, SHAPE, less, long, "bfloat16")
    assert found.option.verdict == FITS and found.config.train.activations in ("recompute_mlp", "recompute")
    assert "keeping all needs" in next(choice.reason for choice in found.choices if choice.key == "train.activations")


@pytest.mark.parametrize(("share", "method"), [(3.0, "lora"), (1.26, "lora"), (1.24, "qlora"), (1.05, "qlora"), (0.9, "qlora")])
def test_method_auto_is_lora_only_with_a_fifth_to_spare(share: float, method: str) -> None:
    """The bound is 1 / (1 - 0.2) = 1.25 times what lora needs."""
    asked = config(method="auto", train={"micro_batch_size": 1, "activations": "keep"})
    decision = decide(asked, SHAPE, place_for(base(micro_batch_size=1), share), ROWS, "bfloat16")
    assert decision.config.method == chosen(decision)["method"] == decision.option.setting.method == method
    assert method == "qlora" or decision.option.headroom(decision.place) >= HEADROOM
    assert "estimate" in decision.choices[0].reason


def test_method_auto_is_lora_where_a_smaller_micro_batch_leaves_the_fifth() -> None:
    """TinyLlama on a card of 8 GB: half of it is free at one row, and eight rows would fill it."""
    tiny = ModelShape.from_config({
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    })  # fmt: skip
    rows, place = RowsSeen((1024,) * 8, 0, 1.0, 1024), card("RTX 4060")
    decision = decide(config(method="auto"), tiny, place, rows, "bfloat16")
    assert decision.config.method == "lora" and decision.option.headroom(place) >= HEADROOM
    size = next(choice for choice in decision.choices if choice.key == "train.micro_batch_size")
    assert "leave less than a fifth" in size.reason
    asked = decide(config(method="lora"), tiny, place, rows, "bfloat16")
    assert asked.option.verdict == FITS and asked.option.setting.micro_batch_size > size.value


def test_a_host_without_room_is_named_and_what_would_help() -> None:
    shape = LLAMA_8B
    asked = config(method="qlora", train={"micro_batch_size": 16, "activations": "offload"})
    decision = decide(asked, shape, Hardware("x", "gpu", 40 << 30, 4 << 30), replace(ROWS, lengths=(4096,)), "bfloat16")
    assert (decision.option.verdict, decision.option.short, decision.as_dict()["short_of"]) == (NOT, "host", "host")
    assert "of host memory, the program included is more than is there" in dict(lines(decision))["plan"]
    with pytest.raises(DoesNotFitError, match="E-FIT-401") as caught:
        require_room(decision)
    text = str(caught.value)
    assert "of host memory" in text and "layer inputs on the host" in text and "at most 4.00 GiB, what is free on the host" in text
    assert "fix:      train.activations=" in text or "fix:      train.micro_batch_size=1" in text


def test_a_plan_keeps_skip_init_and_biases() -> None:
    asked = config(
        method="qlora", quant={"skip": ["*down_proj"]}, lora={"init": "pissa", "train_bias": "all"}, train={"micro_batch_size": 1}
    )
    setting = decide(asked, SHAPE, ROOMY, ROWS, "bfloat16").option.setting
    assert (setting.skip, setting.init, setting.train_bias) == (("*down_proj",), "pissa", "all")


def test_method_auto_never_trains_every_weight() -> None:
    for memory in (2**28, 2**33, 2**50):
        assert decide(config(method="auto"), SHAPE, Hardware("x", "cpu", memory), ROWS, "bfloat16").config.method != "full"


@pytest.mark.parametrize("settings", [{"quant": {"format": "nf4"}}, {"quant": {"format": "none"}}, {"lora": {"init": "loftq"}}])
def test_method_auto_and_a_fixed_storage_clash(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"E-CONF-14[67]"):
        config(method="auto", **settings)


def test_packed_rows_get_shorter_only_as_far_as_every_sample_fits() -> None:
    packing = config(method="lora", data={"path": "rows.jsonl", "packing": True})
    assert row_lengths(packing, ROWS) == [1024, 512]
    assert row_lengths(packing, replace(ROWS, lengths=(3, 1000))) == [1024]
    fixed = config(data={"path": "rows.jsonl", "packing": True, "max_tokens": 1024})
    assert row_lengths(fixed, ROWS) == [656]
    roomy = decide(packing, SHAPE, ROOMY, ROWS, "bfloat16")
    assert chosen(roomy)["data.max_tokens"] == roomy.config.data.max_tokens == 1024
    tight = place_for(base(tokens=1024, micro_batch_size=1, policy="recompute"), 1.09)
    short = decide(packing, SHAPE, tight, ROWS, "bfloat16")
    assert short.option.verdict == FITS and chosen(short)["data.max_tokens"] == 512


def test_what_cannot_fit_is_refused_with_the_largest_term_and_the_first_change() -> None:
    asked = config(method="full", train={"micro_batch_size": 1, "activations": "keep"})
    decision = decide(asked, SHAPE, Hardware("x", "cpu", 2 << 30), ROWS, "bfloat16")
    assert decision.option.verdict == NOT
    with pytest.raises(DoesNotFitError, match="E-FIT-401") as caught:
        require_room(decision)
    text = str(caught.value)
    assert caught.value.exit_code == 7
    assert decision.option.memory.largest.name in text and "estimate" in text and "fix: " in text and "Nothing was loaded." in text
    assert "optim.state=int8" in text or "method=qlora" in text


def test_what_is_tight_is_let_through_with_a_word() -> None:
    asked = config(method="lora", train={"micro_batch_size": 1, "activations": "keep"})
    decision = decide(asked, SHAPE, place_for(base(micro_batch_size=1), 1.04), ROWS, "bfloat16")
    assert decision.option.verdict == TIGHT
    require_room(decision)
    assert "margin of error" in dict(lines(decision))["plan"]


def test_lines_name_each_choice_and_its_reason() -> None:
    decision = decide(config(method="auto"), SHAPE, ROOMY, ROWS, "bfloat16")
    said = lines(decision)
    assert said[0][0] == "plan" and "GiB" in said[0][1] and "estimate" in said[0][1]
    assert [text.split("=")[0] for label, text in said if label == "chosen"] == [choice.key for choice in decision.choices]


def test_what_is_kept_in_the_folder_is_json_and_adds_up() -> None:
    decision = decide(config(), SHAPE, ROOMY, ROWS, "bfloat16")
    kept = json.loads(json.dumps(decision.as_dict()))
    assert kept["estimate"] is True and sum(term["bytes"] for term in kept["terms"]) == kept["predicted_peak_bytes"]
    assert [(one["key"], one["value"]) for one in kept["chosen"]] == [(one.key, one.value) for one in decision.choices]
    assert applied(config(), decision.choices) == decision.config
