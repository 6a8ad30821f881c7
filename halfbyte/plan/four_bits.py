"""What 4 bits are known to cost a model of a size and kind, and so whether a calibrated base is worth making (docs/calibrated.md).

Measured by others: +0.03 to +0.09 nats of held-out loss for models below 3 B parameters and for LLaMA-3 8B, +0.012 for LLaMA-2 7B.
Sources: https://github.com/Lightning-AI/litgpt/tree/main/config_hub, https://arxiv.org/abs/2404.14047
"""

from halfbyte.shape import ModelShape
from halfbyte.units import bytes_text

SMALL_MODEL = 3_000_000_000
LLAMA_3_VOCABULARY = 128_000
"""LLaMA 3 and its successors have 128,256 tokens, LLaMA 1 and 2 have 32,000."""


def worth_calibrating(shape: ModelShape) -> tuple[bool, str]:
    """(whether the loss from 4 bits is worth a calibration, why)."""
    if shape.total_params < SMALL_MODEL:
        return True, "4 bits cost models below 3 B parameters 0.03 nats and more (published)"
    if shape.model_type == "llama" and shape.vocab >= LLAMA_3_VOCABULARY:
        return True, "4 bits cost models of the LLaMA-3 kind 0.03 nats and more (published)"
    return False, "4 bits cost models of this kind little (published: 0.01 nats for LLaMA-2 7B)"


def advice(shape: ModelShape, format: str) -> str:
    """A line for a plan of qlora; empty where plain 4 bits serve, for other storage, and for files that are packed already."""
    worth, why = worth_calibrating(shape)
    fits = format in ("nf4", "fp4") and not shape.packed
    once = f"makes a better, calibrated base first, which takes {bytes_text(2 * shape.total_params)} of host memory or more once (estimate)"
    return f"{why}; quant.calibrate=true {once}" if worth and fits else ""
