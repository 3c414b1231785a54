"""A merge from the command line: files are found and read, merged, and written in the layout that was asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.alerts import bytes_of
from lorasurgery.cli.advice import advised
from lorasurgery.cli.batch import SUFFIX
from lorasurgery.cli.render import announce, note
from lorasurgery.errors import BrokenModuleError, NotRepresentableError, OutputExistsError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.adapter import Adapter
    from lorasurgery.operations.conversion.convert import Options
    from lorasurgery.report import Report
    from lorasurgery.verbs.merge import MergeOptions, MergeReport, Source, Wanted
    from lorasurgery.verbs.merge.choices import Choice

SPLIT, FUSED = (
    "--target comfyui (which reads the split names), or ",
    "--qkv fuse for an exact LoRA of these modules, --lokr-rank N or --energy 0.9999 for a smaller one",
)
HINTS = {
    FUSED: "--as lora (exact); --rank N cuts it",
    SPLIT + FUSED: f"{SPLIT}--as lora (exact); --rank N cuts it",
    "a rank, a policy or a size to recompress it to, or --as full": "--rank 32, --policy sv_fro --param 0.9, --size 40MiB, or "
    "--as full",
    "as LoRA": "--as lora",
    "as LoRA, or a fixed rank": "--as lora, or --rank alone",
    "average": "--method average",
    "text encoders, full differences, or other patterns": "no --rank, --policy or --size; lorasurgery resize cuts DoRA with "
    "--base MODEL --dora recompute",
    "as LoKr alone; resizing it afterwards cuts w2": "--as lokr alone; lorasurgery resize --rank afterwards cuts w2",
    "--as lora (exact), with --lokr-rank N or --energy 0.9999 for a smaller file": "--as lora (exact); --rank N cuts it",
    "an earlier checkpoint of the training run, or --drop REGEX to leave the module out": "an earlier checkpoint of the "
    "training run, or a weight of 0 for the module (FILE:1:re=REGEX:0)",
}  # fmt: skip
"""The library's advice in the words of the command line."""


SMALLER = "--rank N, or --size"
"""What makes the result of a merge smaller."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to merge, and how to write it."""

    files: tuple[str, ...]
    out: Path
    options: MergeOptions
    lora_dir: Path | None = None
    presets: Path | None = None
    target: str | None = None
    arch: str | None = None
    base: Path | None = None
    alpha: float | None = None
    as_lora: bool = False
    strict: bool = False
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """A merge that is done."""

    out: Path
    report: MergeReport
    writing: Report
    size: int
    """Bytes of the file, or of what it would be."""
    ranks: dict[int, int]
    """Rank -> number of modules as they are written; of a sum that is cut, before it was."""
    choices: tuple[Choice, ...] = ()
    """Smaller forms, where the sum is much larger than the files."""
    nearest: bool = False
    """Whether the modules are the nearest LoKr, and their errors no rounding."""

    @property
    def rounding(self) -> float:
        """Relative error of rounding to the dtype (or of the nearest LoKr), of all modules that have one."""
        return self.report.losses.total()

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """What is not in the result."""
        return [*self.report.dropped, *self.writing.dropped]

    @property
    def warnings(self) -> list[str]:
        """Of the merge and of the writing, each once."""
        return list(dict.fromkeys([*self.report.warnings, *self.writing.warnings, *self.report.alerts()]))

    def to_json(self) -> dict[str, Any]:
        """A plain object for ``--json``."""
        found = self.report.to_json()
        found["ranks"] = {str(rank): count for rank, count in self.ranks.items()}
        found["dropped"] = [{"key": key, "reason": reason} for key, reason in self.dropped]
        found["choices"] = [asdict(choice) for choice in self.choices]
        if self.nearest:
            found |= {"rounding": 0.0, "deviation": self.rounding}
        found["warnings"] = self.warnings
        return {
            "output": str(self.out),
            "written": self.writing.written,
            "bytes": self.size if self.writing.written else None,
            "size": self.size,
            **found,
        }


def merged(how: Request) -> Outcome:
    """Do it; raises SurgeryError, with advice in the words of the command line."""
    with advised(HINTS):
        return _merged(how)


def _merged(how: Request) -> Outcome:
    from lorasurgery.adapter import written_in
    from lorasurgery.files.blame import blamed
    from lorasurgery.verbs.merge.inputs import leading

    wanted = _wanted(how)
    how.options.check(len(wanted))
    sources = _sources(wanted, how)
    target = written_in(leading([source.adapter for source in sources]), how.target)
    _check_output(how, [*(w.path for w in wanted), *([] if how.base is None else [how.base])], folder=target.folder)
    try:
        return _written(how, sources)
    except BrokenModuleError as error:
        raise blamed(error, [Path(s.adapter.path) for s in sources if s.adapter.path]) from error


