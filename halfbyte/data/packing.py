"""Samples to rows of at most `max_tokens`, several samples in a row, best fit first.

    samples   AAAA BB CCC       max_tokens 6
    packed    A A A A B B       segment_ids 0 0 0 0 1 1      positions 0 1 2 3 0 1      labels  - a a a - b
              C C C                         0 0 0                      0 1 2                    - c c

Longest first, each into the row with the least room that still takes it (best-fit decreasing).  Positions restart at each sample; from
them the model's attention keeps the samples apart (see `batches.model_inputs`).  The first label of each sample is -100, so that no
sample's first token is a target of the sample before it.  No sample is cut or split; that all tokens came through is checked each time.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.data.faults import Problem, error_of
from halfbyte.data.tokenize import IGNORED, Example


@dataclass(frozen=True)
class Packed:
    """One packed row; all lists have its length, but `rows` names the data row of each segment."""

    input_ids: list[int]
    labels: list[int]
    segment_ids: list[int]
    positions: list[int]
    rows: list[int]


def pack(examples: Sequence[Example], max_tokens: int) -> list[Packed]:
    """Pack examples into rows of at most `max_tokens`; raises DataError when one is longer or a token were lost."""
    packed = [_join([examples[number] for number in group]) for group in groups([len(one.input_ids) for one in examples], max_tokens)]
    _check(examples, packed, max_tokens)
    return packed


def groups(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Best-fit decreasing: which samples share a row; ties by sample number, so the answer is the same everywhere."""
    rooms: list[tuple[int, int]] = []  # (room left, group), sorted
    made: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        if lengths[number] > max_tokens:
            raise _broken(f"a sample of {lengths[number]:,} tokens cannot be packed into {max_tokens:,}")
        at = bisect.bisect_left(rooms, (lengths[number], -1))
        room, group = rooms.pop(at) if at < len(rooms) else (max_tokens, len(made))
        if group == len(made):
            made.append([])
        made[group].append(number)
        if room > lengths[number]:
            bisect.insort(rooms, (room - lengths[number], group))
    return made


def _join(members: Sequence[Example]) -> Packed:
    ids: list[int] = []
    labels: list[int] = []
    segments: list[int] = []
    positions: list[int] = []
    for segment, one in enumerate(members):
        length = len(one.input_ids)
        ids += one.input_ids
        labels += [IGNORED, *one.labels[1:]]
        segments += [segment] * length
        positions += range(length)
    return Packed(ids, labels, segments, positions, [one.row for one in members])


def _check(examples: Sequence[Example], packed: Sequence[Packed], max_tokens: int) -> None:
    """Token and label counts in equal those out, and no row is over the limit."""
    came, went = sum(len(one.input_ids) for one in examples), sum(len(one.input_ids) for one in packed)
    trained_in = sum(label != IGNORED for one in examples for label in one.labels[1:])
    trained_out = sum(label != IGNORED for one in packed for label in one.labels)
    longest = max((len(one.input_ids) for one in packed), default=0)
    if came != went or trained_in != trained_out or longest > max_tokens:
        raise _broken(f"{came:,} tokens in, {went:,} out; {trained_in:,} labels in, {trained_out:,} out; longest row {longest:,}")


def _broken(found: str) -> Exception:
    return error_of(Problem("E-DATA-070", "packing", found=found))
