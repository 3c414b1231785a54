"""From a file taken apart to an adapter: every module that changes a weight, known to a table or by the file's own name."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.adapter import Adapter, Leftover
from lorasurgery.architectures.from_base import custom, resized
from lorasurgery.architectures.table import DENOISERS, DIFFUSERS, ORIGINAL, Own
from lorasurgery.deltas.miss import Miss
from lorasurgery.errors import BrokenModuleError, UnknownArchitectureError
from lorasurgery.files.taken import Unparsed, taken_apart
from lorasurgery.layouts import peft_keys
from lorasurgery.layouts.detect import detect, fits, score
from lorasurgery.layouts.evidence import of_no_table
from lorasurgery.layouts.module import FACTOR, FLAGS, module_of
from lorasurgery.layouts.names import ALIAS, index
from lorasurgery.layouts.numbered import CLONEOFSIMO
from lorasurgery.layouts.peft_keys import doubles, peft_key
from lorasurgery.layouts.scales import unknown_scales
from lorasurgery.layouts.spelled import spelling
from lorasurgery.layouts.widened import as_wide
from lorasurgery.layouts.words import ALPHA, BIAS, EXTRA

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture, Shape
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.files.taken import Taken
    from lorasurgery.io.header import RawFile
    from lorasurgery.layouts.detect import Match
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.names import Found
    from lorasurgery.layouts.scales import PeftConfig, ScaleRules
    from lorasurgery.site import Site

FEW = 0.1
"""A file of which at most this share of the known weights has other sizes is for a variant of the model."""
UNKNOWN_SHAPE = (1,)
"""Of a module whose tensors do not say it: an OFT's, for one. It is carried whole, so nobody asks."""
BASE = "--base MODEL, the checkpoint it was trained on (only its header is read)"
HARMLESS = (
    (re.compile(rf"^({FACTOR}|{'|'.join(FLAGS)})$"), "a note of the trainer that is read, and changes no weight"),
    (re.compile(r"^(optimizer|lr_scheduler|scheduler|scaler)[._]|^(epoch|global_step|step|iteration)$"), "the trainer's state"),
    (re.compile(r"(^|[._])(num_batches_tracked|position_ids)$"), "a counter of the model, no weight"),
)
"""Keys that change nothing, and why."""
KEPT = ((re.compile(r"^(bundle_emb\.|emb_params$|<[^>]*>$)"), "a learned token's embedding, which is no change of a weight"),)
"""Keys with an effect of their own that no operation on changes of weights concerns. Sources: OneTrainer, ai-toolkit,
cloneofsimo/lora."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A file's modules in a model: where each acts, and the model with the weights that only the file names."""

    architecture: Architecture
    found: Mapping[str, Found]
    """Module -> its place."""
    own: frozenset[str]
    """Those whose place is a name of the file's own."""
    other_sizes: tuple[str, ...] = ()
    """Weights of the model that have another size in this file."""


def parse(
    raw: RawFile,
    *,
    among: Iterable[Architecture] | None = None,
    configs: Mapping[str, PeftConfig] | None = None,
    alpha: float | None = None,
) -> Adapter:
    """Understand every key of ``raw``; a model that no table knows is an error.

    ``among`` restricts the architectures considered (``--arch``, ``--base``); ``configs`` are a PEFT folder's
    configurations by component; ``alpha`` is what the file was trained at, where nothing in it says so.
    Raises NotAnAdapterError, UnknownArchitectureError or BrokenModuleError.
    """
    taken = taken_apart(Unparsed(raw, configs, alpha))
    return adapter_of(taken, *detect(taken.shapes, raw.metadata, among=among, path=raw.path))


def parse_for(
    raw: RawFile, architecture: Architecture, *, configs: Mapping[str, PeftConfig] | None = None, alpha: float | None = None
) -> Adapter:
    """The same for the model that a file is going into, whatever other models it fits.

    Raises UnknownArchitectureError where more than half of the modules are not this model's.
    """
    taken = taken_apart(Unparsed(raw, configs, alpha))
    found = score(architecture, taken.shapes)
    if 2 * found.named < found.total:
        raise UnknownArchitectureError(
            f"{architecture.name} has {found.named} of its {found.total} modules", path=raw.path,
            hint="the model it was trained on", candidates=[(architecture.key, found.share)],
        )  # fmt: skip
    return adapter_of(taken, found)


