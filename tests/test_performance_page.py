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
