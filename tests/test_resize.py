"""Resize against the dense float64 optimum (Eckart-Young) for every family, dtype and policy."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.adapter import Adapter, Magnitude, Module, Scale
from lorasurgery.api import SaveOptions, save
from lorasurgery.architectures import named
from lorasurgery.architectures.table import Architecture, Encoder, row
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import BrokenModuleError, NotRepresentableError, RequestError
from lorasurgery.files.read import parse
from lorasurgery.io.header import read_safetensors
from lorasurgery.io.tensors import of_array
from lorasurgery.io.writer import write_safetensors
from lorasurgery.operations.cut import NormCache, ResizeOptions, open_base, parse_rank, resize
from lorasurgery.operations.cut.batches import batches
from lorasurgery.site import DENOISER, Site
from lorasurgery.verbs.resize.plan import plan

D = 48
ARCH = Architecture(
    id="tiny",
    variant="",
    name="Tiny",
    source="made for these tests",
    rows=(
        row("attn.qkv", (3 * D, D), ("attn.to_q", "attn.to_k", "attn.to_v")),
        row("attn.out", (D, D)),
        row("mlp.up", (4 * D, D)),
        row("mlp.down", (D, 4 * D)),
        row("final.mod", (2 * D, D), "norm_out.linear", swap_halves=True),
        row("narrow", (D, 6)),
        row("conv", (D, 16, 3, 3)),
        row("pointwise", (D, 32, 1, 1)),
        row("norm", (D,)),
    ),
    encoders=(Encoder("clip_l", "lora_te1", "text_encoder", "text_encoders.clip_l.transformer"),),
)
SHAPES = ARCH.shapes
EXACT: dict[str, Any] = {"dtype": "fp32"}


class Maker:
    """An adapter in memory; values are random, spectra fall."""

    def __init__(self, dtype="F32", seed=0, layout="comfyui"):
        self.rng = np.random.default_rng(seed)
        self.dtype, self.layout, self.modules, self.metadata = dtype, layout, {}, {}

    def tensor(self, *shape, steep=1.0):
        values = self.rng.standard_normal(shape) * 0.1
        if steep != 1.0:
            values *= steep ** -np.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
        return of_array(values.astype(np.float32), self.dtype)

    def low_rank(self, shape, rank, steep=1.2):
        ones = [1] * len(shape[2:])
        return LowRank(self.tensor(shape[0], rank, *ones, steep=steep), self.tensor(rank, *shape[1:]))

    def add(self, name, delta, *, alpha=None, site=None, magnitude=None, bias=None):
        site = site or Site(DENOISER, ARCH.namings["original"][name])
        rank = delta.rank if delta is not None and delta.rank else 1
        scale = 1.0 if alpha is None else alpha / rank
        self.modules[site] = Module(site, name, delta, Scale(scale, "alpha tensor"), magnitude, bias)
        return self

    def lora(self, name, rank=12, alpha=5.0, **how):
        return self.add(name, self.low_rank(SHAPES[name], rank, **how), alpha=alpha)

    def adapter(self):
        return Adapter(ARCH, self.modules, self.metadata, self.layout)


def kron_delta(make, whole1, whole2, out=(6, 8), width=(6, 8)):
    w1 = {"w1": make.tensor(out[0], width[0])} if whole1 else {"w1_a": make.tensor(out[0], 4), "w1_b": make.tensor(4, width[0])}
    w2 = {"w2": make.tensor(out[1], width[1])} if whole2 else {"w2_a": make.tensor(out[1], 4), "w2_b": make.tensor(4, width[1])}
    return Kronecker(**w1, **w2)


def dense(module: Any) -> Any:
    """The scaled change as (out, in*k*k), restated."""
    delta: Any = module.delta
    scale = module.scale.value
    if delta.family == "lora":
        up, down = delta.up.f64().reshape(delta.up.shape[0], -1), delta.down.f64()
        if delta.mid is not None:
            product = np.einsum("pi,ijkl,jr->prkl", up, delta.mid.f64(), down.reshape(len(down), -1))
            return scale * product.reshape(len(up), -1)
        return scale * up @ down.reshape(len(down), -1)
    if delta.family == "loha":
        arms = [(delta.w1_a, delta.w1_b, delta.t1), (delta.w2_a, delta.w2_b, delta.t2)]
        found = [
            a.f64() @ b.f64().reshape(b.shape[0], -1)
            if t is None
            else np.einsum("ip,ijkl,jr->prkl", a.f64(), t.f64(), b.f64()).reshape(a.shape[1], -1)
            for a, b, t in arms
        ]
        return scale * found[0] * found[1]
    if delta.family == "lokr":
        w1 = delta.w1.f64() if delta.w1 is not None else delta.w1_a.f64() @ delta.w1_b.f64()
        w2 = delta.w2.f64() if delta.w2 is not None else delta.w2_a.f64() @ delta.w2_b.f64()
        return scale * np.kron(w1, w2)
    return scale * delta.diff.f64().reshape(delta.shape[0], -1)


def every(adapter: Adapter) -> list[Any]:
    """The modules, whatever their deltas are."""
    return list(adapter.modules.values())


def pairs(adapter: Adapter) -> list[tuple[Site, Any]]:
    """Sites and modules."""
    return list(adapter)


def optimum(matrix, rank):
    values = np.linalg.svd(matrix, compute_uv=False)
    return math.sqrt(np.sum(values[rank:] ** 2))


def check(adapter, options, *, slack=1e-4, rounding=0.0):
    """Resize; every module's error is the optimum of its rank, and the one reported."""
    result, report = resize(adapter, options)
    for own in report.modules:
        old = next(m for m in every(adapter) if m.name == own.name)
        new = next(m for m in every(result) if m.name == own.name)
        before, after = dense(old), dense(new)
        error, norm = np.linalg.norm(before - after), np.linalg.norm(before)
        best = optimum(before, own.new_rank)
        assert error <= best * (1 + slack) + (rounding + 1e-6) * norm, own
        assert own.relative_error * norm == pytest.approx(best, rel=1e-4, abs=2e-7 * norm)
        if new.delta.family == "lora" and new.delta.mid is None:
            assert new.delta.rank == own.new_rank
    return result, report


def lokr_maker(whole1: bool, whole2: bool) -> Any:
    return lambda m: m.add("attn.out", kron_delta(m, whole1, whole2), alpha=2.0)


