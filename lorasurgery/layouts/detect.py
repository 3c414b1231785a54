"""Which architecture a file is for: the table that explains most of its modules, names and shapes both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING

from lorasurgery.architectures import architectures, plugins
from lorasurgery.architectures.table import NAMINGS
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.errors import UnknownArchitectureError
from lorasurgery.layouts.foreign import known_unmangled
from lorasurgery.layouts.names import index
from lorasurgery.layouts.near import near

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from lorasurgery.adapter import Site
    from lorasurgery.architectures.table import Architecture, Shape, Spans

ENOUGH = 0.5
"""A table that explains less than this share of a file's modules is not taken to be its architecture."""


@dataclass(frozen=True, slots=True)
class Match:
    """How well one table explains a file: modules whose name and shape fit, and whose name alone is known."""

    architecture: Architecture
    fitting: int
    named: int
    total: int

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
    """The best table and every other that fits equally many modules.

    ``stems``: module name as spelled -> shape of its delta (None: unknown). Ties are decided by what the metadata says
    (``ss_base_model_version``, ``modelspec.architecture``), then by the tables' own order.
    Raises UnknownArchitectureError, with the nearest tables, when none explains enough.
    """
    hinted = {arch.key for arch in architectures().values() if _said(metadata) & set(arch.metadata_names)}
    matches = [score(arch, stems) for arch in (_hinted(hinted) if among is None else among)]
    if among is None and not any(m.fitting == m.total for m in matches):  # the metadata is silent or wrong
        matches = _scored(stems)
        if not any(m.fitting == m.total for m in matches):
            matches += [score(arch, stems) for arch in plugins()]
    if not any(m.named for m in matches):
        raise _unknown(stems, matches, path)
    best = max(matches, key=lambda m: (m.fitting, m.named, m.architecture.key in hinted))
    if best.share < ENOUGH:
        raise _unknown(stems, matches, path)
    if best.architecture.key in hinted:
        return best, []
    ties = [m for m in matches if (m.fitting, m.named) == (best.fitting, best.named)]
    if len({m.architecture.id for m in ties}) > 1:
        whole = [m for m in ties if _is_whole(m.architecture, stems)]
        ids = {m.architecture.id for m in whole}
        ties = whole if whole and len(ids) < len({m.architecture.id for m in ties}) else ties
    return ties[0], ties[1:]


def _scored(stems: Mapping[str, Shape | None]) -> list[Match]:
    """The tables that come near, compared in full, except those that cannot fit as many modules as another does."""
    matches: dict[str, Match] = {}
    for arch, most in near(stems):
        best = max((m.fitting for m in matches.values()), default=0)
        if most >= best or 2 * best < len(stems):
            matches[arch.key] = score(arch, stems)
    return [matches[key] for key in architectures() if key in matches]


def _said(metadata: Mapping[str, str]) -> set[str]:
    """What the metadata calls the base model."""
    return {metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "").split("/")[0]} - {""}


def _hinted(keys: set[str]) -> list[Architecture]:
    return [arch for key, arch in architectures().items() if key in keys]


def _is_whole(architecture: Architecture, stems: Mapping[str, Shape | None]) -> bool:
    """Whether the file reaches every block of each stack of blocks it touches: evidence that the depth is this one."""
    names = index(architecture)
    touched = {span.weight for stem in stems if (place := names.find(stem)) is not None for span in place.site.spans}
    blocks = _blocks(touched & architecture.shapes.keys())
    every = _all_blocks(architecture)
    return bool(blocks) and all(every[stack] == own for stack, own in blocks.items())


@cache
def _all_blocks(architecture: Architecture) -> Mapping[str, set[str]]:
    return _blocks(architecture.shapes)


def _blocks(weights: Iterable[str]) -> dict[str, set[str]]:
    """``{"double_blocks": {"0", "1", ...}}`` for the weights in numbered blocks."""
    found: dict[str, set[str]] = {}
    for weight in weights:
        parts = weight.split(".", 2)
        if len(parts) > 2 and parts[1].isdigit():
            found.setdefault(parts[0], set()).add(parts[1])
    return found


def same_results(first: Architecture, second: Architecture, stems: Iterable[str]) -> bool:
    """Whether taking a file for one or the other makes no difference to any conversion of these modules."""
    if _spelling(first) != _spelling(second):
        return False
    names, others = index(first), index(second)
    weights: set[str] = set()
    for stem in stems:
        mine, its = names.find(stem), others.find(stem)
        if mine is None or its is None or mine.site != its.site:
            return False
        weights.update(span.weight for span in mine.site.spans)
    return all(_named_rows(first, naming, weights) == _named_rows(second, naming, weights) for naming in NAMINGS)


def _spelling(arch: Architecture) -> tuple[object, ...]:
    return (
        arch.denoiser,
        arch.onetrainer,
        arch.comfyui_split,
        arch.has_comfyui,
        arch.has_diffusers,
        arch.diffusers_roots,
    )


def _named_rows(arch: Architecture, naming: str, weights: set[str]) -> dict[str, Spans]:
    return {name: spans for name, spans in arch.namings[naming].items() if spans[0].weight in weights}


def score(architecture: Architecture, stems: Mapping[str, Shape | None]) -> Match:
    """Count the modules whose names, and whose names and shapes, the table knows."""
    names = index(architecture)
    fitting = named = 0
    for stem, shape in stems.items():
        found = names.find(stem)
        if found is not None:
            named += 1
            fitting += shape is None or fits(shape, found.shape)
    return Match(architecture, fitting, named, len(stems))


def _unknown(stems: Mapping[str, Shape | None], matches: list[Match], path: Path | None) -> UnknownArchitectureError:
    ranked = sorted(matches, key=lambda m: (-m.fitting, -m.named))[:3]
    candidates = [(m.architecture.key, m.share) for m in ranked if m.named]
    first = next(iter(stems), "")
    if not candidates:
        expected = known_unmangled(first)
        mangled = f"; it looks mangled, expected {expected}" if expected else ""
        return UnknownArchitectureError(
            f"no known architecture has a module called {first}{mangled} ({len(stems)} modules in the file)",
            path=path,
            hint="--base MODEL, the checkpoint it was trained on (only its header is read)",
        )
    closest = ranked[0]
    wrong = _first_misfit(closest.architecture, stems)
    return UnknownArchitectureError(
        f"no known architecture explains these keys; closest: {closest.architecture.name} ({closest.share:.0%}). {wrong}",
        path=path,
        hint="--base MODEL, the checkpoint it was trained on (only its header is read), or --arch NAME",
        candidates=candidates,
    )


def _first_misfit(architecture: Architecture, stems: Mapping[str, Shape | None]) -> str:
    names = index(architecture)
    for stem, shape in stems.items():
        found = names.find(stem)
        if found is None:
            return f"It has no {stem}."
        if shape is not None and not fits(shape, found.shape):
            return f"{stem} is {list(shape)}, it expects {list(found.shape)}."
    return ""
