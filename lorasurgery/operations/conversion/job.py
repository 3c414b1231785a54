"""One conversion while it runs: the adapter, the target, and the report that fills up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lorasurgery.errors import NotRepresentableError
from lorasurgery.layouts.targets import Speller
from lorasurgery.report import Change, Report

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter, Module
    from lorasurgery.deltas.base import Record
    from lorasurgery.layouts.targets import Layout
    from lorasurgery.operations.conversion.options import Options
    from lorasurgery.site import Site


class Job:
    """What every step of a conversion needs, and where it writes down what it did."""

    def __init__(self, adapter: Adapter, target: Layout, options: Options) -> None:
        self.adapter, self.target, self.options = adapter, target, options
        self.arch = adapter.architecture
        self.speller = Speller(target, self.arch, options.prefix)
        self.namings = self.speller.namings
        self.actions: dict[Site, str] = {}
        """What was done to a module before its rows were looked at."""
        self.kept_split: list[tuple[str, str]] = []
        """(module, reason) of fused weights that keep their split names."""
        self.zero_parts: list[str] = []
        """Fused modules of which a part is all zeros, once for each such part."""
        self.report = Report.of(adapter, target.id)

    def done(self, module: Module, action: str, was: Module) -> Module:
        """Note what became of ``was`` and return the result."""
        rank = None if module.delta is None else module.delta.rank
        original = self.adapter.modules.get(was.site, was)
        if action == "renamed":
            action = self.actions.get(was.site, action)
        self.report.changes.append(Change(module.name, action, module.family, original.family, rank))
        return module

    def recorder(self, module: Module) -> Record:
        """Where the rounding errors of a module go."""
        return self.recorder_of(module.name)

    def recorder_of(self, name: str) -> Record:
        """Where the rounding errors go of a module, or a part of one, by name."""
        return partial(self.report.losses.record, name)

    def refusal(self, module: Module, reason: str, hint: str) -> NotRepresentableError:
        """The error that says why this module cannot be written, and which options would do it."""
        return NotRepresentableError(f"{module.name}: {reason}", module=module.name, path=self.adapter.path, hint=hint)


def without_magnitude(job: Job, module: Module, reason: str) -> Module:
    """The module as a plain LoRA under ``--lossy``, or a refusal."""
    if not job.options.lossy:
        raise job.refusal(module, reason, "--lossy to drop the magnitude and keep what is inside")
    job.report.dropped.append((module.keys.get("magnitude", f"{module.name}.dora_scale"), reason))
    return replace(module, magnitude=None)
