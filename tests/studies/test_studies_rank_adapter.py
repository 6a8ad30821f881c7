"""The cost of truncating an adapter that was really trained: predicted on some rows, measured on others; and the command."""

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from halfbyte.adapters.folder import save_adapter
from halfbyte.adapters.truncate import open_folder
from halfbyte.cli.main import run
from halfbyte.config import DataConfig, LoraConfig, QuantConfig
from halfbyte.config.optim import OptimConfig
from halfbyte.data.batches import Batch, Batches
from halfbyte.data.load import load_data
from halfbyte.errors import DataError
from halfbyte.evaluate.opened import open_model
from halfbyte.evaluate.rows import evaluate_rows, loss_batches
from halfbyte.lora.inject import inject
from halfbyte.models.load import load_model, load_tokenizer
from halfbyte.models.source import resolve
from halfbyte.studies.rank_adapter import costs, groups, left_out
from halfbyte.studies.rank_problem import Problem, adapt, token_loss, train
from halfbyte.studies.rank_text import costs_text
from tests.end_to_end.tiny_world import rows, write_model, write_rows


def command(*words: object) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = run(["rank", *map(str, words)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(adapter folder, rows it never saw): rank 16, trained until a random model answers."""
    place = tmp_path_factory.mktemp("rank")
    source = resolve(str(write_model(place / "model")))
    model, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
    config = DataConfig(path=str(write_rows(place / "train.jsonl", rows(400))), eval_rows=0)
    examples = load_data(config, tokenizer).train

    def windows() -> Iterator[list[Batch]]:
        batches = Batches(examples, micro_batch_size=16, global_batch_size=16, seed=0, pad_id=0)
        for epoch in range(100):
            yield from batches.epoch(epoch)

    problem = Problem(model, LoraConfig(alpha=32), windows, [], token_loss(model), OptimConfig())
    adapt(problem, 16)
    train(problem, 150, 1e-2)
    save_adapter(model, place / "adapter", base_name=str(place / "model"))
    return place / "adapter", write_rows(place / "held.jsonl", rows(160, seed=7))


def test_predicted_and_measured_loss_agree(trained: tuple[Path, Path]) -> None:
    """Within 0.02 nats for every rank and for joint cuts, where the adapter gained more than ten times that."""
    folder, held = trained
    opened, whole = open_model(folder), open_folder(folder)
    cuts = {f"{rank}": whole.cut(rank) for rank in (1, 2, 4, 8)} | {f"{rank} joint": whole.cut(rank, joint=True) for rank in (1, 2, 3, 6)}
    found = costs(opened, whole, loss_batches(opened, held, batch_size=4), cuts)
    assert found.base - found.full > 0.5
    for one in found.cuts:
        assert one.measured is not None and abs(one.predicted - one.measured) <= 0.02, one


def test_the_model_is_left_as_it_was(trained: tuple[Path, Path]) -> None:
    folder, held = trained
    opened, whole = open_model(folder), open_folder(folder)
    before = {name: value.clone() for name, value in opened.model.state_dict().items()}
    costs(opened, whole, loss_batches(opened, held, max_rows=24), {"4": whole.cut(4)})
    assert all(torch.equal(value, before[name]) for name, value in opened.model.state_dict().items())


def test_what_is_measured_is_the_loss_of_the_folder_that_is_written(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """# T28: a reader of the written folder gets the loss that was measured in place."""
    folder, held = trained
    opened, whole = open_model(folder), open_folder(folder)
    cut = whole.cut(3, joint=True)
    batches = loss_batches(opened, held, batch_size=4)
    found = costs(opened, whole, [batch for batch in batches for _ in (0, 1)], {"3": cut})  # both halves are all rows
    whole.write(cut, tmp_path / "new")
    again = evaluate_rows(open_model(tmp_path / "new"), held)
    assert found.cuts[0].measured == pytest.approx(again["loss"], abs=2e-4)
    assert found.cuts[0].measured > found.full + 0.001


def test_few_rows_are_refused_and_one_batch_has_no_error(trained: tuple[Path, Path]) -> None:
    """15 rows are too few, 16 are enough; where one batch predicts, the standard error is a dash."""
    folder, held = trained
    opened, whole = open_model(folder), open_folder(folder)
    few, enough = (loss_batches(opened, held, batch_size=4, max_rows=count) for count in (15, 16))
    with pytest.raises(DataError, match="E-DATA-095") as refused:
        costs(opened, whole, few, {"4": whole.cut(4)})
    assert "15 rows" in str(refused.value) and "16 rows or more" in str(refused.value)
    assert costs(opened, whole, enough, {"4": whole.cut(4)}).cuts[0].error is not None
    alone = costs(opened, whole, loss_batches(opened, held, batch_size=8, max_rows=16), {"4": whole.cut(4)})
    assert alone.cuts[0].error is None
    assert costs_text(alone).splitlines()[2].split()[-3] == "-"


def test_the_command_shows_cuts_and_measures(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, held = trained
    code, text, _ = command("--adapter", folder)
    assert code == 0 and "spectrum of" in text and "q_proj" in text and "squared norm left out" in text
    assert "share of the squared norm" in text
    code, text, _ = command("--adapter", folder, "--truncate", 4, "--to", tmp_path / "cut", "--data", held, "--max-rows", 24)
    assert code == 0 and "loss predicted (estimate)" in text and "nats/token" in text and "loss measured" in text
    assert {one.rank for one in groups(open_folder(tmp_path / "cut"))} == {4}
    code, text, _ = command("--adapter", folder, "--truncate", 4, "--joint", "--to", tmp_path / "joint", "--json")
    values = json.loads(text)
    assert code == 0 and values["truncated"]["parameters"] <= open_folder(tmp_path / "cut").cut(4).parameters
    assert len(set(values["truncated"]["ranks"].values())) > 1


def test_an_adapter_of_init_loftq_shows_its_spectrum_and_is_not_cut(tmp_path: Path) -> None:
    source = resolve(str(write_model(tmp_path / "model")))
    model = load_model(source, dtype="float32")
    inject(model, LoraConfig(rank=4, init="loftq"), quant=QuantConfig(format="nf4"))
    save_adapter(model, tmp_path / "adapter", base_name=str(tmp_path / "model"))
    code, text, err = command("--adapter", tmp_path / "adapter", "--json")
    assert code == 0, err
    shares, spectra = json.loads(text)["left_out"], json.loads(text)["singular_values"].values()
    total = sum(value**2 for values in spectra for value in values)
    assert list(shares) == ["1", "2", "4"] and shares["4"] == 0
    for rank in (1, 2):
        assert shares[str(rank)] == pytest.approx(sum(value**2 for values in spectra for value in values[rank:]) / total)
    for words in (["--truncate", 2, "--to", tmp_path / "cut"], ["--data", write_rows(tmp_path / "rows.jsonl")]):
        ended, _, err = command("--adapter", tmp_path / "adapter", *words)
        assert ended == 2 and "E-ADAPT-091" in err and not (tmp_path / "cut").exists()


def test_shares_of_the_spectra_are_those_of_the_cuts(trained: tuple[Path, Path]) -> None:
    whole = open_folder(trained[0])
    for rank in (1, 4, 16):
        assert left_out(whole, rank) == pytest.approx(whole.cut(rank).left_out, abs=1e-12)


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--truncate", 4), "E-CONF-545"), (("--adapter", "RUN", "--truncate", 4), "E-CONF-545"),
     (("--adapter", "RUN", "--joint"), "E-CONF-545"),
     (("--adapter", "RUN", "--model", "starter"), "E-CONF-545"), (("--adapter", "RUN", "--truncate", 0, "--to", "TO"), "E-ADAPT-093"),
     (("--adapter", "RUN", "--max-rows", 3), "E-CONF-545"), (("--adapter", "RUN", "--rows", 9), "E-CONF-545"),
     (("--adapter", "RUN", "--stages", "capacity,gradient,probe"), "E-CONF-545"), (("--adapter", "RUN", "--rows", 256), "E-CONF-545"),
     (("--adapter", "RUN", "--stages", "capacity"), "E-CONF-545"), (("--adapter", "RUN", "--method", "lora"), "E-CONF-545"),
     (("--adapter", "RUN", "--modules"), "E-CONF-545"), (("--force-base", "--model", "starter"), "E-CONF-545"),
     (("--adapter", "RUN", "--truncate", 2, "--to", "TO", "--data", "NONE"), "E-DATA-001"),
     (("--adapter", "NONE"), "E-ADAPT-031")],
)  # fmt: skip
def test_refusals(words: tuple[object, ...], code: str, trained: tuple[Path, Path], tmp_path: Path) -> None:
    names = {"RUN": trained[0], "TO": tmp_path / "to", "NONE": tmp_path / "none"}
    ended, _, text = command(*[names.get(word, word) for word in words])  # type: ignore[call-overload]
    assert ended == 2 and code in text
    assert not (tmp_path / "to").exists()
