"""What the page draws, as numbers: heat maps of norms over blocks and module kinds, spectra as bars."""

from __future__ import annotations

import re
from math import ceil, exp, log
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorasurgery.inspection.spectrum import ModuleSpectrum, Spectrum

STEPS = 10
"""Colours of a heat map."""
CUT = 0.02
"""Share of the modules at either end of the scale that share the outermost colours: outliers must not flatten the rest."""
BARS, HEIGHT, WIDTH = 32, 20, 3
"""Most bars of a drawing, the height of the longest, and the width of one."""
SHOWN_KINDS = 60
"""Kinds of modules with a drawing of their own, those with the most energy."""
_NUMBER = re.compile(r"([0-9]{1,9})")
_DEEPER = re.compile(r"(.*blocks[._][0-9]{1,9})[._](.+)")
_SIGNS = {"dead": "×", "nan": "!", "unknown": "?"}


class Cell(NamedTuple):
    """A module in a heat map."""

    name: str
    classes: str
    """A colour for each metric, or the state."""
    text: str


class HeatMap(NamedTuple):
    """The modules of blocks that are alike: a column a block, a row a kind."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


class Metric(NamedTuple):
    """A number that colours a heat map, and where its colours begin and end."""

    key: str
    of: Callable[[ModuleSpectrum], float | None]
    log: bool
    low: float = 0.0
    high: float = 0.0

    def ticks(self) -> tuple[float, float, float]:
        """The scale's two ends and its middle."""
        middle = exp((log(self.low) + log(self.high)) / 2) if self.log and self.low else (self.low + self.high) / 2
        return self.low, middle, self.high

    def step(self, value: float) -> int:
        """The colour of a value."""
        low, high, at = (log(self.low), log(self.high), log(value)) if self.log else (self.low, self.high, value)
        return min(max(int((at - low) / (high - low) * STEPS), 0), STEPS - 1) if high > low else STEPS // 2


class Component(NamedTuple):
    """The heat maps of a denoiser or of a text encoder, on one scale."""

    name: str
    metrics: tuple[Metric, ...]
    maps: tuple[HeatMap, ...]
    states: tuple[str, ...]
    """States other than ``ok`` that occur."""


class Kind(NamedTuple):
    """Modules that do the same in every block."""

    name: str
    component: str
    modules: int
    share: float
    """Of the file's squared norm."""
    norm: float
    effective_rank: float
    rank_90: float | None
    bars: str
    width: int
    """Of the drawing."""


METRICS = (
    Metric("a", lambda m: m.relative, log=True),
    Metric("b", lambda m: m.norm, log=True),
    Metric("c", lambda m: m.effective_rank, log=False),
)


def natural(text: str) -> list[str | int]:
    """A key that sorts ``blocks.2`` before ``blocks.10``."""
    return [int(part) if i % 2 else part for i, part in enumerate(_NUMBER.split(text))]


def components(spectrum: Spectrum) -> list[Component]:
    """The heat maps of every component that has something to show."""
    found = []
    for name in dict.fromkeys(m.component for m in spectrum.modules):
        own = [m for m in spectrum.modules if m.component == name]
        metrics = tuple(_bounded(metric, own) for metric in METRICS)
        states = tuple(state for state in _SIGNS if any(m.state == state for m in own))
        found.append(Component(name, metrics, tuple(_maps(own, metrics)), states))
    return found


def _bounded(metric: Metric, modules: Sequence[ModuleSpectrum]) -> Metric:
    values = sorted(value for m in modules if (value := metric.of(m)))
    if not values:
        return metric
    last = len(values) - 1
    return metric._replace(low=values[round(last * CUT)], high=values[round(last * (1 - CUT))])


def _maps(modules: Sequence[ModuleSpectrum], metrics: Sequence[Metric]) -> list[HeatMap]:
    """A map for every family of blocks; what stands in no repeated block comes last, in one column."""
    families: dict[str, dict[str, dict[str, ModuleSpectrum]]] = {}
    for module in modules:
        block, kind = _place(module)
        families.setdefault(_NUMBER.sub("#", block), {}).setdefault(block, {})[kind] = module
    repeated = {name: blocks for name, blocks in families.items() if name and len(blocks) > 1}
    single = {
        ".".join(filter(None, (block, kind))): module
        for name, blocks in families.items() if name not in repeated
        for block, kinds in blocks.items() for kind, module in kinds.items()
    }  # fmt: skip
    found = [_map(blocks, metrics) for _, blocks in sorted(repeated.items(), key=lambda item: natural(item[0]))]
    if single:
        found.append(HeatMap("outside the repeated blocks", ("",), _rows({"": single}, metrics)))
    return found


