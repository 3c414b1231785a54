"""What rounding costs: "exact" where the dense float64 change is the same, and an estimate near the truth everywhere else."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorasurgery
from lorasurgery.adapter import Magnitude, Module, Scale
from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.miss import Miss
from lorasurgery.deltas.sampling import ROWS, WHOLE
from lorasurgery.io.tensors import of_array
from lorasurgery.operations.conversion.cast import cast_module
from lorasurgery.operations.conversion.fuse import stack_modules
from lorasurgery.operations.sum.add import added
from lorasurgery.operations.sum.adding import Adding
from lorasurgery.report import Losses
from lorasurgery.site import Site

from tests.edges import run  # isort: skip
from tests.oracle import raw, read, write  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.delta import Delta

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("f2"), "F32": np.dtype("f4")}
FACTORS = (0.7, 1 / 3, 0.5, -2.0, 1.0 + 2.0**-30, 3.0, 1e-3)
dtypes = st.sampled_from(sorted(DTYPES))


class Heard(NamedTuple):
    """A report that hears of roundings, and where it does."""

    losses: Losses
    record: Record

    @property
    def exact(self) -> bool:
        return not self.losses.entries

    @property
    def error(self) -> float:
        return self.losses.total()


def heard() -> Heard:
    losses = Losses()
    return Heard(losses, lambda error, norm: losses.record("x", error, norm))


# factors with structure ---------------------------------------------------------------------------------------------------


class Pattern(NamedTuple):
    """Which rows and columns of a random matrix are ordinary, and what the others are."""

    seed: int
    rows: tuple[str, str]
    columns: tuple[str, str]


ordinary = st.sampled_from(["all", "all", "some", "one", "every sixth"])
others = st.sampled_from(["zero", "zero", "powers of two", "short"])
patterns = st.builds(Pattern, st.integers(0, 2**32), st.tuples(ordinary, others), st.tuples(ordinary, others))


def matrix(pattern: Pattern, height: int, width: int) -> np.ndarray:
    """Random numbers, of which rows or columns are zero, short, or powers of two, which survive a power of two's scale."""
    rng = np.random.default_rng(pattern.seed)
    values = rng.standard_normal((height, width))
    for how, other in (pattern.columns, pattern.rows):
        values = values.T  # columns, then rows
        count = len(values)
        which = {
            "all": np.ones(count, bool), "some": rng.random(count) < 0.5,
            "one": np.arange(count) == rng.integers(count), "every sixth": np.arange(count) % 6 == 1,
        }[how]  # fmt: skip
        rest = values[~which]
        values[~which] = {
            "zero": 0.0 * rest,
            "powers of two": np.exp2(np.round(np.clip(rest, -3.0, 3.0))),
            "short": rest * 2.0**-6,
        }[other]
    return values


SIZES = {
    "lora": {"up": (36, 5), "down": (5, 24)},
    "lora of a high rank": {"up": (60, 20), "down": (20, 48)},
    "loha": {"w1_a": (36, 3), "w1_b": (3, 24), "w2_a": (36, 4), "w2_b": (4, 24)},
    "lokr": {"w1": (6, 4), "w2": (6, 6)},
    "lokr of products": {"w1_a": (6, 2), "w1_b": (2, 4), "w2_a": (6, 3), "w2_b": (3, 6)},
    "full": {"diff": (36, 24)},
    "miss": {"block": (4, 36)},
}
MAKE: dict[str, Callable[..., Delta]] = {
    "lora": LowRank, "loha": Hadamard, "lokr": Kronecker, "full": Full, "miss": lambda block: Miss(block).over((36, 24)),
}  # fmt: skip
four = st.lists(patterns, min_size=4, max_size=4)
families = st.sampled_from(sorted(SIZES))


