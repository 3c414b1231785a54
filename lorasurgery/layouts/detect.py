"""Which architecture a file is for: the table that explains most of its modules, names and shapes both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from lorasurgery.architectures import architectures, plugins
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.deltas.full import is_parameter
from lorasurgery.errors import UnknownArchitectureError
from lorasurgery.layouts.evidence import OWN_KEY, decide, names, said
from lorasurgery.layouts.foreign import known_unmangled
from lorasurgery.layouts.names import index
from lorasurgery.layouts.near import near
from lorasurgery.layouts.plausible import objection

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from lorasurgery.architectures.table import Architecture, Shape
    from lorasurgery.site import Site

ENOUGH = 0.5
"""A table that explains no more than this share of a file's layers is not taken to be its architecture, unless somebody says
that it is: then the others are modules of the file's own. Bare parameters, of which it names none, do not count."""


@dataclass(frozen=True, slots=True)
class Match:
    """How well one table explains a file: modules whose name and shape fit, and whose name alone is known."""

    architecture: Architecture
    fitting: int
    misfits: tuple[str, ...]
    """Modules whose name is known and whose shape is another one: a widened first layer, or a damaged module."""
    total: int
    evidence: tuple[str, ...] = ()
    """Why it is this one, as sentences without a full stop."""

    @property
    def named(self) -> int:
        """The modules whose name is known."""
        return self.fitting + len(self.misfits)

    @property
    def unexplained(self) -> int:
        """The modules whose name is not known."""
        return self.total - self.named

    @property
    def share(self) -> float:
        """Share of the file's modules that fit, 0 to 1."""
        return self.fitting / self.total if self.total else 0.0


def expected_shape(architecture: Architecture, site: Site) -> Shape:
    """(out, in[, k...]) of the weight rows a site stands for."""
    own = architecture.own_shapes.get((site.component, site.spans[0].weight)) if len(site.spans) == 1 else None
    if own is not None:
        return own
    if site.component in TEXT_ENCODERS:
        rows = sum(span.stop - span.start for span in site.spans)
        return TEXT_ENCODERS[site.component].shapes.get(site.spans[0].weight, (rows,))  # norms are not in the tables
    return architecture.module_shape(site.spans)


def has_bias(architecture: Architecture, site: Site) -> bool | None:
    """Whether the model has a bias beside the weight a site stands for; None where that is not known."""
    table = TEXT_ENCODERS.get(site.component, architecture)
    return table.has_bias(site.spans[0].weight)


def fits(shape: Shape, expected: Shape) -> bool:
    """Whether a delta of ``shape`` can be added to ``expected``; flat convolutions count as their kernel's size."""
    if not shape or shape == expected:
        return True
    return shape[0] == expected[0] and prod(shape[1:]) == prod(expected[1:])


def detect(
    stems: Mapping[str, Shape | None],
    metadata: Mapping[str, str],
    *,
    among: Iterable[Architecture] | None = None,
    path: Path | None = None,
) -> tuple[Match, list[Match]]:
    """The likeliest table, and the others that nothing but likelihood speaks against.

    ``stems``: module name as spelled -> shape of its delta (None: unknown). ``among``: what the caller was told it is.
    Of the tables that fit most modules, those are left out that another model than theirs would look like
    (:mod:`lorasurgery.layouts.plausible`), unless they were told or the metadata names them; ties are decided by evidence
    (:mod:`lorasurgery.layouts.evidence`), never by the order of the tables.
    What the caller was told holds as long as one module fits. Raises UnknownArchitectureError, with the nearest tables, when
    no table is left.
    """
    matches = _compared(stems, metadata) if among is None else [score(arch, stems) for arch in among]
    most = max(((m.fitting, m.named) for m in matches), default=(0, 0))
    best = [m for m in matches if (m.fitting, m.named) == most]
    layers = sum(not is_parameter(stem) for stem in stems)
    if among is not None and not most[0]:
        raise _none_of(matches, stems, metadata, path)
    if not best or (among is None and best[0].fitting <= ENOUGH * max(layers, min(1, len(stems)))):
        raise _unknown(stems, matches, path, "")
    if among is None:
        best = _plausible(best, stems, metadata, path)
    decision = decide([m.architecture for m in best], stems, metadata)
    by_arch = {m.architecture: m for m in best}
    first, *ties = (by_arch[arch] for arch in decision.left)
    return replace(first, evidence=(_counts(first), *decision.evidence)), ties


def _compared(stems: Mapping[str, Shape | None], metadata: Mapping[str, str]) -> list[Match]:
    """The tables worth comparing: those the metadata names, when one explains all, else all that come near."""
    called = said(metadata)
    hinted = [score(arch, stems) for arch in architectures().values() if called and names(arch, called)]
    if any(m.fitting == m.total for m in hinted):
        return hinted
    matches = _scored(stems, {m.architecture: m for m in hinted})
    if any(m.fitting == m.total for m in matches):
        return matches
    return matches + [score(arch, stems) for arch in plugins()]


