"""Rank policies, counted exactly: definitions restated with fractions, other programs' formulas restated from their source."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lorasurgery.linalg import policies
from lorasurgery.linalg.policies import References, parse_recipe


def geometric(first, ratio, count):
    return [first * ratio**i for i in range(count)]


spectra = st.one_of(
    st.integers(1, 12).map(lambda n: [0.0] * n),
    st.tuples(st.floats(1e-3, 1e3), st.integers(1, 40)).map(lambda a: [a[0]] * a[1]),
    st.floats(1e-3, 1e3).map(lambda s: [s]),
    st.tuples(st.floats(1e-3, 1e3), st.floats(0.1, 0.99), st.integers(1, 40)).map(lambda a: geometric(*a)),
    st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40).map(lambda s: sorted(s, reverse=True)),
    st.tuples(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20), st.integers(1, 9)).map(
        lambda a: [*sorted(a[0], reverse=True), *[0.0] * a[1]]
    ),
)
shares = st.one_of(st.sampled_from([0.1, 0.5, 0.9, 0.99, 0.9999, 1.0]), st.floats(1e-3, 1.0))
NEAR = Fraction(1, 10**12)


def array(values):
    return np.array(values, np.float64)


def assert_smallest(k, weights, missing):
    """k is the smallest count that leaves at most ``missing`` of the weights out, ties within 1e-12 aside."""
    exact = [Fraction(w) for w in weights]
    total = sum(exact)
    assert sum(exact[k:]) <= (missing + NEAR) * total
    if k:
        assert sum(exact[k - 1 :]) > (missing - NEAR) * total


@given(spectra, shares)
@example([1.0] * 10, 0.9)
@example([0.0], 1.0)
def test_cumulative_fro_and_energy_are_the_smallest_ranks(values, share):
    squares = [Fraction(v) ** 2 for v in values]
    part = Fraction(share)
    assert_smallest(policies.sv_cumulative(array(values), share), values, 1 - part)
    assert_smallest(policies.sv_fro(array(values), share), squares, 1 - part**2)
    assert_smallest(policies.energy(array(values), share), squares, 1 - part)


@given(spectra, st.one_of(st.sampled_from([0.0, 1e-9, 0.1, 1.0, 2.0]), st.floats(0.0, 1.5)))
def test_relative_error_is_met_by_the_smallest_rank(values, error):
    k = policies.relative_error(array(values), error)
    squares = [Fraction(v) ** 2 for v in values]
    if error == 0.0:
        assert k == sum(v > 0 for v in values)
    else:
        assert_smallest(k, squares, Fraction(error) ** 2)


@pytest.mark.parametrize("rule", [policies.sv_cumulative, policies.sv_fro, policies.energy])
def test_counts_written_by_hand(rule):
    assert rule(array([1.0] * 10), 0.9) == 9
    assert rule(array([4.0, 2.0, 1.0, 0.5]), 1.0) == 4
    assert rule(array([4.0, 2.0, 0.0]), 1.0) == 2
    assert rule(array([0.0, 0.0]), 0.5) == 0
    assert rule(array([7.0]), 0.001) == 1


def test_counts_by_hand():
    values = array([4.0, 2.0, 1.0, 0.5])
    assert [policies.sv_cumulative(values, p) for p in (0.5, 4 / 7.5, 0.6, 0.8, 0.9)] == [1, 1, 2, 2, 3]
    assert [policies.sv_ratio(values, p) for p in (1, 1.9, 2, 2.1, 4.1, 100)] == [1, 1, 1, 2, 3, 4]
    assert [policies.absolute_threshold(values, t) for t in (0, 0.5, 0.9, 4)] == [4, 3, 3, 0]
    assert [policies.fixed(values, r) for r in (1, 3, 9)] == [1, 3, 4]
    assert policies.relative_error(values, np.sqrt(1.25 / 21.25)) == 2


@given(spectra, st.floats(1.0, 1e4))
def test_ratio_and_threshold_count_strictly(values, ratio):
    expected = sum(v > values[0] / ratio for v in values) or (1 if values[0] else 0)
    assert policies.sv_ratio(array(values), ratio) == expected
    assert policies.absolute_threshold(array(values), values[0] / ratio) == sum(v > values[0] / ratio for v in values)


@given(spectra, st.integers(1, 60))
def test_a_fixed_rank_is_the_rank_or_all_there_is(values, rank):
    assert policies.fixed(array(values), rank) == min(rank, len(values))


@given(spectra, shares, st.floats(0.01, 100.0))
def test_relative_rules_do_not_see_the_scale(values, share, scale):
    assume(all(v == 0.0 or v > 1e-5 for v in values))
    scaled = array(values) * 2.0 ** round(np.log2(scale))
    for rule in (policies.sv_cumulative, policies.sv_fro, policies.energy, policies.relative_error):
        assert rule(array(values), share) == rule(scaled, share)


def test_knee_keeps_what_stands_before_the_elbow():
    assert policies.knee(array([10, 9, 8, 0.1, 0.09, 0.08, 0.07])) == 3
    assert policies.knee(array(geometric(1.0, 0.5, 8))) == 2
    assert policies.knee(array([10, 9, 8, 0.1, 0.09, 0.08, 0.07, *[0.0] * 500])) == 3
    assert policies.knee(array([5.0] * 6)) == 6
    assert policies.knee(array([0.0] * 6)) == 0
    assert (policies.knee(array([3.0])), policies.knee(array([3.0, 1.0]))) == (1, 2)


@given(spectra, st.floats(0.05, 20.0))
def test_knee_is_furthest_below_the_line(values, sensitivity):
    k = policies.knee(array(values), sensitivity)
    nonzero = [v for v in values if v > 0]
    assert min(len(nonzero), 1) <= k <= len(nonzero)
    assert policies.knee(array(values), sensitivity * 2) >= k
    if len(nonzero) > 2 and nonzero[0] > nonzero[-1]:
        below = [
            (v - nonzero[-1]) / (nonzero[0] - nonzero[-1]) + i / (len(nonzero) - 1) / sensitivity for i, v in enumerate(nonzero)
        ]
        assert k == max(int(np.argmin(below)), 1)


# sd-scripts and KJNodes -------------------------------------------------------------------------------------------------


def sd_scripts(spectrum, rank, method, parameter):
    """networks/resize_lora.py, 063ef10 (0.11.1): the three index functions and rank_resize, in torch's float32."""
    torch = pytest.importorskip("torch")
    spectrum = torch.tensor(np.asarray(spectrum), dtype=torch.float32)
    count = len(spectrum)
    weights = spectrum**2 if method == "sv_fro" else spectrum
    if method == "sv_ratio":
        index = int(torch.sum(spectrum > spectrum[0] / parameter)) - 1
    else:
        sums = torch.cumsum(weights, 0) / float(torch.sum(weights))
        index = int(torch.searchsorted(sums, parameter**2 if method == "sv_fro" else parameter))
    new_rank = max(0, min(index, count - 1)) + 1
    if spectrum[0] <= 1e-6:
        new_rank = 1
    elif new_rank > rank:
        new_rank = rank
    return new_rank


