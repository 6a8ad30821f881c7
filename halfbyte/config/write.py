"""RunConfig -> YAML text that reads back to an equal RunConfig.  Settings without effect in this run are left out."""

from typing import Any

from halfbyte.config.inert import resting_keys
from halfbyte.config.run import RunConfig
from halfbyte.config.yaml_text import dump
from halfbyte.redact import within


def to_yaml(config: RunConfig) -> str:
    """The settings as YAML, every one that has an effect written out; what looks like a secret is blanked."""
    resting = resting_keys(config)
    values: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            value = {inner: part for inner, part in value.items() if f"{name}.{inner}" not in resting}
            if not value:
                continue
        values[name] = value
    return dump(within(values))
