"""The loss and its gradient against one plain computation over all rows at once, however the rows are cut."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from halfbyte.data.packing import pack
from halfbyte.data.tokenize import Example
from halfbyte.evaluate.loss import evaluate_loss
from halfbyte.models.heads import head_of
from halfbyte.models.token_loss import shift, token_loss_sum
from halfbyte.train.loss import accumulate
from tests.train.tiny_runs import adapted, classes, examples, uneven, window

Tiny = Callable[..., nn.Module]


def gradients(model: nn.Module) -> Tensor:
    """All trainable gradients as one vector."""
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad and p.grad is not None])


def oracle(model: nn.Module, items: list[Example]) -> tuple[float, Tensor]:
    """Loss and gradient by the definition: row by row, token by token, no padding, no code of ours but the model."""
    model.zero_grad()
    losses = []
    for item in items:
        logits = model(torch.tensor([item.input_ids]), use_cache=False).logits[0]
        for place in range(1, len(item.input_ids)):
            if item.labels[place] != -100:
                losses.append(cross_entropy(logits[place - 1], torch.tensor(item.labels[place])))
    loss = torch.stack(losses).sum() / len(losses)
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    return float(loss.detach()), found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def measured(model: nn.Module, items: list[Example], micro: int) -> tuple[float, Tensor]:
    model.zero_grad()
    loss, _ = accumulate(model, head_of(model), window(items, micro))
    assert loss is not None
    return float(loss), gradients(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("micro", [1, 2, 3, 8])
def test_any_cut_of_a_window_gives_one_gradient_and_one_loss(tiny_llama: Tiny, micro: int, dtype: torch.dtype) -> None:
    """T1, T2, T5: 8 rows of 2 to 40 tokens as 8x1, 4x2, 3+3+2, 1x8."""
    model = adapted(tiny_llama()).to(dtype)
    items = examples([3, 40, 5, 31, 2, 17, 4, 9])
    loss, gradient = measured(model, items, micro)
    whole_loss, whole = measured(model, items, 8)
    assert relative(gradient, whole) < (1e-6 if dtype == torch.float32 else 1e-12)
    assert loss == pytest.approx(whole_loss, rel=1e-6 if dtype == torch.float32 else 1e-12)
    plain_loss, plain = oracle(model, items)
    assert relative(gradient, plain) < (2e-6 if dtype == torch.float32 else 1e-12)
    assert loss == pytest.approx(plain_loss, rel=1e-6)


def test_sixty_random_cuts(tiny_llama: Tiny) -> None:
    """T1, T2: random lengths, window sizes and micro-batches; last micro-batches smaller than the others."""
    model = adapted(tiny_llama(num_hidden_layers=1, hidden_size=32)).double()
    rng = random.Random(0)
    for case in range(20):
        items = uneven(rng.randrange(1, 12), seed=case)
        wanted = oracle(model, items)
        for micro in rng.sample(range(1, 13), 3):
            loss, gradient = measured(model, items, micro)
            assert relative(gradient, wanted[1]) < 1e-12, f"case {case}, micro {micro}"
            assert loss == pytest.approx(wanted[0], rel=1e-12)


def test_full_training_with_a_tied_head_has_the_same_gradient(tiny_llama: Tiny) -> None:
    """The embedding's gradient comes from both its ends."""
    model = tiny_llama(tie_word_embeddings=True).double().requires_grad_(True)
    items = examples([3, 20, 5, 11])
    wanted = oracle(model, items)
    for micro in (1, 3, 4):
        loss, gradient = measured(model, items, micro)
        assert relative(gradient, wanted[1]) < 1e-12
        assert loss == pytest.approx(wanted[0], rel=1e-12)


