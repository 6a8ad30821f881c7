"""Model <-> adapter folder: what lora collects, formats/peft.py writes, and the other way round.

Loading puts the adapter in and checks that names, shapes,
    ranks and stored base tables agree exactly; what does not agree is counted and named,
and the model is left as it was.
"""

from pathlib import Path

import torch
from torch import nn

from halfbyte.errors import AdapterError
from halfbyte.formats import peft
from halfbyte.lora.inject import Injected, eject, frozen_base, inject, trained_parts, updates
from halfbyte.lora.targets import candidates, classifier_head, output_embedding
from halfbyte.lora.tensors import collected, compare_names, live_tensors, load_adapter_tensors
from halfbyte.quant.linear import QuantLinear
from halfbyte.surgery import undone_on_error


def save_adapter(
    model: nn.Module, folder: Path | str, *, base_name: str | None = None, base_digest: str | None = None, allow_untrained: bool = False
) -> Path:
    """Write the adapter of the model as a PEFT folder and read it back; returns the folder.

    The base is named by `base_name`,
        else by the model's own config.  Raises AdapterError for an adapter that changes nothing, unless `allow_untrained`.
    """
    parts = collected(model)
    return peft.save(
        Path(folder), parts.tensors, parts.config, kinds=parts.kinds, targets=parts.targets, parameters=parts.parameters,
        task=task_of(model), base_name=base_name or own_name(model), base_digest=base_digest,
        notes=parts.notes, loftq=parts.loftq, allow_untrained=allow_untrained,
    )  # fmt: skip


def own_name(model: nn.Module) -> str | None:
    """Name or path a transformers model was loaded from, or None."""
    return getattr(getattr(model, "config", None), "name_or_path", None) or None


def task_of(model: nn.Module) -> str | None:
    """causal-lm, sequence-classification, or None for a model that is neither."""
    if output_embedding(model) is not None:
        return "causal-lm"
    trained = set(trained_parts(model))
    return "sequence-classification" if classifier_head(model) is not None or trained & set(peft.CLASSIFIER_HEADS) else None


def load_adapter(
    model: nn.Module, folder: Path | str, *, base_digest: str | None = None, allow_other_base: bool = False, allow_untrained: bool = False
) -> Injected:
    """Put the adapter of a PEFT folder into the model.  AdapterError or TargetError if it does not fit; the model is untouched then.

    `base_digest` is compared with the one the folder notes, if it does; `allow_other_base` accepts a difference.
    The base of an adapter that began with init loftq is quantized as it was then, and stays so.
    """
    adapter = peft.read(Path(folder), allow_untrained=allow_untrained)
    if not allow_other_base:
        require_base(model, adapter, folder, base_digest)
    with undone_on_error(model):
        if adapter.loftq is not None:
            require_fit(model, adapter, folder)
            if all(isinstance(model.get_submodule(name), QuantLinear) for name in adapter.kinds):
                if not allow_other_base:
                    raise other_start(adapter, folder)
            else:
                rebuild_base(model, adapter)
        return put_in(model, adapter, folder)


def rebuild_base(model: nn.Module, adapter: peft.PeftAdapter) -> None:
    """Quantize the adapter's layers of a dense model as init loftq did when the adapter began; no adapter is left in the model."""
    assert adapter.loftq is not None
    inject(model, adapter.config, quant=adapter.loftq.quant)
    eject(model)


def start_of(adapter: peft.PeftAdapter) -> tuple[object, ...] | None:
    """All that decides the base which init loftq makes of a dense one; None where the adapter began otherwise."""
    config = adapter.config
    return None if adapter.loftq is None else (adapter.loftq, sorted(adapter.kinds), config.rank, sorted(config.ranks.items()))


