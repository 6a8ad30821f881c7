"""The commands that go on from a plan, with all that was given: copied, they train or plan the same settings.

A run decides its micro-batch and its policy by the same search (decide.py), so those are written only where the plan chose others, as for
lora with room beside other methods.  A run does not decide the state of its optimizer: that is written where it is not the default.
"""

import shlex
from pathlib import Path

from halfbyte.plan.answer import Answer, Asked, Question
from halfbyte.plan.search import best, options


def train_command(given: Answer) -> str:
    """Trains as the plan's first choice would; FILE stands where no rows were given."""
    question, method = given.question, given.ranking[0][0]
    words = ["halfbyte", "train", *([question.asked.file] if question.asked.file else [])]
    if _names_model(question):
        words += ["--model", str(Path(question.name).parent) if question.name.endswith(".json") else question.name]
    data = question.asked.data or ("FILE" if question.rows is None else None)
    words += ["--data", data] if data is not None else []
    return shlex.join([*words, "--method", method, *settings_for(question.asked, method), *_chosen(given, method)])


def calibrate_command(question: Question) -> str:
    """The same plan, measuring this machine first."""
    asked = question.asked
    words = ["halfbyte", "plan", *([question.name] if _names_model(question) else []), *([asked.file] if asked.file else [])]
    for option, value in (("--data", asked.data), ("--method", asked.method)):
        words += [option, value] if value is not None else []
    return shlex.join([*words, *asked.settings, "--calibrate"])


def settings_for(asked: Asked, method: str) -> list[str]:
    """The settings without those that do nothing beside this method; the method itself is not among them."""
    rest = {"qlora": (), "lora": ("quant",), "full": ("quant", "lora")}[method]
    return [word for word in asked.settings if _key(word) != "method" and _key(word).split(".")[0] not in rest]


def _key(word: str) -> str:
    return word.partition("=")[0].strip().replace("-", "_")


def _names_model(question: Question) -> bool:
    """Whether the model stands on the command line by itself, and not in a file or a setting."""
    asked = question.asked
    elsewhere = asked.file is not None or any(_key(word) in ("model", "model.name") for word in asked.settings)
    return asked.model is not None or not elsewhere


def _chosen(given: Answer, method: str) -> list[str]:
    """What the plan chose and a run would not choose by itself."""
    question, now = given.question, given.found[method].setting
    words = []
    if "state" not in question.fixed:
        words += ["optim.state=int8"] if now.state == "int8" else []
        words += ["optim.paged=true"] if now.paged else []
    if best(options(question.shape, now, question.hardware, question.fixed | {"state"})).setting != now:
        open_ones = {"policy": f"train.activations={now.policy}", "micro_batch_size": f"train.micro_batch_size={now.micro_batch_size}"}
        words += [word for name, word in open_ones.items() if name not in question.fixed]
    return words
