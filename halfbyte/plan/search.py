"""Which settings fit, best first; and for one that does not, its largest term and the first thing to change.

What a user leaves open is tried in this order, each step costing more time or quality than the one before:

    policy       keep, recompute_mlp, recompute, offload (GPU)
    state        float32, int8, int8 paged (GPU)
    micro batch  the largest divisor of the global batch that still helps (BATCH_TOKENS tokens keep a device busy), down to 1

Methods are ordered by what published comparisons say: an adapter on a dense base where it fits with room to spare, then one on a 4-bit
base, then one on a dense base that just fits, then every weight.  Room to spare is what the run can be given, not what its largest
micro-batch leaves: lora takes the first setting that leaves it.  docs/memory.md has the reasons with their sources.
A setting fits when its plan and the margin of error (hardware.MARGIN) stay within the memory, and is tight when only the plan does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from halfbyte.plan.activations import POLICIES, fused
from halfbyte.plan.hardware import PROGRAM_ON_HOST, Hardware
from halfbyte.plan.memory import Memory, Term, plan_memory
from halfbyte.plan.setting import Setting
from halfbyte.shape import ModelShape
from halfbyte.units import bytes_text

BATCH_TOKENS = {"cpu": 1024, "gpu": 8192}
"""Tokens of a forward pass at which matrix products come near their full rate; more costs memory."""
STATES = {"cpu": (("float32", False), ("int8", False)), "gpu": (("float32", False), ("int8", False), ("int8", True))}
HEADROOM = 0.20
FITS, TIGHT, NOT = "fits", "tight", "does not fit"
GLOBAL_BATCH_SIZE = 16
"""Rows of an optimizer step where nobody says otherwise (config/train.py)."""


@dataclass(frozen=True)
class Option:
    """A setting, its memory, and whether that is there; `short` says of what there is too little: "device", "host", or "" for neither."""

    setting: Setting
    memory: Memory
    verdict: str
    short: str = ""

    def headroom(self, hardware: Hardware) -> float:
        """Share of the memory that is left."""
        return 1 - self.memory.total / hardware.memory_bytes

    @property
    def needed(self) -> int:
        """Bytes of the memory that decides: the host's with the program there where that is short, else the device's."""
        return self.memory.host + PROGRAM_ON_HOST if self.short == "host" else self.memory.total

    def there(self, hardware: Hardware) -> int:
        """Bytes that there are of it."""
        return hardware.host_bytes if self.short == "host" else hardware.memory_bytes

    @property
    def largest(self) -> Term:
        """The largest term of it."""
        return self.memory.largest_on_host if self.short == "host" else self.memory.largest


def needed_text(one: Option) -> str:
    """What it needs of the memory that decides, and which memory that is where it is the host's."""
    return bytes_text(one.needed) + (" of host memory, the program included" if one.short == "host" else "")


@dataclass(frozen=True)
class Change:
    """One setting to change, what the plan is then, and the verdict."""

    text: str
    saved: int
    option: Option


def judge(memory: Memory, hardware: Hardware) -> tuple[str, str]:
    """(whether this much is there, of what there is too little)."""
    if memory.total > hardware.memory_bytes:
        return NOT, "device"
    if hardware.host_bytes and memory.host + PROGRAM_ON_HOST > hardware.host_bytes and memory.host:
        return NOT, "host"
    return (FITS if memory.total * (1 + hardware.margin) <= hardware.memory_bytes else TIGHT), ""


def option(shape: ModelShape, setting: Setting, hardware: Hardware) -> Option:
    """A setting judged for a place."""
    setting = replace(setting, device=hardware.kind)
    memory = plan_memory(shape, setting, hardware.program_bytes)
    return Option(setting, memory, *judge(memory, hardware))


def divisors(global_batch_size: int, tokens: int, most: int) -> list[int]:
    """Micro-batches to try, largest first: divisors of the global batch with at most `most` tokens at once, and 1.

    >>> divisors(16, 200, 1024), divisors(6, 5000, 1024)
    ([4, 2, 1], [1])
    """
    sizes = [size for size in range(global_batch_size, 0, -1) if global_batch_size % size == 0]
    return [size for size in sizes if size == 1 or size * tokens <= most]


def offered(shape: ModelShape, setting: Setting, hardware: Hardware) -> list[str]:
    """The policies that change something: offloading where host memory is another, recompute_mlp where the layer's own ops run."""
    without = {"offload"} if hardware.kind == "cpu" else set()
    without |= set() if fused(shape, setting) else {"recompute_mlp"}
    return [name for name in POLICIES if name not in without]


