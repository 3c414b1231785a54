"""From an Adapter to keys: the only place that writes names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.deltas.full import Full, Opaque
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.miss import Miss
from lorasurgery.deltas.rounding import multiplied
from lorasurgery.errors import NotRepresentableError, RequestError, ValueRangeError
from lorasurgery.io.tensors import Tensor, of_bytes, scalar, zeros
from lorasurgery.layouts.detect import expected_shape
from lorasurgery.layouts.module import LARGEST_SCALE
from lorasurgery.layouts.peft_keys import EMBEDDING_WORDS, is_embedding, transposed
from lorasurgery.layouts.scales import LARGEST_ALPHA
from lorasurgery.layouts.targets import PEFT, SUFFIXES, Layout, Speller

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lorasurgery.adapter import Adapter, Magnitude, Module
    from lorasurgery.deltas.base import Delta
    from lorasurgery.io.tensors import Shape
    from lorasurgery.report import Report

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
    policy = alpha or target.alphas[0]
    if policy not in target.alphas:
        raise RequestError(
            f"{target.reader} cannot take its scale by --alpha {policy}", hint="--alpha " + " or ".join(target.alphas)
        )
    report.scale_written = policy
    speller = Speller(target, adapter.architecture, prefix)
    result = Emitted()
    for module in adapter.modules.values():
        stem = speller.stem(module.site)
        if stem is None:
            raise NotRepresentableError(
                f"{module.name}: {target.reader} has no name for it",
                module=module.name,
                path=adapter.path,
                hint="--drop te to leave the text encoders out, or --drop REGEX",
            )
        shape = expected_shape(adapter.architecture, module.site)
        _module(module, stem, shape, target, policy, report, result)
    if target.words == PEFT and any(m.bias is not None for m in adapter.modules.values()):
        _complete_biases(result, target)
    return result


def _module(module: Module, stem: str, shape: Shape, target: Layout, policy: str, report: Report, result: Emitted) -> None:
    words = SUFFIXES[target.words]
    tensors: dict[str, Tensor] = {}
    scale, rank = module.scale.value, 1
    record = _recorder(report, module.name)
    if module.delta is not None:
        delta, alpha, scale = _scaled(module, module.delta, policy, target, record)
        turned = target.words == PEFT and isinstance(delta, LowRank) and is_embedding(stem, delta.up)
        for slot, tensor in delta.tensors.items():
            if turned:
                tensors[stem + EMBEDDING_WORDS[slot]] = transposed(tensor)
                continue
            if isinstance(delta, LowRank) and not target.any_shape:
                tensor = _fitted(delta, slot, tensor, shape)  # noqa: PLW2901  the same factor, seen in another shape
            tensors[stem + _suffix(delta, slot, words)] = tensor
        if alpha is not None:
            tensors[f"{stem}.alpha"] = alpha
        rank = delta.rank or (max(delta.inner) if isinstance(delta, Kronecker) else 1)
    if module.magnitude is not None:
        # transformers 5 loads text encoders' adapters itself and, unlike PEFT, wants the parameter's whole name.
        whole = ".weight" if target.id == "diffusers" and module.site.component in TEXT_ENCODERS else ""
        tensors[stem + words["magnitude"] + whole] = _magnitude(module, module.magnitude, target)
    if module.bias is not None:
        family = "norm bias" if module.family == "norm" else "bias"
        bias = module.bias
        if target.words == PEFT and scale != 1.0:  # PEFT multiplies lora_B's bias by the scale too
            bias = multiplied(bias, 1.0 / scale, record)
        tensors[stem + words[family]] = bias
    if target.words != PEFT:
        tensors.update({stem + suffix: tensor for suffix, tensor in module.extras.items()})
    result.tensors.update(tensors)
    result.written.append(Written(stem, module, rank, scale * rank, shape, tuple(tensors)))


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
    def record(error: float, norm: float) -> None:
        report.losses.record(name, error, norm)

    return record


def _scaled(
    module: Module, delta: Delta, policy: str, target: Layout, record: Callable[[float, float], None]
) -> tuple[Delta, Tensor | None, float]:
    """(delta as written, alpha tensor or None, scale that remains for the reader)."""
    value, stored = module.scale.value, module.scale.alpha
    if stored is None and value and not SMALLEST_SCALE <= abs(value) < LARGEST_SCALE:
        raise ValueRangeError(f"{module.name} would have the scale {value:g}, which no reader takes", hint="another weight")
    if isinstance(delta, (Full, Miss, Opaque)):
        return delta.scaled(value, record) if value != 1.0 else delta, None if value != 1.0 else stored, 1.0
    if isinstance(delta, Kronecker) and delta.rank is None:
        return _whole_kronecker(delta, module, target, record)
    rank = delta.rank or 1
    if policy == "header":
        return delta, None, value
    keeps = policy == "keep" or (target.id == "other" and isinstance(delta, (Hadamard, Kronecker)))
    if not keeps:
        return delta.scaled(value, record), scalar(rank) if target.always_alpha else None, 1.0
    if stored is not None:
        return delta, stored, value
    return delta, scalar(value * rank) if target.always_alpha or value != 1.0 else None, value


def _whole_kronecker(
    delta: Kronecker, module: Module, target: Layout, record: Callable[[float, float], None]
) -> tuple[Delta, Tensor | None, float]:
    """A LoKr with both factors whole: the scale goes into w1, because loaders disagree on what alpha means there.

    Where an alpha is written beside a folded scale it is max(w2.shape), which every rule reads as 1.
    """
    if target.id == "peft":
        return delta.scaled(module.scale.value, record), None, 1.0
    stored = module.scale.alpha
    if module.scale.value == 1.0 and stored is not None and abs(stored.item()) < LARGEST_ALPHA:
        return delta, stored, 1.0
    neutral = scalar(max(delta.inner)) if stored is not None or target.always_alpha else None
    return delta.scaled(module.scale.value, record), neutral, 1.0


def _suffix(delta: Delta, slot: str, words: Mapping[str, str]) -> str:
    if isinstance(delta, Opaque):
        return (
            words.get("set", ".set_weight") if delta.family == "set" else slot
        )  # BFL's own word, `.scale`, is understood in its files only
    if isinstance(delta, Hadamard):
        return f".hada_{slot}"
    if isinstance(delta, Kronecker):
        return f".lokr_{slot}"
    if isinstance(delta, Miss):
        return f".{slot}"
    return words.get(slot, f".{slot}")


def _magnitude(module: Module, magnitude: Magnitude, target: Layout) -> Tensor:
    """In the reader's shape: (out, 1...) or (1, in...) for dora_scale, (out,) or (1, out, 1, 1) for PEFT."""
    size, delta = magnitude.tensor.size, module.delta
    kernel = delta.shape[2:] if delta is not None else ()
    ones = tuple(1 for _ in kernel)
    if target.words != PEFT:
        return magnitude.tensor.reshape(*((size, 1) if magnitude.axis == "out" else (1, size)), *ones)
    return magnitude.tensor.reshape(*((1, size, *ones) if kernel else (size,)))


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
