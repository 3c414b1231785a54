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
from lorasurgery.inspection.words import SHORT, details, facts, number, percent, shape, size, tiles
from lorasurgery.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.inspection.description import Description, ModuleInfo
    from lorasurgery.inspection.spectrum import ModuleSpectrum

LONGEST, ALL = 4_000, 400_000
"""Characters of a metadata value that are shown, and of all of them together."""
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
    width: int
    """Of the bars."""


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
    page = env.get_template("page.html.j2").render(
        own=own,
        name=Path(own.path).name or Path(own.path).resolve().name,
        version=__version__,
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        thumbnail=_thumbnail(own),
        tiles=tiles(own),
        details=details(own),
        facts=facts(own.training),
        rows=rows,
        ids={row.info.name: row.id for row in rows},
        components=[] if own.spectrum is None else components(own.spectrum),
        kinds=[] if own.spectrum is None else kinds(own.spectrum),
        cloud=_cloud(own),
        metadata=_metadata(own.metadata),
        limits={"rows": MOST, "kinds": SHOWN_KINDS, "short": SHORT, "height": HEIGHT},
    )
    return page.encode("utf-8", "replace").decode()  # names and JSON may hold surrogates, which have no UTF-8 form


def _rows(own: Description) -> list[Row]:
    """The modules in the order of their blocks."""
    spectra = {} if own.spectrum is None else {m.name: m for m in own.spectrum.modules}
    ordered = sorted(own.modules, key=lambda m: natural(m.name))
    found = []
    for i, info in enumerate(ordered):
        own_spectrum = spectra.get(info.name)
        values = () if own_spectrum is None else own_spectrum.singular_values
        found.append(Row(f"m{i}", info, own_spectrum, bars(values), min(len(values), BARS) * WIDTH))
    return found


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
    if not isinstance(value, str) or len(value) > LARGEST_THUMBNAIL or not THUMBNAIL.fullmatch(value):
        return ""
    return value


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
