"""Make the calibrated base of a setting once for all its runs, in a process: `python -m halfbyte.studies.base SETTINGS.yaml ANSWER.json`.

A run with quant.calibrate=true makes its base from the training rows before it trains.  In a study the rows are the same for every rate
and seed, so the base would be too (its random draws are those of the first seed): it is made once, as such a run would make it, and every
run begins from that folder.  How long it took, and the most memory, are told apart from the runs'.

ANSWER   {"base": folder, "init": start of the adapter, "seconds", "peak_memory_bytes"}
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from halfbyte import devices, host, redact
from halfbyte.config import RunConfig, load_config, to_yaml
from halfbyte.data.load import load_data
from halfbyte.errors import HalfbyteError
from halfbyte.models.load import load_tokenizer, token_limit
from halfbyte.models.source import resolve
from halfbyte.studies.runs import Folder, call, failure, read_json, write_json
from halfbyte.train.calibrated_base import settled, with_calibrated_base
from halfbyte.train.resolve import auto_threads
from halfbyte.train.run_folder import RunFolder


def shared(folder: Folder, name: str, config: RunConfig) -> tuple[RunConfig, dict[str, Any] | None]:
    """(the settings on the base made for them, what making it took); the settings, auto decided, and None where they calibrate nothing."""
    config = settled(config)
    if config.quant.calibrate is not True:
        return config, None
    at = folder.path / "bases" / name
    made: dict[str, Any] | None = read_json(at.with_name(f"{name}.json"), ("base", "init", "seconds", "peak_memory_bytes"))
    if made is None:
        folder.say(f"{name}: calibrating its base, once for all its runs")
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir(parents=True)
        settings, log = at.with_name(f"{name}.yaml"), at.with_name(f"{name}.log")
        RunFolder(at).write_text(settings, to_yaml(config.model_copy(update={"out": str(at)})))
        if code := call(folder, ["halfbyte.studies.base", str(settings), str(at.with_name(f"{name}.json"))], log):
            raise failure(code, log)
        made = dict(read_json(at.with_name(f"{name}.json")))
    quant = config.quant.model_copy(update={"calibrate": False})
    lora = config.lora.model_copy(update={"init": made["init"]})
    model = config.model.model_copy(update={"name": made["base"], "revision": None})
    return config.model_copy(update={"model": model, "quant": quant, "lora": lora}), made


def make(config: RunConfig) -> dict[str, Any]:
    """Calibrate as a training run with these settings would; see the top of this module."""
    began = time.monotonic()
    threads = config.train.threads
    devices.set_threads(auto_threads() if threads == "auto" else threads)
    source = resolve(config.model.name, revision=config.model.revision, allow_download=config.model.allow_download)
    data = load_data(config.data, load_tokenizer(source), model_limit=token_limit(source), template=config.model.template)
    decided, base = with_calibrated_base(config, source, data)
    assert base is not None  # only settings that calibrate come here
    return {
        "base": str(base.absolute()), "init": decided.lora.init, "seconds": time.monotonic() - began,
        "peak_memory_bytes": host.peak_rss_bytes(),
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Read the settings, write the answer; the border of this process, where an error becomes text and an exit code."""
    settings, answer = (Path(argument) for argument in arguments)
    try:
        write_json(answer, make(load_config(settings)))
    except HalfbyteError as error:
        print(redact.terminal(redact.secrets(error.text())), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
