"""A loaded and adapted model trains inside transformers.Trainer and TRL's SFTTrainer; what is saved loads in PEFT with equal logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.adapters.folder import save_adapter
from halfbyte.config.lora import LoraConfig
from halfbyte.config.quant import QuantConfig
from halfbyte.lora.inject import inject
from halfbyte.models.load import load_model, load_tokenizer
from halfbyte.models.save import save_quantized
from halfbyte.models.source import Source
from halfbyte.models.trainer_callback import SaveAdapter
from tests.models.small_models import write_folder

IDS = torch.arange(20)[None] * 11 % 320
# Loaders and trainers of the libraries under test warn about their own settings; what they say is not ours to fail on.
pytestmark = pytest.mark.filterwarnings("default")


def adapted(folder: Path, format: str) -> tuple[Any, Any, Source]:
    source = write_folder(folder)
    model = load_model(source, dtype="float32", quant=QuantConfig(format=format))  # type: ignore[arg-type]
    inject(model, LoraConfig(rank=4, alpha=8))
    return model, load_tokenizer(source), source


def rows() -> list[dict[str, list[int]]]:
    return [{"input_ids": [(start + step * 7) % 320 for step in range(16)], "attention_mask": [1] * 16} for start in range(8)]


def peft_logits(source: Source, model: Any, tokenizer: Any, adapter: Path, tmp_path: Path, format: str) -> torch.Tensor:
    """Logits of PEFT's model with the adapter on the same base: dense, or the packed folder through bitsandbytes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = source.folder
    if format != "none":
        bare = load_model(source, dtype="float32", quant=QuantConfig(format=format))  # type: ignore[arg-type]
        base = save_quantized(bare, tokenizer, tmp_path / "packed_base")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).train()
    return theirs(IDS).logits.detach()  # in eval mode bitsandbytes' CPU kernel computes in bfloat16; there is no dropout


def finish(model: Any, before: torch.Tensor, theirs: torch.Tensor) -> None:
    with torch.no_grad():
        ours = model.eval()(IDS).logits
    assert not torch.allclose(ours, before, atol=1e-3), "nothing was learnt"
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["none", "nf4"])
def test_trainer(format: str, tmp_path: Path) -> None:
    """Eight steps with saves and a resume from Trainer's own checkpoint; the callback's folders load in PEFT."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model, tokenizer, source = adapted(tmp_path / "base", format)
    with torch.no_grad():
        before = model(IDS).logits

    def trainer(steps: int) -> Any:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=4,
            logging_steps=1, report_to=[], use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
        )  # fmt: skip
        return Trainer(
            model=model, args=arguments, train_dataset=rows(), data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=[SaveAdapter(tmp_path / "adapter", save_adapter)],
        )  # fmt: skip

    trainer(4).train()
    resumed = trainer(8)
    resumed.train(resume_from_checkpoint=True)
    losses = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert resumed.state.global_step == 8 and losses[-1] < losses[0]
    for folder in ("out/checkpoint-4/adapter", "out/checkpoint-8/adapter", "adapter"):
        assert (tmp_path / folder / "adapter_config.json").is_file()
    finish(model, before, peft_logits(source, model, tokenizer, tmp_path / "adapter", tmp_path, format))


@pytest.mark.parametrize("format", ["none", "nf4"])
def test_sft_trainer(format: str, tmp_path: Path) -> None:
    """TRL trains the adapters in float32 and leaves the packed weights as they are."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer, source = adapted(tmp_path / "base", format)
    packed = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        before = model(IDS).logits
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="no", report_to=[],
        use_cpu=True, bf16=False, dataloader_pin_memory=False, disable_tqdm=True, max_length=32, gradient_checkpointing=False,
    )  # fmt: skip
    texts = Dataset.from_list([{"text": f"row {number} says {number * 7}"} for number in range(8)])
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    assert all(torch.equal(buffer, packed[name]) for name, buffer in model.named_buffers())
    save_adapter(model, tmp_path / "adapter")
    finish(model, before, peft_logits(source, model, tokenizer, tmp_path / "adapter", tmp_path, format))
