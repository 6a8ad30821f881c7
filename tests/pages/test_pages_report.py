"""The report: everything in one file, nothing in it can act, nothing secret in it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from halfbyte.config import load_config, to_yaml
from halfbyte.pages import page as pages
from halfbyte.pages import plots, report

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</pre><script>alert(1)</script>",
    "<iframe src=javascript:alert(1)>",
    "{{ 7*7 }}",
    "{% include '/etc/passwd' %}",
    "</title><script>1</script>",
    "</style><script>1</script>",
    '<a href="javascript:alert(1)">x</a>',
    "<math><mtext></p><style><img src onerror=alert(1)>",
    "&lt;script&gt;",
    "javascript:alert(1)",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<base href=//evil.example>",
    "<form action=//evil.example>",
    "\x1b]0;title\x07\x1b[31mred",
    "<link rel=stylesheet href=//evil.example/a.css>",
    "\u202egnp.exe",
    "<object data=x>",
    "<embed src=x>",
]
ALLOWED_TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "h1",
    "h2",
    "p",
    "section",
    "div",
    "span",
    "b",
    "img",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "ul",
    "li",
    "details",
    "summary",
    "pre",
    "footer",
}
CANARY = "hf_CANARYcanary0123456789"


class Seen(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def make_run(folder: Path, word: str = "plain") -> Path:
    """A run folder in which `word` stands wherever other people's text can stand."""
    folder.mkdir(parents=True)
    steps = [{"step": n, "loss": 3.0 / n, "lr": 1e-3, "grad_norm": 1.0} for n in range(1, 9)]
    steps += [{"step": 4, "eval_loss": 1.1, "perplexity": 3.0, "best": True}, {"step": 5, "event": f"note {word}"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    summary = {
        "status": "done",
        "method": word,
        "steps": 8,
        "seconds": 12.5,
        "peak_memory_bytes": 2**30,
        "model": word,
        "data": word,
        "trainable_share": 0.05,
    }
    (folder / "run.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps({"machine": {"cpu": word}}))
    (folder / "config.yaml").write_text(f"model: {word!r}\n")
    (folder / "samples.json").write_text(json.dumps([{"prompt": word, "reference": word, "before": word, "after": word}]))
    (folder / "scores.json").write_text(json.dumps({"title": word, "columns": [word], "rows": [[word]], "note": word}))
    return folder


@pytest.mark.parametrize("word", HOSTILE)
def test_no_text_from_outside_becomes_markup(tmp_path: Path, word: str) -> None:
    page = report.write(make_run(tmp_path / "run", word)).read_text()
    seen = Seen()
    seen.feed(page)
    plain = Seen()
    plain.feed(report.write(make_run(tmp_path / "plain")).read_text())
    assert [tag for tag, _ in seen.tags] == [tag for tag, _ in plain.tags]
    assert {tag for tag, _ in seen.tags} <= ALLOWED_TAGS
    assert not any(name.startswith("on") or name in ("href", "action") for _, attributes in seen.tags for name in attributes)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page.replace("\r\n", "\n"))
    if word.isprintable() and "&" not in word:
        assert word in seen.text


def test_one_file_that_needs_no_network_and_allows_no_script(tmp_path: Path) -> None:
    page = report.write(make_run(tmp_path / "run")).read_text()
    seen = Seen()
    seen.feed(page)
    policy = next(a["content"] for tag, a in seen.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy and "script" not in policy
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None and pages.style_hash(style.group(1)) in policy
    assert [(a["src"] or "")[:22] for tag, a in seen.tags if "src" in a] == ["data:image/png;base64,"]
    assert "http://" not in page and "https://" not in page
    for text in ("8", "12.5 s", "1.00 GiB", "5.00 %", "note plain", "before", "after"):
        assert text in seen.text


def test_secrets_are_blanked_wherever_they_stand(tmp_path: Path) -> None:
    page = report.write(make_run(tmp_path / "run", CANARY)).read_text()
    assert CANARY not in page and "&lt;hidden&gt;" in page


def test_a_run_that_has_barely_begun_still_has_a_report(tmp_path: Path) -> None:
    assert "<h2>Loss</h2>" in report.write(tmp_path).read_text()


def test_the_plot_is_a_png_of_the_finite_values(tmp_path: Path) -> None:
    records = [{"step": 1, "loss": 2.0, "lr": 1e-3}, {"step": 2, "loss": float("nan"), "lr": 1e-3}, {"step": 3, "loss": None, "lr": 1e-3}]
    assert plots.points(records, "loss") == ([1], [2.0])
    picture = plots.loss_curves(records)
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert plots.loss_curves(records) == picture
    assert plots.loss_curves([*records, {"step": 4, "loss": 9.0, "lr": 1e-3}]) != picture
    assert report.write(make_run(tmp_path / "run")).with_name("loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("task", "per"), [("causal-lm", "token"), ("sequence-classification", "row")])
def test_every_loss_has_its_unit(tmp_path: Path, task: str, per: str) -> None:
    """On the tiles and on the axis; the loss of a classifier is the mean over rows."""
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "run.json").read_text())
    summary |= {"first_eval_loss": 2.5, "best_eval_loss": 1.1, "final_eval_loss": 1.2, "tokens": 30}
    (run / "run.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text(to_yaml(load_config(None, ["data=rows.jsonl", f"model.task={task}"])))
    page, picture = report.html(run)
    for name in ("before", "best", "delivered"):
        assert re.search(f"held-out loss,? {name}, nats/{per}</span>", page)
    assert f">trained {per}s<" in page
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert plots.loss_figure(records, per).axes[0].get_ylabel() == f"loss, nats/{per}"
    assert picture == plots.loss_curves(records, per)


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    from halfbyte.errors import StorageError

    run = make_run(tmp_path / "run")
    (run / "loss.png").mkdir()
    with pytest.raises(StorageError, match="report must be writable"):
        report.write(run)
