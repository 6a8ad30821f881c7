"""docs/performance.md shows what the committed results say."""

import json

from benchmarks import performance_page, record


def test_the_page_is_what_the_results_say() -> None:
    """`python -m benchmarks.performance_page` brings it up to date."""
    page = performance_page.PAGE.read_text()
    assert performance_page.filled(page) == page


def test_the_result_stands_behind_every_bar() -> None:
    """The ratios of a training step, of which the README speaks, were reached in the run that is committed, and losses agreed."""
    part = json.loads((record.RESULTS / "train_cpu.json").read_text())["modes"]["completion"]
    assert all(one["reached"] is not False for one in part["ratios"]) and all(one["agree"] for one in part["agreement"])


def test_predicted_memory_is_within_a_tenth_of_what_was_measured() -> None:
    """What docs/memory.md says of the committed result."""
    found = json.loads((record.RESULTS / "memory.json").read_text())
    shares = [row["predicted_over_measured"] for row in found["rows"]]
    assert found["within_10_percent"] == found["settings"] == len(shares) == 28 and found["fits_wrongly"] == 0
    assert f"{min(shares):.2f} to {max(shares):.2f}" in (performance_page.PAGE.parent / "memory.md").read_text()
    assert all(one["within_15_percent"] for one in found["policies"].values())