def adapter_of(taken: Taken, best: Match | None, ties: Sequence[Match] = ()) -> Adapter:
    """The adapter of a file for the model that fits it best (None: one that no table knows).

    Modules without a name in the table are called as the file calls them. Raises BrokenModuleError for modules that do not
    fit their weight, or where two are the same weight.
    """
    known = None if best is None else as_wide((match.architecture for match in (best, *ties)), taken.groups)
    placed = place(taken, known)
    arch, found = placed.architecture, placed.found
    modules: dict[Site, Module] = {}
    for stem, own in taken.groups.items():
        module = module_of(own, taken.deltas[stem], found[stem], arch, taken.rules, taken.raw.path)
        if module.site in modules:
            _join_or_refuse(modules, module, taken)
        else:
            modules[module.site] = module
    name = layout_of(taken, found, arch)
    how = spelling(taken, found, modules.values(), arch, name)
    misnamed = () if best is None else of_no_table(taken.raw.metadata, best.architecture)
    return Adapter(
        architecture=arch,
        modules=modules,
        metadata=dict(taken.raw.metadata),
        layout=how.id,
        leftovers=leftovers(taken),
        candidates=tuple((m.architecture.key, m.share) for m in ((best, *ties) if best is not None else ())),
        evidence=() if best is None else best.evidence,
        warnings=(*warnings_of(taken.raw, taken.rules, modules.values()), *own_named(placed), *misnamed),
        path=taken.raw.path,
        spelling=how,
        configs={component: config.fields for component, config in taken.rules.configs.items()},
    )


def place(taken: Taken, known: Architecture | None) -> Placed:
    """Where every module acts: a weight of the table, or one that is called what the file calls it.

    Raises UnknownArchitectureError for a module whose place needs a shape that nothing tells.
    """
    arch, other = (custom({}, taken.raw.path), {}) if known is None else _variant(taken, known)
    names = index(arch)
    found = {stem: names.find(stem) for stem in taken.groups}
    namings = _namings(place for place in found.values() if place is not None)
    unknown = [stem for stem, place in found.items() if place is None]
    own = {stem: names.own_place(stem, _shape(taken, stem), namings) for stem in unknown}
    places = {stem: own.get(stem) or place for stem, place in found.items()}
    if known is None:
        arch = _unnamed(arch, own.values(), folder=taken.configs is not None)
    placed = {stem: _in_wrapper(taken, stem, place) for stem, place in places.items() if place is not None}
    return Placed(
        arch.with_own(map(_own, own.values())),
        placed,
        frozenset(_telling(taken, unknown)),
        tuple(other),
    )


def _telling(taken: Taken, unknown: Iterable[str]) -> Iterable[str]:
    """Those of the modules without a place in the table that say something about the model."""
    return (stem for stem in unknown if not taken.groups[stem].parameter)


def _in_wrapper(taken: Taken, stem: str, place: Found) -> Found:
    """The place with all that stands before the name in the file: ``pipe.dit.`` and its like, too."""
    spelled = taken.groups[stem].spelled
    if spelled == stem or not spelled.endswith(stem):
        return place
    return place._replace(prefix=spelled.removesuffix(stem) + place.prefix)


def _variant(taken: Taken, known: Architecture) -> tuple[Architecture, list[str]]:
    """The model with the sizes of the few weights that a file has in others, and their names.

    A first layer that takes more channels, or a modulation of more parts: where nearly all else fits, that is a variant. Where
    much does not, it is another model, and the misfits are told one by one.
    """
    places = {stem: place for stem in taken.groups if (place := index(known).find(stem)) is not None}
    other = {
        place.site.spans[0].weight: taken.deltas[stem].shape  # type: ignore[union-attr]  # a misfit has a change
        for stem, place in places.items()
        if taken.groups[stem].modifier(EXTRA) is None and _is_misfit(taken.deltas.get(stem), place, known)
    }
    inner = [weight for weight, shape in other.items() if not _is_first(weight) or shape[0] != known.shapes[weight][0]]
    if not other or len(inner) > FEW * len(places):
        return known, []
    sized = resized(known, ORIGINAL, {**known.shapes, **other})
    return replace(sized, variant=known.variant, own=known.own), sorted(other)


def _is_misfit(delta: Delta | None, place: Found, known: Architecture) -> bool:
    """Whether a change is for a whole weight of another size than the table's."""
    span = place.site.spans[0]
    whole = len(place.site.spans) == 1 and place.site.component in DENOISERS and place.shape == known.shapes.get(span.weight)
    if not whole or delta is None or isinstance(delta, Miss) or len(delta.shape) < 2:
        return False
    return not fits(delta.shape, place.shape)


def _is_first(weight: str) -> bool:
    """Whether a weight stands outside of all blocks, as the layers do that other inputs make wider."""
    return not any(part.isdigit() for part in weight.split("."))


def _own(found: Found) -> Own:
    return Own(found.site.component, found.site.spans[0].weight, found.shape, found.naming, found.flat)


def _unnamed(arch: Architecture, places: Iterable[Found], *, folder: bool) -> Architecture:
    """A model of which only a file's names are known: they are nobody else's."""
    prefixes = Counter(place.prefix for place in places)
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    denoiser = "unet" if prefix.endswith("unet.") else "transformer"
    return replace(arch, only_prefix="base_model.model." if folder else prefix, denoiser=denoiser)


def _namings(found: Iterable[Found]) -> dict[str, str]:
    """Prefix -> the naming that most known modules have under it."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for place in found:
        if place.naming != ALIAS:
            votes[place.prefix][place.naming] += 1
    return {prefix: own.most_common(1)[0][0] for prefix, own in votes.items()}


def _shape(taken: Taken, stem: str) -> Shape:
    """Of the weight, as far as the module's tensors say it."""
    delta, bias = taken.deltas.get(stem), taken.groups[stem].modifier(BIAS)
    if isinstance(delta, Miss):
        raise UnknownArchitectureError(
            f"no table knows its model, and only that has the shape of {stem}, a MiSS", path=taken.raw.path, hint=BASE
        )
    if delta is not None and delta.shape:
        return delta.shape
    return UNKNOWN_SHAPE if bias is None else (bias.tensor.size,)