KINDS = {
    "linear": lambda m: m.lora("mlp.up"),
    "wide": lambda m: m.lora("mlp.down"),
    "conv": lambda m: m.lora("conv"),
    "1x1": lambda m: m.lora("pointwise"),
    "flat conv": lambda m: m.add("conv", LowRank(m.tensor(D, 12), m.tensor(12, 144)), alpha=3.0),
    "tucker": lambda m: m.add(
        "conv", LowRank(m.tensor(D, 12, 1, 1), m.tensor(12, 16, 1, 1), m.tensor(12, 12, 3, 3)), alpha=3.0
    ),
    "loha": lambda m: m.add(
        "attn.out", Hadamard(m.tensor(D, 3), m.tensor(3, D), m.tensor(D, 4), m.tensor(4, D)), alpha=2.0
    ),
    "loha above both sides": lambda m: m.add(
        "attn.out", Hadamard(m.tensor(D, 9), m.tensor(9, D), m.tensor(D, 9), m.tensor(9, D)), alpha=2.0
    ),
    "loha tucker": lambda m: m.add(
        "conv",
        Hadamard(m.tensor(3, D), m.tensor(3, 16), m.tensor(3, D), m.tensor(3, 16), m.tensor(3, 3, 3, 3), m.tensor(3, 3, 3, 3)),
        alpha=2.0,
    ),
    **{
        f"lokr {a}{b}": lokr_maker(a == "w", b == "w")
        for a, b in itertools.product("wp", "wp")
    },
    "full": lambda m: m.add("mlp.up", Full(m.tensor(4 * D, D))),
    "full conv": lambda m: m.add("conv", Full(m.tensor(D, 16, 3, 3))),
    "negative scale": lambda m: m.lora("attn.out", alpha=-7.0),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_best_of_its_rank(kind, dtype):
    adapter = KINDS[kind](Maker(dtype)).adapter()
    for rank in (1, 5):
        options = ResizeOptions(rank=rank, as_lora=True, full=True, dtype="fp32")
        result, report = check(adapter, options)
        assert [m.new_rank for m in report.modules] == [rank]
        assert {t.dtype for m in every(result) for t in m.delta.tensors.values()} == {"F32"}
    kept, _ = check(adapter, replace(options, dtype="keep"), rounding={"F32": 1e-6, "F16": 2e-3, "BF16": 1e-2}[dtype])
    assert {t.dtype for m in every(kept) for t in m.delta.tensors.values()} == {dtype}


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(1, 60), st.integers(1, 20), st.sampled_from([1.0, 2.0, 10.0, 1000.0]))
def test_any_rank_and_condition(seed, rank, wanted, steep):
    make = Maker(seed=seed)
    make.lora("narrow", rank, steep=steep).lora("attn.out", rank, steep=steep)
    _, report = check(make.adapter(), ResizeOptions(rank=wanted, **EXACT))
    assert [m.new_rank for m in report.modules] == [min(wanted, rank, 6), min(wanted, rank, D)]


@pytest.mark.parametrize("options", [{"rank": 4}, {"policy": "energy", "param": 0.9}, {"policy": "error", "param": 0.0}])
def test_zeros_and_dependent_factors(options):
    make = Maker()
    make.add("attn.out", LowRank(of_array(np.zeros((D, 8), np.float32), "F32"), make.tensor(8, D)), alpha=3.0)
    one = make.rng.standard_normal((D, 1)).astype(np.float32)
    make.add("mlp.down", LowRank(of_array(np.repeat(one, 8, 1), "F32"), make.tensor(8, 4 * D)), alpha=3.0)
    uneven = make.tensor(4 * D, 8).f32() * np.float32(10.0) ** -np.arange(0, 32, 4, dtype=np.float32)
    make.add("mlp.up", LowRank(of_array(uneven, "F32"), make.tensor(8, D)), alpha=3.0)
    result, report = check(make.adapter(), ResizeOptions(**options, **EXACT))
    zero, dependent, _ = report.modules
    assert (zero.relative_error, zero.energy, zero.max_ratio) == (0.0, 1.0, 1.0)
    assert not any(
        t.f64().any() for t in result.modules[Site(DENOISER, ARCH.namings["original"]["attn.out"])].delta.tensors.values()
    )
    assert dependent.relative_error == pytest.approx(0.0, abs=1e-6)
    if "rank" not in options:
        assert (zero.new_rank, dependent.new_rank) == (1, 1)


