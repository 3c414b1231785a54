"""Which rows of both models become one module of the output, and what has no place in it.

The modules are the target layout's own (sd-scripts trains FLUX with q, k and v fused, Diffusers with them apart), so every
one is put together from whatever rows the two files hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorasurgery.architectures.table import Span
from lorasurgery.errors import NotRepresentableError, RequestError
from lorasurgery.layouts.targets import PEFT, Speller
from lorasurgery.operations.cut.pick import unfitting
from lorasurgery.operations.cut.subject import CONV, kind_of
from lorasurgery.operations.cut.survey import rank_asked
from lorasurgery.site import DENOISER, SECOND_DENOISER, Site
from lorasurgery.verbs.extract.coverage import covers, held_rows, total_rows
from lorasurgery.verbs.extract.pair import BIAS, EMBEDDING, MATRICES, NORM, PARAMETER, Pair
from lorasurgery.verbs.extract.parameters import OTHER, bare_module, excluded, parameters
from lorasurgery.verbs.extract.sd_scripts import left_to

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.models import Model, Weight
    from lorasurgery.operations.cut.options import ResizeOptions
    from lorasurgery.verbs.extract.options import ExtractOptions

    LeftOut = Callable[[str, Site, str], str]
    """kind, site and the target's name of a tensor -> why it is not extracted; empty if it is."""

EMBEDDINGS = frozenset(
    {"token_embedding", "position_embedding", "embed_tokens", "shared", "relative_attention_bias", "word_embeddings"}
)
"""Last parts of names of weights that are looked up, not multiplied."""
SHARED = 0.5
"""Where less than this share of either model's weights is in the other, they are not two versions of one model."""


@dataclass(slots=True)
class Pairs:
    """All of them, and what only one of the models has."""

    pairs: list[Pair] = field(default_factory=list)
    only_base: list[str] = field(default_factory=list)
    only_tuned: list[str] = field(default_factory=list)
    alone: list[int] = field(default_factory=lambda: [0, 0])
    """How many of these two are modules of the denoiser, or of the encoder that the models are."""
    unlike: list[str] = field(default_factory=list)
    """Modules of other shapes in the two, left out as asked."""
    modules: list[Module] = field(default_factory=list)
    """All that either model has."""

    def notes(self, cut: ResizeOptions) -> list[str]:
        """Of ``unlike``, and of names that fit nothing: most likely mistyped."""
        asked = (*cut.include, *cut.exclude, *(pattern for pattern, _ in cut.ranks))
        notes = unfitting(asked, self.modules)
        if self.unlike:
            more = f" and {len(self.unlike) - 1} more" if len(self.unlike) > 1 else ""
            notes.insert(0, f"{self.unlike[0]}{more}: of another shape in each model, left out as asked")
        return notes


def pair_up(base: Model, tuned: Model, options: ExtractOptions) -> Pairs:
    """Match two models by the original weights that they hold.

    Raises RequestError for models of different architectures, of which too little is shared, or whose weights differ in
    shape; NotRepresentableError where the target has no names for the model.
    """
    _same_architecture(base, tuned)
    speller = Speller(options.layout, base.architecture)
    held, main = (held_rows(base), held_rows(tuned)), _main(base, tuned)
    found, left_out = Pairs(), _reasons(base.architecture, options)
    for site in _sites(base, tuned, speller):
        there = [covers(own, site) for own in held]
        rows = [total_rows(own, site) for own in held]
        taller = None not in rows and rows[0] != rows[1]
        if not any(there) and not taller:
            continue
        stem = speller.stem(site) or ""
        module = bare_module(site, stem or _unnamed(site))
        found.modules.append(module)
        if all(there) or taller:
            both = [] if taller else list(_pairs_of(base, tuned, site, stem, left_out))
            alike = [pair for pair in both if pair.base.shape == pair.tuned.shape]
            found.pairs += alike
            if taller or len(alike) < len(both):
                if not excluded(site, stem, options):
                    raise _other_shape(base, tuned, site, both)
                found.unlike.append(module.name)
        else:
            (found.only_base if there[0] else found.only_tuned).append(module.name)
            if site.component == main:
                found.alone[0 if there[0] else 1] += 1
    _check_coverage(found, base, tuned)
    if options.layout.words == PEFT:
        found.pairs = _biases_for_all_or_none(found.pairs, options)
    own = parameters(base, tuned, options)
    found.modules += [bare_module(site, name) for site, name, *_ in own.shared]
    found.modules += [bare_module(Site(OTHER, (Span(key, 0, 1),)), key) for key in (*own.only_base, *own.only_tuned)]
    found.pairs += [Pair(site, name, PARAMETER, one, two, reason) for site, name, one, two, reason in own.shared]
    found.only_base += own.only_base
    found.only_tuned += own.only_tuned
    return found


def _biases_for_all_or_none(pairs: list[Pair], options: ExtractOptions) -> list[Pair]:
    """PEFT gives every LoRA layer a bias or none, and cannot merge one whose own layer has no bias.

    Source: PEFT 0.21 ``LoraConfig.lora_bias`` and ``lora/layer.py``.
    """
    with_bias = {pair.site for pair in pairs if pair.kind == BIAS}
    bare = [p for p in pairs if not (p.is_vector or p.reason or p.site in with_bias)]
    if not bare:
        return pairs
    reason = f"{options.layout.reader} has LoRA biases for all layers or none, and some layers have no bias"
    return [replace(p, reason=reason) if p.kind == BIAS and not p.reason else p for p in pairs]


