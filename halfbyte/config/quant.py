"""How the frozen base is stored in few bits.  The formats themselves are in halfbyte/quant."""

from typing import Literal

from halfbyte.config.base import Settings, Switch


class QuantConfig(Settings):
    """The storage of the frozen base."""

    format: Literal["none", "nf4", "fp4", "int8", "auto"] = "auto"
    """nf4 and fp4 take about 4.1 bits a weight, int8 about 8; auto is nf4 for method qlora and none otherwise."""
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale (nf4 and fp4)."""
    double_quant: Switch = True
    """Store the scales themselves in 8 bits, which saves 0.37 bits a weight (nf4 and fp4)."""
    skip: tuple[str, ...] = ()
    """Name patterns of layers to leave in 16 or 32 bits, added to those that are always left."""
    quantize_head: Switch = False
    """Quantize the output head too."""
