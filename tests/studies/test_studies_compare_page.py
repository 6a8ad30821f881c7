"""The figures in docs/compare.md are those of the committed comparisons."""

from benchmarks import compare_page


def test_the_page_shows_the_committed_figures() -> None:
    page, found = compare_page.PAGE.read_text(), compare_page.bodies()
    assert compare_page.with_figures(page, found) == page
    for body in found.values():
        names = [arm["name"] for arm in body["arms"]]
        assert all(name in page for name in names) and {"full", "lora", "qlora", "qlora-calibrated"} <= set(names)
        assert (compare_page.record.ROOT / "docs" / "pages" / f"comparison-{body['set']}.html").exists()
