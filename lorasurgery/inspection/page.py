"""A description as one self-contained HTML page, for ``lorasurgery inspect --html``.

Nothing is fetched: style and script stand in the page, and its content security policy forbids everything else. The script
is allowed by its hash, so that markup smuggled into a name or a metadata value would not run even if it got through.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import sha256
from math import ceil, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from lorasurgery.inspection.charts import BARS, HEIGHT, SHOWN_KINDS, WIDTH, bars, components, kinds, natural
from lorasurgery.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasurgery.inspection.description import Description, ModuleInfo, Numbers
    from lorasurgery.inspection.spectrum import ModuleSpectrum

LONGEST, ALL = 4_000, 400_000
"""Characters of a metadata value that are shown, and of all of them together."""
SHORT = 160
"""Characters of a value that is shown without being opened."""
CLOUD, CLOUD_SIZES = 150, 7
MOST = 200
"""Rows of the smaller lists: datasets, buckets, unexplained keys."""
THUMBNAIL = re.compile(r"data:image/(png|jpeg|webp|gif|avif);base64,[A-Za-z0-9+/]+={0,2}")
LARGEST_THUMBNAIL = 500_000


class Row(NamedTuple):
    """A row of the module table."""

    id: str
    info: ModuleInfo
    spectrum: ModuleSpectrum | None
    bars: str


class Tile(NamedTuple):
    """A number or word that stands out, and what is to be said of it."""

    label: str
    value: str
    note: str = ""


class Meta(NamedTuple):
    """A metadata entry."""

    key: str
    type: str
    text: str
    left_out: int
    """Characters."""


def render(own: Description) -> str:
    """The page. What the description lacks (spectrum, tags) the page leaves out."""
    env = Environment(
        loader=PackageLoader("lorasurgery.inspection"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    env.filters |= {"num": number, "size": size, "shape": shape, "percent": percent}
    script = env.get_template("script.js").render()
    rows = _rows(own)
    return env.get_template("page.html.j2").render(
        own=own,
        name=Path(own.path).name or Path(own.path).resolve().name,
        version=__version__,
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        thumbnail=_thumbnail(own),
        tiles=_tiles(own),
        details=_details(own),
        facts=_facts(own.training),
        rows=rows,
        ids={row.info.name: row.id for row in rows},
        components=[] if own.spectrum is None else components(own.spectrum),
        kinds=[] if own.spectrum is None else kinds(own.spectrum),
        cloud=_cloud(own),
        metadata=_metadata(own.metadata),
        limits={"rows": MOST, "kinds": SHOWN_KINDS, "short": SHORT, "width": BARS * WIDTH, "height": HEIGHT, "bar": WIDTH},
    )


def number(value: float | None) -> str:
    """Three significant digits.

    >>> number(0.000123456), number(16.0), number(12345), number(None)
    ('1.23e-4', '16', '12,345', '')
    """
    if value is None:
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.3g}".replace("e-0", "e-")


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def shape(own: Iterable[int]) -> str:
    """``3072×3072``."""
    return "×".join(map(str, own))


def percent(share: float) -> str:
    """A share; what is not all is never called 100 %."""
    return f"{share:.0%}" if share in {0.0, 1.0} or 0.01 <= share < 0.995 else f"{min(share, 0.9999):.2%}"


def _rows(own: Description) -> list[Row]:
    """The modules in the order of their blocks."""
    spectra = {} if own.spectrum is None else {m.name: m for m in own.spectrum.modules}
    ordered = sorted(own.modules, key=lambda m: natural(m.name))
    found = ((info, spectra.get(info.name)) for info in ordered)
    return [Row(f"m{i}", info, m, "" if m is None else bars(m.singular_values)) for i, (info, m) in enumerate(found)]


def _tiles(own: Description) -> list[Tile]:
    """What a person looks for first."""
    tiles = []
    if own.architecture != "unknown":
        key = f"{own.architecture}-{own.variant}" if own.variant else own.architecture
        tiles.append(Tile("Model", own.architecture_name, f"{key}, explains {percent(own.coverage)} of the keys"))
    elif own.modules:
        nearest = ", ".join(f"{key} ({percent(share)})" for key, share in own.candidates[:2])
        tiles.append(Tile("Model", "unknown", f"nearest: {nearest}" if nearest else "no table explains the keys"))
    if own.modules:
        tiles.append(Tile("Layout", own.layout, "" if own.trainer is None else f"written by {own.trainer.name}"))
        tiles.append(Tile("Modules", f"{len(own.modules):,}", _counts(own.families)))
    if own.rank.histogram:
        notes = [f"{label} {_range(numbers)}" for label, numbers in (("alpha", own.alpha), ("scale", own.scale))
                 if numbers.histogram]  # fmt: skip
        tiles.append(Tile("Rank", _range(own.rank), ", ".join(notes)))
    tiles.append(Tile("Size", size(own.size), f"{own.tensors:,} tensors, {own.container}"))
    if own.parameters:
        tiles.append(Tile("Parameters", _short(own.parameters), ", ".join(own.dtype)))
    if isinstance(own.training.get("steps"), int):
        notes = [f"{own.training[key]} {key}" for key in ("epochs", "images") if isinstance(own.training.get(key), int)]
        tiles.append(Tile("Training steps", f"{own.training['steps']:,}", ", ".join(notes)))
    return tiles


def _range(numbers: Numbers) -> str:
    if numbers.min is None or numbers.max is None:
        return ""
    return number(numbers.min) if numbers.min == numbers.max else f"{number(numbers.min)} to {number(numbers.max)}"


def _short(count: int) -> str:
    """``19.3 M``."""
    for unit in ("", " k", " M"):
        if count < 1000 or unit == " M":
            return f"{count:.3g}{unit}" if count < 1000 else f"{count / 1000:.3g} G"
        count /= 1000  # type: ignore[assignment]
    raise AssertionError


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _details(own: Description) -> list[tuple[str, str]]:
    """The rest of the summary, only what is said."""
    factor = own.lokr_factor
    rows = [
        ("Components", _counts(own.components)),
        ("Fits as well", ", ".join(key for key, _ in own.candidates[1:]) if own.architecture != "unknown" else ""),
        ("Data types", ", ".join(f"{name}: {count:,} parameters" for name, count in own.dtype.items())),
        ("Scale comes from", ", ".join(f"{name} ({count}×)" for name, count in own.scale_sources.items())),
        ("Q, K and V", own.qkv or ""),
        ("DoRA magnitudes", ", ".join(f"{n} per {'output row' if axis == 'out' else 'input column'}"
                                      for axis, n in own.dora.items())),
        ("Convolutions", _counts(own.kernels) + (f"; {own.tucker} with a Tucker core" if own.tucker else "")),
        ("Embeddings", ", ".join(own.embeddings[:MOST])),
    ]  # fmt: skip
    if own.trainer is not None:
        rows.append(("Recognised by", ", ".join(dict.fromkeys(own.trainer.evidence))))
        rows.append(("Changed later by", ", ".join(own.trainer.processed_by)))
    if factor is not None:
        said = [f"{name} {value}" for name, value in (("buffer", factor.buffer), ("metadata", factor.metadata))
                if value is not None]  # fmt: skip
        verdict = {True: "; they agree", False: "; they disagree", None: ""}[factor.agree]
        implied = " or ".join(map(str, factor.implied)) or "nothing known"
        rows.append(("LoKr factor", f"{', '.join(said) or 'not said'}; shapes imply {implied}{verdict}"))
    return [(label, text) for label, text in rows if text]


def _facts(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The training in words; datasets and buckets have tables of their own."""
    return [
        (name.replace("_", " ").replace("seconds", "duration").capitalize().replace(" lr", " LR"), _said(name, value))
        for name, value in training.items()
        if name not in {"datasets", "buckets"}
    ]


