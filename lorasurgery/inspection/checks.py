"""What is suspicious about a file: disagreements between what its metadata says and what its tensors are."""

from __future__ import annotations

import json
from collections import Counter
from math import isclose, isfinite
from typing import TYPE_CHECKING

from lorasurgery.architectures import architectures
from lorasurgery.inspection.description import Finding
from lorasurgery.io.dtypes import FLOATS
from lorasurgery.layouts.evidence import means, of_no_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.inspection.description import LokrFactor
    from lorasurgery.inspection.structure import Structure
    from lorasurgery.io.header import RawFile

EMPTY_HASH = "e3b0c442"
"""The beginning of the SHA-256 of nothing, which some programs saved as the hash of every file."""
CERTAIN = ("lora", "dora", "loha", "dylora")
"""Families whose rank the tensors give."""


def findings(raw: RawFile, found: Structure, lokr: LokrFactor | None) -> tuple[Finding, ...]:
    """Everything suspicious, what was found while reading first."""
    own = [*found.findings]
    for check in _CHECKS:
        own += check(raw, found)
    if lokr is not None and lokr.agree is False:
        said = {"buffer": lokr.buffer, "ss_lokr_factor": lokr.metadata}
        words = ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)
        implied = ", ".join(map(str, lokr.implied))
        own.append(Finding("lokr-factor", f"the LoKr factor disagrees: {words}; the shapes imply {implied}"))
    return tuple(dict.fromkeys(own))


def _base_model(raw: RawFile, found: Structure) -> Iterator[Finding]:
    """Metadata that names another model than the keys do."""
    if found.architecture is None:
        return
    for text in of_no_table(raw.metadata, found.architecture):
        yield Finding("base-model", text)
    for key in ("ss_base_model_version", "modelspec.architecture", "lorasurgery.architecture"):
        text = raw.metadata.get(key, "")
        said = {arch.id: arch for arch in architectures().values() if means(arch, text)}
        if said and found.architecture.id not in said:
            name = " or ".join(_family(arch) for arch in said.values())
            yield Finding(
                "base-model", f"metadata says {name} ({key} {text}), keys say {_family(found.architecture)}; the keys count"
            )


def _family(arch: Architecture) -> str:
    """The name without the variant."""
    return arch.name.removesuffix(f" {arch.variant}") if arch.variant else arch.name


def _undecided(raw: RawFile, found: Structure) -> Iterator[Finding]:  # noqa: ARG001  the checks' signature
    if found.undecided and found.architecture is not None:
        others, first = ", ".join(found.undecided), found.architecture
        yield Finding(
            "undecidable",
            f"the same keys fit {others} as well as {first.key}; --arch {first.id} settles it elsewhere",
        )


def _dim_and_alpha(raw: RawFile, found: Structure) -> Iterator[Finding]:
    """``ss_network_dim`` and ``ss_network_alpha`` against the tensors'; a second value for convolutions is allowed."""
    modules = [m for m in found.modules if m.family in CERTAIN and m.rank is not None]
    for key, label, values in (
        ("ss_network_dim", "rank", Counter(float(m.rank) for m in modules if m.rank is not None)),
        ("ss_network_alpha", "alpha", Counter(m.alpha for m in modules if m.alpha is not None)),
    ):
        try:
            said = float(raw.metadata.get(key, ""))
        except ValueError:
            continue
        if values and not any(isclose(said, value, rel_tol=4e-3) for value in values):
            real = ", ".join(f"{value:g}" for value, _ in values.most_common(4))
            yield Finding(key.replace("ss_", "").replace("_", "-"), f"{key} says {said:g}, the tensors have {label} {real}")


def _alphas(raw: RawFile, found: Structure) -> Iterator[Finding]:
    """Infinite or zero alphas of modules that are divided by their rank."""
    odd: dict[str, list[str]] = {"infinite-alpha": [], "zero-alpha": []}
    for key, tensor in raw.tensors.items():
        if key.endswith(".alpha") and tensor.size == 1:
            value = tensor.item()
            if not isfinite(value):
                odd["infinite-alpha"].append(key)
            elif value == 0.0:
                odd["zero-alpha"].append(key)
    whole = {f"{m.name}.alpha" for m in found.modules if m.rank is None}  # OFT's is a constraint, a whole LoKr's unused
    for code, keys in odd.items():
        read = [key for key in keys if key not in whole]
        if read:
            word = "no finite number" if code == "infinite-alpha" else "zero, so the module does nothing"
            yield Finding(code, f"{len(read)} alphas are {word}; first {read[0]}")


def _dtypes(raw: RawFile, found: Structure) -> Iterator[Finding]:  # noqa: ARG001  the checks' signature
    """Weights of several dtypes; alphas and flags do not count."""
    counts = Counter(module.dtype for module in found.modules if module.dtype)
    if len({name for joined in counts for name in joined.split("+")} & FLOATS) > 1:
        words = ", ".join(f"{count} modules {name.replace('+', ' and ')}" for name, count in counts.most_common())
        yield Finding("mixed-dtypes", f"weights of several dtypes: {words}")


def _unexplained(raw: RawFile, found: Structure) -> Iterator[Finding]:  # noqa: ARG001  the checks' signature
    if found.unexplained:
        key, reason = found.unexplained[0]
        yield Finding("unexplained", f"{len(found.unexplained)} keys are not understood, first {key} ({reason})")


def _split_qkv(raw: RawFile, found: Structure) -> Iterator[Finding]:  # noqa: ARG001  the checks' signature
    """sd-scripts' ``split_qkv`` saves fused modules with the rank times n and the alpha of one part (its issue 2204)."""
    if found.layout != "sd-scripts":
        return
    scales = Counter(round(m.scale, 9) for m in found.modules if m.fused is None and m.family == "lora" and m.scale)
    usual = scales.most_common(1)[0][0] if scales else 0.0
    weak = [
        m for m in found.modules
        if m.fused and m.family == "lora" and m.scale and m.rank
        and any(isclose(m.scale * n, usual, rel_tol=1e-6) and m.rank % n == 0 for n in (2, 3, 4))
    ]  # fmt: skip
    if weak:
        yield Finding(
            "split-qkv-alpha",
            f"{len(weak)} fused modules are weaker than the rest by the number of their parts, first {weak[0].name}: "
            "sd-scripts' split_qkv saves them so; convert --fix-split-alpha looks closer and mends it",
        )


def _hashes(raw: RawFile, found: Structure) -> Iterator[Finding]:  # noqa: ARG001  the checks' signature
    for key in ("sshs_model_hash", "modelspec.hash_sha256"):
        if raw.metadata.get(key, "").removeprefix("0x").startswith(EMPTY_HASH):
            yield Finding("empty-hash", f"{key} is the hash of nothing; the program that saved the file did not compute it")


def _json(raw: RawFile, found: Structure) -> Iterator[Finding]:  # noqa: ARG001  the checks' signature
    for key, text in raw.metadata.items():
        if text[:1] == "{" and key.startswith(("ss_", "lora_adapter", "lycoris_config", "ot_config")):
            try:
                json.loads(text)
            except (ValueError, RecursionError):
                yield Finding("bad-json", f"the metadata's {key} begins like JSON and is none")


_CHECKS: tuple[Callable[[RawFile, Structure], Iterator[Finding]], ...] = (
    _base_model, _undecided, _dim_and_alpha, _alphas, _dtypes, _unexplained, _split_qkv, _hashes, _json,
)  # fmt: skip
