"""A calibrated folder: plain to every reader, nearer to the model than plain NF4, judged on rows that were not fitted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.calibrate import base as base_module
from halfbyte.calibrate import layer as layer_module
from halfbyte.calibrate.base import LEAST_TOKENS, Calibration, calibrate, choose_rows, write_base
from halfbyte.calibrate.layer import Update, calibrate_layer
from halfbyte.calibrate.moments import Moments, Seen
from halfbyte.calibrate.quality import LayerQuality, Quality
from halfbyte.config import LoraConfig, ModelConfig, QuantConfig
from halfbyte.errors import ConfigError, DataError, HalfbyteError, ModelError, NumericError, StorageError
from halfbyte.export import quantized
from halfbyte.export.folder import size_of
from halfbyte.export.quantized import Rows, calibration
from halfbyte.lora.inject import updates
from halfbyte.models.load import load_model, load_tokenizer
from halfbyte.models.source import resolve
from halfbyte.quant import blockwise
from halfbyte.quant.dense import dense_weight
from halfbyte.quant.experts import QuantExperts
from halfbyte.quant.linear import QuantLinear
from tests.models.small_models import write_folder

NF4, RANK_4 = QuantConfig(format="nf4"), LoraConfig(rank=4, alpha=8)
HOW = Calibration(NF4, RANK_4, ModelConfig(dtype="float32"))
ROWS = [torch.randint(3, 260, (30,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(25)]
IDS = torch.arange(3, 60)[None]


def moments(x_TI: torch.Tensor) -> Moments:
    return Moments(x_TI.square().sum(0), x_TI.T @ x_TI, x_TI.shape[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, its rows, and `base`: calibrated with a start of rank 4."""
    place = tmp_path_factory.mktemp("calibrated")
    write_folder(place / "model")
    (place / "rows.jsonl").write_text("".join(json.dumps({"text": "abc def " * 6 + chr(97 + number)}) + "\n" for number in range(20)))
    write_base(resolve(str(place / "model")), ROWS, place / "base", HOW)
    return place


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers for it
def test_transformers_and_bitsandbytes_read_equal_bits(folder: Path) -> None:
    """# T53  The real ones: each layer dequantizes to the same bits, and PEFT puts the start on top with the delta we have."""
    from bitsandbytes.functional import dequantize_4bit
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    ours = load_model(str(folder / "base"), dtype="float32")
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        packed = theirs.get_submodule(name).weight
        assert torch.equal(dequantize_4bit(packed.data, packed.quant_state), dense_weight(layer))
    hb.load_adapter(ours, folder / "base" / "start")
    adapted = dict(PeftModel.from_pretrained(theirs, folder / "base" / "start").named_modules())
    for name, update in updates(ours).items():
        delta = adapted[f"base_model.model.{name}"].get_delta_weight("default")
        assert torch.equal(delta, update.delta_weight()) and bool(delta.any())


def test_base_and_start_are_nearer_to_the_model(folder: Path) -> None:
    """Scales, then start: each brings the logits nearer; plain NF4 is farthest.  The head and the embedding are as they were."""
    dense = load_model(str(folder / "model"), dtype="float32")
    ids = torch.tensor(ROWS)
    with torch.no_grad():
        wanted = dense(input_ids=ids).logits
        models = [load_model(str(folder / "model"), dtype="float32", quant=NF4), load_model(str(folder / "base"), dtype="float32"),
                  load_model(str(folder / "base"), dtype="float32")]  # fmt: skip
        hb.load_adapter(models[2], folder / "base" / "start")
        gaps = [float((model(input_ids=ids).logits - wanted).square().mean()) for model in models]
    assert gaps[0] > gaps[1] > gaps[2]
    for name in ("lm_head", "model.embed_tokens"):
        weights = [model.get_submodule(name).get_parameter("weight") for model in (models[1], dense)]
        assert torch.equal(*weights)


