"""LoRA on a 4-bit model inside transformers.Trainer: python examples/with_transformers_trainer.py [MODEL] [OUT]"""

import sys

from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import halfbyte as hb

model_name = sys.argv[1] if len(sys.argv) > 1 else "starter"
out = sys.argv[2] if len(sys.argv) > 2 else "runs/trainer"

model, tokenizer = hb.load(model_name, quant="nf4")
hb.inject(model, rank=8, alpha=16)
texts = ["Lights on in the hall.", "Play some jazz.", "Wake me at seven.", "Ring Anna at nine."] * 4
rows = [{"input_ids": tokenizer(text).input_ids} for text in texts]

arguments = TrainingArguments(
    output_dir=f"{out}/trainer", max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], use_cpu=True
)
trainer = Trainer(
    model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[hb.SaveAdapter(f"{out}/adapter")],
)  # fmt: skip
trainer.train()
print(f"adapter in PEFT's format: {out}/adapter")
