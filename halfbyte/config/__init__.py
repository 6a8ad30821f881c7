"""Settings as pure data: typed, frozen, unknown keys refused.  Needs no torch, so `--help` and checks are instant.

    config = load_config(Path("run.yaml"), ["lora.rank=32"])
"""

from halfbyte.config.data import DataConfig
from halfbyte.config.load import load_config, make, read_settings
from halfbyte.config.lora import LoraConfig
from halfbyte.config.model import ModelConfig
from halfbyte.config.optim import OptimConfig
from halfbyte.config.quant import QuantConfig
from halfbyte.config.run import RunConfig
from halfbyte.config.schema import json_schema, markdown
from halfbyte.config.train import TrainConfig
from halfbyte.config.write import to_yaml

__all__ = [
    "DataConfig", "LoraConfig", "ModelConfig", "OptimConfig", "QuantConfig", "RunConfig", "TrainConfig",
    "json_schema", "load_config", "make", "markdown", "read_settings", "to_yaml",
]  # fmt: skip
