"""From an Adapter to keys: the only place that writes names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod, sqrt
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.deltas.dora import magnitude_shape
from lorasurgery.deltas.full import Full, Opaque
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.miss import Miss
from lorasurgery.deltas.rounding import multiplied, rounded
from lorasurgery.errors import NotRepresentableError, RequestError, ValueRangeError
from lorasurgery.io.dtypes import wide
from lorasurgery.io.tensors import Tensor, of_bytes, scalar, zeros
from lorasurgery.layouts import sd_scripts_oft
from lorasurgery.layouts.composed import as_composed
from lorasurgery.layouts.detect import expected_shape
from lorasurgery.layouts.diffusers_lokr import refuse_unfit
from lorasurgery.layouts.module import LARGEST_SCALE, is_layer
from lorasurgery.layouts.peft_keys import EMBEDDING_WORDS, is_embedding, saved_key, transposed
from lorasurgery.layouts.scales import HEADER_KEY, LARGEST_ALPHA
from lorasurgery.layouts.targets import PEFT, SUFFIXES, Layout, Speller

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lorasurgery.adapter import Adapter, Magnitude, Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Shape
    from lorasurgery.report import Report

EMBEDDING = ".lora_embedding_"
"""In the keys of PEFT's LoRA of an embedding, whose factors are turned over."""
SMALLEST_SCALE = 1e-30
"""Below it alpha, in fp32, loses digits and becomes 0."""


@dataclass(frozen=True, slots=True)
class Written:
    """One module as written: what a PEFT configuration needs to know about it."""

    stem: str
    module: Module
    rank: int
    alpha: float
    shape: Shape
    """Of the base weight: (out, in[, k...])."""
    keys: tuple[str, ...]
    """The keys it was written to."""


class _Way(NamedTuple):
    """A change as it is written, its alpha tensor if it has one, and the scale that remains for the reader."""

    delta: Delta
    alpha: Tensor | None
    scale: float


