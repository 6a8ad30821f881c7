"""AdapterStore: several adapters beside one base, one acting at a time.

    names      what was added, checked, and is held in memory
    active     the name that acts, or None for the base alone
    merged     the active adapter is folded into the weights for the time being

    operation        allowed when                        afterwards
    add(name)        the name is new                     names + name
    reload(name)     known, not merged                   the folder's present content; acts at once if active
    remove(name)     known, not active                   names - name
    activate(name)   known (or None), not merged         active = name
    merge()          an adapter is active, not merged    merged
    unmerge()        merged                              not merged

Everything else raises AdapterError (TargetError for a packed module that is to be trained whole) and changes nothing.  Names are compared
exactly: "a" is neither "ab" nor "a.b".  Whatever came before, the active adapter acts like a fresh load onto the untouched base, because
every change takes the old one out first.
Does not mix adapters in one forward.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from halfbyte.adapters.folder import other_start, put_in, require_base, require_fit, start_of
from halfbyte.errors import AdapterError, nearest
from halfbyte.formats.peft import PeftAdapter, read
from halfbyte.lora.inject import eject, trained_parts, updates
from halfbyte.lora.merge import MergeReport, merge, unmerge

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Held:
    """An adapter in memory and the folder it came from."""

    adapter: PeftAdapter
    folder: Path


class AdapterStore:
    """The adapters of one model.  The model must carry none when it is handed over.

    base_digest        of the model's weights; an adapter that notes another is refused, unless `allow_other_base`
    start              what init loftq made of the base (see folder.start_of); None for a base as it was loaded
    """

    def __init__(
        self, model: nn.Module, *, base_digest: str | None = None, start: tuple[object, ...] | None = None, allow_other_base: bool = False
    ) -> None:
        if updates(model) or trained_parts(model):
            raise AdapterError("a store starts from a base without an adapter", code="E-ADAPT-070", found="a model with an adapter",
                               remedy="take it out: hb.eject(model)")  # fmt: skip
        self.model = model
        self._base_digest, self._start, self._allow_other_base = base_digest, start, allow_other_base
        self._held: dict[str, Held] = {}
        self._active: str | None = None
        self._merged: MergeReport | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, in the order in which they were added."""
        return tuple(self._held)

    @property
    def active(self) -> str | None:
        """The adapter that acts; None: the base alone."""
        return self._active

    @property
    def merged(self) -> bool:
        """Whether the active adapter is folded into the weights."""
        return self._merged is not None

    def add(self, name: str, folder: Path | str) -> None:
        """Read and check an adapter under a new name; it does not act yet."""
        if not NAME.fullmatch(name):
            raise AdapterError("a name has 1 to 64 letters, digits, dots, lines", code="E-ADAPT-071", found=repr(name)[:80])
        if name in self._held:
            raise AdapterError("a name stands for one adapter", code="E-ADAPT-072", found=name,
                remedy="remove the other first, or reload it")
        self._held[name] = self._read(Path(folder))

    def reload(self, name: str) -> None:
        """Read the folder again; the new content acts at once where this adapter is active."""
        old = self._known(name)
        self._require_unmerged("reload")
        self._held[name] = self._read(old.folder)
        if self._active == name:
            try:
                self._switch(name)
            except BaseException:
                self._held[name] = old
                self._switch(name)
                raise

    def remove(self, name: str) -> None:
        """Forget an adapter that does not act."""
        self._known(name)
        if name == self._active:
            raise AdapterError("the active adapter cannot be removed", code="E-ADAPT-073", found=name,
                remedy="activate another, or none, first")
        del self._held[name]

    def activate(self, name: str | None) -> None:
        """Let this adapter act, or none; a failure leaves the former one acting."""
        if name is not None:
            self._known(name)
        self._require_unmerged("activate")
        if name != self._active:
            former = self._active
            try:
                self._switch(name)
            except BaseException:
                self._switch(former)
                raise

    def merge(self) -> MergeReport:
        """Fold the active adapter into the weights until `unmerge`."""
        self._require_unmerged("merge")
        if self._active is None:
            raise AdapterError("only an active adapter can be merged", code="E-ADAPT-074", found="none active", remedy="activate one first")
        self._merged = merge(self.model)
        return self._merged

    def unmerge(self) -> None:
        """Take the folded adapter out of the weights again; it goes on acting."""
        if self._merged is None:
            raise AdapterError("only what was merged can be unmerged", code="E-ADAPT-075", found="not merged")
        unmerge(self.model, self._merged)
        self._merged = None

    def _switch(self, name: str | None) -> None:
        eject(self.model)
        self._active = None
        if name is not None:
            held = self._held[name]
            put_in(self.model, held.adapter, held.folder)
            self._active = name

    def _read(self, folder: Path) -> Held:
        adapter = read(folder)
        if not self._allow_other_base:
            require_base(self.model, adapter, folder, self._base_digest)
            if start_of(adapter) not in (None, self._start):
                raise other_start(adapter, folder)
        if self._active is None:
            require_fit(self.model, adapter, folder)
        return Held(adapter, folder)

    def _known(self, name: str) -> Held:
        if name not in self._held:
            raise AdapterError("an adapter must be added before it is used", code="E-ADAPT-076", found=name,
                expected=", ".join(self._held) or "none yet",
                               remedy=nearest(name, self._held))  # fmt: skip
        return self._held[name]

    def _require_unmerged(self, what: str) -> None:
        if self._merged is not None:
            raise AdapterError(f"{what} needs weights without a folded adapter", code="E-ADAPT-077", found=f"{self._active} is merged",
                               remedy="unmerge first")  # fmt: skip
