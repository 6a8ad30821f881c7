"""The folder of a run: where each file is, and how it is written so that a reader never sees half of it.

    config.yaml        every setting, resolved      environment.json   machine and versions
    metrics.jsonl      one line per step            run.json           the summary, and how the run ended
    samples.json       answers before and after     bad_batches.jsonl  rows of steps that were not finite, if there were any
    plan.json          what was planned and why; estimates
    adapter/           the adapter, PEFT's format   model/             the whole model instead, for method full
    checkpoints/       see checkpoint.py            report.html, loss.png   written by halfbyte.pages
"""

import datetime
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte import devices
from halfbyte.config.run import RunConfig
from halfbyte.config.write import to_yaml
from halfbyte.errors import ConfigError
from halfbyte.redact import within
from halfbyte.train import durable_files, metrics
from halfbyte.train.checkpoint import storage_error

MARKS_OF_A_RUN = ("checkpoints", "adapter", "model")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Machine and versions."""
        return self.path / "environment.json"

    @property
    def plan(self) -> Path:
        """The plan the run began with: terms of memory, and the reasons of what was chosen."""
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line; see metrics.py."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """How the run ended and what it reached."""
        return self.path / "run.json"

    @property
    def samples(self) -> Path:
        """Answers to held-out prompts before and after."""
        return self.path / "samples.json"

    @property
    def bad_batches(self) -> Path:
        """Rows of steps whose loss or gradient was not finite."""
        return self.path / "bad_batches.jsonl"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's format."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model, for method full."""
        return self.path / "model"

    def check(self, *, resume: bool) -> None:
        """Raise ConfigError when the folder holds a run that took a step, and `resume` is false; writes nothing."""
        foreign = self._foreign()
        if foreign:
            raise ConfigError(
                "a run must not be written over other files", code="E-CONF-304", place=str(self.path), found=", ".join(foreign),
                expected="a new folder, or that of a run", remedy="name another folder with out", nothing_done="Nothing was trained.",
            )  # fmt: skip
        there = [name for name in MARKS_OF_A_RUN if (self.path / name).exists()]
        if any(record["step"] > 0 for record in metrics.read(self.metrics)):
            there.append(self.metrics.name)
        if there and not resume:
            raise ConfigError(
                "a new run needs a folder of its own", code="E-CONF-303", place=str(self.path), found=f"a run is there: {', '.join(there)}",
                expected="a folder without a run", remedy="name another folder with out, or resume this run",
                nothing_done="Nothing was trained.",
            )

    def _foreign(self) -> list[str]:
        """Files that a run would write over or hide, and that no run has put here: a model's, somebody's own config.yaml."""
        model = [name for name in ("config.json", "adapter_config.json") if (self.path / name).exists()]
        if self.metrics.exists():
            ours = all(type(record.get("step")) is int for record in metrics.read(self.metrics))
            return model + ([] if ours else [self.metrics.name])
        own = (self.config, self.environment, self.summary, self.samples, self.plan, self.path / "report.html", self.path / "loss.png")
        return model + [file.name for file in own if file.exists()]

    def open(self, *, resume: bool) -> None:
        """Make the folder.  Raises ConfigError as `check` does, StorageError when it cannot be made."""
        self.check(resume=resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, self.path) from error

    def write_json(self, path: Path, values: Any) -> None:
        """Replace a JSON file as a whole, durably; what looks like a secret is blanked.  Raises StorageError."""
        plain = within(json.loads(json.dumps(values, default=str)))
        self.write_text(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")

    def write_text(self, path: Path, text: str) -> None:
        """Replace a text file as a whole, durably, with this text as it is.  Raises StorageError."""
        new = path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            durable_files.create(new, text.encode())
            durable_files.rename(new, path)
        except OSError as error:
            raise storage_error(error, path) from error
        finally:
            new.unlink(missing_ok=True)

    def write_start(self, config: RunConfig, template_time: str = "") -> None:
        """config.yaml and environment.json; `template_time` is what the chat template was told (ISO 8601)."""
        self.write_text(self.config, to_yaml(config))
        self.write_json(
            self.environment,
            {"machine": devices.describe().as_dict(), "versions": devices.versions(), "template_time": template_time},
        )

    def template_time(self) -> datetime.datetime | None:
        """What the run's chat template was told at its start, so that a resumed run sees the same rows; None where that is not known."""
        if not self.environment.is_file():
            return None
        try:
            noted = json.loads(self.environment.read_bytes()).get("template_time")
            return datetime.datetime.fromisoformat(noted) if noted else None
        except (ValueError, AttributeError, TypeError):  # damaged: should it have mattered, the rows' digest says so
            return None
