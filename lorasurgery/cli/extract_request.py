"""What ``lorasurgery extract`` was asked for: its options and sd-scripts' put together, and the three paths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasurgery.cli.resize_request import PRECISIONS
from lorasurgery.errors import RequestError
from lorasurgery.io.sniff import TORCH_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lorasurgery.verbs.extract import ExtractOptions

RANK = 32
"""Where nothing else is asked for."""
OLD_RANK, OLD_MIN_DIFF = 4, 0.01
"""sd-scripts' own defaults of ``--dim`` and ``--min_diff``."""
SUFFIX = ".safetensors"
HINTS = {
    "a parameter": "--param X",
    "a fixed rank": "--rank N alone; --dry-run shows the size",
    "a rank": "--rank N alone",
    "a rank, a policy, a size or a recipe": "--rank 32, --policy energy --param 0.95, --size 200MiB or --recipe",
    "the family lora, or the targets comfyui and lycoris": "--family lora, or --target comfyui or lycoris",
    "the same without tucker": "without --tucker",
    "the family lora": "--family lora",
    "factors kohya": "--factors kohya",
    "alpha rank": "--alpha rank",
    "another tuned model, or other patterns": "another tuned model, or other --include and --exclude",
}
"""The library's advice in the words of the command line."""


@dataclass(frozen=True, slots=True)
class Old:
    """What sd-scripts' spellings said."""

    used: bool
    """Whether the command line is one of sd-scripts' own: its defaults then hold."""
    rank: int | None = None
    conv_rank: int | None = None
    precision: str | None = None
    encoder_min_diff: float | None = None
    sdxl: bool = False
    v2: bool = False

    @property
    def only(self) -> str | None:
        """The architecture that ``--sdxl`` or ``--v2`` promise."""
        return "sdxl" if self.sdxl else "sd2" if self.v2 else None


@dataclass(frozen=True, slots=True)
class Request:
    """Everything."""

    base: Path
    tuned: Path
    output: Path
    options: ExtractOptions
    resume: bool
    force: bool
    strict: bool
    hashes: bool
    arch: str | None
    old: Old
    verbose: bool
    spectrum: bool
    quiet: bool
    json: bool


def places(
    paths: list[Path],
    base: Path | None,
    tuned: Path | None,
    out: Path | None,
    save_to: Path | None,
    *,
    needs_output: bool,
    folder: bool,
) -> tuple[Path, Path, Path]:
    """Base, tuned model and output, from positions and sd-scripts' options; the output of a dry run is never written.

    Raises RequestError unless each is named once.
    """
    if out is not None and save_to is not None:
        raise RequestError("--out and --save_to are the same thing", hint="one of them")
    left = list(paths)
    first = base if base is not None or not left else left.pop(0)
    second = tuned if tuned is not None or not left else left.pop(0)
    named = out or save_to
    output = named if named is not None or not left else left.pop(0)
    if first is None or second is None or left or (output is None and needs_output):
        raise RequestError(
            "two models and one output, please" if needs_output else "two models, please",
            hint="lorasurgery extract BASE TUNED OUT --rank 32",
        )
    return first, second, _file(output or second.with_name(f"{second.stem}-extracted{SUFFIX}"), second, folder=folder)


def _file(output: Path, tuned: Path, *, folder: bool) -> Path:
    if folder:
        if output.suffix == SUFFIX:
            raise RequestError(
                "PEFT's layout is a folder", path=output, hint=f"{output.with_suffix('')}, or --target diffusers"
            )
        return output
    if output.is_dir():
        return output / f"{tuned.stem}-extracted{SUFFIX}"
    if output.suffix.lower() in TORCH_SUFFIXES:
        raise RequestError(
            f"the output {output} would be a safetensors file with a PyTorch suffix", hint=str(output.with_suffix(SUFFIX))
        )
    return output


def merged(cut: Mapping[str, Any], more: Mapping[str, Any], old: Old) -> ExtractOptions:
    """The options, with sd-scripts' in their place and its defaults where the command line is its own.

    As in its tools the strength is then all in ``up``, and only the layers are taken that they take: no norms, no biases
    and (without ``--conv_dim``) no convolutions with a kernel. Raises RequestError where both spellings of one thing are
    given, or two models.
    """
    from lorasurgery.operations.cut import ResizeOptions
    from lorasurgery.verbs.extract.options import DEFAULT, ExtractOptions

    if old.sdxl and old.v2:
        raise RequestError("--sdxl and --v2 are two models", hint="one of them")
    own = dict(cut)
    ranks = (*(own[name] for name in ("rank", "conv_rank", "pointwise_rank")), own["ranks"] or None, old.rank, old.conv_rank)
    if more["family"] == "full" and any(rank is not None for rank in ranks):
        raise RequestError("--family full writes the whole difference, which has no rank", hint="--family lora")
    for name, ours, theirs, value in (
        ("rank", "--rank", "--dim", old.rank), ("conv_rank", "--conv-rank", "--conv_dim", old.conv_rank),
    ):  # fmt: skip
        if value is not None and own[name] is not None:
            raise RequestError(f"{ours} and {theirs} are the same thing", hint="one of them")
        own[name] = own[name] if value is None else value
    own["dtype"] = _dtype(own["dtype"], old)
    own["factors"] = own["factors"] or ("kohya" if old.used or more["clamp_quantile"] is not None else "balanced")
    if all(own[name] is None for name in ("rank", "policy", "size", "recipe")) and more["family"] not in ("full", "lokr"):
        own["rank"] = OLD_RANK if old.used else RANK
    if old.used:
        more = {**more, "target": more["target"] or DEFAULT}
    options = ExtractOptions(
        **{**more, "cut": ResizeOptions(**own), "small": more["small"] or ("none" if old.used else "vectors")}
    )
    if old.used:
        limit = OLD_MIN_DIFF if old.encoder_min_diff is None else old.encoder_min_diff
        options = replace(options, as_sd_scripts=True, conv=own["conv_rank"] is not None, encoder_min_diff=limit)
    options.check()
    return options


def _dtype(dtype: str, old: Old) -> str:
    if old.precision is None:
        return "fp32" if old.used and dtype == "keep" else dtype
    if dtype != "keep":
        raise RequestError("--dtype and --save_precision are the same thing", hint="one of them")
    if old.precision not in PRECISIONS:
        raise RequestError(f"--save_precision is float, fp16 or bf16, not {old.precision}")
    return PRECISIONS[old.precision]
