"""Several settings on the same rows, tokens, seeds and evaluation, each at its own best learning rate: the table of a paper, measured here.

    rows      written once                                     rows/
    bases     a calibrated base, once for a setting's runs     bases/<setting>/base, bases/<setting>.json
    sweep     each setting's learning rate, on few rows        sweep/<setting>/x<factor>, sweep/<setting>.json
    runs      one process a setting and seed                   runs/<setting>/seed-<n>, ....json
    judged    general text before and after, task score        judged/<setting>/seed-<n>.json
    result    comparison.json, .csv, .txt, .html

A seed changes the order of the rows and, where that is drawn, the start of the adapter; not which rows.  A start that is computed (of a
calibrated base, pissa, loftq) is the same for all seeds.  Every stage leaves its outcome as a file that is there
whole or not at all; a study that was killed and started again repeats only what had not ended, and because training repeats to the bit its
table is that of an uninterrupted one, times and peak memory apart.  The last weights are judged, not the best ones: settings are compared
after the same steps.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from halfbyte import devices, env
from halfbyte.config import RunConfig
from halfbyte.errors import ConfigError, DataError, DoesNotFitError, NumericError
from halfbyte.studies import base, judging, learning_rate, rows
from halfbyte.studies.arms import Arm
from halfbyte.studies.identity import digests_of, models_of
from halfbyte.studies.runs import Folder, Say, end_all, opened, read_json, require_same, train, write_json
from halfbyte.units import loss_is_per, seconds_text

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Score:
    """A task score: the metric, of how many held-out rows, and the longest answer in tokens."""

    metric: str
    rows: int
    max_new_tokens: int


@dataclass(frozen=True)
class Study:
    """What is compared, and how.

    sweep_rows  rows of the short runs that find each learning rate; 0 takes optim.learning_rate as it is
    general     a file of general text, None for Python's own prose, "none" to leave it out
    jobs        runs side by side; with more than one, times and speeds disturb each other
    """

    arms: tuple[Arm, ...]
    seeds: int = 3
    sweep_rows: int = 300
    general: str | None = None
    score: Score | None = None
    samples: int = 3
    jobs: int = 1

    def identity(self) -> dict[str, Any]:
        """Everything that decides the runs; what is judged of them belongs to each judgement (judging.py)."""
        values = {"seeds": self.seeds, "sweep_rows": self.sweep_rows}
        settings = {arm.name: arm.config.model_dump(mode="json", exclude={"out"}) for arm in self.arms}
        files = digests_of(*(arm.config.model.template for arm in self.arms))
        models = models_of(*(arm.config.model.name for arm in self.arms))
        return {**values, "settings": settings, "files": files, "models": models, "versions": devices.versions()}


@dataclass(frozen=True)
class Out:
    """Why a setting has no numbers (it does not fit, it diverges, no rate is stable, its base cannot be made); the others go on."""

    status: str
    error: str


@dataclass(frozen=True)
class Based:
    """A setting on its base: what making a calibrated one took, or why there is none."""

    arm: Arm
    made: dict[str, Any] | None = None
    out: Out | None = None


@dataclass(frozen=True)
class Outcome:
    """One setting's part of a finished study: its rate's sweep, the outcome of each seed's run, and how it was judged."""

    arm: Arm
    status: str
    sweep: dict[str, Any] | None
    runs: list[dict[str, Any]]
    judged: list[dict[str, Any]]
    error: str = ""
    base: dict[str, Any] | None = None


@dataclass(frozen=True)
class Results:
    """Everything the table is made of."""

    study: Study
    rows: dict[str, Any]
    general: str
    outcomes: list[Outcome]


