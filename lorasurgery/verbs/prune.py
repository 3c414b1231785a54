"""Leave modules out of an adapter, by name or because another model does not have them; scale or negate the rest.

What is kept is exact: a scale becomes part of alpha where the layout has one, a sign flips the signs of one factor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapter import SCALED, Scale
from lorasurgery.architectures import named
from lorasurgery.deltas.full import Opaque
from lorasurgery.deltas.rounding import multiplied
from lorasurgery.errors import NotRepresentableError, RequestError
from lorasurgery.operations.conversion.cast import BIAS
from lorasurgery.operations.select.blocks import member, parse_selection
from lorasurgery.operations.select.parts import subset
from lorasurgery.report import Losses
from lorasurgery.site import DENOISER, SECOND_DENOISER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorasurgery.adapter import Adapter, Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.site import Site

    Test = Callable[[Module], bool]

FAMILY = "family="
BASE_VERSION, SPEC = "ss_base_model_version", "modelspec.architecture"


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """What to leave out, and what to do with the rest."""

    keep: tuple[str, ...] = ()
    """Selections (``te1``, ``unet``, ``double=0-18``, ``in=4-8``, ``family=lokr``, ``re=REGEX``); none: everything."""
    drop: tuple[str, ...] = ()
    """Selections that go, of what ``keep`` keeps."""
    target: str | None = None
    """A model, by name (``chroma``, ``flux1-dev``) or by its file: what it does not have goes, and the rest is for it."""
    scale: float = 1.0
    negate: bool = False

    def check(self) -> None:
        """Raises RequestError for options that ask for nothing or for no number."""
        if not isfinite(self.scale) or self.scale == 0.0:
            raise RequestError(f"the scale is a number other than 0, not {self.scale:g}", hint="--drop for what is to go")
        if not (self.keep or self.drop or self.target or self.factor != 1.0):
            raise RequestError(
                "nothing to do", hint="--drop te, --keep double=0-18, --prune-for chroma, --scale 0.5 or --negate"
            )

    @property
    def factor(self) -> float:
        """What every change is multiplied by."""
        return -self.scale if self.negate else self.scale

    @property
    def way(self) -> str:
        """In a few words."""
        words = [f"keep {text}" for text in self.keep] + [f"drop {text}" for text in self.drop]
        words += [f"for {self.target}"] if self.target else []
        return ", ".join(words + ([f"scale {self.factor:g}"] if self.factor != 1.0 else []))


@dataclass(slots=True)
class Pruned:
    """What went and what became of the rest; rounding errors arrive while the result is written."""

    dropped: list[tuple[str, str]] = field(default_factory=list)
    """(module, reason)."""
    warnings: list[str] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)
    """Of biases that were scaled."""


def prune(adapter: Adapter, options: PruneOptions) -> tuple[Adapter, Pruned]:
    """The adapter without what the options name, and the list of that.

    Raises RequestError for selections that the model does not have, and when nothing or everything would go;
    NotRepresentableError where a module that stays cannot be scaled.
    """
    options.check()
    report = Pruned()
    arch = adapter.architecture
    keep, drop = [_test(text, adapter) for text in options.keep], [_test(text, adapter) for text in options.drop]
    _warn_unused(adapter, [*zip(options.keep, keep, strict=True), *zip(options.drop, drop, strict=True)], report)
    target = None if options.target is None else _target(options.target, adapter)
    kept: dict[Site, Module] = {}
    for site, module in adapter:
        reason = _reason(module, options, keep, drop)
        if reason is None and target is not None:
            reason = missing_in(target, module, arch)
        if reason is None:
            whole = _without_parts(module, options.drop, report)
            kept[site] = _times(whole, options.factor, adapter, report)
        else:
            report.dropped.append((module.name, reason))
    if not kept:
        raise RequestError(
            f"nothing would be left of the {len(adapter)} modules ({report.dropped[0][1]})", path=adapter.path,
            hint="a narrower selection, or another model",
        )  # fmt: skip
    result = subset(adapter, kept, f"prune: {options.way}")
    return (result if target is None else _for(target, result, report)), report


def _test(text: str, adapter: Adapter) -> Test:
    """Whether a module belongs to a selection; families are ours, the rest is :mod:`lorasurgery.operations.select.blocks`'.

    A regular expression that no module's name matches is looked for in the keys that make a module's effect.
    """
    if text.startswith(FAMILY):
        wanted = set(text.removeprefix(FAMILY).split(","))
        return lambda module: module.family in wanted
    named = member(parse_selection(text), adapter.architecture)
    if not text.startswith("re=") or any(map(named, adapter.modules.values())):
        return named
    return lambda module: _all_match(module, text)


PARTS = ("bias", "magnitude")
"""What can be left out of a module beside its factors."""


def _changes(module: Module) -> list[str]:
    """The keys of a module's change itself."""
    slots = () if module.delta is None else module.delta.tensors
    return [module.keys.get(slot) or module.keys.get(slot.lstrip("."), "") for slot in slots]


def _all_match(module: Module, text: str) -> bool:
    """Whether a regular expression means every key that makes a module's effect, so that nothing of it is left."""
    keys = _changes(module) + ([module.keys.get("bias", "")] if module.bias is not None else [])
    search = re.compile(text.removeprefix("re=")).search
    return bool(keys) and all(search(key) for key in keys)