def dense(family: str, slots: dict[str, np.ndarray]) -> np.ndarray:
    """The change in float64, from first principles."""
    f = {slot: values.astype("f8") for slot, values in slots.items()}
    kind = family.split(maxsplit=1)[0]
    if kind == "lora":
        return f["up"] @ f["down"]
    if kind == "loha":
        return (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])
    if kind == "lokr":
        return np.kron(*((f[w] if w in f else f[f"{w}_a"] @ f[f"{w}_b"]) for w in ("w1", "w2")))
    if kind == "miss":
        return f["block"].T[:, np.arange(24) % 4]
    return f["diff"]


def made(family: str, dtype: str, how: list[Pattern]) -> tuple[Delta, np.ndarray]:
    """A delta and its dense change."""
    sizes = SIZES[family].items()
    slots = {slot: matrix(p, *size).astype(DTYPES[dtype]) for (slot, size), p in zip(sizes, how, strict=False)}
    return MAKE[family.split(maxsplit=1)[0]](**{s: of_array(v, dtype) for s, v in slots.items()}), dense(family, slots)


def stored(delta: Delta, family: str) -> np.ndarray:
    """What the tensors mean that are written."""
    names = {"miss_block": "block"}
    return dense(family, {names.get(slot, slot): tensor.array() for slot, tensor in delta.tensors.items()})


NOISE = 2.0**-50
"""What the dense changes in float64 do not tell from nothing."""


def judged(found: Heard, true: np.ndarray, exact: np.ndarray, within: float) -> None:
    """Exact where it is, as far as float64 tells; else an error near the true one, and never 0.

    Of a number that is rounded and hardly counts among much larger ones the program may know more than the dense change.
    """
    off, norm = float(np.linalg.norm(true - exact)), float(np.linalg.norm(exact))
    if off <= NOISE * norm:
        assert found.exact or 0.0 < found.error <= NOISE, (off, norm, found.losses)
        return
    assert not found.exact, (off, norm)
    relative = off / norm if norm else 1.0
    assert relative / within <= found.error <= relative * within


FACTOR = {"lora of a high rank": 3.0}
"""How near the estimate is, where it is more than a measurement: roundings of several factors may hang together."""


@settings(max_examples=300)
@given(four, families, dtypes, st.sampled_from(FACTORS))
def test_scaled(how: list[Pattern], family: str, dtype: str, factor: float) -> None:
    delta, change = made(family, dtype, how)
    found = heard()
    scaled = delta.scaled(factor, found.record)
    judged(found, stored(scaled, family), factor * change, FACTOR.get(family, 2.0))


@settings(max_examples=300)
@given(four, families, dtypes, dtypes)
def test_cast(how: list[Pattern], family: str, dtype: str, wanted: str) -> None:
    delta, change = made(family, dtype, how)
    found = heard()
    cast = delta.cast(wanted, found.record)
    judged(found, stored(cast, family), change, FACTOR.get(family, 2.0))


@settings(max_examples=300)
@given(st.lists(four, min_size=2, max_size=3), st.lists(st.sampled_from(FACTORS), min_size=3, max_size=3), dtypes, dtypes)
def test_side_by_side(how: list[list[Pattern]], factors: list[float], first: str, dtype: str) -> None:
    """The sum of LoRAs of one dtype or of two, written in another."""
    found = heard()
    terms, change = [], np.zeros((36, 24))
    for i, (own, factor) in enumerate(zip(how, factors, strict=False)):
        delta, whole = made("lora", first if i == 0 else dtype, own)
        terms.append(Module(Site("denoiser", ()), f"m{i}", delta, Scale(factor, "alpha")))
        change += factor * whole
    total = added(terms, Adding((36, 24), dtype, found.record, full=False)).module
    assert total is not None
    assert total.delta is not None
    written = total.scale.value * stored(total.delta, "lora")
    cancelled = float(np.linalg.norm(change)) < 1e-3 * sum(float(np.linalg.norm(m.dense())) for m in terms)
    if not cancelled:
        judged(found, written, change, 3.0)