def test_the_result_is_computed_when_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("lorasurgery.operations.cut.engine.ALL_HELD", 0)
    monkeypatch.setattr("lorasurgery.operations.cut.engine.HELD", 0)
    make = Maker("F16").lora("attn.out").lora("conv")
    ranks = ResizeOptions(rank=3)
    result, report = resize(make.adapter(), ranks)
    assert all(t.compute is not None for m in every(result) for t in m.delta.tensors.values())
    assert not report.losses.entries
    save(result, tmp_path / "a.safetensors")
    assert 0 < report.losses.total() < 1e-3
    again, _ = resize(make.adapter(), replace(ranks, workers=1))
    save(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    monkeypatch.undo()
    held, _ = resize(make.adapter(), ranks)
    assert all(t.compute is None for m in every(held) for t in m.delta.tensors.values())
    for one, other in zip(every(result), every(held), strict=True):
        np.testing.assert_allclose(dense(one), dense(other), atol=2e-3 * np.max(np.abs(dense(one))))
    back = parse(read_safetensors(tmp_path / "a.safetensors"), among=(ARCH,))
    for site, module in pairs(back):
        assert np.linalg.norm(dense(module) - dense(result.modules[site])) < 1e-12
        assert module.delta.shape == SHAPES[site.spans[0].weight]


# what stays the same ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", ["balanced", "kohya"])
@pytest.mark.parametrize(("alpha", "scale"), [("keep-ratio", 5 / 12), ("rank", 1.0), ("3", 0.75)])
def test_the_effect_does_not_depend_on_alpha_and_factors(factors, alpha, scale):
    adapter = Maker().lora("attn.out").lora("conv").adapter()
    result, _ = check(adapter, ResizeOptions(rank=4, alpha=alpha, factors=factors, **EXACT))
    for module in every(result):
        assert module.scale.value == pytest.approx(scale)
        up, down = module.delta.up.f64().reshape(D, -1), module.delta.down.f64().reshape(4, -1)
        gram = down @ down.T
        if factors == "kohya":
            np.testing.assert_allclose(gram, np.eye(4), atol=1e-6)
        else:
            np.testing.assert_allclose(up.T @ up, gram, atol=1e-6 * np.max(gram))


def test_modules_at_or_below_the_rank_keep_their_bytes():
    adapter = Maker("BF16").lora("attn.out", 4).lora("mlp.up", 8).adapter()
    result, report = resize(adapter, ResizeOptions(rank=8))
    assert report.actions() == {"unchanged": 2}
    for site, module in pairs(result):
        assert module.delta is adapter.modules[site].delta
    grown, report = resize(adapter, ResizeOptions(rank=8, grow=True))
    assert report.actions() == {"padded": 1, "unchanged": 1}
    assert {m.delta.rank for m in every(grown)} == {8}
    for site, module in pairs(grown):
        assert np.array_equal(dense(module), dense(adapter.modules[site]))
    other, _ = resize(adapter, ResizeOptions(rank=8, alpha="rank", **EXACT))
    for site, module in pairs(other):
        assert module.scale.value == 1.0
        np.testing.assert_allclose(dense(module), dense(adapter.modules[site]), rtol=1e-5, atol=1e-7)


def alike(make, dtypes, broken=None):
    """Modules of one shape and rank, which are measured together: falling, zero, dependent and badly scaled ones."""
    for i, (name, dtype) in enumerate(zip(("attn.to_q", "attn.to_k", "attn.to_v", "attn.out"), dtypes, strict=True)):
        up, down = make.tensor(D, 9, steep=1.3).f64(), make.tensor(9, D).f64()
        if i == 1:
            up[:] = 0.0
        elif i == 2:
            up[:, 8] = up[:, 7]
        elif i == 3:
            up, down = up * 10.0 ** np.linspace(2, -2, 9), down / 10.0 ** np.linspace(2, -2, 9)[:, None]
        if name == broken:
            down[3, 4] = np.inf
        namings = ARCH.namings["original" if name == "attn.out" else "diffusers"]
        delta = LowRank(of_array(up, dtype), of_array(down, dtype))
        make.add(name, delta, alpha=2.0 + i, site=Site(DENOISER, namings[name]))
    return make.adapter()


@pytest.mark.parametrize("dtypes", [("F32",) * 4, ("BF16", "F16", "F32", "F64"), ("F64", "F32", "BF16", "F16")])
@pytest.mark.parametrize("how", [{"rank": 4}, {"rank": 4, "dtype": "fp16"}, {"policy": "energy", "param": 0.9}, {"rank": 9}])
def test_modules_of_one_shape_are_measured_together_and_each_is_the_best(dtypes, how):
    adapter, options = alike(Maker(), dtypes), ResizeOptions(**how)
    together = batches(every(adapter), lambda _: options.rank, 1 << 20)
    assert [len(own) for own in together] == [4]
    check(adapter, options, rounding=0.0 if set(dtypes) == {"F32"} and "dtype" not in how else 6e-3)


def test_the_broken_one_of_several_is_named():
    with pytest.raises(BrokenModuleError, match=r"^attn\.to_v"):
        resize(alike(Maker(), ("F32",) * 4, "attn.to_v"), ResizeOptions(rank=2))


def test_uniform_pads_to_the_largest():
    adapter = Maker().lora("attn.out", 12, steep=3.0).lora("mlp.up", 12, steep=1.0).lora("conv", 4).adapter()
    result, report = resize(adapter, ResizeOptions(policy="energy", param=0.9, uniform=True, **EXACT))
    ranks = {m.delta.rank for m in every(result)}
    plain, _ = resize(adapter, ResizeOptions(policy="energy", param=0.9, **EXACT))
    assert ranks == {max(m.delta.rank for m in every(plain))}
    for site, module in pairs(result):
        np.testing.assert_allclose(dense(module), dense(plain.modules[site]), atol=1e-7)
    assert report.histogram() == {ranks.pop(): 3}


def test_uniform_holds_for_every_family_that_has_a_rank():
    make = Maker().lora("attn.out", 9)
    make.add("conv", LowRank(make.tensor(D, 4, 1, 1), make.tensor(4, 16, 1, 1), make.tensor(4, 4, 3, 3)), alpha=3.0)
    make.add("mlp.up", kron_delta(make, True, False, out=(12, 16), width=(6, 8)), alpha=2.0)
    adapter = make.adapter()
    result, report = resize(adapter, ResizeOptions(rank=6, uniform=True, **EXACT))
    assert [m.delta.rank for m in every(result)] == [6, 6, 6]
    for before, after in list(zip(every(adapter), every(result), strict=True))[1:]:
        np.testing.assert_allclose(dense(before), dense(after), atol=1e-6)
    assert [m.relative_error > 1e-9 for m in report.modules] == [True, False, False]


@pytest.mark.parametrize("kind", ["linear", "loha above both sides", "lokr ww", "full", "tucker"])
def test_small_matrices_that_were_given_up_are_computed_again(kind, monkeypatch):
    adapter = KINDS[kind](Maker("F16")).adapter()
    options = ResizeOptions(policy="energy", param=0.8, as_lora=True, full=True)
    plain, _ = resize(adapter, options)
    monkeypatch.setattr("lorasurgery.operations.cut.survey.CORE_BYTES", 0)
    monkeypatch.setattr("lorasurgery.operations.cut.engine.CORE_BYTES", 0)
    again, _ = resize(adapter, options)
    for one, other in zip(every(plain), every(again), strict=True):
        np.testing.assert_allclose(dense(one), dense(other), atol=2e-3 * np.max(np.abs(dense(one))))
    adapter = replace(adapter, modules={**adapter.modules, **Maker(seed=1).lora("narrow").adapter().modules})
    rows = plan(adapter, replace(options, dtype="fp32", include=("attn|mlp|conv",)), ranks=(1, 3, 5)).rows
    values = np.linalg.svd(dense(every(adapter)[0]), compute_uv=False)
    for own in rows:
        assert own.relative_error == pytest.approx(math.sqrt(np.sum(values[own.rank :] ** 2) / np.sum(values**2)), rel=1e-3)


def test_a_second_cut_of_the_same_measurement_is_not_the_first():
    """The plan cuts one survey at several ranks; a decomposition held for a small one must not serve a larger."""
    from lorasurgery.operations.cut.engine import resized_from
    from lorasurgery.operations.cut.survey import survey

    for kind in ("lokr pp", "full", "conv"):
        adapter = KINDS[kind](Maker()).adapter()
        every_rank = ResizeOptions(rank=99, as_lora=True, full=True, **EXACT)
        found = survey(adapter, every_rank)
        for rank in (2, 7):
            result, _ = resized_from(found, replace(every_rank, rank=rank))
            before, after = dense(every(adapter)[0]), dense(every(result)[0])
            assert np.linalg.norm(before - after) == pytest.approx(optimum(before, rank), rel=1e-3)


def test_what_has_no_rank_passes_through():
    make = Maker().lora("attn.out")
    make.add("norm", Full(make.tensor(D), "norm"))
    make.add("mlp.up", Full(make.tensor(4 * D, D)))
    make.add("mlp.down", None, bias=make.tensor(D))
    encoder = Site("clip_l", ())
    name = "text_model.encoder.layers.0.mlp.fc1"
    spans = (ARCH.namings["original"]["attn.out"][0]._replace(weight=name, stop=TEXT_ENCODERS["clip_l"].shapes[name][0]),)
    encoder = Site("clip_l", spans)
    make.add("te", make.low_rank(TEXT_ENCODERS["clip_l"].shapes[name], 6), site=encoder, alpha=3.0)
    adapter = make.adapter()
    result, report = resize(adapter, ResizeOptions(rank=2))
    assert dict(report.kept) == {
        "norm": "a norm has no rank", "mlp.up": "a full difference", "mlp.down": "a bias has no rank", "te": "a text encoder's",
    }  # fmt: skip
    for site, module in pairs(result):
        if module.name != "attn.out":
            assert module is adapter.modules[site]
    result, report = resize(adapter, ResizeOptions(rank=2, text_encoders=True, full=True))
    assert {m.name: (m.action, m.new_rank) for m in report.modules} == {
        "attn.out": ("resized", 2), "mlp.up": ("to LoRA", 2), "te": ("resized", 2),
    }  # fmt: skip
    result, report = resize(adapter, ResizeOptions(policy="error", param=1e-6, full=True))
    assert next(m for m in report.modules if m.name == "mlp.up").action == "unchanged"


def test_ranks_by_kind_and_name():
    make = Maker()
    for name in ("attn.out", "mlp.up", "mlp.down", "conv", "pointwise", "narrow"):
        make.lora(name)
    adapter = make.adapter()

    def ranks(**how):
        _, report = resize(adapter, ResizeOptions(**how))
        return {m.name: m.new_rank for m in report.modules}

    assert ranks(rank=5, conv_rank=3, pointwise_rank=2) == {
        "attn.out": 5, "mlp.up": 5, "mlp.down": 5, "conv": 3, "pointwise": 2, "narrow": 5,
    }  # fmt: skip
    assert ranks(rank=20, include=("mlp",), exclude=("down",)) == {"mlp.up": 12}
    assert ranks(rank=4, ranks=(("mlp.up", 7), ("mlp", 6)), include=("mlp|narrow",)) == {
        "mlp.up": 7,
        "mlp.down": 6,
        "narrow": 4,
    }
    assert ranks(rank=20)["narrow"] == 6
    assert ranks(conv_rank=3)["attn.out"] == 12
    assert ranks(policy="sv_ratio", param=1e9, rank=4, conv_rank=2, compat="kohya")["pointwise"] == 2


def test_ranks_by_block_and_component():
    make = Maker(layout="sd-scripts")
    flux = named("flux1-dev")[0]
    names = ("double_blocks.0.img_mlp.0", "double_blocks.18.img_mlp.0", "single_blocks.3.linear2", "img_in")
    for name in names:
        spans = flux.namings["original"][name]
        make.add(
            name,
            LowRank(make.tensor(flux.shapes[name][0], 8), make.tensor(8, flux.shapes[name][1])),
            site=Site(DENOISER, spans),
        )
    adapter = replace(make.adapter(), architecture=flux)

    def ranks(**how):
        return {m.name: m.new_rank for m in resize(adapter, ResizeOptions(**how))[1].modules}

    asked = tuple(parse_rank(text) for text in ("double=0-9=2", "single=3", "re=img_in=4"))
    assert list(ranks(rank=6, ranks=asked).values()) == [2, 6, 3, 4]
    assert set(ranks(rank=6, include=("double=18", "img_in"))) == {names[1], names[3]}
    assert set(ranks(rank=6, exclude=("double",))) == set(names[2:])
    assert set(ranks(policy="energy", param=0.5, include=("transformer",))) == set(names)
    for bad in ("double=19", "middle=1"):
        with pytest.raises(RequestError, match=r"FLUX\.1"):
            resize(adapter, ResizeOptions(ranks=((bad, 2),)))


# policies ---------------------------------------------------------------------------------------------------------------


def test_policies_count_what_their_definition_says():
    adapter = Maker().lora("attn.out").lora("mlp.down", steep=2.0).lora("conv", steep=1.5).adapter()
    spectra = {m.name: np.linalg.svd(dense(m), compute_uv=False) for m in every(adapter)}
    expected = {
        ("energy", 0.9): lambda s: int(np.argmax(np.cumsum(s**2) >= 0.9 * np.sum(s**2))) + 1,
        ("error", 0.2): lambda s: next(k for k in range(99) if math.sqrt(np.sum(s[k:] ** 2) / np.sum(s**2)) <= 0.2),
        ("sv_ratio", 4.0): lambda s: int(np.sum(s > s[0] / 4)),
        ("sv_cumulative", 0.7): lambda s: int(np.argmax(np.cumsum(s) >= 0.7 * np.sum(s))) + 1,
        ("sv_fro", 0.8): lambda s: int(np.argmax(np.cumsum(s**2) >= 0.64 * np.sum(s**2))) + 1,
        ("threshold", 0.1): lambda s: max(int(np.sum(s > 0.1)), 1),
    }
    for (policy, param), count in expected.items():
        _, report = check(adapter, ResizeOptions(policy=policy, param=param, **EXACT))
        assert {m.name: m.new_rank for m in report.modules} == {n: count(s) for n, s in spectra.items()}, policy
        for m in report.modules:
            s = spectra[m.name]
            assert m.sum_kept == pytest.approx(np.sum(s[: m.new_rank]) / np.sum(s), rel=1e-6)
            assert m.max_ratio == pytest.approx(s[0] / s[m.new_rank - 1], rel=1e-6)
    _, capped = resize(adapter, ResizeOptions(policy="energy", param=0.999, rank=3))
    assert {m.new_rank for m in capped.modules} == {3}


@pytest.mark.parametrize(("method", "param"), [("sv_ratio", 5.0), ("sv_cumulative", 0.6), ("sv_fro", 0.9), ("sv_fro", 0.1)])
def test_kohya_ranks_are_those_of_sd_scripts(method, param):
    from tests.test_policies import sd_scripts

    adapter = Maker().lora("attn.out").lora("mlp.down", steep=2.0).lora("conv", steep=1.5).adapter()
    _, report = resize(adapter, ResizeOptions(policy=method, param=param, compat="kohya", rank=9))
    for m in report.modules:
        module = next(x for x in every(adapter) if x.name == m.name)
        unscaled = np.linalg.svd(dense(module) / module.scale.value, compute_uv=False)
        assert m.new_rank == sd_scripts(np.where(unscaled > 1e-9, unscaled, 0), 9, method, param)


def test_a_share_of_the_parameters_goes_where_it_counts():
    adapter = Maker().lora("attn.out", 12, steep=1.0).lora("mlp.down", 12, steep=3.0).adapter()
    _, report = check(adapter, ResizeOptions(policy="params", param=0.5, **EXACT))
    costs = {"attn.out": 2 * D, "mlp.down": 5 * D}
    spent = sum(costs[m.name] * m.new_rank for m in report.modules)
    assert 0.5 * 12 * 7 * D - 5 * D < spent <= 0.5 * 12 * 7 * D
    values = {m.name: np.linalg.svd(dense(m), compute_uv=False)[:12] for m in every(adapter)}
    best = min(
        sum(np.sum(values[n][k:] ** 2) for n, k in zip(costs, ks, strict=True))
        for ks in itertools.product(range(1, 13), repeat=2)
        if sum(c * k for c, k in zip(costs.values(), ks, strict=True)) <= spent
    )
    total = sum(np.sum(v**2) for v in values.values())
    assert report.relative_error == pytest.approx(math.sqrt(best / total), rel=1e-6)


def many(layout="comfyui", dtype="F16"):
    """Thirty modules of falling weight in one file, with what passes through."""
    rows = tuple(
        row(f"blocks.{i}.{n}", s) for i in range(10) for n, s in (("a", (64, 64)), ("b", (256, 64)), ("c", (64, 32, 3, 3)))
    )
    arch = replace(ARCH, rows=(*rows, row("norm", (D,))))
    make = Maker(dtype, layout=layout)
    for name, shape in arch.shapes.items():
        if name != "norm":
            delta = make.low_rank(shape, 16, steep=1.0 + 0.05 * int(name.split(".")[1]))
            make.add(name, delta, alpha=4.0, site=Site(DENOISER, arch.namings["original"][name]))
    if layout == "comfyui":
        make.add("norm", Full(make.tensor(D), "norm"), site=Site(DENOISER, arch.namings["original"]["norm"]))
    make.metadata = {
        "ss_network_args": json.dumps({"conv_dim": "16", "conv_alpha": "4", "block_dims": "1,2"}),
        "note": "x" * 500,
    }
    return replace(make.adapter(), architecture=arch)


@pytest.mark.parametrize("layout", ["comfyui", "sd-scripts", "diffusers", "lycoris"])
@pytest.mark.parametrize("share", [0.15, 0.5, 0.8])
def test_a_size_is_met_within_a_percent_from_below(tmp_path, layout, share):
    adapter = many(layout)
    save(adapter, tmp_path / "whole.safetensors")
    target = int((tmp_path / "whole.safetensors").stat().st_size * share)
    result, report = resize(adapter, ResizeOptions(size=target))
    save(result, tmp_path / "out.safetensors")
    size = (tmp_path / "out.safetensors").stat().st_size
    assert 0.99 * target <= size <= target
    assert abs(size - report.size) < 64
    _, flat = resize(adapter, ResizeOptions(rank=max(int(16 * share) - 1, 1)))
    assert report.relative_error < flat.relative_error


def test_a_size_that_is_too_small_is_refused_and_one_too_large_cuts_nothing():
    with pytest.raises(RequestError, match="smallest file"):
        resize(many(), ResizeOptions(size=2000))
    _, report = resize(many(), ResizeOptions(size=10_000_000))
    assert report.actions() == {"unchanged": 30}


def test_the_plan_is_what_resizing_does(tmp_path):
    adapter = many()
    rows: Any = plan(adapter, ranks=(2, 8, 32)).rows
    assert [r.rank for r in rows] == [2, 8, 32]
    for own in rows:
        result, report = resize(adapter, ResizeOptions(rank=own.rank))
        save(result, tmp_path / "x.safetensors", options=SaveOptions(force=True))
        assert abs((tmp_path / "x.safetensors").stat().st_size - own.size) < 2000
        assert own.relative_error == pytest.approx(report.relative_error, rel=1e-6)
        worst = report.worst()
        assert worst is not None
        assert own.worst == pytest.approx(worst.relative_error, rel=1e-6)
        assert own.at_size <= own.relative_error + 1e-9
    assert rows[-1].relative_error == 0.0
    assert json.dumps(plan(adapter, ranks=(2,)).to_json())


def test_metadata_says_what_is_true(tmp_path):
    result, report = resize(many("sd-scripts"), ResizeOptions(rank=8, conv_rank=3))
    save(result, tmp_path / "x.safetensors")
    metadata = read_safetensors(tmp_path / "x.safetensors").metadata
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "0.75"}
    assert metadata["ss_network_dim"] == "Dynamic"
    dumped = json.loads(json.dumps(report.to_json()))
    assert dumped["ranks"] == {"3": 10, "8": 20}
    assert dumped["actions"] == {"resized": 30}


