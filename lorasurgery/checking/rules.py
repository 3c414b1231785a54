"""What the table of one program is made of: which names it looks up, which suffixes it reads, what it refuses.

A loader is a list of :class:`Route` for each architecture; the first whose conditions the file's keys meet reads the whole
file. Names are enumerated from the architecture tables, so a rule says a prefix and a naming, never a list of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, SD_SCRIPTS

if TYPE_CHECKING:
    from collections.abc import Mapping

NOTHING, ANYTHING = r"(?!)", ""
"""Regular expressions that no key, and every key, contains."""

KOHYA = frozenset({".lora_down.weight", ".lora_up.weight"})
AB = frozenset({".lora_A.weight", ".lora_B.weight"})
BARE_AB = frozenset({".lora_A", ".lora_B"})
DEFAULT_AB = frozenset({".lora_A.default.weight", ".lora_B.default.weight"})
OLD = frozenset({".lora.down.weight", ".lora.up.weight"})
LINEAR = frozenset({".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"})
PROCESSOR = frozenset({"_lora.down.weight", "_lora.up.weight"})
XLABS = frozenset({".down.weight", ".up.weight"})
MID = frozenset({".lora_mid.weight"})
ALPHA = frozenset({".alpha"})
LOHA = frozenset(f".hada_{s}" for s in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
LOKR = frozenset(f".lokr_{s}" for s in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"))
TUCKER = frozenset({".lokr_t2"})
DORA_SCALE = frozenset({".dora_scale"})
VECTOR = frozenset({".lora_magnitude_vector", ".lora_magnitude_vector.weight"})
MAGNITUDE = frozenset({".magnitude"})
DIFF = frozenset({".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight"})
OFT = frozenset({".oft_blocks", ".rescale"})
GLORA = frozenset(f".{s}.weight" for s in ("a1", "a2", "b1", "b2"))


class Spelling(NamedTuple):
    """Denoiser names that are looked up: a prefix, then a name of one of the architecture's namings."""

    prefix: str
    """``{denoiser}`` is Diffusers' name of the component."""
    naming: str = ORIGINAL
    flat: bool = False
    """Underscores for dots."""
    replace: tuple[tuple[str, str], ...] = ()
    """Replacements on the dotted name, with a dot at its end."""
    only: str = ANYTHING
    """Names this is found in."""
    without: str = NOTHING
    """Names this is found in are left out."""


class EncoderSpelling(NamedTuple):
    """Text encoder names that are looked up. ``{sd_scripts}`` and so on are the encoder's own prefixes."""

    prefix: str
    tables: tuple[str, ...] = ()
    """Encoders this is for; empty: all."""
    flat: bool = False
    only: str = ANYTHING
    optional: str = ""
    """A beginning of the name that may be left out."""


class Has(NamedTuple):
    """A condition: ``any``, ``all`` or ``none`` of the file's keys match a regular expression."""

    pattern: str
    how: str = "any"


class Note(NamedTuple):
    """Something to say about the modules whose name as spelled matches ``pattern``."""

    pattern: str
    text: str


class Needs(NamedTuple):
    """A module whose name matches ``names`` and that has a word matching ``given`` must have all of ``words``."""

    names: str
    given: str
    words: tuple[frozenset[str], ...]
    """Of each set, any one word."""
    error: str = ""
    """What is raised otherwise; empty: the given word is passed over."""


class Together(NamedTuple):
    """Names that are known only in a file one of whose keys matches ``key``; otherwise their keys are leftovers."""

    names: str
    key: str
    passed: str = NOTHING
    """Those of the leftovers that are passed over whatever else the route says of unknown names."""


