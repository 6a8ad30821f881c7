"""The pages in a real browser: opened from disk they ask for nothing, complain about nothing, and hostile text stays text."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from halfbyte.pages import report
from halfbyte.plan import page as plan_page
from halfbyte.plan.answer import answer
from halfbyte.plan.question import ask
from tests.pages.chromium import Browser, binary
from tests.pages.test_pages_report import make_run
from tests.studies import study_outcomes

pytestmark = pytest.mark.skipif(binary() is None, reason="no Chromium is installed (Debian: chromium-headless-shell)")
HOSTILE = "</title></style><script>alert(1)</script><img src=//evil.example/x onerror=alert(2)><svg onload=alert(3)>"
MARKUP = "document.querySelectorAll('script,iframe,object,embed,base,form,link,svg,[onerror],[onload]').length"
WIDER = "document.documentElement.scrollWidth - window.innerWidth"
TEXT = "document.body.innerText"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip


def pages(folder: Path, word: str) -> dict[str, tuple[Path, str]]:
    """Every kind of page there is, with `word` wherever foreign text can stand, and the text that must be read on it."""
    name = word.replace("/", "")  # a plan's foreign text is the name of a folder
    for part in ("study", name):
        (folder / part).mkdir()
    (folder / name / "config.json").write_text(json.dumps(CONFIG))
    plan = plan_page.write(folder / "plan.html", answer(ask(str(folder / name), gpu_memory="24")))
    run = report.write(make_run(folder / "run", word))
    return {"report": (run, word), "comparison": (study_outcomes.write_page(folder / "study", word), word), "plan": (plan, name)}


def colours(png: bytes) -> tuple[int, float]:
    """(different colours, share of the picture that is not its commonest one)."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    counts = [count for count, _ in picture.getcolors(picture.width * picture.height) or []]
    return len(counts), 1 - max(counts) / sum(counts)


@pytest.mark.parametrize("word", ["plain words", HOSTILE], ids=["plain", "hostile"])
def test_pages_open_from_disk_quietly_and_show_foreign_text_as_text(browser: Browser, tmp_path: Path, word: str) -> None:
    for name, (page, wanted) in pages(tmp_path, word).items():
        seen = browser.open(page, MARKUP, WIDER, TEXT)
        markup, wider, text = seen.answers
        assert [url for url in seen.requests if not url.startswith("data:")] == [page.resolve().as_uri()], name
        assert seen.complaints == [] and seen.dialogs == [], name
        assert markup == 0 and wanted in text, name
        assert wider <= 0, f"{name} is wider than the window"
        different, drawn = colours(seen.png)
        assert different > 30 and drawn > 0.02, f"{name} looks blank"


def test_a_page_that_acted_would_be_heard(browser: Browser, tmp_path: Path) -> None:
    """The ears of the tests above: a script, a request and a blank page are all noticed."""
    page = tmp_path / "acts.html"
    page.write_text("<script>alert(1); console.error('x')</script><img src='file:///nowhere.png'>")
    seen = browser.open(page, MARKUP)
    assert seen.dialogs == ["1"] and seen.complaints and "file:///nowhere.png" in seen.requests and seen.answers == [1]
    assert colours(seen.png)[1] < 0.02
    page.write_text("<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\"><script>alert(1)</script>")
    assert browser.open(page).complaints
