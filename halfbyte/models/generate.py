"""Token ids in, text out, through transformers' generate.

    prompts of different lengths:   pad pad a  b  c        padding on the left, masked; positions count from the first real token,
                                    d   e   f  g  h        so a prompt's answer does not depend on its neighbours

On a CPU the model's layers are exchanged for those that decode on own ops, where their structure is known (structure.py).

Greedy at temperature 0, else sampled with a seed of its own.  Generation ends at any of the model's end tokens: those of
its generation config and the tokenizer's.  The model's own generation config gives nothing else: sampling settings are the caller's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from halfbyte.errors import ConfigError
from halfbyte.models.lazy_logits import make_lazy
from halfbyte.models.modes import evaluating
from halfbyte.models.structure import fuse, is_fused

Prompt = str | Sequence[int]


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: all of the generation config's and the tokenizer's, 0 included where it is one."""
    own = getattr(model, "generation_config", None)
    named = own.eos_token_id if own is not None else None
    ids = set(named if isinstance(named, (list, tuple)) else [] if named is None else [named])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0,
    top_p: float = 1.0, seed: int = 0, batch_size: int = 8, stream: Callable[[str], None] | None = None,
    take_over: bool = True,
) -> list[str]:  # fmt: skip
    """The answer to each prompt (text, or token ids as they are), without prompt and special tokens.

    temperature  0 takes the likeliest token
    stream       called with each piece of text as it comes; one prompt only
    take_over    put own layers in on a CPU; without, the model keeps the layers that it has, as one in training must
    Raises ConfigError on settings out of range.
    """
    _check_writes(model)
    if next(model.parameters()).device.type == "cpu" and (take_over or is_fused(model)) and fuse(model).layers:
        make_lazy(model)
    _check(max_new_tokens, temperature, top_p, seed, batch_size, stream, len(prompts))
    token_lists = [tokenizer(prompt).input_ids if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    _check_room(model, token_lists, max_new_tokens)
    stops = stop_ids(model, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, eos_token_id=stops or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
    )  # fmt: skip
    answers: dict[int, str] = {}
    order = sorted(range(len(token_lists)), key=lambda index: len(token_lists[index]))  # little padding
    forked = torch.random.fork_rng(devices=_cuda_of(model))
    with evaluating(model), torch.inference_mode(), contiguous_head_input(model), callers_settings(model), forked:
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            made = _generate_batch(model, [token_lists[index] for index in chosen], settings, _streamer(tokenizer, stream))
            for index, ids in zip(chosen, made):
                answers[index] = str(tokenizer.decode(_cut(ids, stops), skip_special_tokens=True))
    return [answers[index] for index in range(len(token_lists))]


@contextmanager
def contiguous_head_input(model: nn.Module) -> Iterator[None]:
    """Inside, the output head gets its input as one contiguous block.

    transformers cuts the last position out of each prompt, a strided (B, 1, H); torch's linear then multiplies row by row with B copies of
    the head's weight (2.1 GiB for 40 prompts of the starter) instead of folding the rows into one matrix.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def callers_settings(model: Any) -> Iterator[None]:
    """Inside, the model's own generation config is empty.

    transformers fills all that a caller leaves open from it, such as a penalty on repetition that the model was published with.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _generate_batch(model: Any, lists: list[list[int]], settings: GenerationConfig, streamer: BaseStreamer | None) -> list[list[int]]:
    width = max(len(ids) for ids in lists)
    device = next(model.parameters()).device
    pad = int(settings.pad_token_id)
    ids_BT = torch.tensor([[pad] * (width - len(ids)) + ids for ids in lists], device=device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in lists], device=device)
    made: Tensor = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings, streamer=streamer)
    return [row[width:].tolist() for row in made]


def _cut(ids: list[int], stops: list[int]) -> list[int]:
    """Up to the first end token."""
    for place, token in enumerate(ids):
        if token in stops:
            return ids[:place]
    return ids


def _cuda_of(model: nn.Module) -> list[torch.device]:
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []


class _Pieces(BaseStreamer):
    """Hands on the text that each new token completes; a character that is not whole yet waits."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.ids: list[int] = []
        self.said = ""
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.reshape(-1).tolist()
        self._say(whole=False)

    def _say(self, whole: bool) -> None:
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if (whole or not text.endswith("\ufffd")) and len(text) > len(self.said) and text.startswith(self.said):
            self.say(text[len(self.said) :])
            self.said = text

    def end(self) -> None:
        self._say(whole=True)


def _streamer(tokenizer: PreTrainedTokenizerBase, stream: Callable[[str], None] | None) -> BaseStreamer | None:
    return None if stream is None else _Pieces(tokenizer, stream)


def writes_no_text(place: str) -> ConfigError:
    """The refusal of a model that cannot answer."""
    return ConfigError(
        "only a model that writes text can answer", code="E-CONF-068", place=place, found="a model without a language head",
        remedy="a classifier is judged with halfbyte eval, and labels new texts with halfbyte label", nothing_done="Nothing was generated.",
    )  # fmt: skip


def _check_writes(model: nn.Module) -> None:
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        raise writes_no_text(type(model).__name__)


def _check(max_new_tokens: int, temperature: float, top_p: float, seed: int, batch_size: int, stream: object, count: int) -> None:
    ranges = {
        "max_new_tokens": (max_new_tokens, _is(Integral, max_new_tokens) and max_new_tokens >= 1, "a whole number, 1 or more"),
        "temperature": (temperature, _is(Real, temperature) and 0.0 <= temperature < float("inf"), "0 (greedy) or more"),
        "top_p": (top_p, _is(Real, top_p) and 0.0 < top_p <= 1.0, "above 0, up to 1"),
        "seed": (seed, _is(Integral, seed) and 0 <= seed < 2**63, "a whole number, at least 0, under 2^63"),
        "batch_size": (batch_size, _is(Integral, batch_size) and batch_size >= 1, "a whole number, 1 or more"),
        "stream": (f"{count} prompts", stream is None or count == 1, "one prompt at a time"),
    }
    for name, (found, fine, expected) in ranges.items():
        if not fine:
            raise ConfigError(
                "a generation setting must be in its range", code="E-CONF-060", place=name, found=str(found), expected=expected
            )


def _is(kind: type, value: object) -> bool:
    """Whether a setting is such a number; a switch is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_room(model: nn.Module, token_lists: list[list[int]], max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    for number, ids in enumerate(token_lists):
        if not ids:
            raise ConfigError("a prompt must hold at least one token", code="E-CONF-061", place=f"prompt {number}", found="nothing")
        if isinstance(limit, int) and len(ids) + max_new_tokens > limit:
            raise ConfigError(
                "prompt and answer must fit into what the model can see", code="E-CONF-062", place=f"prompt {number}",
                found=f"{len(ids)} + {max_new_tokens} tokens", expected=f"at most {limit}",
                remedy="shorten the prompt or lower max_new_tokens",
            )  # fmt: skip