def settings(
    shape: ModelShape, base: Setting, hardware: Hardware, fixed: frozenset[str] = frozenset(), sizes: Sequence[int] = ()
) -> Iterator[Setting]:
    """What to try for the method of `base`, in order; names in `fixed` (policy, state, micro_batch_size) stay as they are.

    sizes   micro-batches to try, the preferred first; none: `divisors` of the global batch
    """
    policies = [base.policy] if "policy" in fixed else offered(shape, base, hardware)
    states = ((base.state, base.paged),) if "state" in fixed else STATES[hardware.kind]
    if not sizes:
        every = divisors(base.global_batch_size or GLOBAL_BATCH_SIZE, base.tokens, BATCH_TOKENS[hardware.kind])
        sizes = [base.micro_batch_size] if "micro_batch_size" in fixed else every
    for policy in policies:
        for state, paged in states:
            for size in sizes:
                yield replace(base, policy=policy, state=state, paged=paged, micro_batch_size=size)


def options(
    shape: ModelShape, base: Setting, hardware: Hardware, fixed: frozenset[str] = frozenset(), sizes: Sequence[int] = ()
) -> list[Option]:
    """All that is tried for the method of `base`, judged."""
    return [option(shape, setting, hardware) for setting in settings(shape, base, hardware, fixed, sizes)]


def best(tried: Sequence[Option]) -> Option:
    """The first that fits, else the smallest of those that are tight, else the smallest."""
    first = next((one for one in tried if one.verdict == FITS), None)
    return first or min([one for one in tried if one.verdict == TIGHT] or tried, key=lambda one: one.memory.total)


def least(tried: Sequence[Option]) -> Option:
    """The one that needs the least memory; one the host has no room for only where there is no other."""
    return min([one for one in tried if one.short != "host"] or tried, key=lambda one: one.memory.total)


def roomy(tried: Sequence[Option], hardware: Hardware) -> Option | None:
    """The first that fits and leaves HEADROOM; None where none does."""
    return next((one for one in tried if one.verdict == FITS and one.headroom(hardware) >= HEADROOM), None)


def best_of_each(tried: Mapping[str, Sequence[Option]], hardware: Hardware) -> dict[str, Option]:
    """method -> its best option; beside other methods lora's is the first that leaves HEADROOM, which makes it the first choice."""
    found = {method: best(every) for method, every in tried.items()}
    room = roomy(tried["lora"], hardware) if "lora" in tried and len(tried) > 1 else None
    return found if room is None else {**found, "lora": room}


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
    on_host = one.short == "host"
    made = [
        Change(text, one.memory.host - other.memory.host if on_host else one.memory.total - other.memory.total, other)
        for text, other in _changed(shape, one, hardware)
    ]
    enough = next((change for change in made if change.option.verdict == FITS), None)
    return enough or max((change for change in made if change.saved > 0), key=lambda change: change.saved, default=None)


def _changed(shape: ModelShape, one: Option, hardware: Hardware) -> Iterator[tuple[str, Option]]:
    """Single changes, the cheap ones first."""
    now = one.setting
    on_host = one.short == "host"
    later = [name for name in POLICIES if name != "offload"] if on_host else list(POLICIES)[list(POLICIES).index(now.policy) + 1 :]
    changes: list[tuple[str, Setting]] = [
        (f"train.activations={name} ({POLICIES[name].cost})", replace(now, policy=name))
        for name in offered(shape, now, hardware)
        if name in later
    ]
    if now.micro_batch_size > 1:
        changes.append(("train.micro_batch_size=1", replace(now, micro_batch_size=1)))
    if now.state != "int8":
        changes.append(("optim.state=int8", replace(now, state="int8")))
    if on_host and now.paged:
        changes.append(("optim.paged=false", replace(now, paged=False)))
    if not on_host and not now.paged and hardware.kind == "gpu":
        changes.append(("optim.paged=true", replace(now, paged=True)))
    if now.method != "full" and now.rank > 1:
        changes.append((f"lora.rank={now.rank // 2}", replace(now, rank=now.rank // 2)))
    if now.init == "loftq":
        changes.append(("lora.init=default", replace(now, init="default")))
    if now.method != "qlora":
        changes.append(("method=qlora", now.with_method("qlora")))
    if now.tokens > 128:
        changes.append((f"data.max_tokens={now.tokens // 2}", replace(now, tokens=now.tokens // 2)))
    for text, setting in changes:
        yield text, option(shape, setting, hardware)
