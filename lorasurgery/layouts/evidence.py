"""Which of several tables that explain a file equally well it is for, and why: the evidence, in the order it counts.

1. What the metadata calls the model. 2. Whole stacks: the file's last block is the last of each stack it touches.
3. The spelling: a trainer's own for one of the models. 4. How common a model is, and whether the file touches all of its
stacks. The first three decide; the last only says which is likelier.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures import architectures, plugins
from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, SD_SCRIPTS
from lorasurgery.layouts.names import index, prefixed
from lorasurgery.layouts.sd_scripts_oft import MODELS, PREFIX
from lorasurgery.layouts.stacks import DEEP, parts_of
from lorasurgery.nearest import bare

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from lorasurgery.architectures.table import Architecture

OWN_KEY = "lorasurgery.architecture"
SPARED = 0.1
"""How often a training leaves out all of one deep stack of blocks that the model has."""


class Decision(NamedTuple):
    """The tables left, the likeliest first, and the sentences that say why."""

    left: list[Architecture]
    evidence: tuple[str, ...]


def said(metadata: Mapping[str, str]) -> dict[str, str]:
    """What trainers' metadata calls the base model, letters and digits alone -> the key that says it and its value."""
    found: dict[str, str] = {}
    for key in ("ss_base_model_version", "modelspec.architecture"):
        value = metadata.get(key, "").split("/")[0]
        if value:
            found.setdefault(bare(value), f"{key} is {value}")
    return found


def names(arch: Architecture, called: Mapping[str, str]) -> str:
    """What of :func:`said` means this model; "" when nothing does."""
    return next((called[own] for own in _known_as(arch) if own in called), "")


def of_no_table(metadata: Mapping[str, str], arch: Architecture) -> list[str]:
    """What to say of a file that was taken for ``arch`` where all that its metadata calls the model is no name of any table."""
    called = said(metadata)
    if not called or any(names(own, called) for own in _every()):
        return []
    return [f"{next(iter(called.values()))}, which names no model known here; the keys are those of {arch.name}"]


def means(arch: Architecture, value: str) -> bool:
    """Whether ``value``, of one of the keys of :func:`said`, is a name of this model."""
    return bare(value.split("/", maxsplit=1)[0]) in _known_as(arch)


def _every() -> Iterable[Architecture]:
    return (*architectures().values(), *plugins())


@cache
def _known_as(arch: Architecture) -> tuple[str, ...]:
    return tuple(dict.fromkeys(bare(name) for name in (*arch.metadata_names, arch.key)))


def decide(ties: Sequence[Architecture], stems: Collection[str], metadata: Mapping[str, str]) -> Decision:
    """The tables of ``ties`` that the evidence leaves, the likeliest first."""
    told, why = _by_metadata(ties, metadata)
    left, evidence = told or list(ties), [why] if told else []
    for clue in (_by_whole_stacks, _by_spelling, _by_earlier_result):
        if len(left) > 1:
            better, why = clue(left, stems, metadata)
            if better and len(better) < len(left):
                left, evidence = better, [*evidence, why]
    if len({arch.id for arch in left}) < 2:
        return Decision(sorted(left, key=lambda arch: -arch.usage), tuple(evidence))
    expected = {arch: arch.usage * SPARED ** len(_untouched(arch, stems)) for arch in left}
    left.sort(key=lambda arch: -expected[arch])
    return Decision(left, (*evidence, _likelier(left, stems)))


Clue = tuple[list["Architecture"], str]


def _by_metadata(left: Sequence[Architecture], metadata: Mapping[str, str]) -> Clue:
    called = said(metadata)
    found = [arch for arch in left if names(arch, called)]
    return found, f"{names(found[0], called)}, which means {found[0].name}" if found else ""


def _by_whole_stacks(left: Sequence[Architecture], stems: Collection[str], _: Mapping[str, str]) -> Clue:
    ends = {arch: _ends(arch, stems) for arch in left}
    found = [arch for arch in left if ends[arch] and all(last == end for last, end in ends[arch].values())]
    if not found:
        return [], ""
    blocks = " and ".join(f"{stack}.{last}" for stack, (last, _) in ends[found[0]].items())
    return found, f"its last blocks, {blocks}, are the last that {found[0].name} has"