def test_the_count_is_that_of_an_independent_loop(tiny_llama: Tiny) -> None:
    """T3: of single rows and of packed ones, after every mask, counted once."""
    items = uneven(40, seed=3)
    expected = sum(item.labels[place] != -100 for item in items for place in range(1, len(item.input_ids)))
    assert sum(batch.trained_tokens for batch in window(items, 7)) == expected
    packed = pack(items, 48)
    assert len(packed) < 40
    batches = window(packed, 3)  # type: ignore[arg-type]
    assert sum(batch.trained_tokens for batch in batches) == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_and_gradient_of_single_ones(tiny_llama: Tiny, attention: str) -> None:
    """T21, T3: the first token of the next document is no target of the one before."""
    model = adapted(tiny_llama(attn_implementation=attention)).double()
    items = examples([3, 12, 5, 9, 2, 17, 4, 9], untrained=0.0)
    wanted = oracle(model, items)
    within = 1e-10 if attention == "sdpa" else 1e-6  # eager takes its softmax in float32 whatever the model computes in
    for micro in (1, 2):
        model.zero_grad()
        loss, total = accumulate(model, head_of(model), window(pack(items, 24), micro))  # type: ignore[arg-type]
        assert loss is not None
        assert float(loss) == pytest.approx(wanted[0], rel=within)
        assert relative(gradients(model), wanted[1]) < within
        assert total == sum(len(item.input_ids) - 1 for item in items)


class Fixed(nn.Module):
    """A model whose logits are a fixed table by position: position i puts all its weight on token i + 10."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, use_cache: bool, attention_mask: Tensor | None = None) -> object:
        from types import SimpleNamespace

        rows, width = input_ids.shape
        return SimpleNamespace(logits=100.0 * nn.functional.one_hot(torch.arange(width) + 10, 64).expand(rows, -1, -1).float() + self.free)


def test_labels_are_shifted_exactly_once() -> None:
    """T16: position i is right about token i + 1 only, so any other shift gives a loss of 100."""
    from halfbyte.models.heads import Head

    ids = [9, 10, 11, 12, 13]
    (batch,) = window([Example(ids, [-100, *ids[1:]], 0)], 1)
    loss, count = token_loss_sum(Fixed(), Head("logits"), batch)
    assert (float(loss.detach()), count) == (0.0, 4)
    assert shift(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, -100]]


def test_rows_without_labels_change_nothing(tiny_llama: Tiny) -> None:
    """T18: not the loss, not the count, not the gradient; a window of only such rows has no loss and no gradient."""
    model = adapted(tiny_llama()).double()
    items, empty = examples([9, 5, 12]), [Example([5, 6, 7], [-100] * 3, 90), Example([8], [-100], 91)]
    wanted = measured(model, items, 2)
    for micro in (1, 2, 5):
        loss, gradient = measured(model, [empty[0], *items, empty[1]], micro)
        assert loss == pytest.approx(wanted[0], rel=1e-12)
        assert relative(gradient, wanted[1]) < 1e-12
    model.zero_grad(set_to_none=True)
    assert accumulate(model, head_of(model), window(empty, 1)) == (None, 0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_does_not_depend_on_the_batch_size(tiny_llama: Tiny) -> None:
    """T23: 24 rows in batches of 1, 2, 5, 24."""
    model = tiny_llama()
    items = uneven(24, seed=5, longest=40)
    losses = [evaluate_loss(model, window(items, size)) for size in (1, 2, 5, 24)]
    assert max(found.loss for found in losses) - min(found.loss for found in losses) < 1e-6
    assert losses[0].loss == pytest.approx(oracle(model.requires_grad_(True), items)[0], rel=1e-6)
    assert len({found.tokens for found in losses}) == 1


@pytest.mark.parametrize("micro", [1, 3, 10])
def test_a_classifier_counts_rows(micro: int) -> None:
    """Mean over the rows of the whole window, whatever the micro-batches."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    model = LlamaForSequenceClassification(LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=512, num_labels=3, pad_token_id=0,
    )).double()
    items = classes(10)
    logits = torch.stack([model(torch.tensor([item.input_ids])).logits[0] for item in items])
    wanted = cross_entropy(logits, torch.tensor([item.label for item in items]))
    loss, total = accumulate(model, head_of(model), window(items, micro))
    assert loss is not None
    assert total == 10
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-12)
