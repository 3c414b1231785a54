"""Applying from the command line: the model and the adapters are found and read, and a kill leaves nothing behind."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from lorasurgery.cli.advice import advised
from lorasurgery.errors import RequestError, SurgeryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasurgery.models import Model
    from lorasurgery.verbs.apply import ApplyOptions, ApplyReport, Source
    from lorasurgery.verbs.extract import Step


class Done(NamedTuple):
    """How far it is, in bytes: what the progress line reads of an extraction's step."""

    done: int
    total: int
    name: str


@dataclass(frozen=True, slots=True)
class Request:
    """What to apply to what, and where the result goes."""

    model: Path
    adapters: tuple[str, ...]
    out: Path
    options: ApplyOptions
    lora_dir: Path | None = None
    presets: Path | None = None
    arch: str | None = None
    alpha: float | None = None
    force: bool = False
    dry_run: bool = False


def applied(how: Request) -> ApplyReport:
    """Do it, with progress on stderr."""
    from lorasurgery.cli.extract_progress import ProgressLine
    from lorasurgery.models import open_model
    from lorasurgery.verbs.apply import apply, check_model

    how.options.check()
    model = open_model(how.model, arch=how.arch)
    check_model(model)
    with advised({}):
        sources = _sources(how, model)
    out = how.out / how.model.name if how.model.is_file() and how.out.is_dir() and how.model.suffix != ".json" else how.out
    with ProgressLine(shown=not how.dry_run) as line, _killed_cleanly():

        def progress(done: int, total: int) -> None:
            line(cast("Step", Done(done, total, f"of {total / 1e9:.1f} GB")))

        return apply(model, sources, out, how.options, force=how.force, dry_run=how.dry_run, progress=progress)


def _sources(how: Request, model: Model) -> list[Source]:
    """The adapters in the order given, with the weights of each of their modules."""
    from lorasurgery.files.opened import refuse_needless
    from lorasurgery.operations.select.block_lists import read_presets
    from lorasurgery.verbs.apply import read_source
    from lorasurgery.verbs.merge.spec import parse_source

    presets = {} if how.presets is None else read_presets(how.presets)
    found = []
    for text in how.adapters:
        for wanted in parse_source(text, how.lora_dir, presets):
            if wanted.weight.dyn is not None:
                raise RequestError("dyn cuts ranks, which apply does not do", path=wanted.path, hint="lorasurgery merge, first")
            try:
                strength = wanted.weight.of(model.architecture)
                source = read_source(wanted.path, model.architecture, strength, str(wanted.weight), alpha=how.alpha)
            except SurgeryError as error:
                error.path = error.path or str(wanted.path)
                raise
            adapter = source.adapter
            unused = wanted.weight.unused(model.architecture, list(adapter.modules.values()))
            notes = tuple(f"{rule!r} decides nothing: no module that is left belongs to it" for rule in unused)
            found.append(replace(source, adapter=replace(adapter, warnings=(*adapter.warnings, *notes))))
    refuse_needless(how.alpha, [source.adapter for source in found])
    return found


@contextmanager
def _killed_cleanly() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does: what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