def run(study: Study, path: Path, say: Say) -> Results:
    """Do all stages that have not been done in the folder `path`; returns what they found.

    Raises ConfigError, DataError, CheckpointError where the folder holds another study, and what a run that failed said.
    """
    _check(study)
    with opened(path, say) as folder:
        require_same(folder.path / "study.json", study.identity())
        found = rows.prepare(folder.path, study.arms[0].config, sweep_rows=study.sweep_rows)
        asked, words = _asked(study, folder.path)
        based = [_on_base(folder, arm) for arm in study.arms]
        swept = _each(study.jobs, based, lambda one: (None, one.out) if one.out else _sweep(study, folder, one.arm, found))
        trained = _train_all(study, folder, [(one.arm, *result) for one, result in zip(based, swept, strict=True)])

        def outcome(number: int) -> Outcome:
            arm, (sweep, out) = study.arms[number], swept[number]
            runs = [trained[number, seed] for seed in range(study.seeds) if (number, seed) in trained]
            out = out or next((Out(one["status"], f"Seed {seed}: {one['error']}") for seed, one in enumerate(runs)
                               if one["status"] != "finished"), None)  # fmt: skip
            judged = [judging.judged(folder, asked, arm.name, seed, one) for seed, one in enumerate(runs)] if out is None else []
            status, error = (out.status, out.error) if out else ("finished", "")
            return Outcome(arm, status, sweep, runs, judged, error, based[number].made)

        return Results(study, found, words, _each(study.jobs, range(len(study.arms)), outcome))


def _check(study: Study) -> None:
    for arm in study.arms:
        if arm.config.train.eval_every_steps is None:
            raise ConfigError(
                "settings are compared by their held-out loss, and nothing is evaluated", code="E-CONF-415", place="train.eval_every_steps",
                found="null", remedy="leave it out", nothing_done="Nothing was trained.",
            )  # fmt: skip
        if arm.config.data.packing and arm.config.data.max_tokens == "auto":
            raise ConfigError(
                "packed rows of a comparison have one length for all settings", code="E-CONF-422", place=f"data.max_tokens of {arm.name}",
                found="auto", remedy="give data.max_tokens a number, or leave packing out", nothing_done="Nothing was trained.",
            )  # fmt: skip
    longest = study.score.max_new_tokens if study.score else 1
    counts = {"--sweep-rows": study.sweep_rows, "--samples": study.samples, "--score-rows": study.score.rows if study.score else 0}
    ones = (("--max-new-tokens", longest, 1), ("--jobs", study.jobs, 1))
    for place, found, least in [*((name, count, 0) for name, count in counts.items()), *ones]:
        if found < least:
            raise ConfigError("a count must be in its range", code="E-CONF-418", place=place, found=str(found), expected=f"{least} or more",
                              nothing_done="Nothing was trained.")  # fmt: skip
    if study.general not in (None, "none") and not env.at_home(str(study.general)).exists():
        raise DataError("the file of general text must exist", code="E-DATA-411", place="--general", found=str(study.general),
                        remedy="check the path; none leaves general text out", nothing_done="Nothing was trained.")  # fmt: skip
    if study.seeds < 1:
        raise ConfigError("a comparison needs at least one seed", code="E-CONF-416", place="--seeds", found=str(study.seeds),
                          expected="1 or more; 3 give an interval worth looking at")  # fmt: skip


def _asked(study: Study, folder: Path) -> tuple[judging.Asked, str]:
    """What is judged of every run, found to be possible, and the words for the general text; a classifier is given none."""
    config, text, words = study.arms[0].config, None, ""
    reader = judging.Reader(config)
    if study.general != "none" and config.model.task != "sequence-classification":
        text, words = rows.general_text(folder, study.general, reader.fits)
    asked = judging.Asked(text, asdict(study.score) if study.score else None, study.samples)
    judging.check(reader, asked, folder / "rows" / "held-out.jsonl", [(arm.name, arm.config) for arm in study.arms])
    return asked, words


def _each(jobs: int, items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """`work` of every item, `jobs` at a time, in the order given."""
    if jobs == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(work, items))
        except KeyboardInterrupt as stop:
            end_all(stop)
            raise


def _on_base(folder: Folder, arm: Arm) -> Based:
    """The setting on the base calibrated for it from the training rows, where it asks for one."""
    train_rows = arm.config.data.model_copy(update=_same_rows(folder.path))
    try:
        config, made = base.shared(folder, arm.name, arm.config.model_copy(update={"data": train_rows}))
    except DoesNotFitError as fault:
        return Based(arm, out=Out("does not fit", fault.found))
    except (NumericError, DataError) as fault:  # too few rows to calibrate on are enough for the others
        return Based(arm, out=Out("not calibrated", fault.found))
    return Based(replace(arm, config=config), made)