def test_the_report_of_each_layer(folder: Path) -> None:
    report = json.loads((folder / "base" / "calibration.json").read_text())
    assert (report["calibration_rows"], report["calibration_tokens"], report["of_them_checking"], report["start_rank"]) == (25, 750, 150, 4)
    assert len(report["layers"]) == 14
    for layer in report["layers"]:
        assert layer["output_error_with_start"] <= layer["output_error"] <= layer["output_error_plain"]
        assert 4.1 < layer["bits"] < 9  # small layers carry the tables
    assert report["summary"]["output_error"] < report["summary"]["output_error_plain"]
    files = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    assert files < sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_base(resolve(str(folder / "model")), ROWS, tmp_path / "base", HOW)
    for name in ("model.safetensors", "calibration.json", "start/adapter_model.safetensors"):
        assert (tmp_path / "base" / name).read_bytes() == (folder / "base" / name).read_bytes()
    write_base(resolve(str(folder / "model")), ROWS[1:], tmp_path / "base", HOW)  # over the one that is there
    assert (tmp_path / "base" / "model.safetensors").read_bytes() != (folder / "base" / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_scales_that_are_worse_on_the_checking_rows_are_not_kept() -> None:
    """Rows to fit and rows to judge that disagree about what matters: the layer gets the plain bytes, and the report says so."""
    torch.manual_seed(0)
    weight, x_TI = torch.randn(32, 64), torch.randn(400, 64)
    loud = x_TI * torch.cat([torch.full((32,), 30.0), torch.full((32,), 0.01)])
    honest = calibrate_layer("a", weight, Seen(moments(loud), moments(loud + 0.01)), NF4)
    assert honest.quality.kind == "calibrated" and (honest.quality.output_error or 1) < (honest.quality.output_error_plain or 0)
    fooled = calibrate_layer("a", weight, Seen(moments(loud), moments(loud.flip(1))), NF4)
    plain, state = blockwise.quantize(weight)
    assert fooled.quality.kind == "plain" and torch.equal(fooled.packed, plain)
    assert torch.equal(fooled.state.absmax, state.absmax) and fooled.quality.output_error == fooled.quality.output_error_plain


def test_a_start_that_is_worse_on_the_checking_rows_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, x_TI = torch.randn(32, 64), torch.randn(400, 64)
    seen, update = Seen(moments(x_TI), moments(x_TI)), Update(4, 2.0)
    kept = calibrate_layer("a", weight, seen, NF4, update)
    assert kept.factors is not None and (kept.quality.output_error_with_start or 1) < (kept.quality.output_error or 0)
    right = layer_module.factors_on

    def against(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        lora_a, lora_b = right(*given)
        return lora_a, -lora_b

    monkeypatch.setattr(layer_module, "factors_on", against)
    left = calibrate_layer("a", weight, seen, NF4, update)
    assert left.factors is None and left.quality.output_error_with_start == left.quality.output_error


def test_means_are_over_the_same_layers() -> None:
    """A start for one layer of two: the other counts as it is; without any start there is no such mean, and the text says who judged."""
    errors = {"weight_error_plain": 0.2, "weight_error": 0.1, "output_error_plain": 0.4}
    layers = (
        LayerQuality("a", "calibrated", 10, 4.5, **errors, output_error=0.2, output_error_with_start=0.1),
        LayerQuality("b", "calibrated", 10, 4.5, **errors, output_error=0.3), LayerQuality("c", "plain: no token", 10, 4.5),
    )  # fmt: skip
    found = Quality(layers, 20, 1000, 200, 4)
    assert found.means()["output_error"] == pytest.approx(0.25) and found.means()["output_error_with_start"] == pytest.approx(0.2)
    assert "with the start of rank 4 20.00 %" in found.text() and "decided what is kept" in found.text()
    alone = Quality(layers[1:], 20, 1000, 200, 4)
    assert "output_error_with_start" not in alone.means() and "with the start" not in alone.text()


@pytest.mark.parametrize("weights,inputs", [(3e38, 1.0), (1.0, 1e20)])
def test_squares_that_are_no_numbers_are_refused(weights: float, inputs: float) -> None:
    """# T50  Of such sums neither scales nor a start can be made; the layer is named."""
    torch.manual_seed(0)
    seen = moments(torch.randn(100, 64) * inputs)
    with pytest.raises(NumericError, match=r"E-NUM-031(.*\n)+.*layer 7"):
        calibrate_layer("layer 7", torch.rand(64, 64) * weights, Seen(seen, seen), NF4, Update(8, 2.0))


@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_plain_on_the_rows_that_were_fitted(seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(24, 40) * torch.rand(40)
    x_TI = torch.randn(300, 40) * torch.logspace(-2, 1, 40)
    seen = Seen(moments(x_TI), moments(torch.randn(90, 40) * torch.logspace(-2, 1, 40)))
    made = calibrate_layer("a", weight, seen, NF4, Update(2, 1.0))
    gap = weight - blockwise.dequantize(made.packed, made.state)
    assert seen.fit.error(gap) <= seen.fit.error(weight - blockwise.dequantize(*blockwise.quantize(weight))) * (1 + 1e-6)


def test_fused_experts_get_plain_scales_and_the_report_says_so(tmp_path: Path) -> None:
    """A mixture, and GPT-2 whose layers keep (in, out): written, read again, with the logits of the model that was packed."""
    for kind, count in (("mixtral", 10), ("gpt2", 8)):
        source = write_folder(tmp_path / kind, kind)
        quality = write_base(source, ROWS, tmp_path / f"{kind}-base", HOW)
        kinds = {layer.name.rpartition(".")[2]: layer.kind for layer in quality.layers}
        assert len(quality.layers) == count
        assert kinds.get("experts", "plain: fused experts") == "plain: fused experts"
        assert {value for name, value in kinds.items() if name != "experts"} <= {"calibrated", "plain"}
        again = load_model(str(tmp_path / f"{kind}-base"), dtype="float32")
        assert any(isinstance(module, QuantLinear) for module in again.modules())
        dense = load_model(source, dtype="float32")
        with torch.no_grad():
            assert (again(input_ids=IDS).logits - dense(input_ids=IDS).logits).abs().max() < 0.5


def test_experts_in_memory_are_packed(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    """The head is packed where that was asked for, plainly; experts become packed experts."""
    model = tiny_llama()
    quality, _ = calibrate(model, ROWS, QuantConfig(format="nf4", quantize_head=True))
    assert quality.layers[-1].name == "lm_head" and quality.layers[-1].kind == "plain: outside the backbone"
    assert isinstance(model.lm_head, QuantLinear)
    mixture = load_model(write_folder(tmp_path / "mixture", "mixtral"), dtype="float32")
    calibrate(mixture, ROWS, NF4)
    assert sum(isinstance(module, QuantExperts) for module in mixture.modules()) == 2


def test_rows_are_drawn_with_the_seed_and_too_few_are_refused() -> None:
    rows = [[number] * 30 for number in range(50)]
    assert choose_rows(rows, 12, 0, "f") == choose_rows(rows, 12, 0, "f") != choose_rows(rows, 12, 1, "f")
    assert len(choose_rows(rows, 12, 0, "f")) == 12
    for few in ([], rows[:4], [[1] * (LEAST_TOKENS // 8)] * 7):
        with pytest.raises(DataError, match=r"E-DATA-099"):
            choose_rows(few, 128, 0, "f")


def test_the_command_writes_the_folder_and_says_what_was_gained(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = hb.quantize(folder / "model", tmp_path / "out", calibrate=folder / "rows.jsonl", start_rank=4, calibration_rows=15)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calibrated ")]
    assert 2 <= len(told) <= 14 and len({line.split()[-2] for line in told}) == 1 and told[-1].split()[1] == told[-1].split()[3]
    text = made.text()
    assert "calibrated on 15 rows" in text and "lora.init=calibrated lora.rank=4" in text and "bits a parameter of these layers" in text
    assert "next     halfbyte train --model" in text
    assert (tmp_path / "out" / "start" / "adapter_config.json").is_file() and (tmp_path / "out" / "calibration.json").is_file()
    assert hb.generate(tmp_path / "out", "abc", max_new_tokens=3) is not None
    alone = hb.quantize(folder / "model", tmp_path / "alone", calibrate=folder / "rows.jsonl")
    assert not (tmp_path / "alone" / "start").exists() and "start" not in alone.text()


@pytest.mark.parametrize(("options", "code"), [
    ({"start_rank": 4}, "E-CONF-097"), ({"calibrate": "rows", "format": "int8"}, "E-CONF-096"), ({"calibrate": "few"}, "E-DATA-099"),
    ({"calibrate": "rows", "model": "base"}, "E-MODEL-045"), ({"calibrate": "empty"}, "E-DATA"),
])  # fmt: skip
def test_what_cannot_be_calibrated_is_refused(folder: Path, tmp_path: Path, options: dict[str, Any], code: str) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "abc"}\n' * 3)
    (tmp_path / "empty.jsonl").write_text("")
    files = {"rows": folder / "rows.jsonl", "few": tmp_path / "few.jsonl", "empty": tmp_path / "empty.jsonl"}
    given = {**options, **({"calibrate": files[options["calibrate"]]} if "calibrate" in options else {})}
    with pytest.raises(HalfbyteError) as caught:
        hb.quantize(folder / given.pop("model", "model"), tmp_path / "out", **given)
    assert caught.value.code.startswith(code) and isinstance(caught.value, ConfigError | DataError | ModelError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "key"), [
    *(({"seed": seed}, "seed") for seed in ("a", 1.5, None, 2**64, -1)),
    *(({"calibration_rows": count}, "quant.calibration_rows") for count in (-3, 0, "many", 2.5)),
    *(({"start_rank": rank}, "lora.rank") for rank in (-1, "four", 1.5, 5000)), ({"blocksize": 5}, "quant.blocksize"),
])  # fmt: skip
def test_a_wrong_option_is_refused_before_anything_is_read(folder: Path, tmp_path: Path, options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hb.quantize(folder / "model", tmp_path / "out", calibrate=folder / "rows.jsonl", **options)
    assert caught.value.place == key and caught.value.text().endswith("Nothing was written.") and not (tmp_path / "out").exists()


def test_a_number_written_as_a_text_is_that_number() -> None:
    assert calibration("rows.jsonl", start_rank="4", calibration_rows="8") == Rows(Path("rows.jsonl"), 4, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"calibrate": True}, {"calibrate": True, "start_rank": 4}])
def test_of_two_that_write_to_one_place_the_second_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """The first has finished while the second was at work: its files stay as they are."""

    def meanwhile(source: Any) -> Any:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "config.json").write_text("of the first")
        return load_tokenizer(source)

    for module in (base_module, quantized):
        monkeypatch.setattr(module, "load_tokenizer", meanwhile)
    with pytest.raises(StorageError, match="E-STORE-052"):
        hb.quantize(folder / "model", tmp_path / "out", **({**options, "calibrate": folder / "rows.jsonl"} if options else {}))
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "of the first"


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_folder_inside_the_model_is_not_counted_with_it(folder: Path, tmp_path: Path, calibrate: bool) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    before = size_of(tmp_path / "model")
    made = hb.quantize(tmp_path / "model", tmp_path / "model" / "sub", calibrate=folder / "rows.jsonl" if calibrate else None)
    assert made.bytes_before == before and made.bytes_after == size_of(tmp_path / "model" / "sub")


def test_where_nothing_can_be_written_nothing_is_calibrated(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "load_model", lambda *given, **named: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="E-STORE-055"):
        write_base(resolve(str(folder / "model")), ROWS, tmp_path / "file" / "base", HOW)