@dataclass(slots=True)
class Emitted:
    """Keys and tensors of a file, and the modules behind them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    written: list[Written] = field(default_factory=list)


def emit(
    adapter: Adapter, target: Layout, report: Report, *, alpha: str | None = None, prefix: str = "diffusion_model"
) -> Emitted:
    """The keys of a converted adapter in its layout.

    ``alpha`` is ``keep``, ``fold`` or ``header``; None is the layout's own way. Rounding errors of folding reach
    ``report`` when the tensors are computed. Raises NotRepresentableError for a module the layout has no name for,
    RequestError for a way of carrying alpha it does not have.
    """
    policy = alpha or (_own_way(adapter, target) if target.own else target.alphas[0])
    if policy not in target.alphas:
        raise RequestError(
            f"{target.reader} cannot take its scale by --alpha {policy}", hint="--alpha " + " or ".join(target.alphas)
        )
    report.scale_written = policy
    speller = Speller(target, adapter.architecture, prefix)
    result = Emitted()
    network = _oft_network(adapter, target, speller)
    for module in network or adapter.modules.values():
        stem = module.name if target.own and module.keys else speller.stem(module.site)
        if stem is None:
            reason, hint = target.no_name
            raise NotRepresentableError(f"{module.name}: {reason}", module=module.name, path=adapter.path, hint=hint)
        if network:
            stem = sd_scripts_oft.PREFIX + stem.removeprefix(target.denoiser.prefix)
        shape = expected_shape(adapter.architecture, module.site)
        way = "keep" if target.own and alpha is None and "alpha" in module.keys else policy
        _module(module, stem, shape, target, way, report, result)
    if target.words == PEFT and not target.own and any(m.bias is not None for m in adapter.modules.values()):
        _complete_biases(result, target)
    if target.id == "diffusers" and not target.own:
        refuse_unfit({own.stem: own.module for own in result.written}, adapter.path)
    return result


def _oft_network(adapter: Adapter, target: Layout, speller: Speller) -> list[Module]:
    """The modules as sd-scripts' own OFT network has them, where it can be one; LyCORIS' network otherwise, and none here."""
    if target.own or target.id != "sd-scripts":
        return []
    model = adapter.architecture.id
    found = {
        speller.stem(module.site) or "": module.with_delta(sd_scripts_oft.listed(model, module.delta))
        for module in adapter.modules.values() if isinstance(module.delta, Opaque)
    }  # fmt: skip
    alphas = {name: None if (own := module.scale.alpha) is None else own.item() for name, module in found.items()}
    fits = len(found) == len(adapter.modules) and all(
        name.startswith(target.denoiser.prefix) and module.bias is None for name, module in found.items()
    )  # the network has the UNet or transformer alone
    problem = sd_scripts_oft.unfit(model, {name: (module.delta, alphas[name]) for name, module in found.items()})
    return list(found.values()) if fits and not problem else []


def _module(module: Module, stem: str, shape: Shape, target: Layout, policy: str, report: Report, result: Emitted) -> None:
    words = SUFFIXES[target.words]
    composed = as_composed(module, _recorder(report, module.name)) if target.own else None
    keys: Mapping[str, str] = module.keys if target.own and (module.composed is None or composed is not None) else {}
    scale, rank = module.scale.value, 1
    tensors: dict[str, Tensor] = {}
    if composed is not None:
        tensors, scale = composed
    elif module.delta is not None:
        way = _scaled(module, module.delta, policy, target, _recorder(report, module.name))
        tensors = _change(module, stem, keys, shape, target, way, report)
        delta, _, scale = way
        rank = delta.rank or (max(delta.inner) if isinstance(delta, Kronecker) else 1)
    if module.magnitude is not None:
        # transformers 5 loads text encoders' adapters itself and, unlike PEFT, wants the parameter's whole name.
        whole = ".weight" if target.id == "diffusers" and module.site.component in TEXT_ENCODERS else ""
        tensor = module.magnitude.tensor if "magnitude" in keys else _magnitude(module.magnitude, shape, target)
        tensors[keys.get("magnitude", stem + words["magnitude"] + whole)] = tensor
    if module.bias is not None:
        family = "norm bias" if f"{stem}.w_norm" in tensors else "bias"
        key = keys.get("bias", stem + words[family])
        tensors[key] = _bias(module, key, scale, _recorder(report, module.name))
    if target.words != PEFT or target.own:
        tensors.update({keys.get(suffix, stem + suffix): tensor for suffix, tensor in module.extras.items()})
    result.tensors.update(tensors)
    result.written.append(Written(stem, module, rank, scale * rank, shape, tuple(tensors)))


def _change(
    module: Module, stem: str, keys: Mapping[str, str], shape: Shape, target: Layout, way: _Way, report: Report
) -> dict[str, Tensor]:
    """The factors and the alpha under their keys."""
    delta, alpha, scale = way
    words, tensors = SUFFIXES[target.words], dict[str, Tensor]()
    turned = isinstance(delta, LowRank) and (
        any(EMBEDDING in key for key in keys.values()) or (target.words == PEFT and not keys and is_embedding(stem, delta.up))
    )
    for slot, tensor in delta.tensors.items():
        if turned:
            tensors[keys.get(slot, stem + EMBEDDING_WORDS[slot])] = transposed(tensor)
            continue
        whole = saved_key(stem, slot) if target.words == PEFT and delta.family == "set" and not keys else None
        if whole is not None:
            tensors[whole] = tensor
            continue
        if isinstance(delta, LowRank) and not target.any_shape:
            tensor = _fitted(delta, slot, tensor, shape)  # noqa: PLW2901  the same factor, seen in another shape
        tensors[keys.get(slot) or keys.get(slot.lstrip(".")) or stem + _suffix(delta, slot, words, target)] = tensor
    if alpha is not None:
        tensors[keys.get("alpha", f"{stem}.alpha")] = alpha
        stored = alpha.item() / (sqrt(delta.rank or 1) if target.rslora else delta.rank or 1)
        own = alpha is module.scale.alpha or alpha is module.scale.stored
        if not own and scale not in (1.0, stored):
            report.losses.add(module.name, (stored / scale - 1.0) ** 2)  # alpha is a float32 of scale times rank
    return tensors


def _bias(module: Module, key: str, scale: float, record: Callable[[float, float], None]) -> Tensor:
    """The bias as its reader takes it: that of a layer (``lora_B.bias``) is multiplied by the module's scale there."""
    assert module.bias is not None  # noqa: S101  the caller has looked
    layer, factor = module.layer_bias, 1.0 / scale if is_layer(key) and scale not in (0.0, 1.0) else 1.0
    if layer is None or layer.read is not module.bias:
        return module.bias if factor == 1.0 else multiplied(module.bias, factor, record)
    if is_layer(key) and layer.scale == scale:
        return layer.stored
    exact = layer.stored if wide(layer.stored.dtype) == "float64" else rounded(layer.stored, "F32")
    return multiplied(exact, layer.scale * factor, record)  # once more than when it was read, so that its rounding is known


def _own_way(adapter: Adapter, target: Layout) -> str:
    """How a file's own spelling carries scales without alpha tensors.

    A header that not every program reads is right only as long as it says what it said: a file that was scaled is to act
    otherwise in all of them, so that the scale goes into the factors.
    """
    policy = target.alphas[0]
    if policy != "header" or target.folder:
        return policy
    changed = (m for m in adapter.modules.values() if m.delta is not None and m.scale.value != 1.0)
    return policy if all(m.scale.source == HEADER_KEY for m in changed) else "fold"


def _fitted(delta: LowRank, slot: str, tensor: Tensor, shape: Shape) -> Tensor:
    """A factor with as many axes as the layer it becomes, for readers that copy it into one.

    LyCORIS writes (out, rank) for convolutions in DyLoRA, LoKr and LoHa are flat there, and some files have 1x1
    convolutions for linear layers.
    """
    kernel = shape[2:]
    ones = tuple(1 for _ in kernel)
    wanted = tensor.shape
    if slot == "up":
        wanted = (tensor.shape[0], tensor.shape[1], *ones)
    elif slot == "down":
        wanted = (tensor.shape[0], *shape[1:2], *(kernel if delta.mid is None else ones))
    return tensor.reshape(*wanted) if prod(wanted) == tensor.size else tensor


