"""What `halfbyte doctor` says of GPUs that are not here."""

from types import SimpleNamespace

import pytest

from halfbyte import devices
from halfbyte.cli import checkup
from halfbyte.kernels.packed_attention import gpu


def test_doctor_says_where_attention_goes_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = devices.Gpu("Tesla T4", 16 << 30, "7.5"), devices.Gpu("NVIDIA H100", 80 << 30, "9.0")
    monkeypatch.setattr(devices, "describe", lambda: SimpleNamespace(gpus=cards))
    monkeypatch.setattr(gpu, "lacking", tuple)
    assert checkup.attention_lines() == [
        "packed_attention on Tesla T4: one call per sample: flash attention needs compute capability 8.0, found 7.5",
        "packed_attention on NVIDIA H100: one call per batch",
    ]
    monkeypatch.setattr(gpu, "lacking", lambda: ("enable_gqa",))
    assert checkup.attention_lines()[1].endswith("one call per sample: varlen_attn of this PyTorch has no enable_gqa")
    assert checkup.attention_lines()[0] in checkup.ops_text()
