"""Halfbyte: fine-tune large language models with LoRA and QLoRA on the hardware you have."""