@given(
    spectra,
    st.sampled_from(["sv_ratio", "sv_cumulative", "sv_fro"]),
    st.floats(0.01, 1.0),
    st.integers(1, 50),
    st.integers(0, 60),
)
@example([4.0, 2.0, 1.0, 0.5], "sv_cumulative", 0.5, 64, 0)
@example([1e-6, 1e-7], "sv_fro", 0.5, 64, 0)
def test_kohya_as_its_source_says(values, method, parameter, limit, more):
    if method == "sv_ratio":
        parameter = 1 / parameter
    padded = np.concatenate([values, np.zeros(more)])
    ours = policies.kohya(array(values), method, parameter, length=len(padded), limit=limit)
    theirs = sd_scripts(padded, limit, method, parameter)
    assert abs(ours - theirs) <= 1  # torch may add up in another order, and a sum then fall on the other side of the share
    if method == "sv_ratio":
        assert ours == theirs


def test_kohya_keeps_what_was_asked_for():
    values = array([4.0, 2.0, 1.0, 0.5])
    found = [policies.kohya(values, "sv_cumulative", p, length=4, limit=64) for p in (0.5, 0.6)]
    assert found == [1, 2]
    assert policies.kohya(values, "sv_ratio", 1, length=4, limit=64) == 1
    assert policies.kohya(values, "sv_ratio", 3, length=4, limit=64) == 2
    assert policies.kohya(values, "sv_fro", 1.0, length=4, limit=64) == 4
    assert policies.kohya(values, "sv_fro", 1.0, length=4, limit=2) == 2
    for bad in ("sv_knee", ""):
        with pytest.raises(ValueError, match="sd-scripts has"):
            policies.kohya(values, bad, 1.0, length=4, limit=4)
    with pytest.raises(ValueError, match="must not be 0"):
        policies.kohya(values, "sv_fro", 0.0, length=4, limit=4)


