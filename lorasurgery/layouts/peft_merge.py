"""The configurations of several adapters as one: what they agree on, what only one says, and what one adapter cannot have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasurgery.errors import RequestError
from lorasurgery.layouts.peft_fields import FIELDS, HARMLESS, shortened
from lorasurgery.layouts.peft_types import type_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Configs = Mapping[str, Mapping[str, Any]]

_LISTS = ("modules_to_save", "feedforward_modules")
_ROWS = "trainable_token_indices"


def merged_configs(files: Sequence[tuple[str, Configs]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Component -> configuration of the result of a merge, and what there is to say of it. ``files``: (name, configurations).

    What only one file says is kept; where two say otherwise the first one's is, and a warning names both.
    Raises RequestError where that would change what the tensors mean.
    """
    result: dict[str, dict[str, Any]] = {}
    said: dict[tuple[str, str], str] = {}
    told: list[str] = []
    for name, configs in files:
        for component, fields in configs.items():
            own = result.setdefault(component, {})
            for field, value in fields.items():
                _add(own, field, value, (said.get((component, field), ""), name), told)
                said.setdefault((component, field), name)
    return result, told


def _add(own: dict[str, Any], field: str, value: Any, names: tuple[str, str], told: list[str]) -> None:  # noqa: ANN401  JSON
    """One field of one file joins what the files before it said."""
    have = own.get(field)
    if have in (None, "", [], {}) or (field == "bias" and have == "none"):
        own[field] = value
    elif value in (None, "", [], {}) or value == have or (field == "bias" and value == "none"):
        return
    elif field in _LISTS and isinstance(have, list) and isinstance(value, list):
        own[field] = list(dict.fromkeys([*have, *value]))
    else:
        rule = FIELDS.get(type_of(own), {}).get(field)
        text = f"{field} is {shortened(have)} in {names[0]}, {shortened(value)} in {names[1]}"
        if field in (*_LISTS, _ROWS) or (rule is not None and rule.kept and rule.status != HARMLESS):
            raise RequestError(
                f"{text}, and one adapter of PEFT has one of them", hint="lorasurgery apply, one after the other"
            )
        if rule is not None and rule.kept:
            told.append(f"{text}; the first is kept")
