"""What calibration did to each layer, as text and as JSON.

    weight error   |W - Wq|^2 / |W|^2                    of the packed weight alone
    output error   |(W - Wq) x|^2 / |W x|^2              over calibration rows that were not fitted: plain, calibrated, with the start

The rows that judge are also those that decided what is kept (layer.py), so the errors after it are slightly optimistic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from halfbyte.units import count_text, percent_text


@dataclass(frozen=True)
class LayerQuality:
    """One layer.  Errors are shares of the weight's or the output's own square; None where no calibration token reached the layer.

    kind      "calibrated", "plain" (the plain scales were as good or better on the checking rows), or why it was not calibrated
    bits      of storage for each parameter, all constants included
    """

    name: str
    kind: str
    weights: int
    bits: float
    weight_error_plain: float | None = None
    weight_error: float | None = None
    output_error_plain: float | None = None
    output_error: float | None = None
    output_error_with_start: float | None = None


@dataclass(frozen=True)
class Quality:
    """All layers, and what they were calibrated on; `rank` is that of the low-rank start, 0 where there is none."""

    layers: tuple[LayerQuality, ...]
    rows: int
    tokens: int
    check_tokens: int
    rank: int

    def as_dict(self) -> dict[str, Any]:
        """For calibration.json; nothing in it depends on the machine's speed."""
        return {
            "calibration_rows": self.rows, "calibration_tokens": self.tokens, "of_them_checking": self.check_tokens,
            "start_rank": self.rank, "summary": self.means(), "layers": [asdict(layer) for layer in self.layers],
        }  # fmt: skip

    def means(self) -> dict[str, float]:
        """Each error as the mean over all layers that tokens reached, and the bits over all weights together.

        With the start, a layer that has none counts as it is without.
        """
        keys = ("weight_error_plain", "weight_error", "output_error_plain", "output_error")
        found = {key: [value for layer in self.layers if (value := getattr(layer, key)) is not None] for key in keys}
        if any(layer.output_error_with_start is not None for layer in self.layers):
            found["output_error_with_start"] = [_last(layer) for layer in self.layers if layer.output_error is not None]
        means = {key: sum(values) / len(values) for key, values in found.items() if values}
        weights = sum(layer.weights for layer in self.layers)
        return means | {"bits_per_parameter": sum(layer.bits * layer.weights for layer in self.layers) / max(1, weights)}

    def text(self) -> str:
        """The report that is printed: means, then the layers whose output lost most."""
        means, counts = self.means(), self._counts()
        lines = [
            f"calibrated on {self.rows} rows, {count_text(self.tokens)} tokens ({count_text(self.check_tokens)} of them kept for checking)",
            f"layers: {', '.join(f'{count} {kind}' for kind, count in counts.items())}; "
            f"{means['bits_per_parameter']:.3f} bits a parameter of these layers",
        ]
        if "output_error" in means:
            started = means.get("output_error_with_start")
            after = "" if started is None else f", with the start of rank {self.rank} {percent_text(started)}"
            lines += [
                "squared error of a layer's outputs as a share of their square, mean over the layers, checking rows: "
                f"plain {percent_text(means['output_error_plain'])}, "
                f"calibrated {percent_text(means['output_error'])}{after}",
                "  (means over the same layers; these rows also decided what is kept, so all but the first are slightly optimistic)",
                f"squared error of the weights as a share of their square: plain {percent_text(means['weight_error_plain'])}, "
                f"calibrated {percent_text(means['weight_error'])}",
                "largest error of an output:",
            ]
            lines += [f"  {percent_text(_last(layer)):>8}  {layer.name}" for layer in self._worst()]
        return "\n".join(lines)

    def _counts(self) -> Mapping[str, int]:
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.kind] = counts.get(layer.kind, 0) + 1
        return counts

    def _worst(self) -> Sequence[LayerQuality]:
        return sorted((layer for layer in self.layers if layer.output_error is not None), key=lambda layer: -_last(layer))[:5]


def _last(layer: LayerQuality) -> float:
    """The output error of the layer as it will be used."""
    found = layer.output_error if layer.output_error_with_start is None else layer.output_error_with_start
    return found or 0.0