def test_sd_scripts_looks_at_twice_the_rank_of_large_matrices():
    assert policies.kohya_length((3072, 3072), 16, lowrank=True) == 32
    assert policies.kohya_length((3072, 3072), 16, lowrank=False) == 3072
    assert policies.kohya_length((3072, 2048), 16, lowrank=True) == 2048
    flat = array([1.0] * 128)
    assert policies.kohya(flat, "sv_cumulative", 0.5, length=32, limit=16) == 16
    assert policies.kohya(flat, "sv_cumulative", 0.25, length=32, limit=16) == 8
    assert policies.kohya(flat, "sv_cumulative", 0.05, length=3072, limit=16) == 7


@given(spectra, st.sampled_from([0.2, 0.5, 1.0, 1.5]) | st.floats(0.0, 2.0), st.integers(1, 50), st.integers(0, 60))
@example([0.7, 0.3, 0.1], 1.0, 50, 20)
def test_kj_knee_as_its_source_says(values, sensitivity, limit, more):
    spectrum = np.concatenate([values, np.zeros(more)]).astype(np.float32)  # S.cpu().float().numpy()
    count = len(spectrum)
    index = 1
    if count > 2:
        y = (spectrum - spectrum[-1]) / (spectrum[0] - spectrum[-1] + 1e-10)
        index = max(1, min(int(np.argmax(y - (1.0 - sensitivity * np.linspace(0, 1, count)))), count - 1))
    expected = 1 if spectrum[0] <= 1e-6 else min(index + 1, limit, count)
    assert policies.kj(array(values), "knee", sensitivity, length=count, limit=limit) == expected


@given(
    spectra,
    st.sampled_from(["sv_ratio", "sv_cumulative", "sv_fro"]),
    st.floats(0.05, 3.0),
    st.integers(1, 50),
    st.integers(0, 9),
)
@example([1.0, 1.0, 1.0, 1.0], "sv_cumulative", 0.5, 50, 0)
@example([1.0, 0.5, 0.25], "sv_ratio", 3.0, 50, 4)
def test_kj_as_its_source_says(values, method, parameter, limit, more):
    """``index_sv_*`` and ``rank_resize`` of ``nodes/lora_nodes.py``, with torch itself."""
    import torch

    spectrum = torch.from_numpy(np.concatenate([values, np.zeros(more)]).astype(np.float32))
    if method == "sv_ratio":
        index = int(torch.sum(spectrum > spectrum[0] / parameter).item())
    else:
        weights, target = (spectrum, parameter) if method == "sv_cumulative" else (spectrum.pow(2), parameter**2)
        index = int(torch.searchsorted(torch.cumsum(weights, dim=0) / float(torch.sum(weights)), target)) + 1
    index = max(1, min(index, len(spectrum) - 1))
    expected = 1 if spectrum[0] <= 1e-6 else min(index + 1, limit)
    assert policies.kj(array(values), method, parameter, length=len(spectrum), limit=limit) == expected


def test_kj_looks_at_the_factors_of_the_largest_layers():
    assert policies.kj_length((55296, 6144), 16, linear=True) == 16
    assert policies.kj_length((55296, 6144), 16, linear=False) == 6144
    assert policies.kj_length((21504, 3072), 16, linear=True) == 3072


