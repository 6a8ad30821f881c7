"""A process measures itself: each step's time, processor time and page faults, its peak memory, the seconds until its first step."""

import resource
import threading
import time
from pathlib import Path
from typing import Any

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

    A thread reads RssAnon every 20 ms; resident memory has its peak kept by the system (VmHWM).  On a GPU its memory is counted from
    begin() on, and of `steps` steps the last is not timed: the profiler counts its kernels and copies.
    """

    def __init__(self, device: str = "cpu", steps: int = 0) -> None:
        super().__init__(daemon=True)
        self.cuda, self.steps = device.startswith("cuda"), steps
        self.launches = 0
        self._profile: Any = None
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
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.startup = process_age()
        self._last = self._now()

    def step(self, loss: float) -> None:
        """A step is over; reading its loss has waited for the device."""
        self.losses.append(float(loss))
        if self._profile is not None:
            self._count_launches()
            return
        now, last = self._now(), self._last
        self.seconds.append(now[0] - last[0])
        self.processor_seconds.append(now[1] - last[1])
        self.minor_faults.append(now[2] - last[2])
        if self.cuda and len(self.seconds) == self.steps - 1:
            import torch

            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.start()
        self._last = now

    def _count_launches(self) -> None:
        import torch

        self._profile.stop()
        self.launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in self._profile.events())

    def _device(self) -> dict[str, object]:
        if not self.cuda:
            return {}
        import torch

        held = {"peak_device_bytes": torch.cuda.max_memory_allocated(), "peak_device_reserved_bytes": torch.cuda.max_memory_reserved()}
        return {**held, "launches_per_step": self.launches}

    def result(self) -> dict[str, object]:
        """What was measured."""
        self._over.set()
        return {
            "seconds": [round(one, 4) for one in self.seconds],
            "processor_seconds": [round(one, 4) for one in self.processor_seconds],
            "losses": self.losses, "minor_faults": self.minor_faults,
            "startup_seconds": round(self.startup, 3), "peak_rss_bytes": status_bytes("VmHWM"), "peak_rss_anon_bytes": self.peak_anon,
            **self._device(),
        }  # fmt: skip
