"""Held-out loss and scores: sums over tokens, no dropout, modes put back; numbers of the libraries and by hand."""

import math
from typing import Any

import pytest
import torch

from halfbyte.config.lora import LoraConfig
from halfbyte.data.batches import Batches
from halfbyte.data.tokenize import Example
from halfbyte.errors import ConfigError, DataError
from halfbyte.evaluate.classification import classification_scores, evaluate_classes
from halfbyte.evaluate.generation import METRICS, score
from halfbyte.evaluate.loss import EvalLoss, evaluate_loss
from halfbyte.lora.inject import inject
from tests.models.small_models import make_model


def examples() -> list[Example]:
    """Rows of very different lengths and trained shares, so that a mean of means is far off."""
    made = []
    for number in range(24):
        length = 3 + (number * number) % 37
        ids = [(number * 13 + step * 7) % 320 for step in range(length)]
        labels = [token if step >= length - 1 - number % 5 else -100 for step, token in enumerate(ids)]
        made.append(Example(ids, labels, number, f"row {number}"))
    return made


def batches(size: int, items: list[Example] | None = None) -> list[Any]:
    made = Batches(items or examples(), micro_batch_size=size, global_batch_size=24, seed=0, pad_id=0)
    return [batch for window in made.epoch(0) for batch in window]


def test_the_loss_does_not_depend_on_the_batches() -> None:
    """# T23  Batch 1, 2, 5 and 24 agree within 1e-6, and equal a plain sum over rows."""
    model = make_model()
    found = [evaluate_loss(model, batches(size)) for size in (1, 2, 5, 24)]
    total, count = 0.0, 0
    for item in examples():
        labels = torch.tensor([item.labels])
        trained = int((labels[:, 1:] != -100).sum())
        total += model(torch.tensor([item.input_ids]), labels=labels).loss.item() * trained
        count += trained
    for one in found:
        assert abs(one.loss - total / count) < 1e-6 * one.loss and one.tokens == count
        assert one.perplexity == pytest.approx(math.exp(one.loss))


def test_evaluation_runs_without_dropout_and_restores_the_mode() -> None:
    """# T31  Twice with dropout 0.9 is bitwise equal; every module's own mode is back, after an exception too."""
    model = make_model()
    inject(model, LoraConfig(rank=4, dropout=0.9))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert evaluate_loss(model, batches(4)) == evaluate_loss(model, batches(4))
    assert [module.training for module in model.modules()] == modes

    def failing() -> Any:
        yield batches(4)[0]
        raise RuntimeError("the disk went away")

    with pytest.raises(RuntimeError):
        evaluate_loss(model, failing())
    assert [module.training for module in model.modules()] == modes
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_rows_without_labels_are_refused() -> None:
    nothing = [Example([1, 2, 3], [-100] * 3, 0, "row 0")]
    with pytest.raises(DataError, match="E-DATA-090"):
        evaluate_loss(make_model(), batches(1, nothing))


def test_a_huge_loss_has_a_finite_perplexity() -> None:
    assert math.isfinite(EvalLoss(1.0, math.exp(min(1e9, 700.0)), 1).perplexity)


def test_scores_are_those_of_the_libraries() -> None:
    """Two references for one row; exact match ignores white space at the ends only."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    made = ["on the mat the cat sat", "a  dog barked", "nothing"]
    wanted = [["the cat sat on the mat ", "a cat"], ["a dog barked"], ["some thing else"]]
    found = score(made, wanted, tuple(METRICS))
    assert list(found) == list(METRICS) and found["exact_match"] == 0.0
    kinds = ("rouge1", "rouge2", "rougeL")
    rows = [RougeScorer(kinds, use_stemmer=True).score_multi(w, m) for m, w in zip(made, wanted)]
    assert {kind: found[kind] for kind in kinds} == {kind: pytest.approx(sum(row[kind].fmeasure for row in rows) / 3) for kind in kinds}
    assert len({found[kind] for kind in kinds}) == 3
    streams = [["the cat sat on the mat ", "a dog barked", "some thing else"], ["a cat", None, None]]
    assert found["bleu"] == BLEU().corpus_score(made, streams).score and found["chrf"] == CHRF().corpus_score(made, streams).score
    assert score([" x\n", "y  z"], ["x", "y z"], ["exact_match"]) == {"exact_match": 0.5}
    assert score(["x"], ["x"], ["exact_match", "chrf"]) == {"exact_match": 1.0, "chrf": 100.0}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [((["a"], [], []), "E-CONF-065"), (([], [], []), "E-CONF-065"), ((["a"], ["a"], ["blue"]), "E-CONF-086")],
)
def test_wrong_requests_are_refused(arguments: tuple[Any, ...], code: str) -> None:
    with pytest.raises(ConfigError, match=code):
        score(*arguments)


def test_the_commonest_label_scores_badly() -> None:
    """Accuracy 0.9 and macro F1 0.474 by hand: F1 of the common class 18/19, of the rare one 0."""
    found = classification_scores([0] * 10, [0] * 9 + [1])
    assert found["accuracy"] == 0.9 and found["macro_f1"] == pytest.approx((18 / 19) / 2)
    assert classification_scores([0, 1, 2, 2], [0, 1, 2, 2]) == {"accuracy": 1.0, "macro_f1": 1.0}
    with pytest.raises(DataError, match="E-DATA-091"):
        classification_scores([], [])


def test_a_classifier_is_scored_over_its_rows() -> None:
    """Predictions of the model itself, whatever the batch size; the loss is the mean over rows."""
    from transformers import LlamaForSequenceClassification

    from tests.models.small_models import llama_config

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama_config(num_labels=3)).eval()
    rows = [Example([5 + n, 6, 7 + n], [-100] * 3, n, f"row {n}", label=n % 3) for n in range(7)]
    logits = torch.cat([model(torch.tensor([row.input_ids])).logits for row in rows])
    hits = (logits.argmax(-1) == torch.tensor([row.label for row in rows])).float().mean().item()
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([row.label for row in rows])).item()
    for size in (1, 3, 7):
        made = Batches(rows, micro_batch_size=size, global_batch_size=7, seed=0, pad_id=0)
        flat = [batch for window in made.epoch(0) for batch in window]
        assert evaluate_classes(model, flat)["accuracy"] == pytest.approx(hits)
        assert evaluate_loss(model, flat).loss == pytest.approx(wanted, rel=1e-5)