# LoKr and LoHa that stay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("whole1", "whole2"), [(a, b) for a in (True, False) for b in (True, False)])
@pytest.mark.parametrize("how", [{"rank": 2}, {"policy": "energy", "param": 0.7}])
def test_a_lokr_keeps_w1_and_gets_the_best_w2(whole1, whole2, how):
    make = Maker()
    make.add("mlp.up", kron_delta(make, whole1, whole2, out=(12, 16), width=(3, 16)), alpha=2.0)
    adapter = make.adapter()
    result, report = resize(adapter, ResizeOptions(**how, **EXACT))
    old, new = (every(a)[0] for a in (adapter, result))
    w1 = old.delta.w1.f64() if whole1 else old.delta.w1_a.f64() @ old.delta.w1_b.f64()
    w2 = old.delta.w2.f64() if whole2 else old.delta.w2_a.f64() @ old.delta.w2_b.f64()
    best = old.scale.value * np.linalg.norm(w1) * optimum(w2, report.modules[0].new_rank)
    assert np.linalg.norm(dense(old) - dense(new)) == pytest.approx(best, rel=1e-4)
    assert report.modules[0].relative_error == pytest.approx(best / np.linalg.norm(dense(old)), rel=1e-4)
    assert (new.delta.w1, new.delta.w1_a) == (old.delta.w1, old.delta.w1_a)
    assert "given" in report.modules[0].note or "for the w1" in report.modules[0].note
    assert new.family == "lokr"


