"""What other training programs call the same setting: only used to say "did you mean", never accepted.

Names seen in the configuration files of PEFT, TRL, transformers, axolotl, LLaMA-Factory, litgpt and mlx-lm.
"""

NAMES = {
    "r": "lora.rank", "lora_r": "lora.rank", "lora_rank": "lora.rank", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets", "lora_target": "lora.targets", "lora_target_modules": "lora.targets",
    "lora_target_linear": "lora.targets", "modules_to_save": "lora.fully_trained", "exclude_modules": "lora.exclude",
    "use_rslora": "lora.rslora", "use_dora": "lora.dora", "init_lora_weights": "lora.init", "rank_pattern": "lora.ranks",
    "alpha_pattern": "lora.alphas", "layers_to_transform": "lora.layers", "bias": "lora.train_bias",
    "loraplus_lr_ratio": "optim.lora_plus_ratio",
    "load_in_4bit": "method", "quantization_bit": "quant.format", "bnb_4bit_quant_type": "quant.format", "adapter": "method",
    "finetuning_type": "method", "bnb_4bit_use_double_quant": "quant.double_quant",
    "base_model": "model.name", "model_name_or_path": "model.name", "bf16": "model.dtype", "fp16": "model.dtype",
    "precision": "model.dtype", "chat_template": "model.template",
    "dataset": "data.path", "datasets": "data.path", "dataset_name": "data.path", "train_file": "data.path",
    "sequence_len": "data.max_tokens", "max_seq_length": "data.max_tokens", "max_length": "data.max_tokens",
    "cutoff_len": "data.max_tokens", "sample_packing": "data.packing", "val_set_size": "data.eval_rows",
    "lr": "optim.learning_rate", "lr_scheduler": "optim.schedule", "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup_share", "warmup": "optim.warmup_steps", "max_grad_norm": "optim.clip_norm",
    "grad_clip": "optim.clip_norm", "adam_epsilon": "optim.eps",
    "num_epochs": "train.epochs", "num_train_epochs": "train.epochs", "batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size", "gradient_accumulation_steps": "train.global_batch_size",
    "eval_steps": "train.eval_every_steps", "save_steps": "train.save_every_steps", "logging_steps": "train.log_every_steps",
    "save_total_limit": "train.keep_checkpoints", "load_best_model_at_end": "train.keep_best",
    "early_stopping_patience": "train.early_stop_patience", "report_to": "train.trackers", "output_dir": "out",
}  # fmt: skip
WORDS = {
    "fp32": "float32", "bf16": "bfloat16", "fp16": "bfloat16", "float16": "bfloat16", "half": "bfloat16", "4bit": "nf4", "8bit": "int8",
    "adamw_8bit": "int8", "seq_cls": "sequence-classification", "causal_lm": "causal-lm", "all": "all-linear",
    "instruction": "alpaca", "chatml": "messages", "chat": "messages",
}  # fmt: skip
