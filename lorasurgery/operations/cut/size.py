"""How many bytes the file of an adapter has, without computing or writing a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.adapter import written_in
from lorasurgery.api import takes_factor
from lorasurgery.io.header import header_bytes
from lorasurgery.io.writer import LEGACY_HASH, MODEL_HASH
from lorasurgery.layouts.emit import emit
from lorasurgery.layouts.module import TOP_LEVEL
from lorasurgery.layouts.peft_config import header_metadata
from lorasurgery.layouts.scales import HEADER_KEY
from lorasurgery.metadata import converted, with_lokr_factor
from lorasurgery.operations.conversion.convert import convert
from lorasurgery.report import Report

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter


def file_size(adapter: Adapter, layout_name: str | None = None) -> int:
    """Header and data of what :func:`lorasurgery.save` writes in a layout (None: the adapter's own).

    For a PEFT folder, of its safetensors file. Raises RequestError for a layout that cannot be written, and what
    :func:`lorasurgery.convert` raises.
    """
    if layout_name is not None:
        adapter = convert(adapter, layout_name)[0]
    target, report = written_in(adapter), Report()
    emitted = emit(adapter, target, report)
    kept = (left for left in adapter.leftovers if target.own or left.key not in TOP_LEVEL)
    if target.carries_unknown:
        emitted.tensors.update({left.key: left.tensor for left in kept})
    metadata = converted(adapter, adapter.metadata, emitted.written, source_layout=adapter.layout, target=target.id)
    with_lokr_factor(adapter, metadata, emitted.tensors, explicit=None, buffer=takes_factor(target, emitted.tensors))
    if report.scale_written == "header" and not target.folder:
        metadata[HEADER_KEY] = header_metadata(emitted.written, adapter.architecture)
    if MODEL_HASH in adapter.metadata or target.id == "sd-scripts":
        metadata |= {MODEL_HASH: "0" * 64, LEGACY_HASH: "0" * 8}
    return len(header_bytes(emitted.tensors, metadata)) + sum(t.nbytes for t in emitted.tensors.values())
