"""Command lines of sd-scripts' and musubi-tuner's scripts in the words of our commands.

A spelling stands for one option of ours and changes nothing else. What the scripts do and the command does not is refused with
the command that does it. Sources: sd-scripts ``networks/merge_lora.py``, ``sdxl_merge_lora.py``, ``svd_merge_lora.py``,
``flux_merge_lora.py`` and ``convert_*.py``; musubi-tuner ``merge_lora.py``, ``convert_lora.py`` and
``networks/convert_*_to_comfy.py`` (2026-06).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from lorasurgery.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Values = Mapping[str, tuple[str, ...]]

VALUE = re.compile(r"[^-]|-$|-\.?\d")
"""How a word begins that is no option."""


@dataclass(frozen=True, slots=True)
class Spellings:
    """What a command understands beside its own options."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Theirs -> ours, both with one value."""
    valued: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    """Theirs -> each of its values -> our words; ``""``: it has none."""
    needless: Mapping[str, int] = field(default_factory=dict)
    """Theirs -> how many values follow: what changes no number of ours."""
    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Theirs -> (why, what to do)."""
    lists: tuple[str, ...] = ()
    """Theirs with any number of values, for :attr:`listed`."""
    listed: Callable[[Values], list[str]] = lambda _: []
    """Our words for those."""


def _files(given: Values) -> list[str]:
    """``--models a b --ratios 0.5 1 --lbws [..] [..]`` as ``a:0.5:lbw=.. b:1:lbw=..``."""
    models = given.get("--models", ())
    for name in ("--ratios", "--lbws"):
        if name in given and len(given[name]) != len(models):
            raise RequestError(f"{name} has {len(given[name])} values for {len(models)} --models", hint="one for each")
    ratios, lists = given.get("--ratios", ()), given.get("--lbws", ())
    found = []
    for number, model in enumerate(models):
        weight = f":{ratios[number]}" if ratios else ""
        blocks = re.sub(r"[\[\]\s]", "", lists[number]) if lists else ""
        found.append(f"{model}{weight or ':1' * bool(blocks)}{f':lbw={blocks}' if blocks else ''}")
    return found


def _baked(given: Values) -> list[str]:
    """``--sd_model m --models a b --ratios 0.5 1`` (musubi-tuner: ``--dit``, ``--lora_weight``) as ``m a:0.5 b:1``."""
    models = [name for own in BASES for name in given.get(own, ())]
    if len(models) > 1:
        raise RequestError("the command line names two models", hint="one of " + ", ".join(BASES))
    theirs = {"--models": "--models", "--ratios": "--ratios", "--lora_weight": "--models", "--lora_multiplier": "--ratios"}
    return [*models, *_files({theirs[name]: values for name, values in given.items() if name in theirs})]


BAKED = ("merging into a model is another command", "lorasurgery apply MODEL LORA:RATIO ... -o OUT")
BASES = ("--sd_model", "--flux_model", "--dit")
ENCODERS = ("--clip_l", "--t5xxl", "--clip_l_save_to", "--t5xxl_save_to")
MODELS = (*BASES, *ENCODERS, "--lora_weight", "--lora_multiplier", "--save_merged_model")
NEEDLESS = {
    "--precision": 1, "--device": 1, "--loading_device": 1, "--working_device": 1, "--mem_eff_load_save": 0, "--v2": 0,
    "--concat": 0, "--shuffle": 0,
}  # fmt: skip
PRECISIONS = {"float": ("--dtype", "fp32"), "fp16": ("--dtype", "fp16"), "bf16": ("--dtype", "bf16")}
TOWARDS = {
    "sd-scripts": ("--target", "sd-scripts"),
    "ai-toolkit": ("--target", "diffusers"),
}
SPELLINGS: Mapping[str, Spellings] = MappingProxyType(
    {
        "merge": Spellings(
            renamed={"--save_to": "--out", "--new_rank": "--rank", "--new_conv_rank": "--conv-rank"},
            valued={
                "--save_precision": PRECISIONS,
                "--no_metadata": {"": ("--metadata", "strip")},
            },
            needless=NEEDLESS,
            refused=dict.fromkeys(MODELS, BAKED),
            lists=("--models", "--ratios", "--lbws"),
            listed=_files,
        ),
        "apply": Spellings(
            renamed={"--save_to": "--out", "--save_merged_model": "--out"},
            needless={**NEEDLESS, "--diffusers": 0, "--dit_in_channels": 1},
            refused={
                **dict.fromkeys(ENCODERS, ("a text encoder's file is a model of its own", "lorasurgery apply for each file")),
                "--save_precision": ("the weights keep the model's own dtype", "no --save_precision"),
                "--no_metadata": ("what was applied is noted in the result", "lorasurgery meta strip for the result"),
            },
            lists=(*BASES, "--models", "--ratios", "--lora_weight", "--lora_multiplier"),
            listed=_baked,
        ),
        "convert": Spellings(
            renamed={
                "--src_path": "--input", "--dst_path": "--output", "--diffusers_prefix": "--diffusers-prefix",
                "--lokr_rank": "--lokr-rank",
            },
            valued={
                "--dst": TOWARDS,
                "--src": dict.fromkeys(TOWARDS, ()),  # the input's layout is detected
                "--reverse": {"": ("--target", "sd-scripts")},
            },
        ),
    }
)  # fmt: skip
"""``--concat``: factors side by side are what a sum is, in whatever order (``--shuffle``). Numbers are float64 whatever
``--precision`` says."""


class Spelled(TyperCommand):
    """A command that understands :data:`SPELLINGS`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  click's context, which typer brings along
        """Raises RequestError for a script's option that this command has nothing for."""
        return super().parse_args(ctx, translated(args, SPELLINGS[self.name or ""]))


def translated(args: Sequence[str], known: Spellings) -> list[str]:
    """The words with ours in the place of theirs; lists go last."""
    words, found, given = list(args), list[str](), dict[str, tuple[str, ...]]()
    while words:
        word, equals, value = words.pop(0).partition("=")
        if equals and word in (*known.renamed, *known.valued, *known.needless, *known.lists, *known.refused):
            words.insert(0, value)
        elif equals:
            word = f"{word}={value}"
        if word == "--":
            return [*found, *known.listed(given), word, *words]
        ours = _ours(word, words, known, given)
        if ours[:1] != [word] and ours and ours[0] in args:
            raise RequestError(f"{word} and {ours[0]} are the same thing", hint="one of them")
        found += ours
    return [*found, *known.listed(given)]


def _ours(word: str, words: list[str], known: Spellings, given: dict[str, tuple[str, ...]]) -> list[str]:
    """Our words for one of theirs, whose values are taken off ``words``; those of a list go into ``given``."""
    if word in known.refused:
        raise RequestError(f"{word}: {known.refused[word][0]}", hint=known.refused[word][1])
    if word in known.renamed:
        return [known.renamed[word]]
    if word in known.valued:
        choices = known.valued[word]
        value = "" if "" in choices else words.pop(0) if words else "nothing"
        if value not in choices:
            raise RequestError(
                f"{word} is {' or '.join(choices)}, not {value}", hint="--target LAYOUT" if word == "--dst" else None
            )
        return list(choices[value])
    if word in known.needless:
        del words[: known.needless[word]]
        return []
    if word not in known.lists:
        return [word]
    count = next((i for i, own in enumerate(words) if not VALUE.match(own)), len(words))
    given[word] = (*given.get(word, ()), *words[:count])
    del words[:count]
    return []