def test_a_convolution_lokr_with_a_core():
    make = Maker()
    core = make.tensor(4, 4, 3, 3)
    make.add("conv", Kronecker(w1=make.tensor(4, 4), w2_a=make.tensor(4, 12), w2_b=make.tensor(4, 4), t2=core), alpha=2.0)
    adapter = make.adapter()
    result, report = resize(adapter, ResizeOptions(rank=2, **EXACT))
    old, new = (every(a)[0] for a in (adapter, result))
    w2 = np.einsum("ijkl,ip,jr->prkl", old.delta.t2.f64(), old.delta.w2_a.f64(), old.delta.w2_b.f64())
    cut = (new.delta.w2_a.f64() @ new.delta.w2_b.f64()).reshape(w2.shape)
    assert np.linalg.norm(w2 - cut) == pytest.approx(optimum(w2.reshape(12, -1), 2), rel=1e-4)
    assert report.modules[0].new_rank == 2


@pytest.mark.parametrize("kind", ["loha", "loha above both sides", "loha tucker"])
def test_a_loha_that_stays_one_reports_its_true_error(kind):
    adapter = KINDS[kind](Maker()).adapter()
    result, report = resize(adapter, ResizeOptions(rank=2, alpha="4", **EXACT))
    old, new = (every(a)[0] for a in (adapter, result))
    assert (new.family, new.delta.rank, new.scale.value) == ("loha", 2, 2.0)
    error = np.linalg.norm(dense(old) - dense(new)) / np.linalg.norm(dense(old))
    assert report.modules[0].relative_error == pytest.approx(error, rel=1e-4)
    assert "not the best" in report.modules[0].note
    with pytest.raises(NotRepresentableError, match="no singular values"):
        resize(adapter, ResizeOptions(policy="energy", param=0.9))


