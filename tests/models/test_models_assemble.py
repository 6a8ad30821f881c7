"""Where full, LoRA and QLoRA differ, and only there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from halfbyte.config.run import RunConfig
from halfbyte.models.assemble import assemble, weight_bytes
from halfbyte.models.save import save_dense
from halfbyte.quant.linear import QuantLinear
from tests.models.small_models import make_model, write_folder


def run_config(folder: Path, method: str, **model: Any) -> RunConfig:
    values: dict[str, Any] = {"method": method, "data": "rows.jsonl", "model": {"name": str(folder), "dtype": "float32", **model}}
    return RunConfig(**values)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_trains_and_what_is_packed(method: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    made = assemble(run_config(tmp_path, method))
    packed = [module for module in made.model.modules() if isinstance(module, QuantLinear)]
    everything = sum(parameter.numel() for parameter in make_model().parameters())
    assert bool(packed) == (method == "qlora") and (made.injected is None) == (method == "full") and made.model.training
    if method == "full":
        assert made.trainable_params == made.total_params == everything
    else:
        assert made.injected is not None and made.trainable_params == made.injected.trainable_params
        assert made.total_params == everything + made.trainable_params
        assert all("lora" in name for name, parameter in made.model.named_parameters() if parameter.requires_grad)
    dense_bytes = 4 * everything
    base_bytes = made.weight_bytes - (0 if method == "full" else 4 * made.trainable_params)
    assert base_bytes < 0.6 * dense_bytes if method == "qlora" else base_bytes >= dense_bytes
    assert made.dtype == "float32" and made.dtype_reason == "asked for"


def test_for_use_nothing_trains(tmp_path: Path) -> None:
    write_folder(tmp_path)
    made = assemble(run_config(tmp_path, "qlora"), for_training=False)
    assert made.trainable_params == 0 and not made.model.training


def test_the_same_seed_gives_the_same_start(tmp_path: Path) -> None:
    """And none of the global random state is used up by it."""
    write_folder(tmp_path)
    torch.manual_seed(1)
    first = assemble(run_config(tmp_path, "lora")).model.state_dict()
    torch.manual_seed(2)
    second = assemble(run_config(tmp_path, "lora")).model.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_classifier_knows_its_pad_token(tmp_path: Path) -> None:
    write_folder(tmp_path)
    made = assemble(run_config(tmp_path, "qlora", task="sequence-classification", labels=("a", "b")))
    assert made.model.config.pad_token_id == made.tokenizer.pad_token_id == 0
    ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    alone = made.model.eval()(ids[:1, :3]).logits
    together = made.model(ids, attention_mask=(ids != 0).long()).logits
    assert together.shape == (2, 2) and torch.allclose(together[:1], alone, atol=1e-5)


def test_weight_bytes_counts_shared_storage_once() -> None:
    tied, untied = make_model(tie_word_embeddings=True), make_model()
    assert weight_bytes(untied) - weight_bytes(tied) == 320 * 64 * 4


def test_a_template_of_the_users_own_goes_where_the_model_goes(tmp_path: Path) -> None:
    """# T69  A folder written after training renders with the template it was trained with."""
    write_folder(tmp_path / "base")
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    made = assemble(run_config(tmp_path / "base", "full", template=str(tmp_path / "mine.jinja")))
    save_dense(made.model, made.tokenizer, tmp_path / "out")
    rendered = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "[Hi]"
