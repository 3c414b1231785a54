"""Distances, cosines and common directions against dense float64, from the smallest products to whole adapters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorasurgery
from lorasurgery.errors import BrokenModuleError, RequestError
from lorasurgery.operations.effect.products import Measured, Product, by_qr, measure
from lorasurgery.verbs.compare import TOLERANCES, CompareOptions, compare
from tests.builders import Builder, convert_path
from tests.oracle import Raw, Reader, delta, find, model, modules, raw, read, write

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from lorasurgery.verbs.compare import Comparison
    from tests.builders import Made

    Array = NDArray[np.float64]


def product(out: int, rank: int, columns: int, seed: int, scale: float = 1.0) -> Product:
    own = np.random.default_rng(seed)
    return Product(own.standard_normal((out, rank)), own.standard_normal((rank, columns)), scale)


def dense(of: Product) -> Array:
    whole: Array = of.scale * (of.up @ of.down)
    return whole


class Truth(NamedTuple):
    distance: float
    cosine: float
    left: float
    right: float


def truth(a: Array, b: Array) -> Truth:
    """From the dense matrices, by their definitions."""
    norms = np.linalg.norm(a), np.linalg.norm(b)
    spaces = []
    for matrix in (a, b):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        rank = int(np.sum(values > 1e-10 * values[0]))
        spaces.append((left[:, :rank], right[:rank].T))
    overlaps = [np.sum((p.T @ q) ** 2) / min(p.shape[1], q.shape[1]) for p, q in zip(*spaces, strict=True)]
    return Truth(float(np.linalg.norm(a - b) / max(norms)), float(np.sum(a * b) / norms[0] / norms[1]), *map(float, overlaps))


def assert_true(found: Measured, a: Array, b: Array) -> None:
    right = truth(a, b)
    assert found.norm_a == pytest.approx(np.linalg.norm(a), rel=1e-9)
    assert found.norm_b == pytest.approx(np.linalg.norm(b), rel=1e-9)
    assert found.distance == pytest.approx(right.distance, rel=1e-6)
    assert found.cosine == pytest.approx(right.cosine, abs=1e-12)
    assert found.left == pytest.approx(right.left, abs=1e-7)
    assert found.right == pytest.approx(right.right, abs=1e-7)


@pytest.mark.parametrize("ranks", [(3, 3), (2, 7), (1, 1), (20, 25)])
def test_unrelated_products(ranks):
    a, b = product(40, ranks[0], 30, 1, 0.3), product(40, ranks[1], 30, 2, -2.0)
    assert_true(measure(a, b), dense(a), dense(b))


@pytest.mark.parametrize("step", [1e-2, 1e-5, 1e-7, 1e-10, 1e-13])
def test_nearly_equal_products_keep_their_distance(step):
    # ||A||^2 + ||B||^2 - 2 <A, B> has no digit left of it from 1e-8 on.
    a = product(60, 4, 50, 3, 0.5)
    gap = np.random.default_rng(4).standard_normal(a.up.shape)
    b = Product(a.up + step * gap, a.down, a.scale)
    expected = 0.5 * np.linalg.norm((b.up - a.up) @ a.down) / max(np.linalg.norm(dense(a)), np.linalg.norm(dense(b)))
    assert measure(a, b).distance == pytest.approx(expected, rel=1e-4, abs=1e-16)
    assert measure(b, a).distance == pytest.approx(expected, rel=1e-4, abs=1e-16)


def test_nearly_equal_changes_with_unlike_factors():
    # The same change from other factors: only QR tells the distance.
    a = product(60, 4, 50, 3)
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((4, 4)))[0]
    gap = product(60, 1, 50, 6)
    b = Product(np.hstack([a.up @ turn, 1e-9 * gap.up]), np.vstack([turn.T @ a.down, gap.down]))
    expected = 1e-9 * np.linalg.norm(dense(gap)) / np.linalg.norm(dense(a))
    assert measure(a, b).distance == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("power", [2.0, 0.25, -8.0])
def test_a_scale_in_another_place_is_no_difference_at_all(power):
    a = product(30, 3, 20, 7, 0.7)
    found = measure(a, Product(a.up * power, a.down, a.scale / power))
    assert found.difference == 0.0
    assert [found.cosine, found.left, found.right] == pytest.approx([1.0, 1.0, 1.0])


def test_opposite_and_disjoint_products():
    a = product(30, 3, 20, 8)
    opposite = measure(a, Product(-a.up, a.down))
    assert [opposite.distance, opposite.cosine] == pytest.approx([2.0, -1.0])
    one, two = np.eye(30)[:, :3], np.eye(30)[:, 3:6]
    apart = measure(Product(one, np.eye(20)[:3]), Product(two, np.eye(20)[3:6]))
    assert (apart.inner, apart.left, apart.right) == (0.0, 0.0, 0.0)
    assert apart.distance == pytest.approx(math.sqrt(2.0))


def test_zeros_padding_and_repeated_columns():
    a = product(30, 3, 20, 9)
    zero = Product(np.zeros((30, 3)), a.down)
    norm = np.linalg.norm(dense(a))
    assert list(measure(a, zero)[:4]) == pytest.approx([norm, 0.0, 0.0, norm])
    nothing = measure(zero, zero)
    assert (nothing.distance, nothing.cosine, nothing.left) == (0.0, None, None)
    padded = Product(np.pad(a.up, ((0, 0), (0, 5))), np.vstack([a.down, np.zeros((5, 20))]))
    assert measure(a, padded).distance < 1e-15
    assert measure(a, padded).left == pytest.approx(1.0)
    twice = Product(np.hstack([a.up, a.up]) / 2, np.vstack([a.down, a.down]))
    assert measure(a, twice).distance < 1e-14
    assert measure(a, twice).right == pytest.approx(1.0)


def test_both_routes_agree():
    a, b = product(25, 6, 18, 10, 2.0), product(25, 5, 18, 11)
    for one, two in zip(measure(a, b), by_qr(a, b), strict=True):
        assert one == pytest.approx(two, rel=1e-9)


def test_not_a_number_in_is_not_a_number_out():
    a = product(10, 2, 8, 12)
    broken = Product(a.up.copy(), a.down)
    broken.up[0, 0] = np.nan
    with np.errstate(all="ignore"):
        assert math.isnan(measure(a, broken).distance)


factor = st.integers(1, 5)
seed = st.integers(0, 10_000)


@settings(deadline=None, max_examples=60)
@given(factor, factor, seed, st.floats(-4.0, 4.0).filter(lambda s: abs(s) > 1e-3))
def test_symmetry_and_scale(first, second, number, scale):
    a, b = product(9, first, 7, number), product(9, second, 7, number + 1)
    one, two = measure(a, b), measure(b, a)
    assert one.distance == pytest.approx(two.distance, rel=1e-9)
    assert one.cosine == pytest.approx(two.cosine, rel=1e-9)
    assert [one.left, one.right] == pytest.approx([two.left, two.right], rel=1e-7)
    scaled = measure(a, Product(b.up, b.down, scale))
    assert one.cosine is not None
    assert scaled.cosine == pytest.approx(math.copysign(1.0, scale) * one.cosine, abs=1e-9)
    assert 0.0 <= one.distance <= 2.0
    assert scaled.left == pytest.approx(one.left, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(seed, st.floats(0.0, 1.0), st.floats(1e-9, 2.0))
def test_triangle(number, blend, step):
    a = product(9, 2, 7, number)
    b = Product(a.up + step * product(9, 2, 7, number + 1).up, a.down)
    c = Product(blend * a.up + (1 - blend) * b.up, a.down)
    ab, ac, cb = (measure(*pair).difference for pair in ((a, b), (a, c), (c, b)))
    assert ab <= ac + cb + 1e-12 * np.linalg.norm(dense(a))
    assert ac == pytest.approx((1 - blend) * ab, rel=1e-4, abs=1e-13)


# adapters -----------------------------------------------------------------------------------------------------------------

WEIGHT = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
CONV = "input_blocks.1.0.in_layers.2"


def changes(made: Made) -> dict[str, Array]:
    """Original weight -> its whole change, from the oracle."""
    found: dict[str, Array] = {}
    for stem, parts in modules(made.tensors)[0].items():
        place = find(made.of, made.layout, stem)
        assert place is not None
        weight = place[0].weight
        shape = made.of.shapes[weight]
        columns = math.prod(shape[1:])
        values = delta(parts, np.arange(columns)) * Reader(made.layout, made.configs).scale(parts)
        whole = found.setdefault(weight, np.zeros((shape[0], columns)))
        at = 0
        for rows in place:
            whole[rows.start : rows.start + rows.count] = values[at : at + rows.count]
            at += rows.count
    return found


def compared(a: Path, b: Path, of: str, **how: object) -> Comparison:
    return compare(lorasurgery.load(a, arch=of), lorasurgery.load(b, arch=of), CompareOptions(**how))  # type: ignore[arg-type]


def files(tmp_path: Path, *mades: Made) -> list[Path]:
    paths = []
    for i, made in enumerate(mades):
        (tmp_path / str(i)).mkdir()
        paths.append(made.save(tmp_path / str(i)))
    return paths


def names(layout: str) -> dict[str, str]:
    """Name of the two weights in a layout's naming."""
    own = {place[0].weight: name for name, place in model("sd1").diffusers.items()}
    return {w: w if layout == "comfyui" else own[w] for w in (WEIGHT, CONV)}