@dataclass(frozen=True, slots=True)
class Route:
    """One way a loader reads a file."""

    names: tuple[Spelling, ...]
    reads: frozenset[str]
    """Suffixes it reads; with a module's factors among them the module loads."""
    when: tuple[Has, ...] = ()
    encoders: tuple[EncoderSpelling, ...] = ()
    deletes: str = NOTHING
    """Keys taken out before anything else is looked at."""
    ignores_names: str = ANYTHING
    """Keys of modules without a known name that are passed over; any other makes the loader refuse the file."""
    ignores_words: str = ANYTHING
    """The same for suffixes it does not read."""
    refuses: str = NOTHING
    """One such key makes it refuse the file, whatever its name and suffix."""
    tolerates: int | None = None
    """With more keys than this that it does not read it passes over the whole file; None: any number."""
    words: tuple[tuple[str, frozenset[str]], ...] = ()
    """(names, suffixes): what it reads of some names instead of ``reads``."""
    reads_keys: str = NOTHING
    """Keys of no module that it reads too: learned tokens."""
    needs: tuple[Needs, ...] = ()
    together: tuple[Together, ...] = ()
    shares_alpha: bool = False
    """A module without alpha gets the most frequent one of the others (``get_peft_kwargs``)."""
    alike: bool = False
    """sd-scripts' OFT network: all modules have one number of blocks and one constraint."""
    layers: bool = False
    """PEFT's layers hold what loads: a part that one module has and another lacks stays without numbers, and the forward
    pass fails. Diffusers makes the layers without memory (``low_cpu_mem_usage``), and PEFT makes every layer alike."""
    keeps_words: bool = False
    """No key gets another word on the way to PEFT, which makes a layer of every module that any ``.lora_`` key names."""
    complete: tuple[str, ...] = ()
    """Names (prefix included, ``{i}`` the block) of which every block in the file must have each, or the file is refused."""
    every_block: bool = False
    """``complete`` counts every block of the model instead of the blocks in the file."""
    also: str = NOTHING
    """Stems in no table that it reads too: parameters that are no module's weight."""
    because: tuple[Note, ...] = ()
    """Why modules without a known name have none."""
    wrong: tuple[Note, ...] = ()
    """Modules that load with another effect than their file says."""
    error: str = "ValueError"
    """What it raises."""
    note: str = ""
    """Said of every file that takes this route."""
    layout: str | None = None
    """What ``convert --target`` writes for it, where that is not the consumer's."""
    header: bool = False
    """Reads ``lora_adapter_metadata``, as every route does where the consumer says so."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """One program, one version."""

    id: str
    name: str
    version: str
    source: str
    models: Mapping[str, tuple[Route, ...]]
    """By architecture id."""
    default: tuple[Route, ...] = ()
    """For an architecture not in ``models``; empty: see ``unknown``."""
    unknown: bool = False
    """True: what it does with other architectures is not known here. False: it has no such model."""
    facts: tuple[str, ...] = ()
    """What is known of it all the same."""
    layout: str | None = None
    """What ``convert --target`` writes for it."""
    header: bool = False
    """Reads ``lora_adapter_metadata`` (or PEFT's configuration)."""
    folder: bool = False
    """Reads a PEFT folder, and nothing else."""
    misfit: str = "ignored"
    """What becomes of a module of another shape: ``ignored``, or ``rejected`` with the whole file."""
    swaps: bool = True
    """False when a module with exchanged halves is only right for additive families (ComfyUI's patch functions)."""
    patches: bool = False
    """Whether ComfyUI's weight adapters patch the weights; see :mod:`lorasurgery.checking.patches`."""
    slices_bias: bool = True
    """False when the bias of a part of a fused weight cannot be addressed."""


def table(*rows: tuple[str, tuple[Route, ...]]) -> Mapping[str, tuple[Route, ...]]:
    """Rows of (architecture ids separated by spaces, routes) as a mapping."""
    return MappingProxyType({arch: routes for ids, routes in rows for arch in ids.split()})


__all__ = ["DIFFUSERS", "ORIGINAL", "SD_SCRIPTS", "Consumer", "EncoderSpelling", "Has", "Note", "Route", "Spelling", "table"]