@settings(max_examples=300)
@given(st.lists(four, min_size=2, max_size=3), st.lists(st.sampled_from(FACTORS), min_size=3, max_size=3), families, dtypes)
def test_stacked(how: list[list[Pattern]], factors: list[float], family: str, dtype: str) -> None:
    """Modules of other scales, one below the other: each is multiplied by its ratio to the usual one."""
    found = heard()
    site = Site("denoiser", ())
    modules, wholes = [], []
    for i, (own, factor) in enumerate(zip(how, factors, strict=False)):
        delta, whole = made(family, dtype, own)
        modules.append(Module(site, f"m{i}", delta, Scale(factor, "alpha")))
        wholes.append(factor * whole)
    try:
        stack = stack_modules(site, [(module, len(whole)) for module, whole in zip(modules, wholes, strict=True)], found.record)
    except CannotError:
        return
    assert stack.delta is not None
    judged(found, stack.scale.value * stack.delta.dense().reshape(-1, wholes[0].shape[1]), np.vstack(wholes), 4.0)


# large tensors, of which some rows are looked at ------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.7, 0.5])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("rows", [(6, 1), (6, 0), (1536, 700), (3072, 17)])
def test_rows_that_no_sample_holds(rows: tuple[int, int], dtype: str, factor: float) -> None:
    """The only rows that round are every sixth, two, or one of 3072; the others are powers of two, or zeros."""
    step, first = rows
    rng = np.random.default_rng(1)
    down = rng.standard_normal((64, 96)).astype(DTYPES[dtype])
    for rest in (0.0, 0.5):
        up = np.full((3072, 64), rest)
        up[first::step] = rng.standard_normal(up[first::step].shape)
        up = up.astype(DTYPES[dtype])
        found = heard()
        scaled = LowRank(of_array(up, dtype), of_array(down, dtype)).scaled(factor, found.record)
        judged(found, stored(scaled, "lora"), factor * (up.astype("f8") @ down.astype("f8")), 3.0)
        full = heard()
        diff = Full(of_array(up, dtype)).scaled(factor, full.record)
        judged(full, diff.dense(), factor * up.astype("f8"), 2.0)
    assert up.size > WHOLE
    assert len(up) > ROWS


def test_every_part_of_a_module_is_heard_when_it_is_cast() -> None:
    magnitude, bias = np.full((36, 1), 1.0 / 3.0, "f4"), np.full(36, 1.0 / 3.0, "f4")
    up, down = np.ones((36, 4), "f4"), np.ones((4, 24), "f4")
    module = Module(
        Site("denoiser", ()), "m", LowRank(of_array(up, "F32"), of_array(down, "F32")), Scale(1.0, "none (1.0)"),
        Magnitude(of_array(magnitude, "F32"), "out"), of_array(bias, "F32"),
    )  # fmt: skip
    losses = Losses()
    cast = cast_module(module, "BF16", lambda name: lambda error, norm: losses.record(name, error, norm))
    for tensor in (*cast.delta.tensors.values(), cast.magnitude.tensor, cast.bias):  # type: ignore[union-attr]
        assert tensor is not None
        tensor.array()
    true = abs(float(ml_dtypes.bfloat16(1.0 / 3.0)) - float(np.float32(1.0 / 3.0))) * 3.0
    assert losses.relative() == pytest.approx({"m (magnitude)": true, "m (bias)": true}, rel=1e-6)


# a list of errors -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0), st.floats(0.0)), min_size=1))
def test_an_error_never_disappears(entries: list[tuple[str, float, float]]) -> None:
    """Whatever the numbers: tiny, huge, without a norm."""
    losses = Losses()
    for entry in entries:
        losses.record(*entry)
    wrong = {name for name, error, _ in entries if error}
    assert losses.entries.keys() == wrong
    assert all(error > 0.0 for error in losses.relative().values())
    assert (losses.total() > 0.0) == bool(wrong)
    assert losses.total() <= max(losses.relative().values(), default=0.0) * (1.0 + 1e-9)


