"""A file taken apart: its modules' tensors, what each makes, and what the file says about scales; no model is known yet.

Every command begins here, so that a file is the same thing to all of them. What cannot be read is an error, or, for
``inspect`` and ``check``, noted (``tolerant``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery.errors import BrokenModuleError, SurgeryError
from lorasurgery.layouts.fit import check_pefts
from lorasurgery.layouts.foreign import refuse_other_models
from lorasurgery.layouts.group import build, group
from lorasurgery.layouts.module import scale_rules
from lorasurgery.layouts.scales import header_configs
from lorasurgery.layouts.words import split_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.architectures.table import Shape
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.scales import PeftConfig, ScaleRules


@dataclass(frozen=True, slots=True)
class Unparsed:
    """A file's tensors and, for a PEFT folder, its configurations by component (None for a file)."""

    raw: RawFile
    configs: Mapping[str, PeftConfig] | None = None
    alpha: float | None = None
    """What it was trained at, for modules of which nothing in the file says it."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The modules of a file as it spells them."""

    raw: RawFile
    configs: Mapping[str, PeftConfig] | None
    groups: Mapping[str, Group]
    others: Mapping[str, Tensor]
    """Keys that end in no known word."""
    deltas: Mapping[str, Delta | None]
    """Module -> its change (None: it only has a bias); broken modules are not among them."""
    problems: Mapping[str, str]
    """Module -> why its tensors make none."""
    rules: ScaleRules
    findings: tuple[tuple[str, str], ...] = ()
    """(code, sentence) about the file as a whole."""

    @property
    def shapes(self) -> dict[str, Shape | None]:
        """Module -> (out, in[, k...]) of its change, None where its tensors do not tell.

        Biases and rows that PEFT saved whole are not among them: no table has these, and they tell nothing about the model.
        """
        told = {stem: own for stem, own in self.groups.items() if not own.parameter}
        changes = {stem: self.deltas.get(stem) for stem in told}
        return {stem: own.tableless(None if (d := changes[stem]) is None else d.shape) for stem, own in told.items()}


def taken_apart(file: Unparsed, *, tolerant: bool = False) -> Taken:
    """Take a file apart; raises NotAnAdapterError for other files.

    Unless ``tolerant``, raises BrokenModuleError for two keys of one place and for tensors that make no module, and
    FileFormatError for a configuration that is none.
    """
    raw, findings = file.raw, list[tuple[str, str]]()
    groups, others = _grouped(raw, findings) if tolerant else group(raw)
    refuse_other_models(raw, groups)
    configs = _header(raw, findings, tolerant=tolerant) if file.configs is None else file.configs
    deltas: dict[str, Delta | None] = {}
    problems: dict[str, str] = {}
    for stem, own in groups.items():
        made = _built(own, file, tolerant=tolerant)
        if isinstance(made, str):
            problems[stem] = made
        else:
            deltas[stem] = made
    return Taken(raw, file.configs, groups, others, deltas, problems, scale_rules(raw, configs, file.alpha), tuple(findings))


def _built(own: Group, file: Unparsed, *, tolerant: bool) -> Delta | str | None:
    """The change of a module, or, where ``tolerant``, what is wrong with its tensors."""
    try:
        made = build(own, file.raw.path)
        if file.configs is not None:
            check_pefts(own, made, file.raw.path)
    except BrokenModuleError as error:
        if not tolerant:
            raise
        return error.message
    return made


def _grouped(raw: RawFile, findings: list[tuple[str, str]]) -> tuple[dict[str, Group], dict[str, Tensor]]:
    """Modules and the rest; of two keys for one place the first counts."""
    try:
        return group(raw)
    except BrokenModuleError as error:
        findings.append(("duplicate", error.message))
    seen: set[tuple[str, str, str]] = set()
    kept = {}
    for key, tensor in raw.tensors.items():
        split = split_key(key)
        place = (key, "", "") if split is None else (split.stem, split.word.family, split.word.slot)
        if place not in seen:
            kept[key] = tensor
        seen.add(place)
    return group(replace(raw, tensors=kept))


def _header(raw: RawFile, findings: list[tuple[str, str]], *, tolerant: bool) -> Mapping[str, PeftConfig]:
    """``lora_adapter_metadata``."""
    try:
        return header_configs(raw.metadata)
    except SurgeryError as error:
        if not tolerant:
            raise
        findings.append(("bad-config", error.message))
        return {}