FAMILIES: tuple[tuple[str, dict[str, bool]], ...] = (
    ("lora", {}), ("lora", {"tucker": True}), ("loha", {}), ("loha", {"tucker": True}), ("lokr", {}),
    ("lokr", {"whole1": False}), ("lokr", {"whole2": True}), ("full", {}),
)  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second"), [(i, (i + step) % len(FAMILIES)) for i in range(len(FAMILIES)) for step in (0, 3)]
)
def test_families_across_layouts(tmp_path, first, second):
    built = []
    for seed_, layout, which, rank, alpha in ((1, "sd-scripts", first, 4, 3.0), (2, "comfyui", second, 2, 1.5)):
        own = Builder.start(model("sd1"), layout, ("BF16", "F16")[seed_ % 2], seed_)
        family, how = FAMILIES[which]
        for weight, name in names(layout).items():
            own.add(name, family, rank=rank, alpha=alpha, **(how if weight == CONV or "tucker" not in how else {}))
        built.append(own.made)
    one, two = files(tmp_path, *built)
    result = compared(one, two, "sd1")
    ours = {pair.weight: pair for pair in result.pairs}
    a, b = (changes(made) for made in built)
    assert set(ours) == {WEIGHT, CONV}
    for weight, pair in ours.items():
        right = truth(a[weight], b[weight])
        assert pair.distance == pytest.approx(right.distance, rel=1e-9)
        assert pair.cosine == pytest.approx(right.cosine, abs=1e-12)
        assert pair.norm_a == pytest.approx(np.linalg.norm(a[weight]), rel=1e-9)
        if pair.left is not None:
            assert [pair.left, pair.right] == pytest.approx([right.left, right.right], abs=1e-6)
        assert pair.status == "different"
    assert result.distance() == pytest.approx(
        math.sqrt(sum(np.sum((a[w] - b[w]) ** 2) for w in a))
        / max(math.sqrt(sum(np.sum(x[w] ** 2) for w in x)) for x in (a, b)),
        rel=1e-9,
    )


