"""Lists of block weights and of ranks as the web UIs and sd-scripts take them: so many values stand for so many blocks.

Weights, lengths and their order: sd-webui-lora-block-weight ``lora_block_weight.py`` (2026) and sd-scripts
``networks/svd_merge_lora.py`` (2026): 12 and 20 for SDXL, 17 for SD 1 (the blocks that have attention), 26 for every block
of a UNet, 61 for FLUX.1. Modules outside of all blocks keep their weight. For the blocks a list leaves out the two
programs differ: the extension takes 0, sd-scripts 1.

Ranks: these lists, and that of the trainer (``block_dims``, sd-scripts ``networks/lora.py`` ``get_block_index``, 2026): 25
values for SD 1 and 2 (12 down, middle, 12 up), 23 for SDXL (embeddings, 9 in, 3 middle, 9 out, last layer).
"""

from __future__ import annotations

import re
from itertools import groupby
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.errors import RequestError
from lorasurgery.operations.select.blocks import Selection, blocks_named, is_unet, parse_selection, runs_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lorasurgery.architectures.table import Architecture

FLUX_IN, FLUX_OUT = r"re=^(img|txt|time|vector|guidance)_in", "re=^final_layer"
EMBEDDINGS, LAST = r"re=^(time_embed|label_emb)\.", r"re=^out\."
WHOLE = ("blocks", "block_dims", "conv_block_dims")
"""Names of a list for all blocks of a model; the last two are sd-scripts' own."""


def _unet(ins: Iterable[int], outs: Iterable[int]) -> tuple[str, ...]:
    return ("BASE", *(f"IN{i:02}" for i in ins), "M00", *(f"OUT{i:02}" for i in outs))


LISTS: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        12: _unet((4, 5, 7, 8), range(6)),
        17: _unet((1, 2, 4, 5, 7, 8), range(3, 12)),
        20: _unet(range(9), range(9)),
        26: _unet(range(12), range(12)),
        61: ("clip_l", "t5_xxl", FLUX_IN, *(f"D{i:02}" for i in range(19)), *(f"S{i:02}" for i in range(38)), FLUX_OUT),
    }
)
"""Number of values -> the selections they are for, in order."""
_MIDDLE = tuple(f"middle_block={i}" for i in range(3))
TRAINED: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        12: _unet(range(12), range(12))[1:],
        9: (EMBEDDINGS, *_unet(range(9), ())[1:-1], *_MIDDLE, *(f"OUT{i:02}" for i in range(9)), LAST),
    }
)
"""Number of a UNet's input blocks -> the selections of sd-scripts' ``block_dims``, 25 or 23, in order."""
WORDS: Mapping[str, str] = MappingProxyType(
    {FLUX_IN: "img_in to guidance_in", FLUX_OUT: "final_layer", EMBEDDINGS: "time_embed and label_emb", LAST: "out"}
)
"""Expressions in the lists, for people."""
_COUNTED = re.compile(r"(.*?)(\d+)")
RANDOM = ("R", "U", "X")
"""First letters of values that the extension draws or inherits."""


def listed(text: str, arch: Architecture, *, others: float) -> list[tuple[Selection, float]]:
    """(selection, factor) of a list such as ``1,0,0.5,...``; ``others`` is for the blocks that it leaves out.

    Blocks that the model does not have are passed over. Raises RequestError for a list of another length, for another
    kind of model, and for values that are no numbers.
    """
    values = [_value(part.strip(), text) for part in text.split(",")]
    names = LISTS.get(len(values))
    unet = is_unet(arch)
    if names is None or unet != (len(values) != 61) or (not unet and arch.id != "flux1"):
        lengths = "12, 17, 20 or 26" if unet else "61" if arch.id == "flux1" else ""
        raise RequestError(
            f"a list of {len(values)} block weights does not fit {arch.name}",
            hint=f"{lengths} values" if lengths else "ranges of blocks such as blocks=0-9:0.5",
        )
    found = [(Selection(name, name), others) for name in ("in", "mid", "out")] if unet else []
    runs = runs_of(arch)
    for name, value in zip(names, values, strict=True):
        selection = parse_selection(name)
        if not unet or all(first in runs[selection.name] for first, _ in selection.ranges):
            found.append((selection, value))
    return found


