"""The tree of data that describes a file, and its JSON form (documented in docs/inspect.md)."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from types import MappingProxyType
from typing import Any, NamedTuple

SCHEMA = 1
"""Version of the JSON form: raised when a field changes its meaning or goes away, not when one is added."""

Table = Mapping[str, Any]
_EMPTY: Table = MappingProxyType({})


class Finding(NamedTuple):
    """Something that is wrong or suspicious: a stable code and a sentence."""

    code: str
    message: str


class Trainer(NamedTuple):
    """The program that most likely wrote the file, and why."""

    name: str
    evidence: tuple[str, ...]
    processed_by: tuple[str, ...] = ()
    """Programs that changed it afterwards."""


class Key(NamedTuple):
    """One tensor of the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]


class ModuleInfo(NamedTuple):
    """One module of an adapter, from its header."""

    name: str
    """As the file spells it."""
    component: str
    """``denoiser``, ``denoiser_2``, a text encoder's table (``clip_l``), or ``unknown``."""
    weight: str | None
    """The original base weight, None when no table knows the module."""
    block: str
    """What the weight's name has up to its first number: ``double_blocks.3``."""
    kind: str
    """The rest of the name: ``img_attn.qkv``."""
    family: str
    rank: int | None = None
    alpha: float | None = None
    """None when there is none, or it is no finite number."""
    scale: float | None = None
    scale_source: str = ""
    shape: tuple[int, ...] = ()
    """(out, in[, k...]) of the change."""
    kernel: tuple[int, ...] = ()
    """Of the base weight, when it is a convolution."""
    tucker: bool = False
    dora: str | None = None
    """Axis of the DoRA magnitude: ``out``, ``in`` or None."""
    outer: tuple[int, int] | None = None
    """Shape of a LoKr's w1."""
    dtype: str = ""
    parameters: int = 0
    bytes: int = 0
    fused: bool | None = None
    """Whether it is a whole fused weight (True), a part of one (False), or of a weight that is not fused (None)."""
    problem: str | None = None
    """Why a program would refuse it."""

    def to_json(self) -> dict[str, Any]:
        """A plain object."""
        found = self._asdict()
        for name in ("alpha", "scale"):
            if found[name] is not None and not isfinite(found[name]):
                found[name] = None
        return found


class Numbers(NamedTuple):
    """How often each value occurs."""

    min: float | None
    max: float | None
    histogram: Mapping[str, int]


NONE = Numbers(None, None, {})


class LokrFactor(NamedTuple):
    """The LoKr factor as the file says it, and as the shapes of its modules allow it."""

    buffer: int | None
    metadata: int | None
    implied: tuple[int, ...]
    """Factors whose factorisation gives the shape of every w1; -1 is LyCORIS' automatic one."""
    agree: bool | None
    """Whether everything that is said agrees with the shapes; None when nothing is said or nothing implied."""
    outer: Mapping[str, int]
    """Shapes of w1 and how often they occur: ``8x8``."""


class Description(NamedTuple):
    """Everything that is known about one file."""

    path: str
    kind: str
    """``adapter``, or what else the file is: ``checkpoint``, ``denoiser``, ``vae``, ``text-encoder``, ..."""
    summary: str
    """One line."""
    container: str
    """``safetensors``, ``pytorch``, ``peft-folder`` or ``gguf``."""
    size: int
    """Bytes on disk."""
    architecture: str = "unknown"
    variant: str = ""
    architecture_name: str = ""
    candidates: tuple[tuple[str, float], ...] = ()
    """Tables that explain the keys, with the share of modules each explains."""
    undecided: tuple[str, ...] = ()
    """Other architectures that explain everything and would be converted otherwise."""
    coverage: float = 0.0
    """Share of the modules that the architecture explains."""
    evidence: tuple[str, ...] = ()
    """Why it is for this architecture, as sentences without a full stop."""
    layout: str = "unknown"
    trainer: Trainer | None = None
    families: Mapping[str, int] = _EMPTY
    components: Mapping[str, int] = _EMPTY
    rank: Numbers = NONE
    alpha: Numbers = NONE
    scale: Numbers = NONE
    scale_sources: Mapping[str, int] = _EMPTY
    dtype: Mapping[str, int] = _EMPTY
    """dtype -> number of parameters."""
    tensors: int = 0
    parameters: int = 0
    dora: Mapping[str, int] = _EMPTY
    """Axis -> number of modules."""
    kernels: Mapping[str, int] = _EMPTY
    """Convolution kernel -> number of modules."""
    tucker: int = 0
    qkv: str | None = None
    """``fused``, ``split``, ``mixed``; None when the architecture has no fused weights or the file touches none."""
    lokr_factor: LokrFactor | None = None
    metadata: Mapping[str, Table] = _EMPTY
    """Key -> {"type", "value"}, JSON in strings unfolded."""
    training: Mapping[str, Any] = _EMPTY
    triggers: Mapping[str, Any] = _EMPTY
    tags: tuple[tuple[str, int], ...] | None = None
    """With --tags: every training tag and how often it occurs."""
    embeddings: tuple[str, ...] = ()
    """Keys of learned tokens bundled with the adapter."""
    unexplained: tuple[tuple[str, str], ...] = ()
    """(key, reason)."""
    warnings: tuple[Finding, ...] = ()
    modules: tuple[ModuleInfo, ...] = ()
    keys: tuple[Key, ...] | None = None
    """With --keys."""
    spectrum: Any = None
    """With --spectrum: :class:`lorasurgery.inspection.spectrum.Spectrum`."""

    def to_json(self) -> dict[str, Any]:
        """A plain object for ``--json``."""
        found: dict[str, Any] = {"schema": SCHEMA} | {
            name: plain_value(value) for name, value in self._asdict().items() if name != "modules"
        }
        found["modules"] = [module.to_json() for module in self.modules]
        found["candidates"] = [{"architecture": key, "explains": share} for key, share in self.candidates]
        found["unexplained"] = [{"key": key, "reason": reason} for key, reason in self.unexplained]
        if self.tags is not None:
            found["tags"] = [{"tag": tag, "count": count} for tag, count in self.tags]
        return found


def plain_value(value: Any) -> Any:  # noqa: ANN401  any tree of data
    """``value`` as JSON has it; a float that is no finite number becomes None."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_value(own) for key, own in value.items()}
    if hasattr(value, "_asdict"):
        return {key: plain_value(own) for key, own in value._asdict().items()}
    return [plain_value(own) for own in value]
