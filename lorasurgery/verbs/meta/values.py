"""What a metadata string means (its type, nested JSON unfolded), and strings for the keys that have an option."""

from __future__ import annotations

import base64
import json
import re
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from lorasurgery.errors import FileFormatError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SPEC, SPEC_VERSION = "modelspec.sai_model_spec", "1.0.1"
"""The version of the SAI Model Spec that sd-scripts writes. Source: https://github.com/Stability-AI/ModelSpec."""

MUST = ("modelspec.architecture", "modelspec.implementation", "modelspec.title")
"""What the specification demands beside its version."""

OPTION_KEYS = {
    "trigger": "modelspec.trigger_phrase",
    "title": "modelspec.title",
    "author": "modelspec.author",
    "license": "modelspec.license",
    "description": "modelspec.description",
    "tags": "modelspec.tags",
}
"""Options of ``meta set`` and the keys they write. Source: the specification; ``tags`` is sd-scripts' sai_model_spec.py."""

LARGE_THUMBNAIL = 200_000
"""Bytes from which a thumbnail is worth a remark: the specification wants it very small, 256x256."""

DEEPEST = 100
"""Levels of nested JSON that are unfolded."""

_IMAGES = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"), (b"GIF8", "image/gif"))
_TEXT_KEYS = re.compile(r".*(_name|_hash|_comment|_version|_module|_sha256)")
_INT, _FLOAT = re.compile(r"[+-]?\d{1,300}"), re.compile(r"[+-]?(\d+\.\d*|\.?\d+)(e[+-]?\d+)?", re.IGNORECASE)


class Value(NamedTuple):
    """A metadata value: ``kind`` is none, bool, int, float, json, image or text."""

    kind: str
    value: Any
    """What it means; of an image the text."""


def typed(key: str, text: str) -> Value:
    """What a metadata string says.

    Trainers write ``str(value)`` or JSON under ``ss_*``; names, hashes and comments are text even when they look like
    numbers, and so is everything in ``modelspec.*`` and ``sshs_*``. Under other keys only JSON objects and lists are
    unfolded. Source: ``ss_*`` as sd-scripts' train_network.py and musubi-tuner write them.
    """
    if text.startswith("data:image/"):
        return Value("image", text)
    if key.startswith(("modelspec.", "sshs_")):
        return Value("text", text)
    if text[:1] in ("{", "["):
        return _nested(text)
    if not key.startswith("ss_") or _TEXT_KEYS.fullmatch(key):
        return Value("text", text)
    return _scalar(text)


def _scalar(text: str) -> Value:
    if text in ("None", "null"):
        return Value("none", None)
    if text in ("True", "False"):
        return Value("bool", text == "True")
    if _INT.fullmatch(text):
        return Value("int", int(text))
    if _FLOAT.fullmatch(text) and isfinite(float(text)):
        return Value("float", float(text))
    return Value("text", text)


def _nested(text: str) -> Value:
    try:
        value = json.loads(text, parse_constant=str, parse_float=_finite)
        return Value("json", value) if _shallow(value, DEEPEST) else Value("text", text)
    except (ValueError, RecursionError):
        return Value("text", text)


def _shallow(value: object, levels: int) -> bool:
    """Whether nothing is nested deeper than ``levels``; what is deeper could not be printed again."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_shallow(one, levels - 1) for one in inner)


def _finite(text: str) -> float | str:
    """A JSON number; one too large for a float stays text, because JSON has no infinity."""
    number = float(text)
    return number if isfinite(number) else text


def assignments(pairs: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` arguments; raises RequestError for one without a key or with bytes that are no text."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise RequestError(f"{pair} is no KEY=VALUE", hint="KEY=VALUE, in quotes where the value has spaces")
        found[key] = value
    try:
        "".join((*found, *found.values())).encode()
    except UnicodeEncodeError as error:
        raise RequestError("a key or value is not valid text", hint="UTF-8") from error
    return found


def base_model(name: str) -> dict[str, str]:
    """The keys that name the base model, for an architecture's name (``flux1``, ``flux1-schnell``, ``sdxl``).

    Raises RequestError for any other name. The spellings are the trainers' own, kept in the architecture tables.
    """
    from lorasurgery.architectures import named

    try:
        arch = named(name)[0]
    except RequestError as error:
        hint = f"{error.hint}; the name of one checkpoint goes into ss_sd_model_name=NAME"
        raise RequestError(error.message, hint=hint) from error
    names = arch.metadata_names
    if not names:
        return {"modelspec.architecture": f"{arch.id}/lora"}
    spelt = [n for n in names[1:] if "_" not in n] or [names[0]]
    own = [n for n in spelt if name == arch.key and arch.variant and n.endswith(arch.variant)]
    return {"ss_base_model_version": names[0], "modelspec.architecture": f"{(own or spelt)[0]}/lora"}


def thumbnail(path: Path) -> str:
    """A picture as a data URL; raises FileFormatError unless it is JPEG, PNG, GIF or WebP."""
    data = path.read_bytes()
    kind = next((kind for start, kind in _IMAGES if data.startswith(start)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "image/webp"
    if kind is None:
        raise FileFormatError("this is no JPEG, PNG, GIF or WebP picture", path=path, hint="a small JPEG, 256x256")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def spec_notes(metadata: Mapping[str, str]) -> list[str]:
    """What the specification would still like to see, for a file that claims to follow it."""
    notes = []
    missing = [key for key in MUST if key not in metadata]
    if SPEC in metadata and missing:
        notes.append(f"the SAI Model Spec also demands {', '.join(missing)}")
    size = len(metadata.get("modelspec.thumbnail", ""))
    if size > LARGE_THUMBNAIL:
        notes.append(f"the thumbnail takes {size:,} bytes of the header; 256x256 JPEG is what the specification recommends")
    return notes