def _same_rows(folder: Path) -> dict[str, Any]:
    """Data settings that name the study's rows."""
    place = folder / "rows"
    return {"path": str(place / "train.jsonl"), "eval_path": str(place / "held-out.jsonl"), "eval_rows": "auto", "max_rows": None}


def _sweep(study: Study, folder: Folder, arm: Arm, found: dict[str, Any]) -> tuple[dict[str, Any] | None, Out | None]:
    """(the sweep of a setting, why it is out of the comparison): neither where no sweep was asked for."""
    if study.sweep_rows == 0:
        return None, None
    kept = folder.path / "sweep" / f"{arm.name}.json"
    before = read_json(kept, ("points", "reasons", "rate", "rows", "steps"))
    if before is None:
        place = folder.path / "rows"
        try:
            sweep = learning_rate.find(
                folder, f"sweep/{arm.name}", arm.config, rows=place / "sweep-train.jsonl", count=found["sweep-train"],
                held_out=place / "sweep-held-out.jsonl", planned_rows=found["train"],
            )  # fmt: skip
        except DoesNotFitError as fault:
            return None, Out("does not fit", fault.found)
        except NumericError as fault:
            return None, Out("no stable learning rate", fault.found)
        before = sweep.as_dict()
        write_json(kept, before)
        folder.say(f"{arm.name}: learning rate {before['rate']:.3g} of {len(before['points'])} tried")
    return before, None


def settings_of(study: Study, folder: Path, arm: Arm, seed: int, rate: float | None) -> RunConfig:
    """Everything one run is told."""
    config = arm.config
    training: dict[str, Any] = {"seed": config.train.seed + seed, "keep_best": False, "sample_prompts": 0, "early_stop_patience": None}
    if "save_every_steps" not in config.train.model_fields_set:
        training["save_every_steps"] = None  # a run that was cut off begins anew: cheaper than saving what is not needed
    optim = {} if rate is None else {"learning_rate": rate}
    return config.model_copy(update={
        "data": config.data.model_copy(update=_same_rows(folder)), "train": config.train.model_copy(update=training),
        "optim": config.optim.model_copy(update=optim),
    })  # fmt: skip


def _train_all(
    study: Study, folder: Folder, swept: Sequence[tuple[Arm, dict[str, Any] | None, Out | None]]
) -> dict[tuple[int, int], dict[str, Any]]:
    """{(number of the setting, seed): outcome}; seed after seed, so that a look on the way sees all settings.

    A setting is out with its first run that does not finish: its other seeds are not trained."""
    unfinished: set[int] = set()
    pairs = [(number, seed) for seed in range(study.seeds) for number, (_, _, out) in enumerate(swept) if out is None]

    def one(pair: tuple[int, int]) -> dict[str, Any] | None:
        number, seed = pair
        arm, sweep, _ = swept[number]
        if number in unfinished:
            return None
        folder.say(f"run {pairs.index(pair) + 1} of {len(pairs)}: {arm.name}, seed {seed}")
        config = settings_of(study, folder.path, arm, seed, sweep["rate"] if sweep else None)
        outcome = train(folder, f"runs/{arm.name}/seed-{seed}", config, beside=study.jobs)
        if outcome["status"] == "finished":
            per = loss_is_per(config.model.task)
            folder.say(f"  held-out loss {outcome['last_eval_loss']:.4f} nats/{per} in {seconds_text(outcome['seconds'])}")
        else:
            unfinished.add(number)
            folder.say(f"  {outcome['status']}")
        return outcome

    found = zip(pairs, _each(study.jobs, pairs, one))
    return {pair: outcome for pair, outcome in found if outcome is not None}


def absolute(study: Study) -> Study:
    """The study with the whole path of its general text, so that it is found from any working directory."""
    given = study.general
    return study if given in (None, "none") else replace(study, general=str(env.at_home(str(given)).absolute()))