def other_start(adapter: peft.PeftAdapter, folder: Path | str) -> AdapterError:
    """The error for an adapter of init loftq on a base that was not quantized for it."""
    assert adapter.loftq is not None
    return AdapterError(
        "an adapter of init loftq belongs to the base that loftq quantized for it", code="E-ADAPT-065", place=str(folder),
        found="a base in another storage", expected=f"the base quantized in {adapter.loftq.iterations} rounds to {adapter.loftq.format}",
        remedy="open the run or the adapter folder itself, without --quant, or say that the other base is meant "
        "(--force-base, force_base=True)",
        nothing_done="Nothing was loaded.",
    )  # fmt: skip


def require_base(model: nn.Module, adapter: peft.PeftAdapter, folder: Path | str, base_digest: str | None) -> None:
    """AdapterError unless the digest of the base that the folder notes is `base_digest`; unknown digests pass."""
    if base_digest and adapter.base_digest and base_digest != adapter.base_digest:
        raise AdapterError(
            "an adapter belongs to the base it was trained on", code="E-ADAPT-060", place=str(folder),
            found=f"trained on {adapter.base_name} ({adapter.base_digest[:12]}), this is {own_name(model)} ({base_digest[:12]})",
            expected="the same weights", remedy="load that base, or say that the other base is meant (--force-base, force_base=True)",
            nothing_done="Nothing was loaded.",
        )  # fmt: skip


def put_in(model: nn.Module, adapter: peft.PeftAdapter, folder: Path | str) -> Injected:
    """Inject a checked adapter and give it its values; on an error the model is as it was."""
    require_fit(model, adapter, folder)
    with undone_on_error(model):
        done = inject(model, adapter.config, start=False)
        if set(done.names) != set(adapter.kinds):
            raise AdapterError("an adapter must fit module by module", code="E-ADAPT-061", place=str(folder),
                               found=", ".join(sorted(set(done.names) ^ set(adapter.kinds))[:3]),
                                   nothing_done="Nothing was loaded.")  # fmt: skip
        _require_same_base(model, adapter, folder)
        compare_names(live_tensors(model), adapter.tensors, str(folder))
        load_adapter_tensors(model, adapter.tensors)
    return done


def require_fit(model: nn.Module, adapter: peft.PeftAdapter, folder: Path | str) -> None:
    """Every module of the adapter exists and can carry one; else say how many tensors match."""
    if updates(model):
        raise AdapterError("a model carries one adapter at a time", code="E-ADAPT-062", place=str(folder),
                           remedy="take the other out: hb.eject(model)", nothing_done="Nothing was loaded.")  # fmt: skip
    able = candidates(model)
    modules = {name for name, _ in model.named_modules()}
    absent = [name for name, kind in adapter.kinds.items() if able.get(name) != kind]
    absent += [name for name in adapter.config.fully_trained if name not in modules]
    if absent:
        lost = sum(name.rpartition(".")[0] in absent for name in adapter.tensors)
        raise AdapterError(
            "the tensors of an adapter must be those of the model's adapter", code="E-ADAPT-063", place=str(folder),
            found=f"{len(adapter.tensors) - lost} of {len(adapter.tensors)} tensors match; the model has no {', '.join(sorted(absent)[:3])}"
            + (" ..." if len(absent) > 3 else ""),
            expected=f"the base {adapter.base_name or 'it was trained on'}", remedy="load that base", nothing_done="Nothing was loaded.",
        )  # fmt: skip


def _require_same_base(model: nn.Module, adapter: peft.PeftAdapter, folder: Path | str) -> None:
    """Base tables that PEFT stored beside an adapted embedding or head are the model's own."""
    layers = updates(model)
    for name, stored in adapter.base_copies.items():
        own = frozen_base(layers[name.removesuffix(".weight")]).get_parameter("weight")
        if own.shape != stored.shape or not torch.equal(own, stored.to(own.device, own.dtype)):
            raise AdapterError(
                "the base table in an adapter file must be the model's own", code="E-ADAPT-064", place=f"{folder}, tensor {name}",
                found=f"{tuple(stored.shape)}" if own.shape != stored.shape else "other values", expected=f"{tuple(own.shape)}",
                remedy="load the base with the vocabulary the adapter was trained with", nothing_done="Nothing was loaded.",
            )  # fmt: skip
