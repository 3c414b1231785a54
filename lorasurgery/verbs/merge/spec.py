"""The words for a file and its weights: ``FILE[:w][:te=0.5][:double=0-18:0.5]...`` and the web UIs' ``<lora:name:0.8>``.

Sources of the tags: AUTOMATIC1111 ``extensions-builtin/Lora/extra_networks_lora.py``, SD.Next
``modules/lora/extra_networks_lora.py`` and sd-webui-lora-block-weight (2026). In all three ``te=`` without ``unet=`` or a
second number is for both, and that is kept for tags; in our own form a name stands for itself.
"""

from __future__ import annotations

import re
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.errors import RequestError
from lorasurgery.io.sniff import TORCH_SUFFIXES
from lorasurgery.operations.select.block_lists import LISTS
from lorasurgery.operations.select.blocks import REGEX, parse_selection
from lorasurgery.verbs.merge.weights import Weight

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lorasurgery.operations.select.blocks import Selection

SUFFIXES = (".safetensors", *sorted(TORCH_SUFFIXES))
TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>")
LISTED = ("lbw", "w")
STEPS = ("start", "stop", "step")
FORMS = "FILE:0.7, FILE:0.7:te=0.5:unet=1, FILE:1:double=0-18:0.5, FILE:1:re=attn:0.5, FILE:1:lbw=NAME"
TAGS = "<lora:name:0.8>, <lora:name:0.5:1> (text encoders, model), <lora:name:te=0.5:unet=1:in=0:mid=1:out=0.5:lbw=NAME>"
_NO_PRESETS: Mapping[str, str] = MappingProxyType({})


class Wanted(NamedTuple):
    """A file and its weights."""

    path: Path
    weight: Weight


def parse_source(text: str, lora_dir: Path | None = None, presets: Mapping[str, str] = _NO_PRESETS) -> list[Wanted]:
    r"""The file and weights of one argument, or the files of a prompt's tags, which are looked up by name in ``lora_dir``.

    A path may hold colons (``C:\x.safetensors:0.5``): the longest beginning that exists is the file. Raises RequestError
    for words that cannot be read, for weights that change with the step, and for names that are not in the folder.
    """
    if TAG.search(text):
        rest = TAG.sub("", text).strip(" ,")
        if rest:
            raise RequestError(f"{rest!r} stands beside the tags", hint="one argument for each file, or tags alone")
        return [_tag(found[1], lora_dir, presets) for found in TAG.finditer(text)]
    if text.strip().startswith("<"):
        raise RequestError(f"{text!r} is no tag of a LoRA", hint=TAGS)
    path, words = _split_path(text)
    try:
        return [Wanted(path, parse_weight(words, presets))]
    except RequestError as error:
        error.path = str(path)
        raise


def _split_path(text: str) -> tuple[Path, list[str]]:
    parts = text.split(":")
    begins = [":".join(parts[:i]) for i in range(len(parts), 0, -1)]
    drive = 1 if len(parts) > 1 and re.fullmatch("[A-Za-z]", parts[0]) else 0
    plausible = [b for b in begins if b and b.count(":") >= drive] or begins
    there = next((b for b in plausible if Path(b).exists()), None)
    named = next((b for b in plausible if b.lower().endswith(SUFFIXES)), None)
    path = there or named or plausible[-1]
    return Path(path), parts[path.count(":") + 1 :]


def parse_weight(words: Sequence[str], presets: Mapping[str, str] = _NO_PRESETS) -> Weight:
    """The weights behind a file's colons; raises RequestError for what is none."""
    text, left = ":".join(words), _rejoined(words)
    value, blocks, dyn = 1.0, None, None
    rules: list[tuple[Selection, float]] = []
    if left and number(left[0]) is not None:
        value = _number(left.pop(0), text)
    while left:
        word = left.pop(0)
        name, _, rest = word.partition("=")
        _refuse_steps(name, word)
        if name in LISTED and rest:
            blocks = presets.get(rest, rest)
            _refuse_unknown_preset(rest, presets)
        elif name == "dyn":
            dyn = _count(rest, word)
        elif left and number(left[0]) is not None:
            rules.append((parse_selection(word), _number(left.pop(0), text)))
        else:
            selection, equals, last = word.rpartition("=")
            if not equals or number(last) is None:
                raise RequestError(f"{word!r} is no weight", hint=FORMS)
            rules.append((parse_selection(selection), _number(last, text)))
    return Weight(value, tuple(rules), blocks, dyn=dyn, text=text)


