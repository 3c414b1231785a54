"""A file as the checks see it: its modules as they are spelled, each with what it means; tensors stay on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapter import Scale
from lorasurgery.architectures import named
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.files.opened import read_unparsed
from lorasurgery.files.taken import Unparsed, taken_apart
from lorasurgery.layouts.detect import detect, fits
from lorasurgery.layouts.names import index
from lorasurgery.layouts.numbered import named_keys
from lorasurgery.layouts.widened import as_wide
from lorasurgery.layouts.words import ALPHA

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.files.taken import Taken
    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.scales import PeftConfig
    from lorasurgery.site import Site


@dataclass(frozen=True, slots=True)
class Item:
    """One module as the file spells it."""

    stem: str
    group: Group
    delta: Delta | None
    problem: str
    """Why its tensors make no module; empty when they do."""
    site: Site | None
    """What it changes, by any spelling known here; None when no table knows the name."""
    scale: float
    """What its delta is multiplied by, according to everything the file says."""
    misfit: str = ""
    """Why its shape cannot be added to that weight; empty when it can."""

    @property
    def alpha(self) -> Tensor | None:
        """Its alpha tensor."""
        entry = self.group.modifier(ALPHA)
        return None if entry is None else entry.tensor

    @property
    def whole_kronecker(self) -> bool:
        """A LoKr with both factors whole."""
        return isinstance(self.delta, Kronecker) and self.delta.rank is None

    @property
    def strength(self) -> float:
        """Alpha / rank as ComfyUI, sd-scripts and LyCORIS compute it; 1 without alpha, and for a whole LoKr."""
        rank = None if self.delta is None else self.delta.rank
        return 1.0 if self.alpha is None or rank is None or self.alpha.size != 1 else self.alpha.item() / rank


@dataclass(frozen=True, slots=True)
class Subject:
    """A file taken apart."""

    path: Path
    architecture: Architecture
    candidates: tuple[str, ...]
    """Other architectures the same keys fit."""
    layout_folder: bool
    """A PEFT folder."""
    numbered: bool
    """The modules are numbered instead of named (cloneofsimo/lora)."""
    items: tuple[Item, ...]
    others: tuple[str, ...]
    """Keys that end in no known suffix."""
    metadata: Mapping[str, str]
    evidence: tuple[str, ...] = ()
    """Why it is for this architecture."""
    raw: RawFile | None = None
    """The file itself."""
    configs: Mapping[str, PeftConfig] | None = None

    @property
    def keys(self) -> list[str]:
        """Every key."""
        return [entry.key for item in self.items for entry in item.group.entries.values()] + list(self.others)


def read_subject(path: str | Path, *, arch: str | None = None, base: Architecture | None = None) -> Subject:
    """Read a file's header (alphas are the only tensors read). ``base``: the table of a real checkpoint.

    Raises what reading an adapter raises: FileFormatError, NotAnAdapterError, UnknownArchitectureError.
    """
    among = (base,) if base is not None else None if arch is None else named(arch)
    file = read_unparsed(Path(path))
    return subject_of(file.raw, among=among, configs=file.configs)


def subject_of(
    raw: RawFile, *, among: Iterable[Architecture] | None = None, configs: Mapping[str, PeftConfig] | None = None
) -> Subject:
    """Take a file apart; a module that is broken is kept with its problem."""
    taken = taken_apart(Unparsed(raw, configs), tolerant=True)
    best, ties = detect(taken.shapes, raw.metadata, among=among, path=raw.path)
    arch = as_wide((m.architecture for m in (best, *ties)), taken.groups)
    items = tuple(_item(stem, taken, arch) for stem in taken.groups)
    kin = dict.fromkeys(m.architecture.id for m in ties if m.architecture.id != best.architecture.id)
    return Subject(
        raw.path, arch, tuple(kin), configs is not None, bool(named_keys(raw.tensors)), items, tuple(taken.others),
        raw.metadata, best.evidence, raw, configs,
    )  # fmt: skip


def _item(stem: str, taken: Taken, arch: Architecture) -> Item:
    own, delta, problem = taken.groups[stem], taken.deltas.get(stem), taken.problems.get(stem, "")
    found = index(arch).find(stem)
    alpha = own.modifier(ALPHA)
    tensor = None if alpha is None or alpha.tensor.size != 1 else alpha.tensor
    scale = Scale(1.0, "") if delta is None else taken.rules.resolve(stem, delta, tensor)
    misfit = ""
    if found is not None and delta is not None and not fits(delta.shape, found.shape):
        misfit = f"its shape is {list(delta.shape)}, {arch.name} has {list(found.shape)}"
    return Item(own.spelled, own, delta, problem, None if found is None else found.site, scale.value, misfit)
