"""The task of the tour: a request in everyday words -> the JSON command of a home assistant.

    "Could you dim the kitchen lights?"      -> {"do":"light","room":"kitchen","set":"dim"}
    "Wake me at half past six on Friday."    -> {"do":"alarm","day":"fri","at":"6:30"}

Why this one: the keys are nowhere in the prompt, so an untouched model cannot know them, an answer is right or wrong to the letter, and
the rows are short.  A skill has slots (room, time, name ...) and phrasings; a row is a skill, one value for each slot, one phrasing.

Held out means new to the model: the fillings (skill, value, value ...) are dealt first, held-out ones once each, and training rows are
made from the others only.  Single values and phrasings do occur on both sides, as words do; no row and no combination does.

All randomness comes from one `random.Random(seed)`; the same seed gives the same bytes on every machine.
"""

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass

SYSTEM = "Reply in JSON."
TRAIN_ROWS = 640
HELD_OUT_ROWS = 120


@dataclass(frozen=True)
class Row:
    """One row of the task; `filling` is the skill with its slot values, `answer` the JSON text of it."""

    request: str
    answer: str
    filling: tuple[str, ...]

    def messages(self) -> dict[str, list[dict[str, str]]]:
        """The row as a user's own file would hold it: the `messages` shape."""
        return {"messages": [*self.prompt(), {"role": "assistant", "content": self.answer}]}

    def prompt(self) -> list[dict[str, str]]:
        """The conversation up to the answer."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.request}]


@dataclass(frozen=True)
class Skill:
    """What the assistant can do: slots in the order of the answer, each with (spoken words -> value), and ways to ask."""

    name: str
    slots: Mapping[str, Mapping[str, str | int]]
    phrasings: tuple[str, ...]


def _same(*words: str) -> dict[str, str | int]:
    return {word: word for word in words}


_ROOMS = _same("kitchen", "bedroom", "bathroom", "office", "hall", "garage", "attic", "cellar", "nursery", "porch")
_DAYS: dict[str, str | int] = {
    "Monday": "mon",
    "Tuesday": "tue",
    "Wednesday": "wed",
    "Thursday": "thu",
    "Friday": "fri",
    "Saturday": "sat",
    "Sunday": "sun",
}
_NAMES = _same("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Leo", "Maria", "Paul")
_MINUTES: dict[str, str | int] = {
    "two minutes": 2,
    "three minutes": 3,
    "five minutes": 5,
    "ten minutes": 10,
    "a quarter of an hour": 15,
    "twenty minutes": 20,
    "half an hour": 30,
    "forty minutes": 40,
    "three quarters of an hour": 45,
    "an hour": 60,
    "two hours": 120,
}
_CLOCK: dict[str, str | int] = {
    "five": "5:00",
    "half past five": "5:30",
    "six": "6:00",
    "half past six": "6:30",
    "seven": "7:00",
    "half past seven": "7:30",
    "eight": "8:00",
    "half past eight": "8:30",
    "nine": "9:00",
    "half past nine": "9:30",
}

SKILLS = (
    Skill(
        "light",
        {"room": _ROOMS, "set": {"on": "on", "off": "off", "dim": "dim", "bright": "bright", "red": "red", "blue": "blue"}},
        (
            "Make the {room} lights {set}.",
            "I want the light in the {room} {set}, please.",
            "Lights {set} in the {room}.",
            "Can the {room} light be {set}?",
        ),
    ),
    Skill(
        "heat",
        {
            "room": _ROOMS,
            "to": {
                "sixteen": 16,
                "seventeen": 17,
                "eighteen": 18,
                "nineteen": 19,
                "twenty": 20,
                "twenty-one": 21,
                "twenty-two": 22,
                "twenty-three": 23,
            },
        },
        (
            "Heat the {room} to {to} degrees.",
            "It should be {to} degrees in the {room}.",
            "Set the {room} to {to} degrees, please.",
            "I'd like {to} degrees in the {room}.",
        ),
    ),
    Skill(
        "timer",
        {"for": _same("eggs", "pasta", "rice", "tea", "bread", "pizza", "laundry", "soup", "cake", "coffee"), "min": _MINUTES},
        (
            "Tell me when the {for} has had {min}.",
            "The {for} needs {min}, set a timer.",
            "Timer for the {for}: {min}.",
            "Remind me about the {for} in {min}.",
        ),
    ),
    Skill(
        "alarm",
        {"day": _DAYS, "at": _CLOCK},
        (
            "Wake me at {at} on {day}.",
            "I have to get up at {at} on {day}.",
            "Set the alarm for {day} at {at}.",
            "On {day} I need to be awake by {at}.",
        ),
    ),
    Skill(
        "music",
        {"play": _same("jazz", "rock", "blues", "techno", "opera", "folk", "soul", "disco", "reggae", "piano"), "room": _ROOMS},
        (
            "Play some {play} in the {room}.",
            "I feel like {play} in the {room}.",
            "Put {play} on in the {room}, please.",
            "Let me hear {play} in the {room}.",
        ),
    ),
    Skill(
        "meet",
        {"who": _NAMES, "day": _DAYS},
        (
            "I'm seeing {who} on {day}, note it.",
            "Put {who} in my diary for {day}.",
            "Meeting with {who} on {day}.",
            "{day} is for {who}, write it down.",
        ),
    ),
    Skill(
        "call",
        {"who": _NAMES, "at": _CLOCK},
        (
            "Ring {who} at {at}.",
            "I have to phone {who} at {at}.",
            "Call {who} for me at {at}.",
            "At {at}, get {who} on the line.",
        ),
    ),
    Skill(
        "buy",
        {"item": _same("milk", "apples", "butter", "cheese", "rice", "coffee", "bananas", "onions", "sugar", "soap"), "day": _DAYS},
        (
            "We need {item} by {day}.",
            "Put {item} on the list for {day}.",
            "On {day} I have to buy {item}.",
            "Don't let me forget the {item} on {day}.",
        ),
    ),
)


def _row(skill: Skill, words: tuple[str, ...], phrasing: str) -> Row:
    values = {slot: table[word] for (slot, table), word in zip(skill.slots.items(), words)}
    request = phrasing.format(**dict(zip(skill.slots, words)))
    answer = json.dumps({"do": skill.name, **values}, separators=(",", ":"))
    return Row(request[0].upper() + request[1:], answer, (skill.name, *words))


def make(seed: int = 0, train_rows: int = TRAIN_ROWS, held_out_rows: int = HELD_OUT_ROWS) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): no row and no filling in both, no row twice.

    The skills take turns, so that each has the same share.  Raises ValueError when more rows are asked for than the tables can give.
    """
    rng = random.Random(seed)
    per_skill = -(-held_out_rows // len(SKILLS))
    train: list[Row] = []
    held_out: list[Row] = []
    for skill in SKILLS:
        fillings = list(itertools.product(*skill.slots.values()))
        rng.shuffle(fillings)
        if per_skill * 2 > len(fillings):
            raise ValueError(f"skill {skill.name} has {len(fillings)} fillings, too few to hold {per_skill} out")
        held_out += [_row(skill, words, rng.choice(skill.phrasings)) for words in fillings[:per_skill]]
        rest = list(itertools.product(fillings[per_skill:], skill.phrasings))
        rng.shuffle(rest)
        wanted = -(-train_rows // len(SKILLS))
        if wanted > len(rest):
            raise ValueError(f"skill {skill.name} has {len(rest)} training rows, {wanted} were asked for")
        train += [_row(skill, words, phrasing) for words, phrasing in rest[:wanted]]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train[:train_rows], held_out[:held_out_rows]


def commonest_share(rows: list[Row]) -> float:
    """Exact match of always giving the commonest answer of `rows`: the baseline of a model that has learnt the format only."""
    answers = [row.answer for row in rows]
    return max(answers.count(answer) for answer in set(answers)) / len(rows)


def copy_share(rows: list[Row]) -> float:
    """Exact match of repeating the request."""
    return sum(row.request.strip() == row.answer for row in rows) / len(rows)
