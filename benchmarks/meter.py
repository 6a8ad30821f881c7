"""A process measures itself: each step's time, processor time and page faults, its peak memory, the seconds until its first step."""

import resource
import threading
import time
from pathlib import Path

EVERY_SECONDS = 0.02


def status_bytes(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not tell {field}")


def process_age() -> float:
    """Seconds since this process was started."""
    import psutil

    return time.time() - psutil.Process().create_time()


class Meter(threading.Thread):
    """begin() right before the first step, step(loss) after each; a step lasts from the end of the one before to its own.

    A thread reads RssAnon every 20 ms; resident memory has its peak kept by the system (VmHWM).
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.minor_faults: list[int] = []
        self.processor_seconds: list[float] = []
        self.peak_anon = 0
        self.startup = 0.0
        self._over = threading.Event()
        self._last = self._now()
        self.start()

    def run(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            self.peak_anon = max(self.peak_anon, status_bytes("RssAnon"))

    @staticmethod
    def _now() -> tuple[float, float, int]:
        """Clock, processor time of all threads, minor page faults."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_minflt

    def begin(self) -> None:
        """The first step comes now."""
        self.startup = process_age()
        self._last = self._now()

    def step(self, loss: float) -> None:
        """A step is over."""
        now, last = self._now(), self._last
        self.seconds.append(now[0] - last[0])
        self.processor_seconds.append(now[1] - last[1])
        self.minor_faults.append(now[2] - last[2])
        self.losses.append(float(loss))
        self._last = now

    def result(self) -> dict[str, object]:
        """What was measured."""
        self._over.set()
        return {
            "seconds": [round(one, 4) for one in self.seconds],
            "processor_seconds": [round(one, 4) for one in self.processor_seconds],
            "losses": self.losses, "minor_faults": self.minor_faults,
            "startup_seconds": round(self.startup, 3), "peak_rss_bytes": status_bytes("VmHWM"), "peak_rss_anon_bytes": self.peak_anon,
        }  # fmt: skip