@pytest.mark.parametrize(("family", "blocks"), [("lora", 0), ("loha", 0), ("lokr", 3), ("lokr", 2)])
def test_fused_against_split(tmp_path, family, blocks):
    """SD3's qkv in one file is q, k and v in the other, with other ranks and one member missing."""
    fused = Builder.start(model("sd3-medium"), "comfyui", "F16", 3)
    fused.add("joint_blocks.0.x_block.attn.qkv", family, rank=2, alpha=1.0, **({"blocks": blocks} if blocks else {}))
    parts = Builder.start(model("sd3-medium"), "diffusers", "F32", 4)
    for name, rank in (("to_q", 3), ("to_v", 1)):
        parts.add(f"transformer_blocks.0.attn.{name}", "lora", rank=rank)
    first, second = files(tmp_path, fused.made, parts.made)
    result = compared(first, second, "sd3-medium")
    (whole,), (split,) = (changes(made).values() for made in (fused.made, parts.made))
    assert [pair.rows for pair in result.pairs] == [((0, 1536),), ((1536, 3072),), ((3072, 4608),)]
    for pair in result.pairs:
        ((start, stop),) = pair.rows
        one, two = whole[start:stop], split[start:stop]
        gap = np.linalg.norm(one - two) / max(np.linalg.norm(one), np.linalg.norm(two))
        assert pair.distance == pytest.approx(gap, rel=1e-8)
        assert pair.part
    assert [pair.status for pair in result.pairs] == ["different", "only a", "different"]
    assert result.pairs[1].distance == 1.0


