"""Split a CPU kernel's blocks over as many threads as torch uses.

The threads live for one call, so a process that forks afterwards (a data loader's workers) inherits none.  Kernels release the
interpreter lock while they run.
"""

import threading
from collections.abc import Callable

import torch

ELEMENTS_PER_THREAD = 1 << 18  # below this a thread costs more than it saves


def run_ranges(work: Callable[[int, int], object], blocks: int, blocksize: int) -> None:
    """Call `work(first, last)` on ranges that cover 0..blocks exactly once, one of them on the calling thread."""
    count = max(1, min(torch.get_num_threads(), blocks * blocksize // ELEMENTS_PER_THREAD))
    edges = [blocks * part // count for part in range(count + 1)]
    failures: list[BaseException] = []

    def guarded(first: int, last: int) -> None:
        try:
            work(first, last)
        except BaseException as failure:  # carried to the caller below, whatever it is
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(edges[part], edges[part + 1])) for part in range(1, count)]
    for thread in threads:
        thread.start()
    guarded(edges[0], edges[1])
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
