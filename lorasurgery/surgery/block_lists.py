"""Lists of block weights as the web UIs and sd-scripts take them: so many values stand for so many blocks.

Lengths and their order: sd-webui-lora-block-weight ``lora_block_weight.py`` (2026) and sd-scripts
``networks/svd_merge_lora.py`` (2026): 12 and 20 for SDXL, 17 for SD 1 (the blocks that have attention), 26 for every block
of a UNet, 61 for FLUX.1. Modules outside of all blocks keep their weight. For the blocks a list leaves out the two
programs differ: the extension takes 0, sd-scripts 1.
"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.errors import RequestError
from lorasurgery.surgery.blocks import Selection, is_unet, parse_selection, runs_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasurgery.architectures.table import Architecture

FLUX_IN, FLUX_OUT = r"re=^(img|txt|time|vector|guidance)_in", "re=^final_layer"


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
