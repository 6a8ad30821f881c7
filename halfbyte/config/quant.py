"""How the frozen base is stored in few bits.  The formats themselves are in halfbyte/quant."""

from typing import Literal

from halfbyte.config.base import Auto, Count, Settings, Switch

Blocksize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]


class QuantConfig(Settings):
    """The storage of the frozen base."""

    format: Literal["none", "nf4", "fp4", "int8", "auto"] = "auto"
    """nf4 and fp4 take about 4.1 bits a weight, int8 about 8; auto is nf4 for method qlora and none otherwise."""
    blocksize: Blocksize = 64
    """Weights that share one scale (nf4 and fp4)."""
    double_quant: Switch = True
    """Store the scales themselves in 8 bits, which saves 0.37 bits a weight (nf4 and fp4)."""
    skip: tuple[str, ...] = ()
    """Name patterns of layers to leave in 16 or 32 bits, added to those that are always left."""
    quantize_head: Switch = False
    """Quantize the output head too."""
    calibrate: Auto | Switch = False
    """Make a better base from the training rows first (needs the 16-bit model in memory once); auto: where 4 bits are known to cost."""
    calibration_rows: Count = 128
    """Training rows that the calibration reads."""


class LoftqBase(Settings):
    """How init loftq quantized the layers of an adapter; noted beside it, for on another base the adapter gives other numbers."""

    format: Literal["nf4", "fp4"]
    """Storage of the quantized layers."""
    blocksize: Blocksize
    """Weights that share one scale."""
    double_quant: Switch
    """Whether the scales are in 8 bits themselves."""
    iterations: int
    """Rounds of quantizing and factoring the rest."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Type of the weights that were quantized."""

    @property
    def quant(self) -> QuantConfig:
        """The same as settings of a base."""
        return QuantConfig(format=self.format, blocksize=self.blocksize, double_quant=self.double_quant)
