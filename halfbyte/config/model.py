"""Which model is trained, and how it is held in memory.  Says nothing about quantization (quant.py) or adapters (lora.py)."""

from typing import Literal

from halfbyte.config.base import Settings, Switch


class ModelConfig(Settings):
    """The base model."""

    name: str = "starter"
    """`starter` (SmolLM2-135M-Instruct, fetched once), a folder with config.json and safetensors, a .gguf file, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; a commit makes the run repeatable."""
    allow_download: Switch = False
    """Allow fetching a Hub id from the network; without it only local files and the starter are used."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights that are not quantized, and of the arithmetic; auto takes what this machine computes well."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it computes; auto takes the GPU where PyTorch has one."""
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    """Write text, or choose a label for a text."""
    labels: tuple[str, ...] = ()
    """Names of the labels in their order, for sequence-classification; empty takes them from the data, sorted."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Which attention of PyTorch is used: the fused one, or the plain one for comparisons."""
    layers: Literal["auto", "original"] = "auto"
    """auto: Halfbyte's own faster decoder layers where the model's structure fits; original: those of transformers, for comparisons."""
    template: str | None = None
    """Path of a .jinja chat template that replaces the model's own."""
