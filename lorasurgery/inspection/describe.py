"""From a path to a :class:`~lorasurgery.inspection.description.Description`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorasurgery.errors import FileFormatError, NotAnAdapterError
from lorasurgery.inspection.checks import findings
from lorasurgery.inspection.description import NONE, Description, Finding, Key, Numbers
from lorasurgery.inspection.gguf import describe_gguf, is_gguf
from lorasurgery.inspection.lokr import lokr_factor
from lorasurgery.inspection.scalars import SHAPE, SMALL, with_scalars
from lorasurgery.inspection.structure import Structure, read_structure
from lorasurgery.inspection.trainers import key_signs, trainer
from lorasurgery.inspection.training import tag_counts, training_summary, trigger_words, unfolded
from lorasurgery.io.dtypes import INTEGERS
from lorasurgery.io.header import read_safetensors
from lorasurgery.io.peft_folder import is_peft_folder, read_peft_folder, whole_folder
from lorasurgery.io.sniff import TORCH_SUFFIXES, a_folder
from lorasurgery.layouts.peft_read import read_peft

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.layouts.scales import PeftConfig

CONFIG = "adapter_config.json"
KEPT = 64
"""Structures remembered: the files of a folder often have the same keys."""

_known: dict[Any, Structure] = {}


class Opened(NamedTuple):
    """A file's header, and a PEFT folder's configurations."""

    raw: RawFile
    container: str
    size: int
    configs: Mapping[str, PeftConfig] | None
    fields: Mapping[str, Mapping[str, Any]]
    """The configurations as JSON, for the metadata."""
    problem: str = ""
    """Why they are not used."""


def describe(path: str | Path, *, keys: bool = False, tags: bool = False, spectrum: bool = False) -> Description:
    """Describe any file: an adapter, or what else it is.

    Only the header and the scalar tensors are read, unless ``spectrum`` asks for the factors. ``keys`` and ``tags`` fill
    the fields of that name. Raises SurgeryError, which says what the file is, when it cannot be read, and OSError.
    """
    path = Path(path)
    if is_gguf(path):
        return describe_gguf(path)
    opened = _open(path)
    raw = opened.raw
    listed = tuple(Key(name, t.dtype, t.shape) for name, t in raw.tensors.items()) if keys else None
    try:
        found = _structure(raw, opened.configs, keep=spectrum)
    except NotAnAdapterError as error:
        return _no_adapter(opened, error, tags=tags)._replace(keys=listed)
    result = _adapter(opened, found, tags=tags)._replace(keys=listed)
    if spectrum:
        from lorasurgery.inspection.spectrum import spectrum_of

        result = result._replace(spectrum=spectrum_of(found.sources, found.modules))
    return result


def _open(path: Path) -> Opened:
    path = whole_folder(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() in TORCH_SUFFIXES:
        from lorasurgery.io.torchfile import read_torch

        return Opened(with_scalars(read_torch(path)), "pytorch", path.stat().st_size, None, {})
    return Opened(with_scalars(read_safetensors(path)), "safetensors", path.stat().st_size, None, {})


def _open_folder(path: Path) -> Opened:
    """A PEFT folder."""
    if is_peft_folder(path):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        try:
            raw, configs = read_peft(path)
        except FileFormatError as error:  # a configuration that says what nothing here reads: the rest is shown
            raw, said = read_peft_folder(path)
            return Opened(with_scalars(raw), "peft-folder", size, {}, said, error.message)
        fields = {component if len(configs) > 1 else "": own.fields for component, own in configs.items()}
        return Opened(with_scalars(raw), "peft-folder", size, configs, fields)
    raise a_folder(path)


def _structure(raw: RawFile, configs: Mapping[str, PeftConfig] | None, *, keep: bool) -> Structure:
    """The structure of a file, remembered by everything it is made from: keys, shapes, scalars and what the metadata says."""
    if keep:
        return read_structure(raw, configs, keep=True)._replace(signs=key_signs(raw.tensors))
    said = ("ss_base_model_version", "modelspec.architecture", "lora_adapter_metadata", "ss_lokr_factor")
    tensors = raw.tensors.values()
    scalars = [t.tobytes() for t in tensors if len(t.regions) == 1 and _counts(t)]
    shapes = (tuple(raw.tensors), tuple([t.shape for t in tensors]), tuple([t.dtype for t in tensors]), tuple(scalars))
    key = (shapes, tuple(raw.metadata.get(name) for name in said), str(configs))
    if key not in _known:
        if len(_known) >= KEPT:
            _known.pop(next(iter(_known)))
        _known[key] = read_structure(raw, configs)._replace(signs=key_signs(raw.tensors))
    return _known[key]


def _counts(tensor: Tensor) -> bool:
    """Whether the values of a tensor decide what is shown: a number, or a shape (``reshape_weight``, ``bias_size``)."""
    return tensor.nbytes <= SMALL if tensor.size == 1 else tensor.nbytes <= SHAPE and tensor.dtype in INTEGERS


def _common(opened: Opened, *, tags: bool) -> dict[str, Any]:
    """The fields that every file has."""
    raw = opened.raw
    typed = unfolded(raw.metadata)
    for component, fields in opened.fields.items():
        typed[f"{component}/{CONFIG}" if component else CONFIG] = {"type": "json", "value": dict(fields)}
    dtypes: Counter[str] = Counter()
    for tensor in raw.tensors.values():
        dtypes[tensor.dtype] += tensor.size
    counted = tag_counts(typed)
    return {
        "path": str(raw.path),
        "container": opened.container,
        "size": opened.size,
        "dtype": dict(dtypes.most_common()),
        "tensors": len(raw.tensors),
        "parameters": sum(dtypes.values()),
        "metadata": typed,
        "training": training_summary(typed),
        "triggers": trigger_words(typed, counted),
        "tags": tuple(counted) if tags else None,
    }


def _adapter(opened: Opened, found: Structure, *, tags: bool) -> Description:
    """The description of an adapter file."""
    raw, arch = opened.raw, found.architecture
    modules = found.modules
    if _dylora(raw.metadata):
        modules = tuple(m._replace(family="dylora") if m.family == "lora" else m for m in modules)
    factor = lokr_factor(raw, modules)
    written_by = trainer(raw.metadata, found.signs, found.layout, peft_folder=opened.container == "peft-folder")
    return Description(
        kind="adapter",
        summary=_summary(found, _count(m.family for m in modules)),
        architecture="unknown" if arch is None else arch.id,
        variant="" if arch is None else arch.variant,
        architecture_name="" if arch is None else arch.name,
        candidates=found.candidates,
        undecided=found.undecided,
        evidence=found.evidence,
        coverage=found.coverage,
        layout=found.layout,
        trainer=written_by,
        families=_count(m.family for m in modules),
        components=_count(m.component for m in modules),
        rank=_numbers(m.rank for m in modules),
        alpha=_numbers(m.alpha for m in modules),
        scale=_numbers(m.scale for m in modules),
        scale_sources=_count(m.scale_source for m in modules if m.scale_source),
        dora=_count(m.dora for m in modules if m.dora),
        kernels=_count("x".join(map(str, m.kernel)) for m in modules if m.kernel),
        tucker=sum(m.tucker for m in modules),
        qkv=_qkv({m.fused for m in modules} - {None}),
        lokr_factor=factor,
        embeddings=found.embeddings,
        unexplained=found.unexplained,
        warnings=(*findings(raw, found, factor), *([Finding("bad-config", opened.problem)] if opened.problem else [])),
        modules=modules,
        **_common(opened, tags=tags),
    )


def _summary(found: Structure, families: Mapping[str, int]) -> str:
    name = "an unknown model" if found.architecture is None else found.architecture.name
    kinds = ", ".join(f"{count} {family}" for family, count in families.items())
    return f"an adapter for {name} in {found.layout} layout: {kinds} modules"


def _no_adapter(opened: Opened, error: NotAnAdapterError, *, tags: bool) -> Description:
    """The description of a readable file that is no adapter."""
    common = _common(opened, tags=tags)
    unread = next((word for word in ("mangled", "packed") if word in error.message), None)
    if unread is not None:
        return Description(
            kind=f"{unread}-adapter", summary=error.message, warnings=(Finding(unread, error.message),), **common
        )
    from lorasurgery.inspection.models import identify

    model = identify(opened.raw.tensors)
    arch = model.architecture
    return Description(
        kind=model.kind,
        summary=model.title,
        coverage=model.coverage,
        layout=model.layout,
        components=dict(model.components),
        candidates=() if arch is None else ((arch.key, model.coverage),),
        architecture="unknown" if arch is None else arch.id,
        variant="" if arch is None else arch.variant,
        architecture_name="" if arch is None else arch.name,
        **common,
    )


def _dylora(metadata: Mapping[str, str]) -> bool:
    """DyLoRA's tensors are LoRA's; only the metadata tells."""
    args = metadata.get("ss_network_args", "")
    return metadata.get("ss_network_module", "").endswith(".dylora") or '"dylora"' in args


def _count(values: Iterable[Any]) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _numbers(values: Iterable[float | None]) -> Numbers:
    counts = Counter(value for value in values if value is not None)
    if not counts:
        return NONE
    return Numbers(min(counts), max(counts), {f"{value:.9g}": count for value, count in sorted(counts.items())})


def _qkv(seen: set[bool | None]) -> str | None:
    if not seen:
        return None
    return "mixed" if len(seen) > 1 else "fused" if True in seen else "split"
