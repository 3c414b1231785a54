"""Which block of a model a module belongs to, and sets of modules named by component, block or regular expression.

A selection is data: it is read from a few words (``te1``, ``unet``, ``in=4-8``, ``mid``, ``double=0-18``, ``single=3,7-9``,
``re=attn``) and looked up in an architecture's own table, so that a name the model does not have is an error and no guess.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.architectures.table import NAMINGS, ORIGINAL
from lorasurgery.errors import RequestError
from lorasurgery.site import DENOISER, SECOND_DENOISER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture

_BLOCK = re.compile(r"^(.*?\d+)[._](.*)$")
_NUMBERED = re.compile(r"^(.+?)\.(\d+)(?:\.|$)")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_LISTED = re.compile(r"(in|out|m|d|s)(\d\d\d?)", re.IGNORECASE)

REGEX = "re"
ENCODERS = ("te", "base")
"""Every text encoder; ``base`` is what block weight lists call them."""
DENOISERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("unet", "transformer", "denoiser", "dit", "model"), (DENOISER, SECOND_DENOISER)),
        "transformer_1": (DENOISER,), "transformer_2": (SECOND_DENOISER,),
    }
)  # fmt: skip
_UNET = MappingProxyType({"in": "input_blocks", "mid": "middle_block", "out": "output_blocks"})
_SHORT = MappingProxyType({"in": "in", "out": "out", "m": "mid", "d": "double", "s": "single"})
EXAMPLES = "te1, unet, in=4-8, mid, double=0-18, single=3,7-9, or re=REGEX"


def block_and_kind(name: str) -> tuple[str, str]:
    """A weight's name cut after its first number.

    >>> block_and_kind("double_blocks.3.img_attn.qkv"), block_and_kind("img_in")
    (('double_blocks.3', 'img_attn.qkv'), ('', 'img_in'))
    """
    match = _BLOCK.match(name)
    return (match[1], match[2]) if match else ("", name)


@dataclass(frozen=True, slots=True)
class Selection:
    """A set of modules as somebody named it; :func:`chooser` looks it up in an architecture."""

    text: str
    """As it was written, for messages."""
    name: str
    """A component or a run of blocks, in lower case; ``re`` for an expression."""
    ranges: tuple[tuple[int, int], ...] = ()
    """Blocks (first, last), both included; empty: all of them."""
    pattern: str = ""
    """Of ``re``."""

    def __str__(self) -> str:
        return self.text


def parse_selection(text: str) -> Selection:
    """A component, a run of blocks with or without indices, a block of a weight list (``IN04``) or ``re=REGEX``.

    >>> parse_selection("single=3,7-9").ranges
    ((3, 3), (7, 9))

    Raises RequestError for anything else; whether the model has it is decided by :func:`chooser`.
    """
    name, equals, rest = text.strip().partition("=")
    if name == REGEX and equals:
        return Selection(text, REGEX, pattern=_expression(rest))
    listed = _LISTED.fullmatch(name)
    if listed and not equals:
        short, index = _SHORT[listed[1].lower()], int(listed[2])
        return Selection(text, short, () if short == "mid" else ((index, index),))
    if not _NAME.fullmatch(name) or (equals and not rest):
        raise RequestError(f"{text!r} names no modules", hint=EXAMPLES)
    return Selection(text, name.lower(), tuple(_ranges(rest, text)) if equals else ())


def _expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise RequestError(f"{pattern!r} is no regular expression ({error})") from error
    return pattern


def _ranges(text: str, whole: str) -> Iterator[tuple[int, int]]:
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise RequestError(f"{whole!r}: {part!r} is no block or range of blocks", hint=EXAMPLES)
        yield first, last


def chooser(selections: Sequence[Selection], arch: Architecture) -> Callable[[Module], int | None]:
    """A function that gives the index of the last selection that has a module, None where none has it.

    Raises RequestError for a component, a run of blocks or an index that the architecture does not have.
    """
    tests = [_test(selection, arch) for selection in selections]

    def choose(module: Module) -> int | None:
        return next((i for i in reversed(range(len(tests))) if tests[i](module)), None)

    return choose


def member(selection: Selection, arch: Architecture) -> Callable[[Module], bool]:
    """Whether a module belongs to one selection; raises as :func:`chooser`."""
    return _test(selection, arch)


def _test(selection: Selection, arch: Architecture) -> Callable[[Module], bool]:
    if selection.name == REGEX:
        search = re.compile(selection.pattern).search
        return lambda module: bool(search(module.name) or search(module.site.spans[0].weight))
    components = _components(selection.name, arch)
    if components is not None:
        if selection.ranges:
            raise RequestError(f"{selection.text!r}: {selection.name} has no numbered blocks", hint=offered(arch))
        return lambda module: module.site.component in components
    weights = _weights(selection, arch)
    return lambda module: module.site.component in (DENOISER, SECOND_DENOISER) and module.site.spans[0].weight in weights


def _components(name: str, arch: Architecture) -> frozenset[str] | None:
    """The components that a name means, None for a name of something else."""
    if name in DENOISERS:
        return frozenset(DENOISERS[name])
    beyond = {own.component for own in arch.own} - {DENOISER, SECOND_DENOISER}
    if name in ENCODERS:
        return frozenset({*beyond, *(encoder.table for encoder in arch.encoders)})
    if name in beyond:
        return frozenset((name,))
    for i, own in enumerate(arch.encoders):
        named = {own.table, own.diffusers, own.sd_scripts.removeprefix("lora_")}
        if len(arch.encoders) == 1:
            named.add(f"te{i + 1}")
        if name in named:
            return frozenset((own.table,))
    return None


def blocks_named(name: str, arch: Architecture) -> Sequence[Selection]:
    """Every block of a run in order, each as a selection; raises RequestError for a name without numbered blocks."""
    whole = Selection(name, name.lower())
    if _components(whole.name, arch) is not None:
        raise RequestError(f"{name!r}: {whole.name} has no numbered blocks", hint=offered(arch))
    return [Selection(f"{name}={i}", whole.name, ((i, i),)) for i in _run(whole, arch)]


def _weights(selection: Selection, arch: Architecture) -> frozenset[str]:
    """The original weights in the selected blocks."""
    blocks = _run(selection, arch)
    if not selection.ranges:
        return frozenset().union(*blocks.values())
    chosen: set[str] = set()
    for first, last in selection.ranges:
        missing = [i for i in (first, last) if i not in blocks]
        if missing:
            raise RequestError(
                f"{selection.text!r}: {arch.name} has no block {missing[0]} there", hint=f"{min(blocks)} to {max(blocks)}"
            )
        chosen.update(*(own for i, own in blocks.items() if first <= i <= last))
    return frozenset(chosen)


def _run(selection: Selection, arch: Architecture) -> Mapping[int, frozenset[str]]:
    """The blocks of a name: exactly it, or the only run that begins with it (``double`` of ``double_blocks``)."""
    runs = runs_of(arch)
    if selection.name in runs:
        return runs[selection.name]
    own = {name for name in runs if name.startswith(f"{selection.name}_")}
    original = own & set(runs_of(arch, originals=True))
    found = original or own
    if len(found) != 1:
        what = f"more than one run of blocks ({', '.join(sorted(found))})" if found else "no component or blocks"
        raise RequestError(f"{selection.text!r}: {arch.name} has {what} of that name", hint=offered(arch))
    return runs[found.pop()]


@cache
def runs_of(arch: Architecture, *, originals: bool = False) -> Mapping[str, Mapping[int, frozenset[str]]]:
    """Every run of numbered blocks by its name in any naming (``originals``: the original only), its weights by index.

    A UNet has ``in``, ``mid`` (one block) and ``out`` besides.
    """
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for naming in (ORIGINAL,) if originals else NAMINGS:
        for name, spans in arch.namings[naming].items():
            match = _NUMBERED.match(name)
            if match:
                found[match[1]][int(match[2])].add(spans[0].weight)
    if is_unet(arch):
        found |= {short: found[name] for short, name in _UNET.items()}
        found["mid"] = defaultdict(set, {0: set().union(*found["middle_block"].values())})
    return MappingProxyType({name: {i: frozenset(w) for i, w in sorted(own.items())} for name, own in found.items()})


def is_unet(arch: Architecture) -> bool:
    """Whether the model is one of Stable Diffusion's UNets, with blocks in, mid and out."""
    return any(name.startswith("middle_block.") for name in arch.shapes)


def offered(arch: Architecture) -> str:
    """What can be selected of an architecture, for hints."""
    encoders = [own.sd_scripts.removeprefix("lora_") for own in arch.encoders]
    names = list(_UNET) if is_unet(arch) else [n for n, b in runs_of(arch, originals=True).items() if len(b) > 1]
    runs = runs_of(arch)
    blocks = [f"{name}={min(runs[name])}-{max(runs[name])}" if len(runs[name]) > 1 else name for name in names]
    return ", ".join([*encoders, arch.denoiser, *blocks, "re=REGEX"])
