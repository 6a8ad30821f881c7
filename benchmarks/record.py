"""The header every committed result carries: device, versions, date, commit; and an atomic way to write it."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared" / "data"
PACKAGES = ("halfbyte", "torch", "transformers", "peft", "bitsandbytes", "trl", "numba", "safetensors", "tokenizers")


def header() -> dict[str, object]:
    """Device, versions, date and commit of this measurement."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": f"{cpu}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit that is checked out; empty outside of a repository."""
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def write(name: str, body: dict[str, object]) -> Path:
    """Write results/<name>.json with the header in front; the file is replaced whole or not at all."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({**header(), **body}, indent=1) + "\n")
    fresh.replace(path)
    return path