def test_errors_of_one_module_are_shares_of_their_own_norms() -> None:
    """A factor's error is against the factor, which may be any number of times as large as the change."""
    losses = Losses()
    losses.record("a", 1e-6, 1.0)
    losses.record("a", 1e-8, 1e8)
    assert losses.relative()["a"] == pytest.approx(1e-3)
    losses.record("b", 1.0, 0.0)
    losses.record("c", math.nan, 1.0)
    assert losses.relative()["b"] == losses.relative()["c"] == losses.total() == 1.0
    more = Losses()
    more.gather(losses)
    assert more == losses


# files ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "alpha"), [(6, 2.8), (6, 4.0), (1, 2.8), (2, 2.0)])
def test_a_folded_file_is_exact_only_where_it_is(every: int, alpha: float, tmp_path: Path) -> None:
    """A scale of 0.7 folded into bf16, of which only every sixth row is not zero; a power of two changes nothing."""
    rng, stem = np.random.default_rng(3), "diffusion_model.layers.0.attention.out"
    up = np.zeros((3840, 4))
    up[1 % every :: every] = rng.standard_normal(up[1 % every :: every].shape)
    tensors = {"lora_A.weight": raw(rng.standard_normal((4, 3840)), "BF16"), "lora_B.weight": raw(up, "BF16")}
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    write(source, {f"{stem}.{key}": t for key, t in tensors.items()} | {f"{stem}.alpha": raw(alpha, "F32")})
    report = lorasurgery.save(lorasurgery.load(source), out, layout="comfyui", options=lorasurgery.SaveOptions(alpha="fold"))
    found = read(out)[0]
    factors = {key.removeprefix(f"{stem}."): t.f64() for key, t in found.items() if not key.endswith(".alpha")}
    up_key, down_key = sorted(factors, key=lambda key: factors[key].shape[0] != 3840)
    scale = raw(alpha, "F32").item() / 4.0
    exact = scale * tensors["lora_B.weight"].f64() @ tensors["lora_A.weight"].f64()
    off = float(np.linalg.norm(factors[up_key] @ factors[down_key] - exact) / np.linalg.norm(exact))
    assert report.exact == (off == 0.0) == (alpha in (2.0, 4.0))
    assert report.losses.total() == pytest.approx(off, rel=0.05)
    assert report.to_json()["exact"] == report.exact


@pytest.mark.parametrize("rows", [[7], list(range(5, 1024, 64)), [1023]])
def test_a_change_of_few_rows_is_measured(rows: list[int], tmp_path: Path) -> None:
    """Errors are measured on some rows; where nothing changes in those, on all."""
    name, rng = "t_embedder.mlp.0", np.random.default_rng(2)
    up, down = np.zeros((1024, 2)), rng.standard_normal((2, 256))
    up[rows] = 0.01 * rng.standard_normal((len(rows), 2))
    weight = rng.standard_normal((1024, 256))
    base, adapter, out = (tmp_path / f"{each}.safetensors" for each in ("base", "adapter", "out"))
    write(base, {f"{name}.weight": raw(weight, "BF16")})
    write(adapter, {f"diffusion_model.{name}.lora_{w}.weight": raw(v, "F32") for w, v in (("up", up), ("down", down))})
    done = run("apply", base, adapter, "-o", out, "--arch", "z-image", "--json")
    assert done.code == 0, done.err
    told, kept = json.loads(done.out), raw(weight, "BF16").f64()
    exact = raw(up, "F32").f64() @ raw(down, "F32").f64()
    error = read(out)[0][f"{name}.weight"].f64() - kept - exact
    assert told["relative_change"] == pytest.approx(np.linalg.norm(exact) / np.linalg.norm(kept), rel=0.02)
    share = np.linalg.norm(error) / np.linalg.norm(exact)
    assert share > 0
    assert told["rounding"]["share_of_change"] == pytest.approx(share, rel=0.02)