# base model -------------------------------------------------------------------------------------------------------------


def base_file(path, names, *, prefix="", dtype="F32", seed=7):
    """A base model with the tiny architecture's weights; returns them by original name."""
    rng = np.random.default_rng(seed)
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    tensors = {}
    for name, spans in ARCH.namings[names].items():
        rows = np.concatenate([weights[s.weight][s.start : s.stop] for s in spans])
        tensors[f"{prefix}{name}.weight"] = of_array(rows, dtype)
        tensors[f"{prefix}{name}.bias"] = of_array(rows[:, :1] if rows.ndim > 1 else rows, dtype)
    write_safetensors(path, tensors, {})
    return weights


LAYOUTS = [("original", ""), ("original", "model.diffusion_model."), ("diffusers", ""), ("diffusers", "transformer.")]


@pytest.mark.parametrize(("names", "prefix"), LAYOUTS)
def test_a_base_is_read_in_every_layout(tmp_path, names, prefix):
    weights = base_file(tmp_path / "base.safetensors", names, prefix=prefix)
    base = open_base(tmp_path / "base.safetensors", ARCH)
    for naming in ("original", "diffusers"):
        for spans in ARCH.namings[naming].values():
            rows = np.concatenate([weights[s.weight][s.start : s.stop] for s in spans])
            site = Site(DENOISER, spans)
            assert np.array_equal(base.weight(site)(), rows.reshape(len(rows), -1))
            assert base.frobenius(site) == pytest.approx(np.linalg.norm(rows), rel=1e-6)
            assert base.spectral(site) == pytest.approx(np.linalg.norm(rows.reshape(len(rows), -1), 2), rel=1e-3)


def test_text_encoders_of_a_base(tmp_path):
    shapes = TEXT_ENCODERS["clip_l"].shapes
    rng = np.random.default_rng(0)
    arch = replace(ARCH, encoders=(replace(ARCH.encoders[0], table="clip_g"),))
    wide = TEXT_ENCODERS["clip_g"].shapes["text_model.encoder.layers.0.self_attn.q_proj"][0]
    fused = rng.standard_normal((3 * wide, wide)).astype(np.float32)
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    write_safetensors(tmp_path / "sdxl.safetensors", {key: of_array(fused, "F32")}, {})
    base = open_base(tmp_path / "sdxl.safetensors", arch)
    for i, part in enumerate("qkv"):
        name = f"text_model.encoder.layers.0.self_attn.{part}_proj"
        site = Site("clip_g", (ARCH.namings["original"]["attn.out"][0]._replace(weight=name, stop=wide),))
        assert np.array_equal(base.weight(site)(), fused[i * wide : (i + 1) * wide])
    folder = tmp_path / "pipeline" / "text_encoder"
    folder.mkdir(parents=True)
    name = "text_model.encoder.layers.0.mlp.fc1"
    weight = rng.standard_normal(shapes[name]).astype(np.float32)
    write_safetensors(folder / "model.safetensors", {f"{name}.weight": of_array(weight, "F32")}, {})
    base = open_base(tmp_path / "pipeline", ARCH)
    site = Site("clip_l", (ARCH.namings["original"]["attn.out"][0]._replace(weight=name, stop=len(weight)),))
    assert np.array_equal(base.weight(site)(), weight)


def test_a_scaled_fp8_base(tmp_path):
    values = np.random.default_rng(0).standard_normal((D, D)).astype(np.float32)
    tensors = {"attn.out.weight": of_array(values, "F8_E4M3"), "attn.out.scale_weight": of_array(np.float32(0.25)[None], "F32")}
    write_safetensors(tmp_path / "base.safetensors", tensors, {})
    base = open_base(tmp_path / "base.safetensors", ARCH)
    site = Site(DENOISER, ARCH.namings["original"]["attn.out"])
    np.testing.assert_array_equal(base.weight(site)(), tensors["attn.out.weight"].f32() * 0.25)
    with pytest.raises(RequestError, match=r"no rows 0:192 of denoiser mlp\.up"):
        base.frobenius(Site(DENOISER, ARCH.namings["original"]["mlp.up"]))