def test_rows_in_another_order_are_one_pair(tmp_path):
    """Diffusers holds scale and shift of FLUX's final layer the other way round."""
    own = Builder.start(model("flux1-dev"), "comfyui", "BF16", 5)
    own.add("final_layer.adaLN_modulation.1", "lora", rank=3, alpha=2.0)
    (source,) = files(tmp_path, own.made)
    out = convert_path(source, own.made.of, "diffusers", tmp_path / "out.safetensors")
    result = compared(source, out.path, "flux1-dev")
    (pair,) = result.pairs
    assert (pair.status, pair.rows, pair.part) == ("same", ((0, 6144),), False)
    assert pair.distance is not None
    assert 0.0 < pair.distance < TOLERANCES["BF16"]


@pytest.mark.parametrize(("dtype", "status"), [("F32", "identical"), ("F16", "same"), ("BF16", "same")])
def test_the_tolerance_is_the_dtypes(tmp_path, dtype, status):
    own = Builder.start(model("sd1"), "sd-scripts", "F32", 6)
    own.add(names("sd-scripts")[WEIGHT], "lora", rank=4, alpha=3.0)
    (a,) = files(tmp_path, own.made)
    tensors = {key: raw(t.f64(), dtype) for key, t in own.made.tensors.items()}
    write(tmp_path / "b.safetensors", tensors, {})
    result = compared(a, tmp_path / "b.safetensors", "sd1")
    assert [pair.status for pair in result.pairs] == [status]
    assert result.same
    assert compared(a, tmp_path / "b.safetensors", "sd1", tolerance=0.0).same is (status == "identical")
    assert not compared(a, tmp_path / "b.safetensors", "sd1", tolerance=1e-6).same or dtype == "F32"


def lora_file(path: Path, change: float = 1.0, alpha: float = 3.0, more: dict[str, Raw] | None = None) -> Path:
    """Two modules of SD 1, the second times ``change``."""
    own = Builder.start(model("sd1"), "sd-scripts", "F32", 7)
    for weight, name in names("sd-scripts").items():
        stem = own.add(name, "lora", rank=4, alpha=alpha)
        if weight == CONV:
            up = own.made.tensors[f"{stem}.lora_up.weight"]
            own.made.tensors[f"{stem}.lora_up.weight"] = raw(change * up.f64(), "F32")
    write(path, {**own.made.tensors, **(more or {})}, {})
    return path


def test_one_strength_for_all_is_named(tmp_path):
    a, b = lora_file(tmp_path / "a.safetensors"), lora_file(tmp_path / "b.safetensors", alpha=-1.5)
    c = lora_file(tmp_path / "c.safetensors", 0.5, 1.5)
    negative = compared(a, b, "sd1")
    assert negative.strength() == pytest.approx(-0.5)
    assert negative.verdict() == "different: B is A times -0.5"
    assert compared(a, c, "sd1").strength() is None
    assert compared(a, a, "sd1").verdict() == "identical: the 2 modules change exactly the same in both"


def test_zero_modules_count_as_nothing(tmp_path):
    """A module of zeros, as trainers leave it, does what no module does."""
    a, b = lora_file(tmp_path / "a.safetensors", 0.0), lora_file(tmp_path / "b.safetensors")
    stem = "lora_unet_" + names("sd-scripts")[CONV].replace(".", "_")
    tensors = {k: t for k, t in read(b)[0].items() if not k.startswith(stem)}
    write(tmp_path / "c.safetensors", tensors, {})
    result = compared(a, tmp_path / "c.safetensors", "sd1")
    assert (result.same, result.counts()) == (True, {"identical": 2})
    result = compared(b, tmp_path / "c.safetensors", "sd1")
    assert (result.same, result.counts()) == (False, {"identical": 1, "only a": 1})
    assert result.verdict().endswith("1 only in A")