PEFT_STATES = MappingProxyType({peft_keys.HARMLESS: "harmless", peft_keys.BASE: "harmless"})
"""Roles of PEFT's own keys."""


def leftovers(taken: Taken) -> tuple[Leftover, ...]:
    """The keys that are no part of a module, each with what is known about it."""
    twice = doubles(taken.raw.tensors)
    told = {key: ("it says what another key says", "harmless") if key in twice else said_of(key) for key in taken.others}
    return tuple(Leftover(key, tensor, *told[key]) for key, tensor in taken.others.items())


def said_of(key: str) -> tuple[str, str]:
    """(reason, state) of a key that is no part of a module; see :class:`Leftover`."""
    for table, state in ((HARMLESS, "harmless"), (KEPT, "kept")):
        for pattern, reason in table:
            if pattern.search(key):
                return reason, state
    pefts = peft_key(key)
    if pefts is not None:
        return pefts.reason, PEFT_STATES.get(pefts.role, "unknown")
    return "not part of any module: its last word is none that an adapter has", "unknown"


def _join_or_refuse(modules: dict[Site, Module], module: Module, taken: Taken) -> None:
    """Two spellings of one weight: a bias apart from its factors is joined, anything else is two answers to one question."""
    first = modules[module.site]
    if module.delta is None and first.bias is None:
        joined = replace(first, bias=module.bias, layer_bias=module.layer_bias)
    elif first.delta is None and module.bias is None:
        joined = replace(module, bias=first.bias, layer_bias=first.layer_bias)
    else:
        raise BrokenModuleError(
            f"{first.name} and {module.name} are the same weight; programs disagree on which one counts",
            key=module.name,
            path=taken.raw.path,
            hint="remove one of the two",
        )
    modules[module.site] = replace(joined, keys={**first.keys, **module.keys})


def own_named(placed: Placed) -> Iterable[str]:
    """What to say of modules that the known model has not, or has in other sizes."""
    if placed.other_sizes:
        yield (
            f"{len(placed.other_sizes)} weights (first: {placed.other_sizes[0]}) have another size than in "
            f"{placed.architecture.name}: the file is taken to be for a variant of it"
        )
    if not placed.own or placed.architecture.only_prefix is not None:
        return
    stems = sorted(placed.own)
    yield (
        f"{len(stems)} modules (first: {stems[0]}) are in no table of {placed.architecture.name}; they keep their names, and "
        "go to no layout with other names"
    )


def layout_of(taken: Taken, found: Mapping[str, Found], arch: Architecture) -> str:
    """The layout most modules are spelled in."""
    if taken.configs is not None:
        return "peft"
    votes: Counter[str] = Counter()
    for stem, place in found.items():
        layout = place.layout
        dialects = {entry.word.dialect for entry in taken.groups[stem].entries.values()}
        if CLONEOFSIMO in dialects:
            layout = CLONEOFSIMO
        elif (layout == "sd-scripts" and place.naming == DIFFUSERS and arch.sd_scripts != DIFFUSERS) or (
            layout == "diffusers" and "kohya" in dialects and not _is_diffusers_own(taken.groups[stem], arch)
        ):
            layout = "onetrainer"
        elif layout == "bare":
            layout = next((name for word, name in _BARE if word in dialects), layout)
        votes[layout] += 1
    if votes["bfl"]:
        return "bfl"
    return votes.most_common(1)[0][0] if votes else "unknown"


def _is_diffusers_own(group: Group, arch: Architecture) -> bool:
    """Whether it is in a family that Diffusers spells as everyone does, without the alpha that OneTrainer always writes."""
    return group.modifier(ALPHA) is None and {e.word.family for e in group.entries.values()} <= arch.diffusers_families


_BARE = (("bfl", "bfl"), ("xlabs", "xlabs"), ("processor", "diffusers"))
"""Dialects that tell whose the names without a prefix are."""


def warnings_of(raw: RawFile, rules: ScaleRules, modules: Iterable[Module]) -> list[str]:
    """What is odd about a file although it can be read: its LoKr factor and the scales that hang on it."""
    modules = list(modules)
    found = unknown_scales(modules)
    buffer, text = raw.tensors.get(FACTOR), raw.metadata.get("ss_lokr_factor")
    if buffer is not None and text is not None and str(round(buffer.item())) != text:
        found.append(f"lokr_factor is {round(buffer.item())} but ss_lokr_factor says {text}; the buffer counts")
    if rules.whole_lokr_by_shape:
        odd = [m.name for m in modules if "max(w2.shape)" in m.scale.source and m.scale.value != 1.0]
        if odd:
            found.append(
                f"{len(odd)} whole LoKr modules have alpha / max(w2.shape) != 1; it is baked in so that every loader agrees"
            )
    return found
