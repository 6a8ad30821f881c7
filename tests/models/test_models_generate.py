"""Generation: a batch answers as each prompt alone, ends at every end token, streams what it returns."""

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.models.generate import generate, stop_ids
from tests.models.small_models import byte_tokenizer, make_model

PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30], [100, 3, 50, 4, 40]]


@pytest.fixture
def pair() -> tuple[Any, Any]:
    model = make_model()
    model.generation_config.eos_token_id = 2
    return model, byte_tokenizer()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_answers_as_each_prompt_alone(kind: str, temperature: float) -> None:
    """# T26  Token for token: left padding does not move positions.  Sampled with the first prompt's draw for one prompt."""
    model, tokenizer = make_model(kind, **({"n_positions": 256} if kind == "gpt2" else {})), byte_tokenizer()
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    if temperature:
        assert generate(model, tokenizer, PROMPTS[:1], **options) == generate(model, tokenizer, PROMPTS[:1], **options)
        assert generate(model, tokenizer, PROMPTS[:1], **options) != generate(model, tokenizer, PROMPTS[:1], **{**options, "seed": 4})
        return
    together = generate(model, tokenizer, PROMPTS, batch_size=4, **options)
    assert together == [generate(model, tokenizer, [prompt], **options)[0] for prompt in PROMPTS]
    assert together == generate(model, tokenizer, PROMPTS, batch_size=3, **options)


def test_greedy_is_the_likeliest_token_each_time(pair: tuple[Any, Any]) -> None:
    """temperature 0 against a loop of plain forwards."""
    model, tokenizer = pair
    ids = list(PROMPTS[2])
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert generate(model, tokenizer, [PROMPTS[2]], max_new_tokens=6) == [tokenizer.decode(ids[11:], skip_special_tokens=True)]


def test_every_end_token_ends(pair: tuple[Any, Any]) -> None:
    """The set is the generation config's and the tokenizer's, token 0 included; the answer stops before it."""
    model, tokenizer = pair
    first = int(model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [0, first]
    assert stop_ids(model, tokenizer) == sorted({0, first, 2})
    assert generate(model, tokenizer, [PROMPTS[0]], max_new_tokens=8) == [""]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_models_own_settings_do_not_act(pair: tuple[Any, Any], temperature: float) -> None:
    """Nothing of the generation config but its end tokens, and it is as it was afterwards."""
    model, tokenizer = pair
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature}
    plain = generate(model, tokenizer, PROMPTS, **options)
    model.generation_config.update(repetition_penalty=20.0, no_repeat_ngram_size=1, top_k=1, min_p=0.5, suppress_tokens=list(range(200)))
    before = model.generation_config.to_dict()
    assert generate(model, tokenizer, PROMPTS, **options) == plain
    assert model.generation_config.to_dict() == before


def test_streaming_says_what_is_returned(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    pieces: list[str] = []
    whole = generate(model, tokenizer, [PROMPTS[0]], max_new_tokens=12, stream=pieces.append)
    assert "".join(pieces) == whole[0] and len(pieces) > 1


def test_modes_and_the_global_random_state_are_left_alone(pair: tuple[Any, Any]) -> None:
    """# T31  Sampling runs without dropout, and training goes on afterwards; also after an exception."""
    model, tokenizer = pair
    model.train()
    model.model.layers[0].eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate(model, tokenizer, PROMPTS[:2], max_new_tokens=3, temperature=1.0)

    def broken(text: str) -> None:
        raise RuntimeError("the listener went away")

    with pytest.raises(RuntimeError, match="went away"):
        generate(model, tokenizer, PROMPTS[:1], max_new_tokens=3, stream=broken)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"max_new_tokens": 0}, "E-CONF-060"), ({"max_new_tokens": 5, "temperature": -1.0}, "E-CONF-060"),
        ({"max_new_tokens": 5, "temperature": float("nan")}, "E-CONF-060"), ({"max_new_tokens": 5, "top_p": 0.0}, "E-CONF-060"),
        ({"max_new_tokens": 5, "stream": print}, "E-CONF-060"), ({"max_new_tokens": 600}, "E-CONF-062"),
        ({"max_new_tokens": 2.5}, "E-CONF-060"), ({"max_new_tokens": "5"}, "E-CONF-060"), ({"max_new_tokens": True}, "E-CONF-060"),
        ({"max_new_tokens": 5, "seed": 1.5}, "E-CONF-060"), ({"max_new_tokens": 5, "seed": "a"}, "E-CONF-060"),
        ({"max_new_tokens": 5, "temperature": "1"}, "E-CONF-060"), ({"max_new_tokens": 5, "top_p": None}, "E-CONF-060"),
        ({"max_new_tokens": 5, "batch_size": 1.5}, "E-CONF-060"),
    ],
)
def test_settings_out_of_range_are_refused(pair: tuple[Any, Any], settings: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        generate(*pair, PROMPTS, **settings)


def test_an_empty_prompt_is_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="E-CONF-061"):
        generate(*pair, [[]], max_new_tokens=3)


def test_text_prompts_are_tokenized(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    assert generate(model, tokenizer, ["ab"], max_new_tokens=5) == generate(model, tokenizer, [tokenizer("ab").input_ids], max_new_tokens=5)