def test_norms_are_remembered_by_content(tmp_path):
    base_file(tmp_path / "a.safetensors", "original")
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    base_file(tmp_path / "other.safetensors", "original", seed=8)
    cache = NormCache(tmp_path / "cache" / "norms.json")
    site = Site(DENOISER, ARCH.namings["original"]["attn.out"])
    first = open_base(tmp_path / "a.safetensors", ARCH, cache)
    norm = first.frobenius(site)
    cache.save()
    again = NormCache(tmp_path / "cache" / "norms.json")
    copy = open_base(tmp_path / "copy.safetensors", ARCH, again)
    assert copy.content == first.content
    assert again.get(copy.content, f"fro:denoiser:attn.out[0:{D}]", lambda: -1.0) == norm
    assert open_base(tmp_path / "other.safetensors", ARCH, again).content != first.content
    (tmp_path / "cache" / "norms.json").write_text("[")
    assert NormCache(tmp_path / "cache" / "norms.json").get("x", "y", lambda: 2.0) == 2.0


@pytest.mark.parametrize("recipe", ["fro_ckpt=1", "spn_ckpt=1,params=0.5", "spn_lora,fro_lora=2", "subspace=0.3,fro_ckpt"])
def test_recipes_keep_what_their_scores_say(tmp_path, recipe):
    weights = base_file(tmp_path / "base.safetensors", "diffusers")
    base = open_base(tmp_path / "base.safetensors", ARCH)
    make = Maker()
    for i, part in enumerate(("attn.to_q", "attn.to_v")):
        site = Site(DENOISER, ARCH.namings["diffusers"][part])
        make.add(part, make.low_rank((D, D), 12), alpha=3.0 + i, site=site)
    make.lora("mlp.up").lora("conv")
    adapter = make.adapter()
    given = {k: float(v or 1) for k, _, v in (part.partition("=") for part in recipe.split(","))}
    share = {k: v / sum(given.values()) for k, v in given.items()}
    scores, spectra = {}, {}
    for module in every(adapter):
        span = module.site.spans[0]
        W = weights[span.weight][span.start : span.stop].reshape(module.out, -1).astype(np.float64)
        u, s, vt = np.linalg.svd(dense(module), full_matrices=False)
        u, s, vt = u[:, :12], s[:12], vt[:12]
        refs = {
            "fro_ckpt": np.linalg.norm(W), "spn_ckpt": np.linalg.norm(W, 2), "params": sum(W.shape), "spn_lora": s[0],
            "fro_lora": np.linalg.norm(s), "subspace": np.abs(np.diag(u.T @ W @ vt.T)),
        }  # fmt: skip
        scores[module.name] = np.log10(s) + np.log10(1.5) - sum(w * np.log10(refs[k]) for k, w in share.items())
        spectra[module.name] = s
    threshold = float(np.median(np.concatenate(list(scores.values())))) + 1e-4
    options = ResizeOptions(recipe=f"{recipe},thr={threshold!r},rescale=1.5", min_rank=0, **EXACT)
    result, report = resize(adapter, options, base)
    for m in report.modules:
        keep = scores[m.name] > threshold
        assert m.new_rank == keep.sum()
        new = next((x for x in every(result) if x.name == m.name), None)
        assert (new is None) == (m.action == "left out")
        gone = spectra[m.name][~keep]
        assert m.relative_error == pytest.approx(np.linalg.norm(gone) / np.linalg.norm(spectra[m.name]), rel=1e-5, abs=1e-7)
        if new is not None:
            old = next(x for x in every(adapter) if x.name == m.name)
            error = np.linalg.norm(1.5 * dense(old) - dense(new))
            assert error == pytest.approx(1.5 * np.linalg.norm(gone), rel=1e-4, abs=1e-5)
    if "ckpt" in recipe or "subspace" in recipe:
        with pytest.raises(RequestError, match="base model"):
            resize(adapter, options)


def test_a_recipe_with_a_size(tmp_path):
    adapter = many()
    result, report = resize(adapter, ResizeOptions(recipe="fro_lora,size=0.25", min_rank=0))
    save(result, tmp_path / "x.safetensors")
    assert 0.98 * 2**18 <= (tmp_path / "x.safetensors").stat().st_size <= 2**18
    assert report.threshold is not None


# DoRA -------------------------------------------------------------------------------------------------------------------


def dora(weight, delta, magnitude, axis):
    """W' by definition, for (out, in, k...) arrays."""
    new = weight + delta
    axes = tuple(range(1, new.ndim)) if axis == "out" else (0, *range(2, new.ndim))
    shape = [1] * new.ndim
    shape[0 if axis == "out" else 1] = -1
    return new / np.sqrt(np.sum(new**2, axis=axes, keepdims=True)) * magnitude.reshape(shape)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("name", ["mlp.up", "conv"])
def test_dora_with_its_base(tmp_path, name, axis):
    weights = base_file(tmp_path / "base.safetensors", "original")
    base = open_base(tmp_path / "base.safetensors", ARCH)
    make, shape = Maker(), SHAPES[name]
    size = shape[0] if axis == "out" else shape[1]
    values = make.rng.uniform(5.0, 9.0, size).astype(np.float32)
    tensor = of_array(values.reshape((-1, 1) if axis == "out" else (1, -1)), "F32")
    make.add(name, make.low_rank(shape, 12), alpha=5.0, magnitude=Magnitude(tensor, axis))
    adapter = make.adapter()
    with pytest.raises(NotRepresentableError, match="magnitude"):
        resize(adapter, ResizeOptions(rank=3))
    module = every(adapter)[0]
    weight = weights[name].astype(np.float64)
    target = dora(weight, dense(module).reshape(shape), values.astype(np.float64), axis)
    change = (target - weight).reshape(shape[0], -1)

    folded, report = resize(adapter, ResizeOptions(rank=3, dora="fold", **EXACT), base)
    new = every(folded)[0]
    assert (new.family, new.magnitude) == ("lora", None)
    assert np.linalg.norm(change - dense(new)) <= optimum(change, 3) * 1.0001
    assert report.modules[0].relative_error == pytest.approx(optimum(change, 3) / np.linalg.norm(change), rel=1e-4)

    again, report = resize(adapter, ResizeOptions(rank=3, dora="recompute", **EXACT), base)
    new = every(again)[0]
    assert new.family == "dora"
    result = dora(weight, dense(new).reshape(shape), new.magnitude.tensor.f64().ravel(), axis)
    error = np.linalg.norm(target - result)
    assert report.modules[0].relative_error == pytest.approx(error / np.linalg.norm(change), rel=1e-3)
    stale = dora(weight, dense(new).reshape(shape), values.astype(np.float64), axis)
    assert error <= np.linalg.norm(target - stale)