def _place(module: ModuleSpectrum) -> tuple[str, str]:
    """Block and kind; blocks inside blocks (SDXL's ``input_blocks.7.1.transformer_blocks.3``) count as blocks."""
    deeper = _DEEPER.fullmatch(module.kind)
    return (f"{module.block}.{deeper[1]}".lstrip("."), deeper[2]) if deeper else (module.block, module.kind)


def _map(blocks: Mapping[str, Mapping[str, ModuleSpectrum]], metrics: Sequence[Metric]) -> HeatMap:
    ordered = dict(sorted(blocks.items(), key=lambda item: natural(item[0])))
    numbers = [_NUMBER.findall(block) for block in ordered]
    varying = [i for i, column in enumerate(zip(*numbers, strict=False)) if len(set(column)) > 1]
    parts = _NUMBER.split(next(iter(ordered)))
    for place, letter in zip(varying, "nmkji" + "n" * len(varying), strict=False):
        parts[2 * place + 1] = letter
    labels = tuple(".".join(own[i] for i in varying) for own in numbers)
    return HeatMap("".join(parts), labels, _rows(ordered, metrics))


def _rows(
    blocks: Mapping[str, Mapping[str, ModuleSpectrum]], metrics: Sequence[Metric]
) -> tuple[tuple[str, tuple[Cell | None, ...]], ...]:
    kinds = sorted({kind for kinds in blocks.values() for kind in kinds}, key=natural)
    return tuple(
        (kind, tuple(_cell(kinds[kind], metrics) if kind in kinds else None for kinds in blocks.values())) for kind in kinds
    )


def _cell(module: ModuleSpectrum, metrics: Sequence[Metric]) -> Cell:
    if module.state != "ok" or not module.relative:
        state = module.state if module.state in _SIGNS else "dead"
        return Cell(module.name, state, _SIGNS[state])
    steps = ((metric.key, metric.of(module)) for metric in metrics)
    classes = [f"{key}{metric.step(value)}" for metric, (key, value) in zip(metrics, steps, strict=True) if value]
    return Cell(module.name, " ".join(classes), f"{module.relative:.2g}")


def kinds(spectrum: Spectrum) -> list[Kind]:
    """Every kind of module with its mean spectrum, the one with the most energy first."""
    groups: dict[tuple[str, str], list[ModuleSpectrum]] = {}
    for module in spectrum.modules:
        if module.state == "ok":
            groups.setdefault((module.component, _place(module)[1]), []).append(module)
    total = sum(m.norm**2 for own in groups.values() for m in own if m.norm) or 1.0
    found = [_kind(place, own, total) for place, own in groups.items()]
    return sorted(found, key=lambda kind: -kind.share)


def _kind(place: tuple[str, str], modules: Sequence[ModuleSpectrum], total: float) -> Kind:
    ranks = [rank for m in modules for share, rank in m.ranks if share == 0.9]
    mean = _mean([m.singular_values for m in modules])
    return Kind(
        name=place[1],
        component=place[0],
        modules=len(modules),
        share=sum(m.norm**2 for m in modules if m.norm) / total,
        norm=fmean(m.norm or 0.0 for m in modules),
        effective_rank=fmean(m.effective_rank or 0.0 for m in modules),
        rank_90=fmean(ranks) if ranks else None,
        bars=bars(mean, gap=1),
        width=len(mean) * WIDTH - 1,
    )


def _mean(spectra: Sequence[Sequence[float]]) -> list[float]:
    """The mean of spectra, each over its largest value; one that ended counts as zero."""
    length = max(map(len, spectra))
    columns = min(length, BARS)
    places = [column * length // columns for column in range(columns)]
    return [fmean(own[at] / own[0] if at < len(own) else 0.0 for own in spectra) for at in places]


def bars(values: Sequence[float], *, gap: int = 0) -> str:
    """An SVG path of at most ``BARS`` bars, ``HEIGHT`` high, evenly spread over the values."""
    if not values or values[0] <= 0:
        return ""
    columns = min(len(values), BARS)
    heights = [ceil(values[column * len(values) // columns] / values[0] * HEIGHT) for column in range(columns)]
    if not gap:
        steps = "".join(f"V{HEIGHT - height}h{WIDTH}" for height in heights)
        return f"M0 {HEIGHT}{steps}V{HEIGHT}z"
    return "".join(
        f"M{column * WIDTH} {HEIGHT}v-{height}h{WIDTH - gap}v{height}z" for column, height in enumerate(heights) if height
    )