def _written(how: Request, sources: Sequence[Source]) -> Outcome:
    from lorasurgery.api import SaveOptions, save
    from lorasurgery.cli.merge_choices import choices_text
    from lorasurgery.operations.conversion.convert import convert
    from lorasurgery.operations.cut.size import file_size
    from lorasurgery.verbs.merge import merge
    from lorasurgery.verbs.merge.choices import choices

    found: list[Choice] = []
    try:
        result, report = merge(sources, how.options, how.target)
        if not how.as_lora:
            found = choices(sources, (result, report), how.options, how.target)
        result, writing = convert(result, how.target, _writing(how))
    except NotRepresentableError as error:
        error.path = error.path or _home(error.module, sources)
        raise
    report.losses.gather(writing.losses)
    writing.losses = report.losses
    report.ledgers = [own.without([d for d in writing.dropped if own.concerns(d[0])]) for own in report.ledgers]
    gone = [*report.lost, *report.dropped]
    if gone and how.strict:
        raise RequestError(f"--strict: {gone[0][0]} would be left out ({gone[0][1]})", hint="no --strict")
    if found and not how.dry_run:
        note(f"note: {choices_text(found, file_size(result, how.target))}")
    options = SaveOptions(
        strict=how.strict, force=how.force, dry_run=how.dry_run, smaller=SMALLER, announce=None if found else announce,
        inputs=tuple(Path(source.adapter.path) for source in sources if source.adapter.path is not None),
    )  # fmt: skip
    save(result, how.out, options=options, report=writing)
    if report.resize is not None:
        report.losses.gather(report.resize.losses)
    report.seconds += writing.seconds
    ranks = report.ranks() if report.resize is not None else _ranks(result)
    size = bytes_of(how.out) if writing.written else file_size(result, how.target)
    return Outcome(how.out, report, writing, size, ranks, tuple(found), nearest=how.options.as_lokr)


def _writing(how: Request) -> Options:
    """What the conversion to the layout does with families and dtypes."""
    from lorasurgery.operations.conversion.convert import Options

    own = how.options
    family = "full" if own.as_full else "lokr" if own.as_lokr else None
    return Options(dtype=own.dtype, as_lora=how.as_lora, family=family, factor=own.lokr_factor)


def _ranks(result: Adapter) -> dict[int, int]:
    """Rank -> number of modules, of what is written."""
    found = (module.delta.rank for module in result.modules.values() if module.delta is not None)
    return dict(sorted(Counter(rank for rank in found if rank is not None).items()))


def _home(module: str, sources: Sequence[Source]) -> str | None:
    """The file that a module comes from."""
    return next((str(s.adapter.path) for s in sources for m in s.adapter.modules.values() if m.name == module), None)


def _wanted(how: Request) -> list[Wanted]:
    from lorasurgery.operations.select.block_lists import read_presets
    from lorasurgery.verbs.merge import parse_source

    presets = {} if how.presets is None else read_presets(how.presets)
    return [wanted for text in how.files for wanted in parse_source(text, how.lora_dir, presets)]


def _sources(wanted: Sequence[Wanted], how: Request) -> list[Source]:
    """The files, all under one architecture."""
    from lorasurgery.files.opened import open_together
    from lorasurgery.verbs.merge import Source

    adapters = open_together([one.path for one in wanted], arch=how.arch, base=how.base, alpha=how.alpha)
    return [Source(adapter, one.weight, one.path.name) for adapter, one in zip(adapters, wanted, strict=True)]


def _check_output(how: Request, inputs: Sequence[Path], *, folder: bool) -> None:
    from lorasurgery.io.writer import check_output

    if folder and how.out.suffix == SUFFIX and not how.dry_run:
        raise RequestError("PEFT's layout is a folder", hint=f"-o {how.out.with_suffix('')}, or --target diffusers")
    if not folder and how.out.is_dir():
        raise OutputExistsError("the output is a folder", path=how.out, hint=f"-o {how.out / 'merged.safetensors'}")
    for path in (path for path in inputs if path.exists()):
        if how.out.exists() and how.out.samefile(path):
            raise OutputExistsError("the output is an input; it is never overwritten", path=how.out, hint="another name")
        if path.is_dir() and path.resolve() in how.out.resolve().parents:
            raise OutputExistsError("the output is in an input's folder", path=how.out, hint="another name")
    if not how.dry_run:
        check_output(how.out, list(inputs), force=how.force)
