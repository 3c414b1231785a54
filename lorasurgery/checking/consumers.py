"""The programs that files can be checked for."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.checking.comfyui import COMFYUI
from lorasurgery.checking.diffusers import DIFFUSERS_LIBRARY
from lorasurgery.checking.trainers import LYCORIS, MUSUBI, ONETRAINER, PEFT, SD_SCRIPTS_TOOLS
from lorasurgery.checking.webuis import FORGE, SDNEXT
from lorasurgery.errors import RequestError
from lorasurgery.nearest import one_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.checking.rules import Consumer

CONSUMERS: Mapping[str, Consumer] = MappingProxyType(
    {c.id: c for c in (COMFYUI, DIFFUSERS_LIBRARY, SD_SCRIPTS_TOOLS, MUSUBI, ONETRAINER, PEFT, LYCORIS, FORGE, SDNEXT)}
)
ALIASES = MappingProxyType({"kohya": "sd-scripts", "musubi-tuner": "musubi", "sd.next": "sdnext"})


def consumer(name: str) -> Consumer:
    """The program called ``name``; raises RequestError for another name."""
    found = CONSUMERS.get(ALIASES.get(name, name))
    if found is None:
        raise RequestError(f"no loader is called {name}", hint=one_of(name, CONSUMERS))
    return found
