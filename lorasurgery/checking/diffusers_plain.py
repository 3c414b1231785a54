"""Diffusers' own files, which every pipeline loads, and what its converters have in common."""

from __future__ import annotations

from dataclasses import replace

from lorasurgery.checking.rules import AB, DIFFUSERS, NOTHING, OLD, VECTOR, EncoderSpelling, Has, Needs, Note, Route, Spelling

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


def popped(words: frozenset[str], error: str = "KeyError or ValueError") -> tuple[Needs, ...]:
    """For converters that take a module's two factors out of the file by name: neither may be missing."""
    ends = (("_A", "_down", ".down"), ("_B", "_up", ".up"))
    sets = (frozenset(w for w in words if "lora" in w and any(f"{end}." in w for end in own)) for own in ends)
    return (Needs("", "", tuple(sets), error),)


_WHOLE_OR = tuple(frozenset({f".lokr_{w}", f".lokr_{w}_{part}"}) for w in ("w1", "w2") for part in "ab")
WHOLE_LOKR = (Needs("", "lokr", _WHOLE_OR, "AttributeError"),)
"""``_create_lokr_config`` asks every module for the shapes of both factors."""
WHOLE_OWN_LOKR = tuple(need._replace(names=r"^transformer\.") for need in WHOLE_LOKR)
"""The same where only Diffusers' own names get there."""


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