def test_biases_magnitudes_and_unknown_keys(tmp_path):
    stem = "lora_unet_" + names("sd-scripts")[WEIGHT].replace(".", "_")
    ones = np.ones(320)
    plain = lora_file(tmp_path / "a.safetensors")
    bias = lora_file(tmp_path / "b.safetensors", more={f"{stem}.diff_b": raw(ones, "F32")})
    other = lora_file(tmp_path / "c.safetensors", more={f"{stem}.diff_b": raw(1.5 * ones, "F32")})
    dora = lora_file(tmp_path / "d.safetensors", more={f"{stem}.dora_scale": raw(ones.reshape(320, 1), "F32")})
    column = lora_file(tmp_path / "e.safetensors", more={f"{stem}.dora_scale": raw(ones.reshape(1, 320), "F32")})
    stray = lora_file(tmp_path / "f.safetensors", more={"mystery.tensor": raw(ones, "F32")})

    def vectors(a: Path, b: Path) -> dict[str, float]:
        return dict(next(p for p in compared(a, b, "sd1").pairs if p.weight == WEIGHT).vectors)

    assert vectors(plain, bias) == {"bias": 1.0}
    assert vectors(bias, other) == {"bias": pytest.approx(0.5 / 1.5)}
    assert vectors(bias, bias) == {"bias": 0.0}
    assert vectors(plain, dora) == {"magnitude": 1.0}
    assert vectors(dora, dora) == {"magnitude": 0.0}
    unlike = compared(dora, column, "sd1")
    assert unlike.counts() == {"unknown": 1, "identical": 1}
    assert "--base" in unlike.worst_first()[0].note
    assert not unlike.same
    assert compared(plain, stray, "sd1").leftovers == ([], ["mystery.tensor"])
    assert not compared(plain, stray, "sd1").same
    assert compared(stray, stray, "sd1").same


def test_families_that_need_the_base_are_compared_as_tensors(tmp_path):
    stem = "lora_unet_" + names("sd-scripts")[WEIGHT].replace(".", "_")
    blocks = np.random.default_rng(0).standard_normal((10, 32, 32))
    for name, values, alpha in (("a", blocks, 1.0), ("b", blocks, 1.0), ("c", blocks * 1.25, 1.0), ("d", blocks, 2.0)):
        write(
            tmp_path / f"{name}.safetensors", {f"{stem}.oft_blocks": raw(values, "F32"), f"{stem}.alpha": raw(alpha, "F32")}, {}
        )
    a, b, c, d = (tmp_path / f"{name}.safetensors" for name in "abcd")
    assert compared(a, b, "sd1").verdict().startswith("identical")
    assert compared(a, c, "sd1").pairs[0].distance == pytest.approx(0.2, abs=1e-3)
    assert compared(a, d, "sd1").pairs[0].status == "different"
    lora = lora_file(tmp_path / "e.safetensors")
    assert compared(a, lora, "sd1").counts() == {"unknown": 1, "only b": 1}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_are_told(tmp_path, value):
    a = lora_file(tmp_path / "a.safetensors")
    b = lora_file(tmp_path / "b.safetensors", value)
    result = compared(a, b, "sd1")
    assert result.counts() == {"identical": 1, "unknown": 1}
    assert "NaN" in result.worst_first()[0].note
    assert not result.same


def test_different_models_and_wrong_options(tmp_path):
    sd1 = lora_file(tmp_path / "a.safetensors")
    other = Builder.start(model("flux1-dev"), "comfyui", "F16", 1)
    other.add("double_blocks.0.img_attn.proj", "lora", rank=1)
    (flux,) = files(tmp_path, other.made)
    result = compare(lorasurgery.load(sd1), lorasurgery.load(flux, arch="flux1-dev"))
    assert (result.same, result.pairs) == (False, [])
    assert result.verdict() == "different: they are for different models, sd1 and flux1-dev"
    for wrong in ({"tolerance": -1.0}, {"tolerance": math.nan}, {"workers": 0}):
        with pytest.raises(RequestError):
            compared(sd1, sd1, "sd1", **wrong)


def test_two_modules_for_one_row_are_refused(tmp_path):
    own = Builder.start(model("sd3-medium"), "comfyui", "F16", 3)
    own.add("joint_blocks.0.x_block.attn.qkv", "lora", rank=2)
    parts = Builder.start(model("sd3-medium"), "diffusers", "F16", 4)
    parts.add("transformer_blocks.0.attn.to_q", "lora", rank=2)
    write(tmp_path / "both.safetensors", {**own.made.tensors, **parts.made.tensors}, {})
    with pytest.raises(BrokenModuleError, match="both hold the same rows"):
        compared(tmp_path / "both.safetensors", tmp_path / "both.safetensors", "sd3-medium")


def test_the_number_of_threads_changes_nothing(tmp_path):
    a, b = lora_file(tmp_path / "a.safetensors"), lora_file(tmp_path / "b.safetensors", 1.01)
    one, two = (compared(a, b, "sd1", workers=n).to_json() for n in (1, 2))
    one["seconds"] = two["seconds"] = 0
    assert one == two
