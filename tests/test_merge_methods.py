"""Methods of merging against their formulas, written down again for dense float64 matrices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorasurgery.adapter import Scale
from lorasurgery.api import save
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.miss import Miss
from lorasurgery.errors import BrokenModuleError, NotRepresentableError, RequestError
from lorasurgery.io.header import read_safetensors
from lorasurgery.io.tensors import of_array
from lorasurgery.operations.cut import ResizeOptions
from lorasurgery.verbs.merge import MergeOptions, Source, merge, parse_weight
from lorasurgery.verbs.merge.options import COMPATS, DENSE, METHODS
from tests.test_resize import D, Maker, dense, every

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter

WEIGHTS = (1.0, 0.75, -0.5)
NAMES = ("mlp.up", "conv", "narrow")


def adapters(count: int = 3) -> list[Adapter]:
    """Files with unequal ranks and alphas, and a module that only the first has."""
    found = []
    for seed in range(count):
        make = Maker("F32", seed)
        for name in NAMES:
            make.lora(name, rank=3 + seed, alpha=2.0 + seed)
        if seed == 0:
            make.lora("mlp.down", rank=2, alpha=5.0)
        found.append(make.adapter())
    return found


def merged(files: list[Adapter], weights: tuple[float, ...] = WEIGHTS, **how: Any) -> dict[str, Any]:
    """Module name -> dense result."""
    sources = [Source(a, parse_weight([str(w)]), f"f{i}") for i, (a, w) in enumerate(zip(files, weights, strict=False))]
    result, _ = merge(sources, MergeOptions(**how))
    return {module.name: dense(module) for module in every(result)}


def terms(files: list[Adapter], name: str, weights: tuple[float, ...] = WEIGHTS) -> list[Any]:
    """The weighted changes that files have of a module, dense."""
    return [w * dense(m) for a, w in zip(files, weights, strict=False) for m in every(a) if m.name == name]


def same(found: Any, truth: Any, tolerance: float = 1e-6) -> bool:
    return bool(np.linalg.norm(found - truth) <= tolerance * max(float(np.linalg.norm(truth)), 1e-30))


def test_average_divides_by_the_weights_of_all_files() -> None:
    files = adapters()
    found = merged(files, method="average", factor=2.0)
    for name in (*NAMES, "mlp.down"):
        assert same(found[name], 2.0 * sum(terms(files, name)) / sum(WEIGHTS))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_turns_from_one_to_the_other(t: float) -> None:
    files = adapters(2)
    found = merged(files, (1.0, 0.75), method="slerp", t=t)
    for name in NAMES:
        a, b = terms(files, name, (1.0, 0.75))
        angle = math.acos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
        assert same(found[name], (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle))
    if t < 1.0:
        assert same(found["mlp.down"], (1 - t) * terms(files, "mlp.down")[0])


def test_slerp_of_parallel_changes_is_linear() -> None:
    (file,) = adapters(1)
    found = merged([file, file], (1.0, 3.0), method="slerp", t=0.25)
    assert same(found["mlp.up"], (0.75 + 0.75) * terms([file], "mlp.up")[0])


def test_model_stock_is_the_mean_times_how_much_they_agree() -> None:
    make = [Maker("F32", seed) for seed in (5, 6, 7)]
    shared = Maker("F32", 9).tensor(4 * D, D).f64()  # three trainings of one thing: a common part and an own one
    files = [own.add("mlp.up", Full(of_array(2.0 * shared + own.tensor(4 * D, D).f64(), "F64"))).adapter() for own in make]
    found = merged(files, (1.0, 1.0, 1.0), method="model-stock")["mlp.up"]
    flat = [dense(every(f)[0]).ravel() for f in files]
    cosines = [flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    c = float(np.mean(cosines))
    assert 0.5 < c < 1.0
    t = 3 * c / (1 + 2 * c)
    assert same(found.ravel(), t * sum(flat) / 3)


def test_model_stock_keeps_what_one_file_has() -> None:
    files = adapters()
    assert same(merged(files, method="model-stock")["mlp.down"], terms(files, "mlp.down")[0])


def projector(matrix: Any) -> Any:
    """On the column space."""
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    left = left[:, values > 1e-6 * values[0]]
    return left @ left.T


@pytest.mark.parametrize("method", ["orthogonal", "remove"])
def test_projections_take_out_what_the_others_do(method: str) -> None:
    files = adapters()
    found = merged(files, method=method)
    for name in NAMES:
        a, *others = terms(files, name)
        b = sum(others)
        p, q = projector(b), projector(b.T)
        truth = a - p @ a @ q if method == "remove" else (np.eye(len(p)) - p) @ a @ (np.eye(len(q)) - q)
        assert np.linalg.norm(found[name] - truth) <= 1e-6 * np.linalg.norm(a)
        assert np.linalg.norm(p @ found[name] @ q) < 1e-6 * np.linalg.norm(a)
    assert same(found["mlp.down"], terms(files, "mlp.down")[0])


def test_projections_drop_what_only_the_others_have_and_refuse_full_differences() -> None:
    first, second = Maker("F32", 0).lora("mlp.up"), Maker("F32", 1).lora("mlp.down")
    assert set(merged([first.adapter(), second.adapter()], (1.0, 1.0), method="orthogonal")) == {"mlp.up"}
    full = Maker("F32", 2)
    full.add("mlp.up", Full(full.tensor(4 * D, D)))
    with pytest.raises(NotRepresentableError, match="every direction"):
        merged([first.adapter(), full.adapter()], (1.0, 1.0), method="remove")


# element by element: the formulas once more, with loops over sorted lists ------------------------------------------------


def top(matrix: Any, density: float) -> Any:
    """Its largest elements, zeros elsewhere."""
    order = sorted(range(matrix.size), key=lambda i: -abs(matrix.flat[i]))[: max(int(density * matrix.size), 1)]
    kept = np.zeros_like(matrix)
    kept.flat[order] = matrix.flat[order]
    return kept


def elected(kept: list[Any], majority: str) -> Any:
    votes = sum(kept) if majority == "total" else sum(np.sign(k) for k in kept)
    return np.where(np.asarray(votes) >= 0, 1.0, -1.0)


def mean_of_agreeing(kept: list[Any], weights: tuple[float, ...], majority: str) -> Any:
    signs = elected(kept, majority)
    masks = [np.sign(k) == signs for k in kept]
    total = sum(w * m for w, m in zip(weights, masks, strict=False))
    total = np.where(np.abs(np.asarray(total)) < 1e-8, 1.0, total)
    return sum(np.where(m, k, 0.0) for k, m in zip(kept, masks, strict=False)) / total


def ties(parts: list[Any], majority: str) -> Any:
    return mean_of_agreeing([top(p, 0.3) for p in parts], WEIGHTS[: len(parts)], majority)


def crumbs(parts: list[Any], majority: str) -> Any:
    del majority
    total = 0.0
    for part in parts:
        first = int(0.1 * part.size)
        order = sorted(range(part.size), key=lambda i: -abs(part.flat[i]))[first : first + int(0.3 * part.size)]
        kept = np.zeros_like(part)
        kept.flat[order] = part.flat[order]
        total = total + kept
    return total


def pruned(parts: list[Any], majority: str) -> Any:
    del majority
    return sum(top(p, 0.3) for p in parts)


def sce(parts: list[Any], majority: str) -> Any:
    if len(parts) == 1:
        return parts[0]
    keep = top(np.var(np.stack(parts), axis=0), 0.3) != 0
    kept = [np.where(keep, p, 0.0) for p in parts]
    energies = [np.mean(k**2) for k in kept]
    signs = elected(kept, majority)
    weights = [np.where(np.sign(k) == signs, e / sum(energies), 0.0) for k, e in zip(kept, energies, strict=True)]
    return sum(k * w for k, w in zip(kept, weights, strict=True)) / np.maximum(sum(weights), 1e-6)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize(
    ("method", "formula"), [("ties", ties), ("breadcrumbs", crumbs), ("magnitude-prune", pruned), ("sce", sce)]
)
def test_pruning_methods_are_their_formulas(method: str, formula: Any, majority: str) -> None:
    files = adapters()
    found = merged(files, method=method, majority=majority, density=0.3, gamma=0.1, as_full=True, factor=0.5)
    for name in (*NAMES, "mlp.down"):
        truth = 0.5 * np.asarray(formula([p.astype(np.float32).astype(float) for p in terms(files, name)], majority))
        off = np.abs(found[name] - truth) > 1e-5 * np.abs(truth).max()
        assert off.mean() < 2e-3, name  # float32 decides close calls at the edge of a mask otherwise


@pytest.mark.parametrize("method", ["dare", "dare-ties", "della"])
def test_random_methods_have_the_right_mean_and_depend_on_the_seed_alone(method: str) -> None:
    files = adapters(1)
    runs = [merged(files, (1.0,), method=method, density=0.4, seed=seed, as_full=True)["mlp.up"] for seed in range(60)]
    again = merged(files, (1.0,), method=method, density=0.4, seed=7, as_full=True)["mlp.up"]
    assert np.array_equal(runs[7], again)
    assert not np.array_equal(runs[7], runs[8])
    whole = terms(files, "mlp.up")[0]
    kept = np.mean([np.mean(r != 0) for r in runs])
    assert kept == pytest.approx(0.4, abs=0.01)
    if method != "della":  # TIES' mean of those that agree does not rescale
        mean = np.mean(runs, axis=0)
        assert np.sum(mean * whole) / np.sum(whole * whole) == pytest.approx(1.0, abs=0.03)
        nonzero = runs[0] != 0
        assert np.allclose(runs[0][nonzero], whole[nonzero] / 0.4, rtol=1e-5)


def test_della_keeps_large_elements_more_often() -> None:
    files = adapters(1)
    runs = [merged(files, (1.0,), method="della", density=0.5, epsilon=0.8, seed=s, as_full=True)["mlp.up"] for s in range(80)]
    whole = np.abs(terms(files, "mlp.up")[0])
    stays = np.mean([r != 0 for r in runs], axis=0)
    ranks = np.argsort(np.argsort(whole, axis=1), axis=1)
    low, high = stays[ranks < D // 8].mean(), stays[ranks >= 7 * D // 8].mean()
    assert low == pytest.approx(0.5 - 0.4 + 0.8 * 0.0532, abs=0.03)  # the mean rank of an eighth is 2.5 of 47
    assert high == pytest.approx(0.5 + 0.4 - 0.8 * 0.0532, abs=0.03)


@pytest.mark.parametrize("method", ["ties", "dare", "sce", "orthogonal"])
def test_the_factor_is_for_norms_and_biases_too(method: str) -> None:
    files, vectors, biases = [], [], []
    for seed in (0, 1):
        make = Maker("F32", seed)
        vectors.append(make.tensor(D))
        biases.append(make.tensor(4 * D))
        make.add("norm", Full(vectors[-1], "norm"))
        make.add("mlp.up", make.low_rank((4 * D, D), 3), alpha=2.0, bias=biases[-1])
        files.append(make.adapter())
    if method == "orthogonal":
        files[1].modules.pop(next(site for site, m in files[1].modules.items() if m.name == "norm"))
        vectors.pop()
        biases.pop()
    as_full = method != "orthogonal"
    result, _ = merge([(file, 0.5) for file in files], MergeOptions(method=method, factor=3.0, as_full=as_full))
    found = {module.name: module for module in every(result)}
    assert np.allclose(found["norm"].dense(), 1.5 * sum(v.f64() for v in vectors), rtol=1e-6)
    assert np.allclose(found["mlp.up"].bias.f64(), 1.5 * sum(b.f64() for b in biases), rtol=1e-6)


def test_a_module_that_comes_out_as_nothing_is_told() -> None:
    (file,) = adapters(1)
    opposite = replace(file, modules={s: m if m.name != "conv" else replace(m, scale=Scale(-0.1, "")) for s, m in file})
    result, report = merge([(file, 1.0), (opposite, 1.0)], MergeOptions(method="model-stock"))
    assert "conv" not in {module.name for module in every(result)}
    assert {m.name: m.action for m in report.modules}["conv"] == "times 0"


@pytest.mark.parametrize("how", [{"method": m} for m in METHODS] + [{"compat": c} for c in COMPATS], ids=str)
def test_nan_is_never_hidden(how: dict[str, Any], tmp_path: Any) -> None:
    good, bad = adapters(1)[0], Maker("F32", 9)
    up = bad.tensor(4 * D, 3).f64()
    up[5, 1] = np.nan
    bad.add("mlp.up", LowRank(of_array(up, "F32"), bad.tensor(3, D)), alpha=1.0)
    options = MergeOptions(as_full=how.get("method") in DENSE, **how)
    with pytest.raises(BrokenModuleError, match="NaN"):
        save(merge([(good, 1.0), (bad.adapter(), 0.5)], options)[0], tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_dare_ties_drops_what_disagrees() -> None:
    files = adapters(2)
    found = merged(files, (1.0, 1.0), method="dare-ties", density=1.0, as_full=True)
    parts = terms(files, "mlp.up", (1.0, 1.0))
    signs = elected(parts, "total")
    assert same(found["mlp.up"], sum(np.where(np.sign(p) == signs, p, 0.0) for p in parts), 1e-5)


def test_miss_of_one_rank_stays_miss() -> None:
    """A block is repeated over the layer: linear, so the blocks are added; of two ranks it is a LoRA."""
    files = []
    for seed, rank in enumerate((4, 4, 6)):
        make = Maker("F32", seed)
        block = make.tensor(rank, 4 * D)
        files.append((make.add("mlp.up", Miss(block, (4 * D, D))).adapter(), block.f64().T[:, np.arange(D) % rank]))
    for own, family in ((files[:2], "miss"), ([files[0], files[2]], "lora")):
        result, report = merge([(adapter, w) for (adapter, _), w in zip(own, (0.5, -2.0), strict=True)])
        assert report.modules[0].family == family
        truth = sum(w * values for (_, values), w in zip(own, (0.5, -2.0), strict=True))
        assert same(every(result)[0].dense(), truth)


def test_density_1_without_conflicts_is_the_file() -> None:
    files = adapters(1)
    for method in ("ties", "dare", "dare-ties", "magnitude-prune", "sce"):
        found = merged(files, (1.0,), method=method, density=1.0, as_full=True)
        assert same(found["conv"], terms(files, "conv")[0], 1e-5), method


def test_dense_results_are_recompressed_to_the_optimum(tmp_path: Any) -> None:
    files = adapters()
    exact = merged(files, method="ties", density=0.3, as_full=True)
    sources = [Source(a, parse_weight([str(w)]), "f") for a, w in zip(files, WEIGHTS, strict=True)]
    result, report = merge(sources, MergeOptions(method="ties", density=0.3, resize=ResizeOptions(rank=5)))
    save(result, tmp_path / "out.safetensors")
    for module in every(result):
        values = np.linalg.svd(exact[module.name], compute_uv=False)
        best = math.sqrt(float(np.sum(values[5:] ** 2)))
        assert np.linalg.norm(dense(module) - exact[module.name]) <= 1.0001 * best + 1e-6
    narrow = next(m for m in every(result) if m.name == "narrow")
    assert narrow.family == "full"  # which takes less than a LoRA of rank 5
    assert report.resize is not None
    assert {m.name: m.new_rank for m in report.resize.modules} == {"mlp.up": 5, "conv": 5, "mlp.down": 5, "narrow": 6}
    assert all(t.dtype == "F32" for t in read_safetensors(tmp_path / "out.safetensors").tensors.values())


@pytest.mark.parametrize("options", [{"rank": 5}, {"policy": "energy", "param": 0.9, "ranks": (("mlp.down", 3),)}])
@pytest.mark.parametrize("held", [True, False])
def test_a_module_of_zeros_is_cut_like_any_other(options: dict[str, Any], held: bool, monkeypatch: Any) -> None:
    if not held:
        monkeypatch.setattr("lorasurgery.operations.cut.engine.ALL_HELD", 0)
        monkeypatch.setattr("lorasurgery.operations.cut.engine.HELD", 0)
    files = adapters(2)
    for adapter in files:
        for module in every(adapter):
            if module.name in ("mlp.down", "conv"):
                zero = of_array(np.zeros(module.delta.up.shape, np.float32), "F32")
                adapter.modules[module.site] = replace(module, delta=replace(module.delta, up=zero))  # type: ignore[index]
    sources = [Source(a, parse_weight([str(w)]), "f") for a, w in zip(files, WEIGHTS, strict=False)]
    result, report = merge(sources, MergeOptions(method="ties", resize=ResizeOptions(**options)))
    found = {module.name: dense(module) for module in every(result)}
    assert found["mlp.up"].any()
    assert not found["mlp.down"].any()
    assert not found["conv"].any()
    assert report.resize is not None
    assert all(np.isfinite(m.relative_error) for m in report.resize.modules)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"method": "ties"}, "full rank"),
        ({"method": "ties", "density": 0.0, "as_full": True}, "density lies in"),
        ({"method": "della", "density": 0.95, "epsilon": 0.5, "as_full": True}, "leave"),
        ({"method": "breadcrumbs", "density": 0.95, "gamma": 0.1, "as_full": True}, "more than there is"),
        ({"method": "slerp"}, "from one file to another"),
        ({"method": "slerp", "t": 2.0}, "t lies between"),
        ({"factor": math.nan}, "lambda is a finite number"),
        ({"seed": -1}, "a seed is at least 0"),
        ({"method": "karcher"}, "method is one of"),
        ({"method": "ties", "majority": "x", "as_full": True}, "majority is one of"),
        ({"compat": "kohya", "method": "ties"}, "kohya's results can be reproduced for sum"),
        ({"as_full": True, "resize": ResizeOptions(rank=2), "method": "ties"}, "no rank to cut"),
    ],
)
def test_requests_that_make_no_sense_are_refused(how: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        merged(adapters(), **how)