def _value(text: str, whole: str) -> float:
    if text[:1].upper() in RANDOM:
        raise RequestError(f"{whole!r}: {text} stands for a number that is drawn for every picture", hint="a number")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise RequestError(f"{whole!r}: {text!r} is no number")
    return value


def read_presets(path: str | Path) -> Mapping[str, str]:
    """The lists of a presets file of the extension by name: a line ``NAME:1,0,...`` each, others are comments.

    Raises RequestError for a file without any, OSError for one that cannot be read.
    """
    found = {}
    for line in Path(path).read_text("utf-8", errors="replace").splitlines():
        name, colon, values = line.strip().partition(":")
        if colon and values.count(",") + 1 in LISTS and not name.startswith("#"):
            found[name.strip()] = values.strip()
    if not found:
        raise RequestError("it has no lines such as NAME:1,0,0.5,...", path=path)
    return found


def places(name: str, count: int, arch: Architecture) -> Sequence[Selection | None]:
    """What each of ``count`` ranks in a list is for; None for a block that the model does not have.

    ``name``: one of :data:`WHOLE` for all blocks of a UNet or of FLUX.1, or a run of blocks of the model (``double``,
    ``layers``), which takes one value for each of them. Raises RequestError for a list of another length.
    """
    if name.lower() in WHOLE and name.lower() not in runs_of(arch):
        fitting = rank_lists(arch)
        if count not in fitting:
            raise RequestError(f"a list of {count} ranks does not fit {arch.name}", hint=_accepted(arch, fitting))
        return [_there(parse_selection(text), arch) for text in fitting[count]]
    own = blocks_named(name, arch)
    if len(own) != count:
        raise RequestError(
            f"{name!r} of {arch.name} has {len(own)} blocks, the list has {count} ranks",
            hint=f"{len(own)} values, one for each block, or ranges such as {name}=0-{len(own) - 1}=16",
        )
    return own


def rank_lists(arch: Architecture) -> Mapping[int, tuple[str, ...]]:
    """Number of values -> the selections they are for, of all lists of a model's blocks; the trainer's own is the first."""
    if not is_unet(arch):
        return {61: LISTS[61]} if arch.id == "flux1" else {}
    own = trained_list(arch)
    return {**({len(own): own} if own else {}), **{n: names for n, names in LISTS.items() if n != 61}}


def trained_list(arch: Architecture) -> tuple[str, ...]:
    """The selections that sd-scripts' ``block_dims`` has values for, in order; none for what is none of its UNets."""
    return TRAINED.get(len(runs_of(arch)["in"]), ()) if is_unet(arch) else ()


def _there(selection: Selection, arch: Architecture) -> Selection | None:
    """The selection, unless it is a block that a UNet does not have."""
    blocks = runs_of(arch).get(selection.name)
    return selection if blocks is None or all(first in blocks for first, _ in selection.ranges) else None


def _accepted(arch: Architecture, fitting: Mapping[int, tuple[str, ...]]) -> str:
    """The lengths and what they stand for; where a model has no list, its runs of blocks."""
    if fitting:
        own = " (sd-scripts' block_dims)" if is_unet(arch) else ""
        first, *others = (f"{count} values{{}}: {described(names)}" for count, names in fitting.items())
        return "; ".join([first.format(own), *(text.format("") for text in others)])
    runs = {n: len(own) for n, own in runs_of(arch, originals=True).items() if _is_run(n, own)}
    return "a list for one run of blocks: " + ", ".join(f"{name}=N,N,... ({count} values)" for name, count in runs.items())


def _is_run(name: str, blocks: Mapping[int, frozenset[str]]) -> bool:
    """Whether numbered names are blocks, and no layers of a sequence (``time_embed.0``)."""
    return len(blocks) > 1 and not any(f"{name}.{i}" in own for i, own in blocks.items())


def described(names: Sequence[str]) -> str:
    """``BASE, IN04-IN05, M00, OUT00-OUT05``."""
    return ", ".join(_runs_together(names))


def _runs_together(names: Sequence[str]) -> Iterator[str]:
    def run(place: tuple[int, str]) -> tuple[str, int]:
        found = _COUNTED.fullmatch(place[1])
        return (found[1], int(found[2]) - place[0]) if found else (place[1], 0)

    for _, group in groupby(enumerate(names), run):
        own = [WORDS.get(name, name) for _, name in group]
        yield own[0] if len(own) == 1 else f"{own[0]}-{own[-1].removeprefix('middle_block=')}"
