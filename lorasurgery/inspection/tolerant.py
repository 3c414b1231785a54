"""Rows of the modules that can be read, and what is wrong with the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasurgery.errors import SurgeryError
from lorasurgery.inspection.modules import module_info
from lorasurgery.layouts.module import module_of
from lorasurgery.layouts.names import REMEMBERED
from lorasurgery.layouts.words import ALPHA

if TYPE_CHECKING:
    from lorasurgery.adapter import Module
    from lorasurgery.files.read import Placed
    from lorasurgery.files.taken import Taken
    from lorasurgery.inspection.description import ModuleInfo
    from lorasurgery.layouts.group import Group

_rows: dict[Any, ModuleInfo] = {}


def parsed(taken: Taken, placed: Placed, *, keep: bool) -> tuple[dict[str, ModuleInfo | str], list[Module]]:
    """Module name -> its row, or what is wrong with it; and the modules themselves, all of them with ``keep``.

    Rows are remembered by everything they are made from: the files of a folder have many modules in common.
    """
    rows: dict[str, ModuleInfo | str] = {}
    modules: list[Module] = []
    rules, arch = taken.rules, placed.architecture
    remember = not (keep or rules.configs or rules.whole_lokr_by_shape)
    for stem, place in placed.found.items():
        if stem in taken.problems:
            continue
        own = taken.groups[stem]
        key = (arch, rules.rslora_flag, stem, _made_from(own)) if remember else None
        row = _rows.get(key)
        if row is None:
            try:
                module = module_of(own, taken.deltas[stem], place, arch, rules, taken.raw.path)
            except SurgeryError as error:
                rows[stem] = error.message
                continue
            modules.append(module)
            row = module_info(module, own, arch, rules.configs)
            if key is not None:
                if len(_rows) >= REMEMBERED:
                    _rows.clear()
                _rows[key] = row
        rows[stem] = row
    return rows, modules


def _made_from(own: Group) -> tuple[Any, ...]:
    """What a row depends on besides the module's name: words, dtypes, shapes, and the alpha's value."""
    alpha = own.modifier(ALPHA)
    tensors = [(e.suffix, e.tensor.dtype, e.tensor.shape) for e in own.entries.values()]
    return (b"" if alpha is None or alpha.tensor.size != 1 else alpha.tensor.tobytes(), *tensors)
