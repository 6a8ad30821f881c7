"""Bytes, parameters, tokens and seconds as text, and bytes back from text.

GiB is 2^30 bytes everywhere; a number never appears without its unit.
"""

_BYTE_STEPS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_COUNT_STEPS = ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k"))


def bytes_text(count: float) -> str:
    """
    >>> bytes_text(2.5 * 2**30), bytes_text(900)
    ('2.50 GiB', '900 B')
    """
    for size, name in _BYTE_STEPS:
        if abs(count) >= size:
            return f"{count / size:.2f} {name}"
    return f"{count:.0f} B"


def loss_is_per(task: str) -> str:
    """What a loss is the mean of: trained tokens, of a classifier rows.

    >>> loss_is_per("causal-lm"), loss_is_per("sequence-classification")
    ('token', 'row')
    """
    return "row" if task == "sequence-classification" else "token"


def gib(count: float) -> float:
    """Bytes as GiB (2^30 bytes)."""
    return count / 2**30


def count_text(count: float) -> str:
    """
    >>> count_text(134_515_008), count_text(960)
    ('134.52 M', '960')
    """
    for size, name in _COUNT_STEPS:
        if abs(count) >= size:
            return f"{count / size:.2f}{name}"
    return f"{count:.0f}"


def seconds_text(seconds: float) -> str:
    """
    >>> seconds_text(8.25), seconds_text(75), seconds_text(7384)
    ('8.2 s', '1 min 15 s', '2 h 03 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent_text(share: float) -> str:
    """
    >>> percent_text(0.0362)
    '3.62 %'
    """
    return f"{100 * share:.2f} %"