# budgets ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(spectra, st.integers(1, 50), st.integers(0, 2)), min_size=1, max_size=8), st.floats(0.0, 1.2))
def test_a_budget_is_spent_but_for_less_than_one_rank(modules, share):
    values, costs, floors = ([m[i] for m in modules] for i in range(3))
    scores = [policies.per_cost(array(v), c) for v, c in zip(values, costs, strict=True)]
    scores = [np.where(s > 0, s, -np.inf) for s in scores]
    least = sum(c * min(f, len(v)) for v, c, f in zip(values, costs, floors, strict=True))
    whole = sum(c * len(v) for v, c in zip(values, costs, strict=True))
    budget = share * whole
    if budget < least:
        with pytest.raises(ValueError, match="smallest ranks"):
            policies.fill(scores, costs, budget, floors)
        return
    kept, threshold = policies.fill(scores, costs, budget, floors)
    spent = sum(c * len(k) for c, k in zip(costs, kept, strict=True))
    assert spent <= budget
    for own, k, cost, floor in zip(scores, kept, costs, floors, strict=True):
        assert k.tolist() == list(range(len(k)))  # values fall, so what is kept is a prefix
        assert len(k) >= min(floor, len(own))
        rest = [s for s in own[len(k) :] if s > -np.inf]
        assert not rest or cost > budget - spent
        assert all(s <= threshold for s in rest)


@given(st.lists(st.tuples(st.lists(st.floats(0.1, 9), min_size=1, max_size=3), st.integers(1, 4)), min_size=1, max_size=3))
def test_greedy_is_one_singular_value_from_the_best(modules):
    from itertools import product

    values = [sorted(v, reverse=True) for v, _ in modules]
    costs = [c for _, c in modules]
    budget = sum(c * len(v) for v, c in zip(values, costs, strict=True)) * 0.6
    scores = [policies.per_cost(array(v), c) for v, c in zip(values, costs, strict=True)]
    kept, _ = policies.fill(scores, costs, budget, [0] * len(values))

    def saved(ranks):
        return sum(sum(s * s for s in v[:k]) for v, k in zip(values, ranks, strict=True))

    fitting = [r for r in product(*(range(len(v) + 1) for v in values)) if sum(map(lambda a, b: a * b, r, costs)) <= budget]
    best = max(map(saved, fitting))
    assert saved([len(k) for k in kept]) >= best - max(v[0] ** 2 for v in values) - 1e-9


def test_scores_that_do_not_fall_keep_no_prefix():
    scores = [array([1.0, 3.0, 2.0]), array([0.5, -np.inf])]
    kept, threshold = policies.fill(scores, [1, 1], 2, [0, 0])
    assert [k.tolist() for k in kept] == [[1, 2], []]
    assert threshold == 2.0
    assert [k.tolist() for k in policies.fill(scores, [1, 1], 9, [0, 0])[0]] == [[0, 1, 2], [0]]
    assert [k.tolist() for k in policies.fill(scores, [1, 1], 2, [1, 1])[0]] == [[1], [0]]
    assert [k.tolist() for k in policies.within(scores, 0.5)] == [[0, 1, 2], []]


# recipes ----------------------------------------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.sampled_from(["spn_lora", "spn_ckpt", "subspace", "fro_lora", "fro_ckpt", "params"]), st.floats(0.1, 3), min_size=1
    ),
    st.floats(0.1, 4.0),
    st.lists(st.floats(1e-3, 10), min_size=1, max_size=9).map(lambda v: sorted(v, reverse=True)),
)
def test_scores_as_resize_lora_computes_them(weights, rescale, values):
    text = ",".join(f"{k}={v!r}" for k, v in weights.items()) + f",thr=-2,rescale={rescale!r}"
    along = np.linspace(0.5, 2.0, len(values))
    recipe = parse_recipe(text)
    scores = recipe.scores(array(values), References(1920, lambda: 3.0, lambda: 40.0, lambda: -along))
    total = sum(weights.values())
    w = {k: v / total for k, v in weights.items()}
    refs = {"spn_lora": values[0], "spn_ckpt": 3.0, "fro_lora": np.linalg.norm(values), "fro_ckpt": 40.0, "params": 1920}
    for i, s in enumerate(values):
        expected = (
            np.log10(s) + np.log10(rescale) - sum(v * np.log10(along[i] if k == "subspace" else refs[k]) for k, v in w.items())
        )
        assert scores[i] == pytest.approx(expected)
    assert recipe.threshold == -2
    assert recipe.needs_base == bool({"spn_ckpt", "subspace", "fro_ckpt"} & set(weights))