def _rejoined(words: Sequence[str]) -> list[str]:
    """An expression may hold colons of its own, as in ``(?:a|b)``: it ends where it is one."""
    found: list[str] = []
    for word in words:
        if found and found[-1].startswith(f"{REGEX}=") and not _compiles(found[-1][len(REGEX) + 1 :]):
            found[-1] += f":{word}"
        else:
            found.append(word)
    return found


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def number(text: str) -> float | None:
    """A finite number, None for other words."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None


def _number(text: str, whole: str, forms: str = FORMS) -> float:
    value = number(text)
    if value is None:
        raise RequestError(f"{whole!r}: {text!r} is no weight", hint=forms)
    return value


def _count(text: str, word: str) -> int:
    if not (text.isdigit() and int(text)):
        raise RequestError(f"{word!r}: dyn is a number of ranks from 1 up")
    return int(text)


def _refuse_steps(name: str, word: str) -> None:
    if "@" in word or name in STEPS:
        raise RequestError(
            f"{word!r} changes with the sampling step, and a file has one weight for all of them",
            hint="one number; for several, merge one file for each part of the sampling",
        )


def _refuse_unknown_preset(name: str, presets: Mapping[str, str]) -> None:
    if name not in presets and name.count(",") + 1 not in LISTS:
        known = f"one of {', '.join(presets)}" if presets else "--presets FILE, whose lines are NAME:1,0,0.5,..."
        raise RequestError(f"{name!r} is neither a list of block weights nor a known name of one", hint=known)


def _tag(text: str, lora_dir: Path | None, presets: Mapping[str, str]) -> Wanted:
    """``name:te:unet:dyn`` by place, ``te=``, ``unet=``, ``in=``, ``mid=``, ``out=``, ``dyn=`` and ``lbw=`` by name."""
    whole = f"<lora:{text}>"
    places = [part for part in text.split(":") if "=" not in part]
    names = dict(part.split("=", 1) for part in text.split(":") if "=" in part)
    if not places or not places[0].strip() or len(places) > 4:
        raise RequestError(f"{whole} names no file and weights", hint=TAGS)
    for name, value in names.items():
        _refuse_steps(name, f"{name}={value}")
    strange = [name for name in names if name not in ("te", "unet", "in", "mid", "out", "dyn", *LISTED)]
    if strange:
        raise RequestError(f"{whole}: {strange[0]}= is not known", hint="te=, unet=, in=, mid=, out=, lbw= or dyn=")
    blocks = _tag_list(names, places, presets)
    for place in places[1:]:
        _refuse_steps("", place)
    te = _number(names.get("te", places[1] if len(places) > 1 else "1"), whole, TAGS)
    unet = _number(names.get("unet", places[2] if len(places) > 2 else str(te)), whole, TAGS)
    dyn = names.get("dyn", places[3] if len(places) > 3 else None)
    rules = [(parse_selection("te"), te)] if te != unet else []
    rules += [(parse_selection(name), _number(names[name], whole, TAGS)) for name in ("in", "mid", "out") if name in names]
    count = None if dyn is None else _count(dyn, f"dyn={dyn}")
    weight = Weight(unet, tuple(rules), blocks, others=0.0, dyn=count, text=":".join(text.split(":")[1:]))
    return Wanted(_in_folder(places[0].strip(), lora_dir), weight)


def _tag_list(names: Mapping[str, str], places: list[str], presets: Mapping[str, str]) -> str | None:
    """The block weights of a tag; by place, as the extension also takes them, they are a known name or a whole list."""
    found = next((names[name] for name in LISTED if name in names), None)
    by_place = next((p for p in places[2:] if p in presets or p.count(",") + 1 in LISTS), None)
    if found is None and by_place is not None:
        places.remove(by_place)
        found = by_place
    if found is not None:
        _refuse_unknown_preset(found, presets)
    return None if found is None else presets.get(found, found)


def _in_folder(name: str, lora_dir: Path | None) -> Path:
    """The file of that name in the folder or below it; raises RequestError when there is none, or more than one."""
    if lora_dir is None:
        raise RequestError(f"<lora:{name}> is a name, not a path", hint="--lora-dir FOLDER, where the web UI has its LoRAs")
    everything = sorted(p for p in lora_dir.rglob("*") if p.suffix.lower() in SUFFIXES)
    wanted = {name, *(name + suffix for suffix in SUFFIXES)}
    found = [p for p in everything if p.stem == name or p.relative_to(lora_dir).as_posix() in wanted]
    if len(found) != 1:
        raise RequestError(
            f"{'more than one file' if found else 'no file'} called {name} in {lora_dir}", hint=_names(found or everything)
        )
    return found[0]


def _names(paths: Iterable[Path]) -> str:
    shown = [str(path) for path in paths]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "") or "another --lora-dir"
