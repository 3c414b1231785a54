"""Diffusers' own files, which every pipeline loads, and what its converters have in common."""

from __future__ import annotations

from dataclasses import replace

from lorasurgery.checking.rules import AB, DIFFUSERS, NOTHING, OLD, VECTOR, EncoderSpelling, Has, Note, Route, Spelling

DORA = r"dora_scale"
"""These keys are deleted with a warning before anything else."""
NEEDS_LORA = r"lora"
"""``Invalid LoRA checkpoint``: every key must contain it."""
ENCODERS = (EncoderSpelling("{diffusers}.", optional="text_model."),)

PLAIN = Route(
    (Spelling("{denoiser}.", DIFFUSERS),),
    AB | OLD | VECTOR | {".lora_B.bias", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"},
    encoders=ENCODERS,
    deletes=DORA,
    ignores_names=NEEDS_LORA,
    ignores_words=NEEDS_LORA,
    keeps_words=True,
    because=(
        Note(
            r"^transformer_2\.",
            "load_lora_weights(..., load_into_transformer_2=True) loads the second expert from a file of its own",
        ),
    ),
)


def plain(
    *,
    names: tuple[Spelling, ...] = PLAIN.names,
    reads: frozenset[str] = PLAIN.reads,
    when: tuple[Has, ...] = (),
    note: str = "",
) -> Route:
    """:data:`PLAIN` with other names or words."""
    return replace(PLAIN, names=names, reads=reads, when=when, note=note)


def refuse(pattern: str) -> Route:
    """A file with such a key is refused."""
    return Route((), frozenset(), (Has(pattern),), deletes=DORA, ignores_names=NOTHING, ignores_words=NOTHING)