def _ends(arch: Architecture, stems: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Stack of blocks -> (the file's last block, the last that has such modules)."""
    place = index(arch).find
    touched = {span.weight for stem in stems if (own := place(stem)) is not None for span in own.site.spans}
    every = _last_blocks(arch)
    found: dict[str, tuple[int, int]] = {}
    for weight in touched:
        numbered = _numbered(weight)
        if numbered is not None and weight in arch.shapes:
            stack, block, kind = numbered
            last, end = found.get(stack, (0, 0))
            found[stack] = max(last, block), max(end, every[stack, kind])
    return found


@cache
def _last_blocks(arch: Architecture) -> Mapping[tuple[str, str], int]:
    """(stack, name within a block) -> the last block that has it."""
    found: dict[tuple[str, str], int] = {}
    for weight in arch.shapes:
        numbered = _numbered(weight)
        if numbered is not None:
            stack, block, kind = numbered
            found[stack, kind] = max(found.get((stack, kind), 0), block)
    return found


def _numbered(weight: str) -> tuple[str, int, str] | None:
    """``double_blocks.3.img_mlp.0`` -> its stack, its block and its name within it."""
    parts = weight.split(".", 2)
    return (parts[0], int(parts[1]), parts[2]) if len(parts) > 2 and parts[1].isdigit() else None


def _by_spelling(left: Sequence[Architecture], stems: Collection[str], _: Mapping[str, str]) -> Clue:
    found = [arch for arch in left if all(_is_trained_as(arch, stem) for stem in stems)]
    return found, f"its keys are spelled as the trainers of {found[0].name} write them" if found else ""


def _is_trained_as(arch: Architecture, stem: str) -> bool:
    """Whether a program that trains or runs this model calls the module so; True where the name tells nothing."""
    found = index(arch).find(stem)
    if found is None:
        return True
    prefix = prefixed(stem)[0][0].text
    test = _PREFIXES.get(prefix)
    return test is None or test(arch, found.naming)


_PREFIXES: Mapping[str, Callable[[Architecture, str], bool]] = {
    "lora_unet_": lambda arch, naming: naming in (SD_SCRIPTS, arch.sd_scripts),
    PREFIX: lambda arch, naming: naming in (SD_SCRIPTS, arch.sd_scripts) and arch.id in MODELS,
    "lora_transformer_": lambda arch, naming: naming == DIFFUSERS and arch.onetrainer == "flat",
    "diffusion_model.": lambda arch, naming: naming == ORIGINAL and arch.has_comfyui,
}
"""Prefix -> whether sd-scripts and musubi-tuner, OneTrainer, or ComfyUI have the module of that model under that naming."""


def _by_earlier_result(left: Sequence[Architecture], _: Collection[str], metadata: Mapping[str, str]) -> Clue:
    """What an earlier run of this program wrote: it may have been told, or have guessed."""
    key = metadata.get(OWN_KEY, "")
    return [arch for arch in left if arch.key == key], f"{OWN_KEY} is {key}"


def one_of_each(likely: Iterable[Architecture]) -> list[Architecture]:
    """The first variant of each model (:attr:`Architecture.id`), in their order."""
    found: dict[str, Architecture] = {}
    for arch in likely:
        found.setdefault(arch.id, arch)
    return list(found.values())


def _untouched(arch: Architecture, stems: Collection[str]) -> list[str]:
    """The table's deep stacks of which the file has nothing."""
    return [part.stack.name for part in parts_of(arch, stems, ()) if part.stack.depth >= DEEP and not part.blocks]


def _likelier(left: Sequence[Architecture], stems: Collection[str]) -> str:
    others = ", ".join(arch.name for arch in one_of_each(left)[1:])
    spared = {stack for arch in left[1:] for stack in _untouched(arch, stems)}
    blocks = "" if _untouched(left[0], stems) or not spared else ", and the file touches all its stacks of blocks"
    return f"it could be {others} as well; {left[0].name} is likelier: it is common{blocks}"
