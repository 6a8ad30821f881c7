"""Which settings fit, best first; and for one that does not, its largest term and the first thing to change.

What a user leaves open is tried in this order, each step costing more time or quality than the one before:

    policy       keep, recompute_mlp, recompute, offload (GPU)
    state        float32, int8, int8 paged (GPU)
    micro batch  the largest that still helps (BATCH_TOKENS tokens keep a device busy), down to 1

Methods are ordered by what published comparisons say: an adapter on a dense base where it fits with room to spare, then one on a 4-bit
base, then one on a dense base that just fits, then every weight.  docs/memory.md has the reasons with their sources.
A setting fits when its plan and the margin of error (hardware.MARGIN) stay within the memory, and is tight when only the plan does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from halfbyte.plan.activations import POLICIES, fused
from halfbyte.plan.hardware import PROGRAM_ON_HOST, Hardware
from halfbyte.plan.memory import Memory, plan_memory
from halfbyte.plan.setting import Setting
from halfbyte.shape import ModelShape

BATCH_TOKENS = {"cpu": 1024, "gpu": 8192}
"""Tokens of a forward pass at which matrix products come near their full rate; more costs memory."""
STATES = {"cpu": (("float32", False), ("int8", False)), "gpu": (("float32", False), ("int8", False), ("int8", True))}
HEADROOM = 0.20
FITS, TIGHT, NOT = "fits", "tight", "does not fit"


@dataclass(frozen=True)
class Option:
    """A setting, its memory, and whether that is there."""

    setting: Setting
    memory: Memory
    verdict: str

    def headroom(self, hardware: Hardware) -> float:
        """Share of the memory that is left."""
        return 1 - self.memory.total / hardware.memory_bytes


@dataclass(frozen=True)
class Change:
    """One setting to change, what the plan is then, and the verdict."""

    text: str
    saved: int
    option: Option


def judge(memory: Memory, hardware: Hardware) -> str:
    """Whether this much is there."""
    if hardware.host_bytes and memory.host + PROGRAM_ON_HOST > hardware.host_bytes and memory.host:
        return NOT
    if memory.total * (1 + hardware.margin) <= hardware.memory_bytes:
        return FITS
    return TIGHT if memory.total <= hardware.memory_bytes else NOT


def option(shape: ModelShape, setting: Setting, hardware: Hardware) -> Option:
    """A setting judged for a place."""
    setting = replace(setting, device=hardware.kind)
    memory = plan_memory(shape, setting, hardware.program_bytes)
    return Option(setting, memory, judge(memory, hardware))


def batch_sizes(tokens: int, kind: str) -> list[int]:
    """Micro-batches to try, largest first: powers of two up to BATCH_TOKENS tokens.

    >>> batch_sizes(512, "cpu"), batch_sizes(100_000, "gpu")
    ([2, 1], [1])
    """
    most = max(1, BATCH_TOKENS[kind] // tokens)
    return [2**power for power in range(most.bit_length() - 1, -1, -1)]


def offered(shape: ModelShape, setting: Setting, hardware: Hardware) -> list[str]:
    """The policies that change something: offloading where host memory is another, recompute_mlp where the layer's own ops run."""
    without = {"offload"} if hardware.kind == "cpu" else set()
    without |= set() if fused(shape, setting) else {"recompute_mlp"}
    return [name for name in POLICIES if name not in without]


def settings(
    shape: ModelShape, base: Setting, hardware: Hardware, fixed: frozenset[str] = frozenset(), sizes: Sequence[int] = ()
) -> Iterator[Setting]:
    """What to try for the method of `base`, in order; names in `fixed` (policy, state, micro_batch_size) stay as they are.

    sizes   micro-batches to try, the preferred first; none: `batch_sizes`
    """
    policies = [base.policy] if "policy" in fixed else offered(shape, base, hardware)
    states = ((base.state, base.paged),) if "state" in fixed else STATES[hardware.kind]
    if not sizes:
        sizes = [base.micro_batch_size] if "micro_batch_size" in fixed else batch_sizes(base.tokens, hardware.kind)
    for policy in policies:
        for state, paged in states:
            for size in sizes:
                yield replace(base, policy=policy, state=state, paged=paged, micro_batch_size=size)


def options(
    shape: ModelShape, base: Setting, hardware: Hardware, fixed: frozenset[str] = frozenset(), sizes: Sequence[int] = ()
) -> list[Option]:
    """All that is tried for the method of `base`, judged."""
    return [option(shape, setting, hardware) for setting in settings(shape, base, hardware, fixed, sizes)]


def best(tried: list[Option]) -> Option:
    """The first that fits, else the smallest."""
    return next((one for one in tried if one.verdict == FITS), None) or min(tried, key=lambda one: one.memory.total)


def order(found: dict[str, Option], hardware: Hardware) -> list[tuple[str, str]]:
    """(method, why it stands here) of those that fit, best first; tight ones last."""
    reasons = {
        ("lora", True): "the base stays in 16 or 32 bits, nothing is lost to rounding, and a fifth of the memory is left",
        ("qlora", True): "the base takes far less memory",
        ("qlora", False): "the base takes far less memory",
        ("lora", False): "fits, but with less than a fifth of the memory to spare",
        ("full", True): "fits, but an adapter reaches about the same loss on instruction data with a third less arithmetic",
        ("full", False): "fits, but an adapter reaches about the same loss on instruction data with a third less arithmetic",
    }
    places = ["lora roomy", "qlora", "lora", "full"]
    listed = []
    for method, one in found.items():
        if one.verdict == NOT:
            continue
        roomy = one.headroom(hardware) >= HEADROOM
        place = places.index("lora roomy" if method == "lora" and roomy else method)
        why = reasons[method, roomy] if one.verdict == FITS else "within the memory, but not by the margin of error of this plan"
        listed.append((one.verdict == TIGHT, place, method, why))
    return [(method, why) for _, _, method, why in sorted(listed)]


def first_change(shape: ModelShape, one: Option, hardware: Hardware) -> Change | None:
    """The cheapest single change that makes it fit; else the one that saves most; None where nothing is left to change."""
    made = [Change(text, one.memory.total - other.memory.total, other) for text, other in _changed(shape, one, hardware)]
    enough = next((change for change in made if change.option.verdict == FITS), None)
    return enough or max((change for change in made if change.saved > 0), key=lambda change: change.saved, default=None)


def _changed(shape: ModelShape, one: Option, hardware: Hardware) -> Iterator[tuple[str, Option]]:
    """Single changes, the cheap ones first."""
    now = one.setting
    later = list(POLICIES)[list(POLICIES).index(now.policy) + 1 :]
    changes: list[tuple[str, Setting]] = [
        (f"train.activations={name} ({POLICIES[name].cost})", replace(now, policy=name))
        for name in offered(shape, now, hardware)
        if name in later
    ]
    if now.micro_batch_size > 1:
        changes.append(("train.micro_batch_size=1", replace(now, micro_batch_size=1)))
    if now.state != "int8":
        changes.append(("optim.state=int8", replace(now, state="int8")))
    if not now.paged and hardware.kind == "gpu":
        changes.append(("optim.paged=true", replace(now, paged=True)))
    if now.method != "full" and now.rank > 1:
        changes.append((f"lora.rank={now.rank // 2}", replace(now, rank=now.rank // 2)))
    if now.method != "qlora":
        changes.append(("method=qlora", now.with_method("qlora")))
    if now.tokens > 128:
        changes.append((f"data.max_tokens={now.tokens // 2}", replace(now, tokens=now.tokens // 2)))
    for text, setting in changes:
        yield text, option(shape, setting, hardware)