def test_the_error_of_several_doras_is_that_of_their_effect(tmp_path):
    """Not weighted by what is inside; what is left out counts as nothing left, what stays as nothing lost."""
    weights = base_file(tmp_path / "base.safetensors", "original")
    base, make = open_base(tmp_path / "base.safetensors", ARCH), Maker()
    names = {"attn.out": (8, 1.0, 0.3), "mlp.up": (8, 9.0, 3.0), "mlp.down": (2, 1.0, 1.0), "narrow": (4, 1e-6, 1.0)}
    for name, (rank, alpha, gain) in names.items():
        norms = np.linalg.norm(weights[name].reshape(SHAPES[name][0], -1), axis=1)
        magnitude = Magnitude(of_array((gain * norms).astype(np.float32).reshape(-1, 1), "F32"), "out")
        make.add(name, make.low_rank(SHAPES[name], rank), alpha=alpha, magnitude=magnitude)
    adapter = make.adapter()
    how = ResizeOptions(rank=2, policy="threshold", param=1e-3, min_rank=0, dora="recompute", **EXACT)
    result, report = resize(adapter, how, base)
    after = {module.site.spans[0].weight: module for module in every(result)}
    lost = total = 0.0
    for module, said in zip(every(adapter), report.modules, strict=True):
        name = module.site.spans[0].weight
        weight = weights[name].astype(np.float64)

        def effect(one, weight=weight):
            if one is None:
                return 0.0 * weight
            return dora(weight, dense(one).reshape(weight.shape), one.magnitude.tensor.f64().ravel(), "out") - weight

        old, new = effect(module), effect(after.get(name))
        lost, total = lost + np.sum((old - new) ** 2), total + np.sum(old**2)
        assert said.squared_norm == pytest.approx(np.sum(old**2), rel=1e-4)
        assert said.relative_error == pytest.approx(math.sqrt(np.sum((old - new) ** 2) / np.sum(old**2)), rel=1e-3, abs=1e-6)
    assert after.keys() == names.keys() - {"narrow"}
    assert report.relative_error == pytest.approx(math.sqrt(lost / total), rel=1e-4)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("family", ["lokr", "loha", "lokr as LoRA"])
def test_dora_of_other_families_with_its_base(tmp_path, family, axis):
    weight = base_file(tmp_path / "base.safetensors", "original")["attn.out"].astype(np.float64)
    base = open_base(tmp_path / "base.safetensors", ARCH)
    make = Maker()
    delta = kron_delta(make, True, False) if family != "loha" else Hadamard(
        make.tensor(D, 6, steep=1.5), make.tensor(6, D), make.tensor(D, 6, steep=1.5), make.tensor(6, D)
    )  # fmt: skip
    values = make.rng.uniform(5.0, 9.0, D).astype(np.float32)
    make.add(
        "attn.out",
        delta,
        alpha=9.0,
        magnitude=Magnitude(of_array(values.reshape((-1, 1) if axis == "out" else (1, -1)), "F32"), axis),
    )
    adapter = make.adapter()
    target = dora(weight, dense(every(adapter)[0]), values.astype(np.float64), axis)
    norm = np.linalg.norm(target - weight)
    options = ResizeOptions(rank=2, dora="recompute", as_lora=family == "lokr as LoRA", **EXACT)
    result, report = resize(adapter, options, base)
    new, (said,) = every(result)[0], report.modules
    assert new.family == said.family == ("dora" if family == "lokr as LoRA" else family)
    assert (new.delta.rank, new.magnitude.axis) == (2, axis)
    after = dora(weight, dense(new), new.magnitude.tensor.f64().ravel(), axis)
    assert said.relative_error == pytest.approx(np.linalg.norm(target - after) / norm, rel=1e-3)
    stale = dora(weight, dense(new), values.astype(np.float64), axis)
    assert np.linalg.norm(target - after) < np.linalg.norm(target - stale)
    assert "the magnitude is the best one for it" in said.note


# refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "nothing says"), ({"rank": 0}, "at least 1"), ({"policy": "energy"}, "needs a parameter"),
        ({"policy": "energy", "param": 2.0}, "energy"), ({"policy": "best", "param": 1.0}, "no policy"),
        ({"policy": "energy", "param": 0.9, "size": 5}, "both decide"), ({"recipe": "fro"}, "none of"),
        ({"rank": 4, "alpha": "half"}, "alpha"), ({"rank": 4, "include": ("(",)}, "regular expression"),
        ({"rank": 4, "compat": "kohya"}, "compat"), ({"rank": 4, "factors": "other"}, "factors"), ({"size": 0}, "nothing"),
        ({"policy": "params", "param": 1.5}, "share"), ({"rank": 4, "include": ("nothing like it",)}, "excluded"),
        ({"rank": 4, "ranks": (("[", 3),)}, "regular expression"), ({"rank": 4, "dtype": "fp8"}, "dtype"),
    ],
)  # fmt: skip
def test_bad_requests_say_why(options, why):
    with pytest.raises(RequestError, match=why):
        resize(Maker().lora("attn.out").adapter(), ResizeOptions(**options))


def test_not_a_number_names_the_module():
    make = Maker().lora("attn.out")
    bad = np.full((D, 4), np.nan, np.float32)
    make.add("mlp.down", LowRank(of_array(bad, "F32"), make.tensor(4, 4 * D)))
    with pytest.raises(BrokenModuleError, match=r"mlp\.down: its factors hold NaN"):
        resize(make.adapter(), ResizeOptions(rank=2))
    for whole in (True, False):
        make = Maker()
        delta = kron_delta(make, whole, whole)
        broken = replace(
            delta, **{"w1" if whole else "w1_a": of_array(np.full((6, 6 if whole else 4), np.inf, np.float32), "F32")}
        )
        for as_lora in (True, False):
            with np.errstate(invalid="ignore"), pytest.raises(BrokenModuleError, match=r"attn\.out: .*NaN or infinity"):
                resize(make.add("attn.out", broken).adapter(), ResizeOptions(rank=2, as_lora=as_lora))


def test_ranks_are_read_from_text():
    assert parse_rank("16") == 16
    assert parse_rank("(a|b)=x=4") == ("(a|b)=x", 4)
    for bad in ("", "x", "x=", "x=-4"):
        with pytest.raises(RequestError, match="no rank"):
            parse_rank(bad)
