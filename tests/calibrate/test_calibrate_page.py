"""The figures in docs/calibrated.md are those of the committed result."""

import json

from benchmarks import calibrated_page


def test_the_page_shows_the_committed_figures() -> None:
    """docs/calibrated.md is that of benchmarks/results/calibrated.json, and LoftQ and QPiSSA stand beside every text."""
    page, body = calibrated_page.PAGE.read_text(), json.loads((calibrated_page.record.RESULTS / "calibrated.json").read_text())
    assert calibrated_page.with_figures(page, body) == page
    texts = {(row["basis"], row["calibrated_on"], row["held_out_text"]) for row in body["table"]}
    assert len(texts) >= 2
    for text in texts:
        arms = {row["arm"] for row in body["table"] if (row["basis"], row["calibrated_on"], row["held_out_text"]) == text}
        assert arms == set(calibrated_page.NAMES)
