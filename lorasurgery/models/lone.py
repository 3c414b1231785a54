"""Models that are one text encoder and nothing else: which encoder it is, and what the layouts call its modules.

Such a file does not say which pipeline it belongs to. Its modules are spelled as most model families spell that encoder's:
sd-scripts' number differs between families (``lora_te`` for Stable Diffusion 1 alone, ``lora_te1`` wherever else CLIP-L is).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lorasurgery.architectures import architectures
from lorasurgery.architectures.table import Architecture
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.models.encoders import ALL_IN_ONE, within

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasurgery.architectures.table import Encoder, Shape

ENOUGH = 0.5
"""The least share of an encoder's weights that a file of it has, as for ``inspect``."""


def lone_encoder(shapes: Mapping[str, Shape]) -> tuple[str, str] | None:
    """(prefix, table) of the one encoder that most of these keys are weights of; None when there is none."""
    for prefix in _prefixes():
        own = {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}
        if 2 * len(own) < len(shapes):
            continue
        for table in TEXT_ENCODERS:
            if len(_covered(own, table)) >= ENOUGH * len(TEXT_ENCODERS[table].shapes):
                return prefix, table
    return None


def _covered(shapes: Mapping[str, Shape], table: str) -> set[str]:
    """The weights of an encoder that are there in their own shape."""
    known = TEXT_ENCODERS[table].shapes
    found: set[str] = set()
    for key, shape in shapes.items():
        inside = within(key, shape, table)
        if inside is not None and inside[1] != "bias":
            spans = inside[0]
            if spans[0].weight in known and (spans[0].stop, *shape[1:]) == known[spans[0].weight]:
                found.update(span.weight for span in spans)
    return found


def table_of(table: str, among: Iterable[Architecture] | None = None) -> Architecture | None:
    """The architecture of an encoder alone: the first of ``among`` that has it, else one that has nothing but the encoder.

    None when none of ``among`` has it.
    """
    if among is not None:
        return next((arch for arch in among if any(own.table == table for own in arch.encoders)), None)
    encoder = _usual(table)
    loaded = {name for arch in architectures().values() if encoder in arch.encoders for name in arch.diffusers_encoders}
    return Architecture(
        id=table, variant="", name=f"the text encoder {table}", rows=(), source=TEXT_ENCODERS[table].source,
        encoders=(encoder,), diffusers_encoders=tuple(loaded & {encoder.diffusers}),
    )  # fmt: skip


def _usual(table: str) -> Encoder:
    """The encoder as the first of those families has it that agree, more than others do, on sd-scripts' prefix."""
    families: dict[str, Encoder] = {}
    for arch in architectures().values():
        for encoder in arch.encoders:
            if encoder.table == table:
                families.setdefault(arch.id, encoder)
    prefix, _ = Counter(encoder.sd_scripts for encoder in families.values()).most_common(1)[0]
    return next(encoder for encoder in families.values() if encoder.sd_scripts == prefix)


def _prefixes() -> dict[str, None]:
    """What may stand before all keys of an encoder's file."""
    own = [encoder for arch in architectures().values() for encoder in arch.encoders]
    known = (f"{prefix}." for encoder in own for prefix in (encoder.comfyui, encoder.diffusers) if prefix is not None)
    return dict.fromkeys(("", "transformer.", *known, *(p for some in ALL_IN_ONE.values() for p in some)))
