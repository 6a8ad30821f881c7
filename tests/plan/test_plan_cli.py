"""`halfbyte plan` as a user meets it: without torch, in plain words, as JSON, with wrong input."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.plan import hardware, rates
from halfbyte.plan.answer import compute_dtype
from halfbyte.plan.rates import keep
from halfbyte.shape import ModelShape
from tests.plan.asked import SMALL, plan
from tests.plan.test_plan_rates import RATES

ROOT = Path(__file__).resolve().parents[2]
LARGE = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


def test_no_torch_is_loaded_and_nothing_is_started(config: Path) -> None:
    code = (
        f"import sys\nfrom halfbyte.cli.main import run\n"
        f"assert run(['plan', {str(config)!r}, '--gpu-memory', '24']) == 0\n"
        f"assert run(['plan', {str(config)!r}, '--json']) == 0\n"
        f"assert not [name for name in ('torch', 'transformers', 'numba', 'numpy', 'matplotlib') if name in sys.modules]\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_all_methods_side_by_side(config: Path) -> None:
    code, text, _ = plan(config, "--gpu", "RTX 3060", "--max-tokens", 512)
    assert code == 0
    for words in ("qlora", "lora", "full", "GiB", "weights, packed", "optimizer", "what fits, best first", "no rates were measured"):
        assert words in text
    assert "planned for rows of 512 tokens" in text


def test_the_table_adds_up(config: Path) -> None:
    _, text, _ = plan(config, "--gpu", "RTX 3060")
    head, *lines = text.split("\n\n")[1].splitlines()
    column = head.split().index("lora") - 1
    values = [line.rsplit(None, 3)[1:] for line in lines]
    total = next(float(row[1]) for line, row in zip(lines, values) if line.startswith("at the peak"))
    parts = [row[1] for line, row in zip(lines, values) if not line.startswith("at the peak")][: lines.index(next(
        line for line in lines if line.startswith("at the peak")))]  # fmt: skip
    numbers = [0.0 if part == "-" else 0.005 if part == "<0.01" else float(part) for part in parts]
    assert column > 0 and sum(numbers) == pytest.approx(total, abs=0.005 * len(numbers))


def test_the_least_a_method_needs_stands_beside_what_is_chosen(config: Path, tmp_path: Path) -> None:
    """As chosen, qlora needs about what lora does, for what is left over goes to rows at once; at the least it is the base that counts."""
    page = tmp_path / "plan.html"
    _, text, _ = plan(config, "--gpu-memory", "24", "--page", page)
    said = json.loads(plan(config, "--gpu-memory", "24", "--json")[1])
    row = next(line.split()[-3:] for line in text.splitlines() if line.startswith("the least it needs"))
    setting = {"policy": "offload", "state": "int8", "paged": True, "micro_batch_size": 1}
    for shown, (method, chosen) in zip(row, said["methods"].items()):
        least = chosen["least"]
        alone = json.loads(plan(config, "--gpu-memory", "0.3", "--json", "--method", method)[1])["methods"][method]
        assert setting.items() <= least.items() and setting.items() <= alone.items()
        assert least["predicted_bytes"] == alone["predicted_bytes"] <= chosen["predicted_bytes"] and least["host_bytes"] > 0
        assert shown == f"{least['predicted_bytes'] / 2**30:.2f}"
    assert float(row[0]) < 0.9 * float(row[1]) < 0.9 * float(row[2])
    note = next(line for line in text.splitlines() if "the least for the same rows and rank (estimate)" in line)
    assert note.endswith("policy offload, optim.state=int8, paged, 1 row at once (the rest in host memory)")
    assert "<td>the least it needs</td>" in page.read_text(encoding="utf-8") and note in page.read_text(encoding="utf-8")


def test_the_least_keeps_to_what_was_given(config: Path) -> None:
    text = plan(config, "--gpu-memory", "24", "--policy", "recompute", "--micro-batch-size", 4, "--state", "float32")[1]
    assert "(estimate): policy recompute, 4 rows at once" in text


def test_json_says_the_same(config: Path) -> None:
    code, text, _ = plan(config, "--gpu-memory", "24", "--json", "--method", "lora", "--rank", 8)
    answer: dict[str, Any] = json.loads(text)
    assert code == 0 and list(answer["methods"]) == ["lora"]
    lora = answer["methods"]["lora"]
    assert lora["trained_params"] == 305_280 * 8 and lora["verdict"] == "fits"
    assert sum(term["bytes"] for term in lora["terms"] if term["at_peak"]) == lora["predicted_bytes"]
    assert answer["time"] == "not measured" and lora["seconds_per_step_estimate"] is None
    assert answer["settings_that_fit"][0]["policy"] == "keep"


def test_what_does_not_fit_is_told_what_to_change(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE), encoding="utf-8")
    code, text, _ = plan(tmp_path, "--gpu", "A100 80GB")
    assert code == 0 and "what does not fit" in text and "largest term is weights, dense" in text and "first change: method=qlora" in text
    code, text, _ = plan(tmp_path, "--gpu-memory", "24", "--method", "qlora")
    assert code == 7 and "nothing of this fits" in text and "next " not in text and "take a card with 48 GB" in text


def test_rows_give_the_length_and_the_steps(config: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "a" * 90, "completion": "b" * 30}) for _ in range(40)), encoding="utf-8")
    code, text, _ = plan(config, "--data", rows, "--gpu-memory", "24")
    assert code == 0 and "rows: 40, the longest of 51 tokens" in text and "estimate" in text and "3 steps of 16 rows" in text


def test_a_calibration_of_this_place_gives_time(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "_driver_says", lambda: None)
    text = plan(config)[1]
    assert f"`halfbyte plan {config} --calibrate` measures them" in text
    assert f"next     halfbyte train --model {config.parent} --data FILE --method " in text
    path = keep(replace(RATES, threads=rates.threads_of(), dtype=compute_dtype(hardware.this_machine())))
    text = plan(config)[1]
    assert "time for steps of 16 rows (estimate from the rates of this machine, measured on 2026-11-02" in text and "a step" in text
    assert "no rates were measured for this place" in plan(config, "--gpu-memory", "24")[1]
    path.write_text("{", encoding="utf-8")
    code, _, err = plan(config)
    assert code == 3 and err.startswith("error E-ENV-401")


def test_calibrating_is_said_of_the_base_alone(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option has its name; what it does is told as measuring this machine."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "_driver_says", lambda: None)
    texts = [plan(config)[1], plan(config, "--calibrate", "--gpu", "H100")[2]]
    keep(replace(RATES, threads=rates.threads_of(), dtype=compute_dtype(hardware.this_machine())))
    texts.append(plan(config)[1])
    assert "quant.calibrate=true makes a better, calibrated base" in texts[0]
    for text in texts:
        for word in (str(config.parent), "--calibrate", "quant.calibrate=true", "calibrated base"):
            text = text.replace(word, "")
        assert "calibrat" not in text


def test_a_card_with_a_published_peak_has_a_lower_bound_for_its_time(config: Path) -> None:
    assert "at the least: estimate from the published peak, 165 TFLOP/s" in plan(config, "--gpu", "RTX 4090")[1]
    assert "no rates were measured" in plan(config, "--gpu", "RTX 3060")[1]


def test_calibrating_measures_keeps_and_uses(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real measurement is in test_plan_calibration; here the command asks for it and reads what it kept."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "_driver_says", lambda: None)
    asked: list[str] = []

    def measured(shape: ModelShape, dtype: str, threads: int) -> float:
        asked.append(dtype)
        keep(replace(RATES, dtype=dtype, threads=threads, widths=rates.widths_of(shape)))
        return 1.0

    monkeypatch.setattr(rates, "measure", measured)
    monkeypatch.setattr(rates.host, "processor_share", lambda: 0.3)
    code, text, err = plan(config, "--calibrate")
    assert code == 3 and err.startswith("error E-ENV-403") and "30.00 % of the time" in err and not asked and not text
    monkeypatch.setattr(rates.host, "processor_share", lambda: 1.0)
    code, text, _ = plan(config, "--calibrate")
    assert code == 0 and len(asked) == 1 and "rates of this machine, measured on 2026-11-02)" in text
    code, _, err = plan(config, "--calibrate", "--gpu", "H100")
    assert code == 2 and err.startswith("error E-CONF-407") and len(asked) == 1


def test_the_page_is_one_file_that_escapes_what_it_shows(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    page = tmp_path / "plan.html"
    code, text, _ = plan(folder, "--gpu-memory", "1.2", "--max-tokens", 512, "--page", page)
    made = page.read_text(encoding="utf-8")
    assert code == 0 and "<img src=x" not in made and "&lt;img src=x" in made
    assert "Content-Security-Policy" in made and "http://" not in made and "<script" not in made
    for words in ("All methods side by side", "What fits, best first", "What does not fit", "What published comparisons found",
                  "first change: ", "estimate", "GiB", "data:image/png;base64,"):  # fmt: skip
        assert words in made
    for line in text.splitlines():
        if line.startswith(("at the peak", "weights, packed")):
            assert all(f"<td>{cell}</td>" in made for cell in line.split("  ") if cell.strip() and cell == cell.strip())


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--gpu", "RTX 9999"], "E-CONF-402"), (["--gpu-memory", "lots"], "E-CONF-401"),
        (["--gpu", "H100", "--gpu-memory", "8"], "E-CONF-404"),
        (["--method", "qlroa"], "E-CONF-405"), (["--policy", "none"], "E-CONF-405"), (["--state", "int4"], "E-CONF-405"),
        (["--rank", "0"], "E-CONF-406"), (["--max-tokens", "1"], "E-CONF-406"), (["--max-tokens", "9000"], "E-CONF-403"),
        (["--targets", "q_projj"], "E-TARGET-001"), (["--micro-batch-size", "-1"], "E-CONF-406"), (["--data", "nothing.jsonl"], "E-DATA-"),
    ],
)  # fmt: skip
def test_wrong_input_gives_one_block(config: Path, words: list[str], code: str) -> None:
    status, out, err = plan(config, *words)
    assert status == 2 and not out and err.startswith(f"error {code}") and "Traceback" not in err and err.count("error ") == 1


@pytest.mark.parametrize(("text", "code"), [("{", "E-MODEL-903"), ('{"model_type": "bert"}', "E-UNSUP-901"), ("[]", "E-UNSUP-901")])
def test_a_config_that_cannot_be_read(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    status, _, err = plan(tmp_path / "config.json", "--gpu-memory", "24")
    assert status in (2, 3) and err.startswith(f"error {code}")
    assert plan(tmp_path / "other.json")[2].startswith("error E-MODEL-901")


def test_a_plan_without_a_layer_or_a_file_to_write_is_refused(config: Path, tmp_path: Path) -> None:
    for nothing in ("", " , "):
        code, _, err = plan(config, "--targets", nothing)
        assert code == 2 and err.startswith("error E-CONF-408")
    (tmp_path / "folder").mkdir()
    for page in ("", tmp_path / "folder"):
        code, text, err = plan(config, "--gpu-memory", "24", "--page", page)
        assert code == 5 and err.startswith("error E-STORE-080") and "what fits, best first" in text  # the answer is told all the same
    assert not [one for folder in (tmp_path, Path()) for one in folder.iterdir() if one.name.endswith(".new")]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "other.html"])
def test_a_page_never_takes_the_place_of_another_file(config: Path, tmp_path: Path, name: str) -> None:
    place = config if name == "config.json" else tmp_path / name
    if place != config:
        place.write_bytes(b"<!doctype html>\n<p>of another program</p>" if name == "other.html" else bytes(64))
    before = place.read_bytes()
    code, text, err = plan(config, "--gpu-memory", "24", "--page", place)
    assert code == 5 and err.startswith("error E-STORE-084") and str(place) in err and "what fits, best first" in text
    assert place.read_bytes() == before


def test_a_page_is_written_again_over_itself(config: Path, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    page.touch()
    for card in ("24", "80"):
        assert plan(config, "--gpu-memory", card, "--page", page)[0] == 0
        assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_hub_id_is_planned_from_its_config_alone(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def fetched(name: str, **options: object) -> str:
        asked.update(options)
        return str(config.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    code, _, err = plan("owner/name", "--gpu-memory", "24")
    assert code == 2 and "--allow-download" in err and not asked
    code, text, _ = plan("owner/name", "--gpu-memory", "24", "--allow-download")
    assert code == 0 and "owner/name: " in text and asked["ignore_patterns"] == ["*.safetensors"]
