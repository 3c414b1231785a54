"""Adapters of a model that no table knows: their modules are called what the files, or a base model's header, call them.

Files in one spelling need nothing else: their names are equal or not. A file in another spelling (a prefix, underscores for
dots) must have its modules among the first one's, or a base model has to say what is what. No name is ever made up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery.adapter import Adapter, Leftover, Site
from lorasurgery.architectures.from_base import custom
from lorasurgery.architectures.table import ORIGINAL, Span, flat
from lorasurgery.deltas.miss import Miss
from lorasurgery.errors import BrokenModuleError, RequestError, UnknownArchitectureError
from lorasurgery.layouts.detect import fits
from lorasurgery.layouts.emit import emit
from lorasurgery.layouts.foreign import named_modules, refuse_other_models
from lorasurgery.layouts.group import build, group
from lorasurgery.layouts.module import module_of, scale_rules
from lorasurgery.layouts.names import Found
from lorasurgery.layouts.parse import warnings_of
from lorasurgery.layouts.peft_keys import reason_of
from lorasurgery.layouts.scales import header_configs
from lorasurgery.layouts.spelled import PREFIXED, spelling
from lorasurgery.layouts.targets import layout
from lorasurgery.layouts.words import BIAS
from lorasurgery.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lorasurgery.architectures.table import Architecture, Shape
    from lorasurgery.deltas.base import Delta
    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.names import Prefix
    from lorasurgery.layouts.scales import PeftConfig

PEFT_FOLDER = ("base_model.model.", "transformer.", "unet.")
"""What stands before the names in a PEFT folder, or in one folder of several."""
UNKNOWN_SHAPE = (1,)
"""Of a module whose tensors do not say it: an OFT's, for one. It is carried whole, so nobody asks."""
ADVICE = "--base MODEL, the checkpoint it was trained on (only its header is read)"


@dataclass(frozen=True, slots=True)
class Unread:
    """A file's tensors and, for a PEFT folder, its configurations by component."""

    raw: RawFile
    configs: Mapping[str, PeftConfig] | None = None


@dataclass(frozen=True, slots=True)
class _File:
    """A file taken apart, before its modules have names."""

    raw: RawFile
    configs: Mapping[str, PeftConfig] | None
    groups: Mapping[str, Group]
    others: Mapping[str, Tensor]
    deltas: Mapping[str, Delta | None]

    @property
    def prefixes(self) -> list[Prefix]:
        """Those that its names may begin with: whatever stands before them in a file, PEFT's own in its folder."""
        return [p for p in PREFIXED if self.configs is None or p.text in PEFT_FOLDER]

    def bodies(self, prefix: Prefix) -> dict[str, str]:
        """Stem -> what follows the prefix, for those that have it; with underscores for dots there is no dot."""
        found = {stem: stem[len(prefix.text) :] for stem in self.groups if stem.startswith(prefix.text)}
        return {stem: body for stem, body in found.items() if body and not (prefix.flat and "." in body)}

    @property
    def own(self) -> Prefix | None:
        """The longest prefix that all of its names have."""
        return next((p for p in self.prefixes if len(self.bodies(p)) == len(self.groups)), None)

    def says_nothing(self, stem: str) -> bool:
        """Whether a module's factors do not tell the weight's shape, or there are none."""
        delta = self.deltas[stem]
        return delta is None or not delta.shape

    def shape(self, stem: str) -> Shape:
        """Of the weight, as far as the module's tensors say it."""
        delta, bias = self.deltas[stem], self.groups[stem].modifier(BIAS)
        if delta is not None and delta.shape:
            return delta.shape
        return UNKNOWN_SHAPE if bias is None else (bias.tensor.size,)


class _Names:
    """The names of a model's modules, looked up as a file spells them."""

    def __init__(self, names: Iterable[str], *, is_flat: bool) -> None:
        self.exact = dict.fromkeys(names)
        self.is_flat = is_flat
        self._flat: dict[str, list[str]] = {}
        for name in self.exact:
            self._flat.setdefault(flat(name), []).append(name)

    def find(self, body: str, *, is_flat: bool) -> list[str]:
        """Every name that a spelled one can stand for."""
        if is_flat or self.is_flat:
            return self._flat.get(flat(body), [])
        return [body] if body in self.exact else []


def read_by_names(files: Sequence[Unread], base: Architecture | None = None) -> list[Adapter]:
    """The adapters under one table, in the files' own spellings; ``base`` is a base model's table.

    Raises UnknownArchitectureError where the names of two files cannot be told to be the same or another, or the base has
    not all of them, BrokenModuleError for modules that have other sizes elsewhere, RequestError for a PEFT folder of several
    components, NotAnAdapterError for other files.
    """
    taken = [_taken_apart(file) for file in files]
    first = _prefix(taken[0])
    if base is None:
        alike = [file for file in taken if file.own == first]
        names = _Names((body for file in alike for body in file.bodies(first).values()), is_flat=first.flat)
        named = [(first, file.bodies(first)) if file.own == first else _like(taken[0], file, names) for file in taken]
        table = _table(taken, [own for _, own in named])
        table = replace(table, only_prefix=first.text if taken[0].configs is None else PEFT_FOLDER[0])
    else:
        names = _Names(base.shapes, is_flat=False)
        named = [_in_base(file, names, base) for file in taken]
        table = base
    table = replace(table, denoiser="unet" if named[0][0].text.endswith("unet.") else "transformer")
    found = [_adapter(file, prefix, own, table) for file, (prefix, own) in zip(taken, named, strict=True)]
    return [replace(found[0], warnings=(*found[0].warnings, *_respelled(found[0], taken[0]))), *found[1:]]