def _parts(module: Module, text: str) -> list[str]:
    """The parts of a module that a selection means, where it does not mean the module: its bias, magnitude or extras.

    ``family=bias`` is every bias; a regular expression that no module's name matches is looked for in the keys.
    """
    if module.delta is None:
        return []
    if text == f"{FAMILY}bias":
        return ["bias"] if module.bias is not None else []
    if not text.startswith("re="):
        return []
    search = re.compile(text.removeprefix("re=")).search
    found = [slot for slot, key in module.keys.items() if (slot in PARTS or slot in module.extras) and search(key)]
    alone = module.bias is not None and "bias" not in found and all(map(search, _changes(module)))
    return [*found, CHANGE] if alone else found


CHANGE = "change"
"""The part of a module that is its change, where a bias is to stay."""


def _without_parts(module: Module, drop: Sequence[str], report: Pruned) -> Module:
    """The module without the parts that ``--drop`` names."""
    for text in drop:
        for slot in _parts(module, text):
            if slot == CHANGE:
                report.dropped += [(key, f"--drop {text}") for key in _changes(module)]
                keys = {own: key for own, key in module.keys.items() if own == "bias"}
                module = replace(module, delta=None, magnitude=None, extras={}, composed=None, scale=Scale(1.0, ""), keys=keys)
                continue
            report.dropped.append((module.keys.get(slot, f"{module.name} {slot}"), f"--drop {text}"))
            module = replace(module, keys={own: key for own, key in module.keys.items() if own != slot})
            if slot == "bias":
                module = replace(module, bias=None, layer_bias=None)
            elif slot == "magnitude":
                module = replace(module, magnitude=None)
            else:
                module = replace(module, extras={own: t for own, t in module.extras.items() if own != slot})
    return module


def _warn_unused(adapter: Adapter, tests: Sequence[tuple[str, Test]], report: Pruned) -> None:
    for text, test in tests:
        if not any(test(module) or _parts(module, text) for module in adapter.modules.values()):
            report.warnings.append(f"{text} is no module of the file")


def _reason(module: Module, options: PruneOptions, keep: Sequence[Test], drop: Sequence[Test]) -> str | None:
    if keep and not any(test(module) for test in keep):
        return f"not in --keep {' --keep '.join(options.keep)}"
    return next((f"--drop {text}" for text, test in zip(options.drop, drop, strict=True) if test(module)), None)


# another model ------------------------------------------------------------------------------------------------------------


def _target(text: str, adapter: Adapter) -> Architecture:
    """The model to prune for: a file's own table, or of the variants of a name the one that keeps most."""
    if Path(text).exists():
        from lorasurgery.models import open_model

        return open_model(text).architecture
    own = adapter.architecture

    def kept(arch: Architecture) -> int:
        return sum(missing_in(arch, module, own) is None for module in adapter.modules.values())

    return max(named(text), key=kept)


def missing_in(arch: Architecture, module: Module, own: Architecture) -> str | None:
    """Why a model has no place for a module of ``own``; None when it has."""
    component = module.site.component
    if component not in (DENOISER, SECOND_DENOISER):
        return None if any(encoder.table == component for encoder in arch.encoders) else f"{arch.name} has no {component}"
    for span in module.site.spans:
        there, here = arch.shapes.get(span.weight), own.shapes[span.weight]
        if there is None:
            return f"{arch.name} has no {span.weight}"
        if there != here:
            return f"{span.weight} is {list(there)} in {arch.name}, {list(here)} here"
    return None


def _for(arch: Architecture, adapter: Adapter, report: Pruned) -> Adapter:
    """The adapter as one for another model; its metadata no longer name the old one."""
    metadata = dict(adapter.metadata)
    if BASE_VERSION in metadata and arch.metadata_names and metadata[BASE_VERSION] not in arch.metadata_names:
        report.warnings.append(f"{BASE_VERSION} was {metadata[BASE_VERSION]} and is {arch.metadata_names[0]} now")
        metadata[BASE_VERSION] = arch.metadata_names[0]
    if metadata.get(SPEC, "").split("/")[0] not in ("", *arch.metadata_names):
        report.warnings.append(f"{SPEC} was {metadata.pop(SPEC)} and is left out")
    return replace(adapter, architecture=arch, metadata=metadata, candidates=())


# scale --------------------------------------------------------------------------------------------------------------------


def _times(module: Module, factor: float, adapter: Adapter, report: Pruned) -> Module:
    """The module's change times a number: the sign flips one factor's signs, the rest goes to the scale, both exact."""
    if factor == 1.0:
        return module
    if module.magnitude is not None or isinstance(module.delta, Opaque):
        what = module.delta.called if isinstance(module.delta, Opaque) else "a DoRA"
        raise NotRepresentableError(
            f"{module.name}: {what} is not scaled by any number in the file: its effect depends on the base weight",
            module=module.name, path=adapter.path, hint=f"--drop {FAMILY}{module.family} for these modules",
        )  # fmt: skip
    record = partial(report.losses.record, BIAS.format(module.name))
    bias = None if module.bias is None else multiplied(module.bias, factor, record)
    if module.delta is None:
        return replace(module, bias=bias)
    delta = module.delta.scaled(-1.0) if factor < 0 else module.delta
    scale = module.scale if abs(factor) == 1.0 else Scale(module.scale.value * abs(factor), SCALED)
    return replace(module, delta=delta, scale=scale, bias=bias)