def _recorder(report: Report, name: str) -> Callable[[float, float], None]:
    return partial(report.losses.record, name)


def _scaled(module: Module, delta: Delta, policy: str, target: Layout, record: Callable[[float, float], None]) -> _Way:
    """How a module's change and scale are written."""
    value, stored = module.scale.value, module.scale.alpha or (module.scale.stored if target.own else None)
    if target.own and stored is not None and policy == "keep":
        return _Way(delta, stored, value)
    if stored is None and value and not SMALLEST_SCALE <= abs(value) < LARGEST_SCALE:
        raise ValueRangeError(f"{module.name} would have the scale {value:g}, which no reader takes", hint="another weight")
    if isinstance(delta, (Full, Miss, Opaque)):
        return _Way(delta.scaled(value, record) if value != 1.0 else delta, None if value != 1.0 else stored, 1.0)
    if isinstance(delta, Kronecker) and delta.rank is None:
        return _whole_kronecker(delta, module, target, record)
    if policy == "header":
        return _Way(delta, None, value)
    return _factored(module, delta, policy, target, record)


def _factored(module: Module, delta: Delta, policy: str, target: Layout, record: Callable[[float, float], None]) -> _Way:
    """The same for factors, whose scale is alpha / rank."""
    value, stored, rank = module.scale.value, module.scale.alpha, delta.rank or 1
    keeps = policy == "keep" or (target.id == "other" and isinstance(delta, (Hadamard, Kronecker)))
    if not keeps:
        return _Way(delta.scaled(value, record), scalar(rank) if target.always_alpha else None, 1.0)
    if stored is not None:
        return _Way(delta, stored, value)
    known = target.always_alpha or (target.own and "alpha" in module.keys)
    return _Way(delta, scalar(value * (sqrt(rank) if target.rslora else rank)) if known or value != 1.0 else None, value)


def _whole_kronecker(delta: Kronecker, module: Module, target: Layout, record: Callable[[float, float], None]) -> _Way:
    """A LoKr with both factors whole: the scale goes into w1, because loaders disagree on what alpha means there.

    Where an alpha is written beside a folded scale it is max(w2.shape), which every rule reads as 1.
    """
    if target.words == PEFT and not target.own:
        return _Way(delta.scaled(module.scale.value, record), None, 1.0)
    stored = module.scale.alpha
    if module.scale.value == 1.0 and stored is not None and abs(stored.item()) < LARGEST_ALPHA:
        return _Way(delta, stored, 1.0)
    neutral = scalar(max(delta.inner)) if stored is not None or target.always_alpha else None
    return _Way(delta.scaled(module.scale.value, record), neutral, 1.0)


def _suffix(delta: Delta, slot: str, words: Mapping[str, str], target: Layout) -> str:
    if isinstance(delta, Opaque):
        return words["set"] if delta.family == "set" else slot  # BFL's own word, `.scale`, is understood in its files only
    if delta.family == "norm" and target.denoiser.flat and not target.own:
        return words["norm"]  # LyCORIS' word; ComfyUI reads it and ``diff``
    if isinstance(delta, Hadamard):
        return f".hada_{slot}"
    if isinstance(delta, Kronecker):
        return f".lokr_{slot}"
    if isinstance(delta, Miss):
        return f".{slot}"
    return words.get(slot, f".{slot}")


def _magnitude(magnitude: Magnitude, shape: Shape, target: Layout) -> Tensor:
    """In the reader's shape, for a weight of ``shape``, which may be flat where only flat factors tell it."""
    tensor = magnitude.tensor
    axes = max(len(shape), len(tensor.shape)) if target.own else len(shape)
    return tensor.reshape(*magnitude_shape(tensor.size, magnitude.axis, axes, peft=target.words == PEFT))


def _complete_biases(result: Emitted, target: Layout) -> None:
    """PEFT gives every lora_B a bias or none: modules without one get zeros."""
    suffix = SUFFIXES[target.words]["bias"]
    for i, written in enumerate(result.written):
        key = written.stem + suffix
        up = result.tensors.get(written.stem + SUFFIXES[target.words]["up"])
        if up is not None and key not in result.tensors:
            result.tensors[key] = zeros(up.dtype, (up.shape[0],))
            result.written[i] = replace(written, keys=(*written.keys, key))


def common(values: list[float]) -> float:
    """The most frequent value: a configuration's default, so that its patterns stay short."""
    return Counter(values).most_common(1)[0][0]


def reshape_weight(shape: tuple[int, ...]) -> Tensor:
    """ComfyUI's ``reshape_weight``: the shape the base weight is zero-padded to before the delta is added."""
    return of_bytes("I64", (len(shape),), b"".join(n.to_bytes(8, "little") for n in shape))