@given(spectra, st.sampled_from(["spn_lora", "fro_lora", "params", "spn_ckpt", "fro_ckpt", "subspace"]), st.floats(-6, 3))
def test_a_threshold_counts_what_scores_above_it(values, name, threshold):
    size = 7.0 + 0.0 * array(values)
    recipe = parse_recipe(f"{name},thr={threshold!r}")
    (kept,) = policies.within([recipe.scores(array(values), References(12, lambda: 2.0, lambda: 5.0, lambda: size))], threshold)
    norm = np.linalg.norm(values)
    refs = {"spn_lora": values[0], "fro_lora": norm, "params": 12, "spn_ckpt": 2.0, "fro_ckpt": 5.0, "subspace": 7.0}
    ratios = [v / refs[name] if v else 0.0 for v in values]
    assume(all(r == 0.0 or abs(np.log10(r) - threshold) > 1e-9 for r in ratios))
    assert kept.tolist() == [i for i, r in enumerate(ratios) if r > 10.0**threshold]


def test_recipes_parse_as_written():
    recipe = parse_recipe("fro_ckpt=1,thr=-3.5")
    assert (recipe.weights, recipe.threshold, recipe.size, recipe.rescale) == ({"fro_ckpt": 1.0}, -3.5, None, 1.0)
    recipe = parse_recipe("spn_lora, params=3 ,size=32,rescale=1.2")
    assert (recipe.weights, recipe.size, recipe.rescale) == ({"spn_lora": 0.25, "params": 0.75}, 32.0, 1.2)
    assert not recipe.needs_base
    zero = parse_recipe("fro_lora,thr=0").scores(np.zeros(3), References(5))
    assert np.all(zero == -np.inf)
    assert parse_recipe("params,thr=0").scores(array([1.0, 0.0]), References(10)).tolist() == [-1.0, -np.inf]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fro_ckpt=1", "where to stop"), ("fro_ckpt,thr=1,size=2", "where to stop"), ("thr=1", "no score"),
        ("fro=1,thr=1", "none of"), ("fro_ckpt=x,thr=1", "no number"), ("fro_ckpt,thr=", "needs a number"), ("", "none of"),
        ("fro_ckpt,fro_ckpt=2,thr=1", "twice"), ("fro_ckpt=1,params=-1,thr=0", "sum to 0"), ("params,thr=nan", "finite"),
        ("params,size=-3", "positive"), ("params,thr=0,rescale=0", "positive"),
    ],
)  # fmt: skip
def test_bad_recipes_say_why(text, why):
    with pytest.raises(ValueError, match=why):
        parse_recipe(text)


def test_a_base_score_without_a_base_says_so():
    with pytest.raises(ValueError, match="looks at the base"):
        parse_recipe("spn_ckpt,thr=0").scores(array([1.0]), References(10))


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        (policies.fixed, 0), (policies.sv_ratio, 0.5), (policies.sv_cumulative, 0.0), (policies.sv_cumulative, 1.1),
        (policies.sv_fro, -1.0), (policies.energy, 0.0), (policies.relative_error, -0.1), (policies.absolute_threshold, -1.0),
        (policies.knee, 0.0), (policies.sv_fro, float("nan")), (policies.relative_error, float("nan")),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(rule, bad):
    with pytest.raises(ValueError, match=r"must|share|error|energy"):
        rule(array([2.0, 1.0]), bad)
