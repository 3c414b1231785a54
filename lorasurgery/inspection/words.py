"""A description in words, for the page: numbers as people write them, what stands out, and the facts of the training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasurgery.inspection.description import Description, Numbers

SHORT = 160
"""Characters of a value that is shown without being opened."""
EMBEDDINGS = 50
"""Keys of learned tokens that are listed."""


class Tile(NamedTuple):
    """A number or word that stands out, and what is to be said of it."""

    label: str
    value: str
    note: str = ""


def number(value: float | None) -> str:
    """Three significant digits.

    >>> number(0.000123456), number(16.0), number(12345), number(None)
    ('1.23e-4', '16', '12,345', '')
    """
    if value is None:
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:.3g}"


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
    if share >= 0.995:
        return "100 %" if share > 1 - 1e-6 else f"{min(share, 0.9999) * 100:.2f} %"
    return f"{share * 100:.0f} %" if share == 0.0 or share >= 0.01 else f"{max(share * 100, 0.1):.1f} %"


def tiles(own: Description) -> list[Tile]:
    """What a person looks for first."""
    tiles = []
    if own.architecture != "unknown":
        key = f"{own.architecture}-{own.variant}" if own.variant else own.architecture
        tiles.append(
            Tile(
                "Model",
                own.architecture_name,
                f"{key}, explains {percent(own.coverage)} of the {'modules' if own.modules else 'weights'}",
            )
        )
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


def details(own: Description) -> list[tuple[str, str]]:
    """The rest of the summary, only what is said."""
    factor = own.lokr_factor
    rows = [
        ("Components", _counts(own.components)),
        ("Fits as well", ", ".join(key for key, _ in own.candidates[1:]) if own.architecture != "unknown" else ""),
        ("Evidence", "; ".join(own.evidence[1:])),
        ("Data types", ", ".join(f"{name}: {count:,} parameters" for name, count in own.dtype.items())),
        ("Scale comes from", ", ".join(f"{name} ({count}×)" for name, count in own.scale_sources.items())),
        ("Q, K and V", own.qkv or ""),
        ("DoRA magnitudes", ", ".join(f"{n} per {'output row' if axis == 'out' else 'input column'}"
                                      for axis, n in own.dora.items())),
        ("Convolutions", _counts(own.kernels) + (f"; {own.tucker} with a Tucker core" if own.tucker else "")),
        ("Embeddings", ", ".join(own.embeddings[:EMBEDDINGS])),
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


def facts(training: Mapping[str, Any]) -> list[tuple[str, str]]:
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
    if name in {"started", "date"} and isinstance(value, str):
        return value.replace("T", " ").replace("+00:00", " UTC")
    if isinstance(value, dict):
        value = ", ".join(f"{key}={own}" for key, own in value.items())
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHORT * 2 else f"{text[: SHORT * 2]}… ({len(text):,} characters)"