def _taken_apart(file: Unread) -> _File:
    raw = named_modules(file.raw)
    groups, others = group(raw)
    refuse_other_models(raw, groups)
    return _File(raw, file.configs, groups, others, {stem: build(own, raw.path) for stem, own in groups.items()})


def _prefix(file: _File) -> Prefix:
    """What the names of a file begin with; raises RequestError for a PEFT folder of several components."""
    if file.own is None:
        raise RequestError(
            "no table knows its model, and its folders are several components", path=file.raw.path,
            hint="one of the folders at a time",
        )  # fmt: skip
    return file.own


def _like(first: _File, file: _File, names: _Names) -> tuple[Prefix, dict[str, str]]:
    """Stem -> name for a file that is spelled otherwise than the first, all of whose modules that one has."""
    prefix = _prefix(file)
    found = {stem: names.find(body, is_flat=prefix.flat) for stem, body in file.bodies(prefix).items()}
    missing = next((stem for stem, own in found.items() if not own), None)
    if missing is not None:
        raise UnknownArchitectureError(
            f"no table knows its model, it is spelled otherwise than {first.raw.path.name}, and {missing} is none of the "
            "modules there: whether it is called something else is not known",
            path=file.raw.path, hint=ADVICE,
        )  # fmt: skip
    return prefix, _only(found, file, "a file that spells it with dots")


def _only(found: Mapping[str, list[str]], file: _File, hint: str) -> dict[str, str]:
    """Stem -> its one name; raises UnknownArchitectureError where underscores leave a choice."""
    for stem, own in found.items():
        if len(own) > 1:
            raise UnknownArchitectureError(
                f"{stem} can be {own[0]} or {own[1]}: its underscores do not tell", path=file.raw.path, hint=hint
            )
    return {stem: own[0] for stem, own in found.items() if own}


def _in_base(file: _File, names: _Names, base: Architecture) -> tuple[Prefix, dict[str, str]]:
    """The prefix under which the base has most of a file's modules, and stem -> name; it must have all of them."""
    best: tuple[Prefix, dict[str, list[str]]] | None = None
    for prefix in file.prefixes:
        found = {s: own for s, body in file.bodies(prefix).items() if (own := names.find(body, is_flat=prefix.flat))}
        if best is None or len(found) > len(best[1]):
            best = prefix, found
    missing = [stem for stem in file.groups if best is None or stem not in best[1]]
    if missing or best is None:
        raise UnknownArchitectureError(
            f"{base.source} has no module for {missing[0]} ({len(missing)} of the {len(file.groups)} modules)",
            path=file.raw.path, hint="the model it was trained on, or no --base where all files are spelled alike",
        )  # fmt: skip
    return best[0], _only(best[1], file, "the same adapter in a layout with dots")


def _table(files: Sequence[_File], named: Sequence[Mapping[str, str]]) -> Architecture:
    """The modules of all files, each with the shape that says most; raises BrokenModuleError where two cannot be one."""
    shapes: dict[str, Shape] = {}
    whose: dict[str, _File] = {}
    every = [(file, stem, name) for file, own in zip(files, named, strict=True) for stem, name in own.items()]
    for file, stem, name in sorted(every, key=lambda one: one[0].says_nothing(one[1])):
        shape, known = file.shape(stem), shapes.get(name, ())
        if known and (file.says_nothing(stem) or (len(shape) <= len(known) and fits(shape, known))):
            continue
        if known and not fits(shape, known):
            raise BrokenModuleError(
                f"{stem} is {list(shape)}, in {whose[name].raw.path.name} {list(known)}", key=file.groups[stem].key(),
                path=file.raw.path, hint="files for one model",
            )  # fmt: skip
        shapes[name], whose[name] = shape, file
    return custom({name: shapes[name] for *_, name in every}, files[0].raw.path)


def _adapter(file: _File, prefix: Prefix, names: Mapping[str, str], table: Architecture) -> Adapter:
    rules = scale_rules(file.raw, header_configs(file.raw.metadata) if file.configs is None else file.configs)
    families = {"bias" if delta is None else delta.family for delta in file.deltas.values()}
    own = "peft" if file.configs is not None else spelling(prefix, file.groups, families, header=bool(rules.configs))
    modules = {}
    for stem, name in names.items():
        shape, delta = table.shapes[name], file.deltas[stem]
        if isinstance(delta, Miss) and shape == UNKNOWN_SHAPE:
            raise UnknownArchitectureError(
                f"no table knows its model, and only that has the shape of {stem}, a MiSS", path=file.raw.path, hint=ADVICE
            )
        place = Found(Site(prefix.component, (Span(name, 0, shape[0]),)), ORIGINAL, own, shape)
        modules[place.site] = module_of(file.groups[stem], delta, place, table, rules, file.raw.path)
    return Adapter(
        architecture=table,
        modules=modules,
        metadata=dict(file.raw.metadata),
        layout=own,
        leftovers=tuple(Leftover(key, tensor, reason_of(key)) for key, tensor in file.others.items()),
        candidates=((table.key, 1.0),),
        warnings=tuple(warnings_of(file.raw, rules, modules.values())),
        path=file.raw.path,
        configs={component: config.fields for component, config in rules.configs.items()},
    )


def _respelled(adapter: Adapter, file: _File) -> Iterator[str]:
    """What is not written as it was spelled: PEFT's names of adapters (``lora_A.default.weight``), words that got others."""
    written = emit(adapter, layout(adapter.layout), Report()).tensors
    missing = [entry.key for own in file.groups.values() for entry in own.entries.values() if entry.key not in written]
    if missing and file.configs is None:
        yield f"{len(missing)} keys (first: {missing[0]}) are not written as the file spells them"