def _said(name: str, value: Any) -> str:  # noqa: ANN401  any JSON
    if name == "seconds" and isinstance(value, int):
        hours, minutes = divmod(value // 60, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {value % 60} s"
    if isinstance(value, dict):
        value = ", ".join(f"{key}={own}" for key, own in value.items())
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHORT * 2 else f"{text[: SHORT * 2]}… ({len(text):,} characters)"


def _cloud(own: Description) -> list[tuple[str, int, int]]:
    """(tag, count, size from 0) of the most frequent training tags."""
    tags = [(tag, count) for tag, count in own.tags or () if tag and count > 0][:CLOUD]
    if not tags:
        return []
    low, high = log(tags[-1][1]), log(tags[0][1])
    span = (high - low) or 1.0
    return [(tag[:SHORT], count, ceil((log(count) - low) / span * (CLOUD_SIZES - 1))) for tag, count in tags]


def _thumbnail(own: Description) -> str:
    """``modelspec.thumbnail`` when it is a small picture in a data URL."""
    value = own.metadata.get("modelspec.thumbnail", {}).get("value")
    fits = isinstance(value, str) and len(value) <= LARGEST_THUMBNAIL and THUMBNAIL.fullmatch(value)
    return value if fits else ""


def _metadata(metadata: Mapping[str, Mapping[str, Any]]) -> list[Meta]:
    """The entries in alphabetical order, cut so that the page stays small."""
    found, left = [], ALL
    for key in sorted(metadata, key=str.lower):
        value = metadata[key]["value"]
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
        shown = text[: max(min(LONGEST, left - len(key)), 0)]
        left -= len(shown) + len(key)
        found.append(Meta(key[:SHORT], metadata[key]["type"], shown, len(text) - len(shown)))
        if left <= 0:
            break
    return found