def _scored(stems: Mapping[str, Shape | None], matches: dict[Architecture, Match]) -> list[Match]:
    """The tables that come near, compared in full, except those that cannot fit as many modules as another does."""
    for arch, most in near(stems):
        best = max((m.fitting for m in matches.values()), default=0)
        if arch not in matches and (most >= best or 2 * best < len(stems)):
            matches[arch] = score(arch, stems)
    return list(matches.values())


def _plausible(
    best: Sequence[Match], stems: Mapping[str, Shape | None], metadata: Mapping[str, str], path: Path | None
) -> list[Match]:
    """Those of equally good matches against which nothing speaks, or which the metadata names."""
    called, own = said(metadata), metadata.get(OWN_KEY)
    told = [m for m in best if names(m.architecture, called) or m.architecture.key == own]
    if told:
        return told
    against = {m.architecture: objection(m.architecture, stems, m.misfits, m.unexplained) for m in best}
    found = [m for m in best if not against[m.architecture]]
    if not found:
        nearest = max(best, key=lambda m: m.architecture.usage)
        raise _unknown(stems, [nearest, *best], path, against[nearest.architecture])
    return found


def score(architecture: Architecture, stems: Mapping[str, Shape | None]) -> Match:
    """Count the modules whose names, and whose names and shapes, the table knows."""
    find = index(architecture).find
    fitting, misfits = 0, []
    for stem, shape in stems.items():
        found = find(stem)
        if found is None:
            continue
        if shape is None or fits(shape, found.shape):
            fitting += 1
        else:
            misfits.append(stem)
    return Match(architecture, fitting, tuple(misfits), len(stems))


def _counts(match: Match) -> str:
    """How much of the file fits, as a sentence."""
    found = f"{match.fitting} of {match.total} modules have a name and shape of {match.architecture.name}"
    if match.misfits:
        found += f", {len(match.misfits)} another shape (first: {match.misfits[0]})"
    return found + (f", {match.unexplained} another name" if match.unexplained else "")


def _none_of(
    told: Sequence[Match], stems: Mapping[str, Shape | None], metadata: Mapping[str, str], path: Path | None
) -> UnknownArchitectureError:
    """The error where not one module fits the model that somebody said it is: that model, and the nearest ones."""
    first = max(told, key=lambda match: match.named, default=None)
    ranked = sorted((m for m in _compared(stems, metadata) if m.fitting), key=_nearness)[:3]
    name = "that model" if first is None else first.architecture.name
    text = f"none of its {len(stems)} modules has a name and shape of {name}. "
    text += "" if first is None else _first_misfit(first.architecture, stems)
    if ranked:
        near = ranked[0]
        text += f" Nearest is {near.architecture.name}, {near.fitting} of {near.total} modules."
        hint = f"--arch {near.architecture.id}, or no --arch"
    else:
        hint = "--base MODEL, the checkpoint it was trained on (only its header is read), or no --arch"
    return UnknownArchitectureError(
        text.rstrip(), path=path, hint=hint, candidates=[(m.architecture.key, m.share) for m in ranked]
    )


def _unknown(
    stems: Mapping[str, Shape | None], matches: Sequence[Match], path: Path | None, against: str
) -> UnknownArchitectureError:
    """The error that names the nearest tables, and what speaks against the nearest."""
    ranked = sorted({m.architecture: m for m in matches if m.named}.values(), key=_nearness)[:3]
    first = next(iter(stems), "")
    meant = known_unmangled(first)
    if meant and not any(m.fitting for m in ranked):
        return UnknownArchitectureError(
            f"no known architecture has a module called {first}; it looks mangled, expected {meant}"
            f" ({len(stems)} modules in the file)",
            path=path,
            hint="the file as its trainer wrote it, or renaming the keys to that form",
        )
    if not ranked:
        return UnknownArchitectureError(
            f"no known architecture has a module called {first} ({len(stems)} modules in the file)",
            path=path,
            hint="--base MODEL, the checkpoint it was trained on (only its header is read)",
        )
    closest = ranked[0]
    why = f"{against[0].upper()}{against[1:]}. " if against else ""
    if not against or closest.misfits:
        why += _first_misfit(closest.architecture, stems)
    told = f"--arch {closest.architecture.key} if it is for that model all the same" if closest.fitting else "--arch NAME"
    return UnknownArchitectureError(
        f"no known architecture explains these keys (nearest: {closest.architecture.name},"
        f" {closest.fitting} of {closest.total} modules). {why.rstrip()}",
        path=path,
        hint=f"--base MODEL, the checkpoint it was trained on (only its header is read), or {told}",
        candidates=[(m.architecture.key, m.share) for m in ranked],
    )


def _nearness(match: Match) -> tuple[int, int, float]:
    return -match.fitting, -match.named, -match.architecture.usage


def _first_misfit(architecture: Architecture, stems: Mapping[str, Shape | None]) -> str:
    find = index(architecture).find
    for stem, shape in stems.items():
        found = find(stem)
        if found is None:
            return f"It has no {stem}."
        if shape is not None and not fits(shape, found.shape):
            return f"{stem} is {list(shape)}, it expects {list(found.shape)}."
    return ""