def _same_architecture(base: Model, tuned: Model) -> None:
    one, two = base.architecture, tuned.architecture
    if one.id != two.id:
        raise RequestError(
            f"its weights are those of {two.name} ({two.key}), the base model's those of {one.name} ({one.key})",
            path=tuned.path, hint="two models of one architecture, or --arch NAME where one was not recognised",
        )  # fmt: skip


def _sites(base: Model, tuned: Model, speller: Speller) -> Iterator[Site]:
    """Every module the target may have of this architecture; encoders' (and a second expert's) as either model has them."""
    arch = base.architecture
    naming = speller.namings[0].naming
    names = arch.namings[naming]
    if not names and base.component == DENOISER:
        raise NotRepresentableError(
            f"{arch.name} has no {naming} names", module=arch.name, path=base.path, hint="--target comfyui or sd-scripts"
        )
    yield from (Site(DENOISER, spans) for spans in names.values())
    seen: dict[Site, None] = {}
    for model in (base, tuned):
        for component, spans in model.sites():
            if component != DENOISER:
                seen.update((Site(component, (span,)), None) for span in spans)
    yield from seen


def _unnamed(site: Site) -> str:
    """A name for what the target has none for."""
    return f"{site} [{', '.join(f'{span.start}:{span.stop}' for span in site.spans)}]"


def _pairs_of(base: Model, tuned: Model, site: Site, stem: str, left_out: LeftOut) -> Iterator[Pair]:
    """The weight of a module, and its bias."""
    readers = base.reader(*site), tuned.reader(*site)
    biases = base.bias_reader(*site), tuned.bias_reader(*site)
    name, shape = site.spans[0].weight, readers[0].shape
    kind = NORM if len(shape) == 1 else EMBEDDING if name.rpartition(".")[2] in EMBEDDINGS else kind_of(shape)
    for own, (one, two) in ((kind, readers), (BIAS, biases)):
        if one is not None and two is not None:
            yield Pair(site, stem or _unnamed(site), own, one, two, left_out(own, site, stem))


def _reasons(arch: Architecture, options: ExtractOptions) -> LeftOut:
    """Everything that keeps a tensor out."""
    layout, scripts = options.layout, left_to(arch, conv=options.conv) if options.as_sd_scripts else None

    def left_out(kind: str, site: Site, stem: str) -> str:
        matrix = kind in MATRICES
        reasons = (
            (site.component == SECOND_DENOISER, "the second expert, to be extracted from its own folder"),
            (not stem, f"{layout.reader} has no name for it"),
            (excluded(site, stem, options), "excluded"),
            (site.component != DENOISER and not options.text_encoders, "a text encoder's"),
            (kind == CONV and not options.conv, "a convolution with a kernel"),
            (kind in (NORM, BIAS) and options.small == "none", f"a {kind}"),
            (kind == EMBEDDING and options.small != "all", "an embedding"),
            (kind == NORM and "norm" not in layout.holds, f"{layout.reader} does not load norms"),
            (kind == EMBEDDING and "full" not in layout.holds, f"{layout.reader} loads no embeddings"),
            (matrix and rank_asked(bare_module(site, stem), kind, options.cut) == 0, "rank 0 is asked for it"),
        )
        found = next((reason for applies, reason in reasons if applies), "")
        return scripts(site) if not found and matrix and scripts is not None else found

    return left_out


def _first_weight(model: Model, site: Site) -> Weight:
    """A tensor that holds rows of a site's first weight."""
    return next(
        w for w in model.weights.values()
        if w.place is not None and w.role != BIAS and w.place.component == site.component
        and w.place.spans[0].weight == site.spans[0].weight
    )  # fmt: skip


def _other_shape(base: Model, tuned: Model, site: Site, pairs: Sequence[Pair]) -> RequestError:
    """For the first of the pairs that are not of one shape; for the weights where there are no pairs."""
    differ = ((own.base.parts[0].weight, own.tuned.parts[0].weight) for own in pairs if own.base.shape != own.tuned.shape)
    one, two = next(differ, None) or (_first_weight(base, site), _first_weight(tuned, site))
    return RequestError(
        f"{two.key} has {list(two.shape)}, the base model's {one.key} {list(one.shape)}",
        path=two.file.path,
        hint=f'the base model it was tuned from, or --exclude "{site.spans[0].weight}" to leave it out',
    )


def _main(base: Model, tuned: Model) -> str:
    """The component that is compared before all: the denoiser, or the encoder where one of the models is nothing else."""
    return base.component if base.component != DENOISER else tuned.component


def _check_coverage(found: Pairs, base: Model, tuned: Model) -> None:
    """An all-in-one file may stand beside a bare denoiser, so only the denoiser counts; of a text encoder, the encoder."""
    main = _main(base, tuned)
    both = sum(pair.kind != BIAS and pair.site.component == main for pair in found.pairs)
    if both == 0 or both < SHARED * (both + max(found.alone)):
        only = (*found.only_base[:1], *found.only_tuned[:1])
        raise RequestError(
            f"only {both} of its weights are in {base.path} too (not in both: {', '.join(only) or 'all'})",
            path=tuned.path, hint="the model it was tuned from",
        )  # fmt: skip
