"""Extraction against known truths and the dense optimum, for every family, layout and dtype."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from lorasurgery.errors import BrokenModuleError, FileFormatError, OutputExistsError, RequestError
from lorasurgery.operations.cut import ResizeOptions
from lorasurgery.verbs.extract import ExtractOptions, Running, extract
from lorasurgery.verbs.extract.dry import plan
from tests.edges import calm, run
from tests.extracting import GRID, changed, differences, grid, optimum, relative, said, whole_low_rank
from tests.models.small import diffusers_arrays, original_arrays, original_of, save, save_gguf
from tests.models.test_encoders import all_in_one, arrays_of, encoder
from tests.oracle import raw, read, write

QUICK = Running(hashes=False)
KEYS = {"flux1-dev": True, "sd1": False, "sdxl": True, "z-image": False}
"""Model -> whether sd-scripts trains it by its original names."""


def pair(folder, base, tuned, dtype="F32"):
    return save(folder / "base.safetensors", base, dtype), save(folder / "tuned.safetensors", tuned, dtype)


def options(rank=None, *, dtype="fp32", **more):
    fields = ResizeOptions.__dataclass_fields__.keys() - ExtractOptions.__dataclass_fields__.keys()
    own = {name: more.pop(name) for name in list(more) if name in fields}
    return ExtractOptions(cut=ResizeOptions(rank=rank, dtype=dtype, **own), **more)


def taken(paths, out, own, running=QUICK):
    base, tuned = paths
    return extract(base, tuned, out, own, running)


def known(wanted, found):
    """What the tables have of the differences: original names are only those with a row."""
    return {name: values for name, values in wanted.items() if name in found}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("key", KEYS)
def test_a_low_rank_change_comes_back(key, dtype, tmp_path):
    base = grid(key)
    tuned = changed(base, whole_low_rank(2))
    out = tmp_path / "out.safetensors"
    report = taken(pair(tmp_path, base, tuned, dtype), out, options(8))
    wanted = differences(key, base, tuned, original=KEYS[key])
    matrices = {name: values for name, values in wanted.items() if values.ndim > 1 and "token" not in name}
    found = said(out, wanted)
    assert relative(found, matrices) < 1e-6
    assert set(matrices) <= set(found)
    assert math.isclose(report.relative_error, math.sqrt(report.share_left_out), abs_tol=1e-6)
    assert relative(found, known(wanted, found)) < 1e-6
    assert math.isclose(
        report.squared, sum(float(np.sum(v**2)) for v in differences(key, base, tuned, original=False).values())
    )


@pytest.mark.parametrize("target", ["sd-scripts", "comfyui", "diffusers", "lycoris", "onetrainer", "other"])
def test_layouts_of_the_models_do_not_matter(target, tmp_path):
    key, base = "flux1-dev", grid("flux1-dev")
    tuned = changed(base, whole_low_rank(2))
    mixes = {
        "dd": (base, tuned, "", ""), "od": (original_of(key, base), tuned, "model.diffusion_model.", ""),
        "do": (base, original_of(key, tuned), "", "diffusion_model."),
    }  # fmt: skip
    written = {}
    for name, (one, two, first, second) in mixes.items():
        paths = (
            save(tmp_path / f"{name}.base.safetensors", one, "F32", first),
            save(tmp_path / f"{name}.t.safetensors", two, "BF16", second),
        )
        taken(paths, tmp_path / f"{name}.safetensors", options(8, target=target, small="none"))
        written[name] = read(tmp_path / f"{name}.safetensors")[0]
    assert written["dd"] == written["od"] == written["do"]
    assert written["dd"]


def test_fp8_with_scales_is_the_true_weight(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((64, 48)).astype(ml_dtypes.float8_e4m3fn)
    up, down = rng.standard_normal((64, 2)), rng.standard_normal((2, 48))
    base = stored.astype("f8") * 0.5
    fp8 = raw(np.zeros((64, 48)), "F32")._replace(dtype="F8_E4M3", data=stored.tobytes())
    marker = fp8._replace(shape=(0,), data=b"")
    write(tmp_path / "base.safetensors", {"a.weight": fp8, "a.scale_weight": raw(0.5, "F32"), "scaled_fp8": marker})
    write(tmp_path / "tuned.safetensors", {"a.weight": raw(base + up @ down, "F32")})
    report = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "out.safetensors", options(2))
    assert relative(said(tmp_path / "out.safetensors", {"a.weight": base}), {"a.weight": up @ down}) < 1e-6
    assert not report.warnings


def test_gguf_is_its_dequantised_self(tmp_path):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(rng.standard_normal((64, 64)).astype("f4"), kind)
    base = gguf.quants.dequantize(blocks, kind)
    delta = rng.standard_normal((64, 2)) @ rng.standard_normal((2, 64))
    quantised = save_gguf(tmp_path / "base.gguf", {"a.weight": (blocks, kind)})
    tuned = save(tmp_path / "tuned.safetensors", {"a.weight": base + delta})
    taken((quantised, tuned), tmp_path / "out.safetensors", options(2, dtype="keep"))
    assert relative(said(tmp_path / "out.safetensors", {"a.weight": base}), {"a.weight": delta}) < 1e-6
    taken((tuned, quantised), tmp_path / "back.safetensors", options(2, dtype="keep"))
    assert read(tmp_path / "back.safetensors")[0]["lora_unet_a.lora_up.weight"].dtype == "BF16"


def lokr(name, shape, rng):
    outer, inner = rng.standard_normal((4, 4)), rng.standard_normal((shape[0] // 4, shape[1] // 4, *shape[2:]))
    return np.einsum("ab,cd...->acbd...", outer, inner).reshape(shape)


def loha(name, shape, rng):
    sides = (shape[0], math.prod(shape[1:]))
    arms = [rng.standard_normal((sides[0], 2)) @ rng.standard_normal((2, sides[1])) for _ in range(2)]
    return (arms[0] * arms[1]).reshape(shape)


def tucker(name, shape, rng):
    if len(shape) < 3:
        return whole_low_rank(2)(name, shape, rng)
    core, up, down = (rng.standard_normal(size) for size in ((2, 2, *shape[2:]), (shape[0], 2), (2, shape[1])))
    return np.einsum("ijkl,pi,jr->prkl", core, up, down)


def unknown(folder, change, shapes, seed=3):
    """A model that no table knows, and the same with a change."""
    rng = np.random.default_rng(seed)
    base = {f"{name}.weight": rng.standard_normal(shape) for name, shape in shapes.items()}
    tuned = {name: values + change(name, values.shape, rng) for name, values in base.items()}
    wanted = {name: tuned[name].astype("f4").astype("f8") - base[name].astype("f4") for name in base}
    return pair(folder, base, tuned), wanted


@pytest.mark.parametrize(
    ("family", "change", "how"),
    [
        ("lokr", lokr, {"factor": 4}),
        ("loha", loha, {}),
        ("lora", tucker, {"tucker": True}),
        ("locon", whole_low_rank(2), {}),
        ("full", lokr, {}),
    ],
)
def test_every_family_finds_its_own_change(family, change, how, tmp_path):
    shapes = {"linear": (96, 80), "conv": (24, 20, 3, 3), "pointwise": (16, 24, 1, 1)}
    paths, wanted = unknown(tmp_path, change, shapes)
    rank = None if family in ("lokr", "full") else 2
    report = taken(paths, tmp_path / "out.safetensors", options(rank, family=family, **how))
    error = relative(said(tmp_path / "out.safetensors", wanted), wanted)
    assert error < 2e-6
    assert report.relative_error < 2e-6
    assert {m.family for m in report.modules} == {family}


def test_dora_finds_direction_and_magnitude(tmp_path):
    rng = np.random.default_rng(8)
    base = rng.standard_normal((40, 24))
    new = base + 0.1 * rng.standard_normal((40, 2)) @ rng.standard_normal((2, 24))
    magnitude = np.linalg.norm(base, axis=1) * rng.uniform(0.8, 1.2, 40)
    tuned = magnitude[:, None] * new / np.linalg.norm(new, axis=1)[:, None]
    paths = pair(tmp_path, {"a.weight": base}, {"a.weight": tuned})
    report = taken(paths, tmp_path / "out.safetensors", options(2, dora=True))
    found = read(tmp_path / "out.safetensors")[0]
    up, down = (found[f"lora_unet_a.lora_{side}.weight"].f64() for side in ("up", "down"))
    again = base + up @ down
    again *= found["lora_unet_a.dora_scale"].f64() / np.linalg.norm(again, axis=1)[:, None]
    assert np.linalg.norm(again - tuned) < 1e-5 * np.linalg.norm(tuned - base)
    assert report.relative_error < 1e-5


@pytest.mark.parametrize(
    ("key", "how"),
    [*(("sd1", how) for how in ("lora", "dora", "lokr", "full", "tucker")), ("flux1-dev", "loha"), ("flux1-dev", "lora")],
)
def test_applied_again_it_is_the_tuned_model_but_for_the_error_that_was_told(key, how, tmp_path):
    base = grid(key)
    tuned = changed(base, lambda n, s, r: 0.05 * r.standard_normal(s) + whole_low_rank(2)(n, s, r))
    paths = pair(tmp_path, base, tuned)
    own = {"dora": {"dora": True}, "tucker": {"tucker": True}, "lora": {}}.get(how, {"family": how})
    report = taken(paths, tmp_path / "lora.safetensors", options(None if how in ("lokr", "full") else 2, **own))
    outcome = run("apply", paths[0], tmp_path / "lora.safetensors", "-o", tmp_path / "again.safetensors")
    assert outcome.code == 0, outcome.err
    again, before, after = (read(path)[0] for path in (tmp_path / "again.safetensors", *paths))
    left = {name: again[name].f64() - values.f64() for name, values in after.items()}
    whole = {name: before[name].f64() - values.f64() for name, values in after.items()}
    squares = [sum(float(np.sum(v**2)) for v in own.values()) for own in (left, whole)]
    assert math.isclose(math.sqrt(squares[0] / squares[1]), report.relative_error, rel_tol=1e-5, abs_tol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [{"rank": 8}, {"policy": "energy", "param": 0.9}, {"policy": "knee"}])
def test_a_gpu_finds_the_same(policy, tmp_path):
    shapes = {**{f"blocks.{i}.a": (300, 260) for i in range(5)}, "b": (200, 30, 3, 3)}
    paths, wanted = unknown(tmp_path, lambda n, s, r: falling(n, (s[0], math.prod(s[1:])), r).reshape(s), shapes)
    reports = [
        taken(paths, tmp_path / f"{device}.safetensors", options(device=device, **{"rank": None, **policy}))
        for device in ("cpu", "cuda")
    ]
    one, two = (said(tmp_path / f"{device}.safetensors", wanted) for device in ("cpu", "cuda"))
    assert relative(two, one) < 1e-4
    assert math.isclose(reports[0].relative_error, reports[1].relative_error, rel_tol=1e-3)


SPECTRA = {
    "baked": lambda n: np.where(np.arange(n) < 32, 1.0, 0.02),
    "slow": lambda n: (1.0 + np.arange(n)) ** -0.8,
    "steep": lambda n: 10.0 ** (-np.arange(n) / 20.0),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_noisy_changes_are_within_a_thousandth_of_the_optimum(spectrum, tmp_path):
    rng = np.random.default_rng(1)

    def change(_, shape, __):
        flat = (shape[0], math.prod(shape[1:]))
        u, v = (np.linalg.qr(rng.standard_normal((side, min(flat))))[0] for side in flat)
        return ((u * SPECTRA[spectrum](min(flat))) @ v.T).reshape(shape)

    paths, wanted = unknown(tmp_path, change, {"a": (300, 260), "b": (200, 30, 3, 3)})
    report = taken(paths, tmp_path / "out.safetensors", options(16))
    found = said(tmp_path / "out.safetensors", wanted)
    for name, matrix in wanted.items():
        best = optimum(matrix, 16)
        error = float(np.sum((found[name] - matrix) ** 2))
        assert error <= best * 1.001**2 + 1e-12 * np.sum(matrix**2)
    squared = sum(float(np.sum((found[n] - m) ** 2)) for n, m in wanted.items())
    assert math.isclose(report.squared_error, squared, rel_tol=1e-3, abs_tol=1e-9 * report.squared)


def falling(_, shape, rng):
    values = 0.7 ** np.arange(min(shape))
    u, v = (np.linalg.qr(rng.standard_normal((side, min(shape))))[0] for side in shape)
    return (u * values) @ v.T


RULES = {
    "energy": (0.9, lambda s: np.cumsum(s**2) >= 0.9 * np.sum(s**2)),
    "error": (0.2, lambda s: np.sum(s**2) - np.cumsum(s**2) <= 0.04 * np.sum(s**2)),
    "sv_fro": (0.95, lambda s: np.cumsum(s**2) >= 0.95**2 * np.sum(s**2)),
    "sv_cumulative": (0.8, lambda s: np.cumsum(s) >= 0.8 * np.sum(s)),
    "sv_ratio": (4.0, lambda s: np.append(s[1:], 0) <= s[0] / 4.0),
    "threshold": (0.3, lambda s: np.append(s[1:], 0) <= 0.3),
}


@pytest.mark.parametrize("cap", [None, 3])
@pytest.mark.parametrize("policy", RULES)
def test_policies_choose_as_they_say(policy, cap, tmp_path):
    paths, wanted = unknown(tmp_path, falling, {"a": (40, 30), "b": (140, 200)})
    param, enough = RULES[policy]
    taken(paths, tmp_path / "out.safetensors", options(cap, policy=policy, param=param))
    found = read(tmp_path / "out.safetensors")[0]
    for name, matrix in wanted.items():
        values = np.linalg.svd(matrix, compute_uv=False)
        expected = min(int(np.argmax(enough(values))) + 1, cap or len(values))
        assert found[f"lora_unet_{name[0]}.lora_down.weight"].shape[0] == expected


SCORES = {
    "fro_ckpt=1,thr=-2.5": lambda _, base: np.linalg.norm(base),
    "spn_ckpt=1,thr=-2": lambda _, base: np.linalg.norm(base, 2),
    "subspace=1,thr=-0.5": lambda change, base: np.abs(np.sum((change.U.T @ base) * change.Vh, 1)),
}


@pytest.mark.parametrize("recipe", SCORES)
def test_recipes_look_at_the_base(recipe, tmp_path):
    paths, wanted = unknown(tmp_path, falling, {"a": (40, 30), "b": (140, 200)})
    base = {name: tensor.f64() for name, tensor in read(paths[0])[0].items()}
    taken(paths, tmp_path / "out.safetensors", options(None, recipe=recipe, min_rank=0))
    found = read(tmp_path / "out.safetensors")[0]
    for name, matrix in wanted.items():
        change = np.linalg.svd(matrix, full_matrices=False)
        scores = np.log10(change.S) - np.log10(SCORES[recipe](change, base[name]))
        kept = np.flatnonzero(scores > float(recipe.partition("thr=")[2]))
        assert 0 < len(kept) < len(scores)
        up, down = (found[f"lora_unet_{name[0]}.lora_{side}.weight"].f64() for side in ("up", "down"))
        best = (change.U[:, kept] * change.S[kept]) @ change.Vh[kept]
        assert np.linalg.norm(up @ down - best) < 1e-5 * np.linalg.norm(matrix)


def test_names_that_fit_nothing_are_told(tmp_path):
    paths, _ = unknown(tmp_path, falling, {"a": (40, 30), "b": (40, 20)})
    named = (("_a$", 2), ("_b$", 0), ("_c$", 4))
    report = taken(paths, tmp_path / "out.safetensors", options(4, ranks=named, include=("[ab]$", "q$"), exclude=("x",)))
    assert [m.rank for m in report.modules] == [2]
    notes = [f"{name!r} fits no module" for name in ("q$", "x", "_c$")]
    assert calm(report.warnings) == notes
    assert list(plan(paths[0], paths[1], options(4, ranks=named, include=("[ab]$", "q$"), exclude=("x",))).warnings) == notes


def test_names_of_what_only_one_model_has_fit(tmp_path):
    flux = grid("flux1-dev")
    tuned = {**changed(flux, whole_low_rank(1)), "registers": np.ones((4, 8)), "pos": np.ones(3)}
    report = taken(
        pair(tmp_path, flux, tuned), tmp_path / "out.safetensors", options(4, exclude=("registers", "pos", "nowhere"))
    )
    assert [text for text in report.warnings if "fits no" in text] == ["'nowhere' fits no module"]


def test_a_size_is_met_and_spent_where_it_counts(tmp_path):
    def change(name, shape, rng):
        return falling(name, shape, rng) * (10.0 if name == "a.weight" else 0.1)

    paths, wanted = unknown(tmp_path, change, {"a": (60, 60), "b": (60, 60)})
    out = tmp_path / "out.safetensors"
    report = taken(paths, out, options(dtype="bf16", size=6000))
    ranks = {m.name: m.rank for m in report.modules}
    assert 4500 < out.stat().st_size <= 6000
    assert report.size == out.stat().st_size
    assert ranks["lora_unet_a"] > ranks["lora_unet_b"]
    assert report.relative_error < math.sqrt(
        sum(optimum(m, 6) for m in wanted.values()) / sum(np.sum(m**2) for m in wanted.values())
    )


def test_ranks_by_name_and_kind_and_alpha(tmp_path):
    paths, wanted = unknown(
        tmp_path, whole_low_rank(2), {"a": (40, 30), "b": (40, 30), "c": (20, 10, 3, 3), "d": (20, 10, 1, 1)}
    )
    own = options(4, conv_rank=3, pointwise_rank=5, ranks=(("b", 7),), alpha="2")
    taken(paths, tmp_path / "out.safetensors", own)
    found = read(tmp_path / "out.safetensors")[0]
    assert [found[f"lora_unet_{n}.lora_down.weight"].shape[0] for n in "abcd"] == [4, 7, 3, 5]
    assert {found[f"lora_unet_{n}.alpha"].item() for n in "abcd"} == {2.0}
    assert relative(said(tmp_path / "out.safetensors", wanted), wanted) < 1e-6


def test_what_is_left_out_is_listed_with_its_share(tmp_path):
    key, base = "sd1", grid("sd1")
    tuned = changed(base, whole_low_rank(2))
    own = options(8, small="none", conv=False, exclude=("mid_block",))
    report = taken(pair(tmp_path, base, tuned), tmp_path / "out.safetensors", own)
    delta = differences(key, base, tuned, original=False)
    total = sum(float(np.sum(v**2)) for v in delta.values())
    found = said(tmp_path / "out.safetensors", delta)
    assert math.isclose(
        report.energy, 1.0 - sum(float(np.sum((found.get(n, 0.0) - v) ** 2)) for n, v in delta.items()) / total, abs_tol=1e-9
    )
    assert {reason for reason, _ in report.reasons().items()} == {"a norm", "a bias", "a convolution with a kernel", "excluded"}
    assert math.isclose(sum(share for _, share in report.reasons().values()), report.share_left_out)
    convs = sum(float(np.sum(v**2)) for n, v in delta.items() if v.ndim == 4 and v.shape[-1] > 1 and "mid_block" not in n)
    assert math.isclose(report.reasons()["a convolution with a kernel"][1], convs / total)
    assert len(found) + len(report.left_out) == len(delta)


def test_unchanged_and_barely_changed_modules_are_left_out(tmp_path):
    def change(name, shape, rng):
        return rng.standard_normal(shape) * {"a": 0.0, "b": 1e-4, "c": 1.0}[name[0]]

    paths, _ = unknown(tmp_path, change, {"a": (20, 20), "b": (20, 20), "c": (20, 20)})
    report = taken(paths, tmp_path / "out.safetensors", options(4, min_diff=0.01))
    assert [m.name for m in report.modules] == ["lora_unet_c"]
    assert {one.name: one.reason for one in report.left_out} == {
        "lora_unet_a": "unchanged", "lora_unet_b": "changed by no more than 0.01",
    }  # fmt: skip


def test_unrelated_models_are_told_from_tuned_ones(tmp_path):
    shapes = {f"blocks.{i}": (80, 60) for i in range(6)}
    noise, _ = unknown(tmp_path, lambda n, s, r: r.standard_normal(s), shapes)
    report = taken(noise, tmp_path / "noise.safetensors", options(8))
    assert any("probably not the base" in text for text in report.warnings)
    for strength, rank in ((1e-3, 60), (0.5, 3)):  # rounding of a narrow dtype, and a strong low-rank change
        paths, _ = unknown(
            tmp_path,
            lambda n, s, r, k=rank, f=strength: f * r.standard_normal((s[0], k)) @ r.standard_normal((k, s[1])),
            shapes,
        )
        own = taken(paths, tmp_path / f"{rank}.safetensors", options(8))
        assert not calm(own.warnings)


def test_modules_of_which_a_policy_keeps_nothing_can_be_left_out(tmp_path):
    paths, _ = unknown(
        tmp_path, lambda n, s, r: falling(n, s, r) * (1.0 if n[0] == "a" else 0.1), {"a": (40, 40), "b": (40, 40)}
    )
    kept = taken(paths, tmp_path / "kept.safetensors", options(policy="threshold", param=0.5))
    report = taken(paths, tmp_path / "out.safetensors", options(policy="threshold", param=0.5, min_rank=0))
    assert [m.rank for m in kept.modules] == [2, 1]
    assert [m.name for m in report.modules] == ["lora_unet_a"]
    assert [(one.name, one.reason) for one in report.left_out] == [("lora_unet_b", "the policy keeps nothing of it")]


def test_parameters_that_no_table_has_go_to_comfyui(tmp_path):
    base = {"layers.0.w.weight": np.ones((8, 6)), "layers.0.modulation": np.ones((1, 6, 8)), "token": np.zeros(5)}
    tuned = changed(base, whole_low_rank(1))
    for target, expected in (("sd-scripts", 0), ("comfyui", 2)):
        own = options(1, target=target)
        report = taken(pair(tmp_path, base, tuned), tmp_path / f"{target}.safetensors", own)
        tensors = read(tmp_path / f"{target}.safetensors")[0]
        found = {k: v.f64() for k, v in tensors.items() if k.endswith(("modulation.diff", "token.diff"))}
        assert len(found) == expected == sum(m.kind == "parameter" for m in report.modules)
        assert ("no table has a place for it" in report.reasons()) == (not expected)
        assert not any("modules" in text for text in report.warnings)  # whatever is written for ComfyUI is in its key map
    assert np.array_equal(
        found["diffusion_model.layers.0.modulation.diff"], (tuned["layers.0.modulation"] - base["layers.0.modulation"])
    )
    assert np.array_equal(found["diffusion_model.token.diff"], tuned["token"])


def test_a_second_expert_is_left_to_its_own_folder(tmp_path):
    key = "wan-2.1-t2v-1.3b"
    base, tuned = grid(key), changed(grid(key), whole_low_rank(1))
    for folder, arrays in ((tmp_path / "base", base), (tmp_path / "tuned", tuned)):
        for part in ("transformer", "transformer_2"):
            save(folder / part / "diffusion_pytorch_model.safetensors", arrays)
    report = taken((tmp_path / "base", tmp_path / "tuned"), tmp_path / "out.safetensors", options(2))
    assert {m.component for m in report.modules} == {"denoiser"}
    assert report.reasons()["the second expert, to be extracted from its own folder"][1] > 0.45
    own = taken(
        (tmp_path / "base" / "transformer_2", tmp_path / "tuned" / "transformer_2"),
        tmp_path / "2.safetensors",
        options(2, target="sd-scripts"),
    )
    assert own.energy > 0.99


def test_a_clamp_is_sd_scripts_own_and_its_error_is_told(tmp_path):
    paths, wanted = unknown(tmp_path, falling, {"a": (60, 50)})
    report = taken(paths, tmp_path / "out.safetensors", options(4, factors="kohya", clamp_quantile=0.99))
    u, s, v = np.linalg.svd(wanted["a.weight"])
    left, right = u[:, :4] * s[:4], v[:4]
    limit = np.quantile(np.concatenate([left.ravel(), right.ravel()]), 0.99)
    found = read(tmp_path / "out.safetensors")[0]
    assert np.isclose(np.abs(found["lora_unet_a.lora_up.weight"].f64()).max(), limit, rtol=0.05)
    error = relative(said(tmp_path / "out.safetensors", wanted), wanted)
    assert math.isclose(report.modules[0].relative_error, error, rel_tol=1e-5)
    assert error > 1.01 * math.sqrt(optimum(wanted["a.weight"], 4) / np.sum(wanted["a.weight"] ** 2))


def test_the_same_command_gives_the_same_bytes(tmp_path):
    paths, _ = unknown(tmp_path, lambda n, s, r: r.standard_normal(s), {"a": (300, 260), "b": (280, 300)})
    for name, jobs in (("one", 2), ("two", 3)):
        taken(paths, tmp_path / f"{name}.safetensors", options(8, jobs=jobs))
    first, second = (read(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert {k: v.data for k, v in first[0].items()}.keys() == second[0].keys()
    assert all(np.allclose(first[0][k].f64(), second[0][k].f64(), atol=1e-5) for k in first[0])
    taken(paths, tmp_path / "again.safetensors", options(8, jobs=2))
    one, again = (read(tmp_path / f"{name}.safetensors")[0] for name in ("one", "again"))
    assert one == again


def test_memory_is_a_few_of_the_largest_matrix(tmp_path):
    rng = np.random.default_rng(0)
    count, size, blocks = 160, 192, 5 << 20
    base = {f"blocks.{i}.w.weight": rng.standard_normal((size, size)) for i in range(count)}
    change = falling("", (size, size), rng)
    paths = pair(tmp_path, base, {name: w + change for name, w in base.items()}, "BF16")
    taken(paths, tmp_path / "warm.safetensors", options(2, jobs=2, include=("blocks.0",)))
    tracemalloc.start()
    try:
        taken(paths, tmp_path / "out.safetensors", options(2, jobs=2))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * size * size * 4 + blocks < count * size * size * 4 / 3  # the writer hashes 1 MiB at a time


# refusals -----------------------------------------------------------------------------------------------------------------


def refused(error, folder, paths, *texts, own=None, running=QUICK, out="out.safetensors"):
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(error) as caught:
        taken(paths, folder / out, own or options(4), running)
    assert all(text in str(caught.value) for text in texts), caught.value
    assert sorted(p.name for p in folder.iterdir()) == before


def test_models_that_do_not_belong_together(tmp_path):
    flux, sdxl = grid("flux1-dev"), grid("sdxl")
    refused(RequestError, tmp_path, pair(tmp_path, flux, sdxl), "Stable Diffusion XL", "FLUX.1", "tuned.safetensors")
    wider = {**changed(flux, whole_low_rank(1)), "x_embedder.weight": np.zeros((16, 6))}
    refused(
        RequestError, tmp_path, pair(tmp_path, flux, wider), "x_embedder.weight has [16, 6]", "[16, 4]", '--exclude "img_in"'
    )
    report = taken(pair(tmp_path, flux, wider), tmp_path / "ok.safetensors", options(4, exclude=("img_in",)))
    assert "lora_unet_img_in" not in {m.name for m in report.modules}
    assert "lora_unet_img_in: of another shape in each model, left out as asked" in report.warnings
    assert not [text for text in report.warnings if "fits no" in text]
    taller = {**flux, "proj_out.weight": np.zeros((8, 16)), "proj_out.bias": np.zeros(8)}
    refused(RequestError, tmp_path, pair(tmp_path, flux, taller), "proj_out.weight has [8, 16]", "[4, 16]")
    refused(RequestError, tmp_path, pair(tmp_path, taller, flux), "proj_out.weight has [4, 16]", "[8, 16]")
    shapes = {"a": (8, 8), "b": (8, 8)}
    one, _ = unknown(tmp_path, whole_low_rank(1), shapes)
    write(tmp_path / "other.safetensors", {"x.weight": raw(np.zeros((8, 8)), "F32")})
    refused(RequestError, tmp_path, (one[0], tmp_path / "other.safetensors"), "only 0 of its weights")


def test_nan_is_named_with_its_file_and_key(tmp_path):
    paths, _ = unknown(tmp_path, whole_low_rank(1), {"a": (8, 8), "b": (8, 8)})
    broken = {"a.weight": np.ones((8, 8)), "b.weight": np.ones((8, 8))}
    broken["b.weight"][3, 3] = np.nan
    tuned = save(tmp_path / "tuned.safetensors", broken)
    with pytest.raises(BrokenModuleError, match=r"tuned.safetensors: b.weight holds NaN"):
        extract(paths[0], tuned, tmp_path / "out.safetensors", options(4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]  # nothing to go on with
    report = extract(paths[0], tuned, tmp_path / "out.safetensors", options(4, exclude=("b",)))  # as the message says
    assert [(m.name, one.reason) for m, one in zip(report.modules, report.left_out, strict=True)] == [
        ("lora_unet_a", "excluded; it holds NaN or infinity")
    ]
    difference = broken["b.weight"] - read(paths[0])[0]["b.weight"].f64()
    assert math.isclose(report.left_out[0].squared, np.nansum(difference**2), rel_tol=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e20])
@pytest.mark.parametrize(
    "how", [{}, {"policy": "energy", "param": 0.999}, {"family": "lokr"}, {"family": "loha"}, {"dora": True}]
)
def test_changes_whose_squares_leave_float32(size, how, tmp_path):
    base = {"a.weight": np.zeros((260, 256))}
    tuned = {"a.weight": size * np.outer(1 + np.arange(260) % 2, 1 + np.arange(256) % 2)}  # a LoRA, a LoKr and a LoHa
    paths = pair(tmp_path, base, tuned, "BF16")
    report = taken(paths, tmp_path / "out.safetensors", options(None if "policy" in how else 1, **how))
    wanted = {name: values.f64() for name, values in read(paths[1])[0].items()}
    assert math.isclose(report.squared, float(np.sum(wanted["a.weight"] ** 2)), rel_tol=1e-5)
    assert report.relative_error < 0.01
    if not how.get("dora"):
        assert relative(said(tmp_path / "out.safetensors", wanted), wanted) < 0.01


def test_adapters_are_no_models(tmp_path):
    models, _ = unknown(tmp_path, whole_low_rank(1), {"a": (8, 8), "b": (8, 8)})
    for name in ("one", "two"):
        taken(models, tmp_path / f"{name}.safetensors", options(4, seed=len(name)))
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    refused(RequestError, tmp_path, (one, two), "an adapter, not a model", "one.safetensors")
    refused(RequestError, tmp_path, (models[0], two), "an adapter, not a model", "two.safetensors")


def test_outputs_and_inputs_are_not_overwritten(tmp_path):
    paths, _ = unknown(tmp_path, whole_low_rank(1), {"a": (8, 8)})
    refused(OutputExistsError, tmp_path, paths, "one of the models", out="tuned.safetensors", running=Running(force=True))
    (tmp_path / "there.safetensors").write_bytes(b"x")
    refused(OutputExistsError, tmp_path, paths, "exists already", out="there.safetensors")
    refused(RequestError, tmp_path, (paths[0], paths[0]), "the same file")
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-10])
    refused(FileFormatError, tmp_path, paths, "truncated", "tuned.safetensors")
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(RequestError, match="nothing to extract: unchanged"):
        taken(paths, tmp_path / "out.safetensors", options(4))


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ({"family": "glora"}, "no family"), ({"family": "lokr", "dora": True}, "for the family lora"),
        ({"family": "loha", "rank": None, "policy": "energy", "param": 0.9}, "no singular values"),
        ({"target": "diffusers", "family": "loha"}, "writes no loha"), ({"tucker": True, "target": "diffusers"}, "Tucker"),
        ({"factor": 4}, "for the family lokr"), ({"small": "some"}, "small is"), ({"clamp_quantile": 2.0}, "quantile"),
        ({"tolerance": 0.0}, "tolerance"), ({"jobs": 0}, "jobs"), ({"rank": None, "conv_rank": 3}, "linear layers"),
        ({"min_diff": -1.0}, "0 or more"), ({"dora": True, "tucker": True}, "contradict"),
        ({"family": "full", "size": 10**6}, "no rank to choose"),
        ({"clamp_quantile": 0.9}, "strength in up"), ({"clamp_quantile": 0.9, "size": 10**6}, "fixed rank"),
        ({"clamp_quantile": 0.9, "factors": "kohya", "alpha": "2"}, "alpha that is the rank"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(own, text, tmp_path):
    with pytest.raises(RequestError, match=text):
        options(**{"rank": 4, **own}).check()


def test_norms_biases_and_embeddings(tmp_path):
    base = grid("flux1-dev")
    tuned = changed(base, whole_low_rank(2))
    for small, families in (("none", {"lora"}), ("vectors", {"lora", "bias", "norm"})):
        out = tmp_path / f"{small}.safetensors"
        report = taken(pair(tmp_path, base, tuned, "BF16"), out, options(8, small=small))
        assert {m.family for m in report.modules} == families
    found = read(out)[0]
    assert np.array_equal(
        found["lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm"].f64(),
        tuned["transformer_blocks.0.attn.norm_q.weight"] - base["transformer_blocks.0.attn.norm_q.weight"],
    )
    assert np.array_equal(found["lora_unet_img_in.diff_b"].f64(), tuned["x_embedder.bias"] - base["x_embedder.bias"])
    assert GRID == 1 / 16


def encoders(change):
    """Weights of two text encoders, as they are and with a change, on a grid."""
    found = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        base = {n: rng.integers(-40, 41, a.shape) * GRID for n, a in arrays_of(encoder(seed)).items()}
        found.append((base, {n: a + change(n, a.shape, rng) for n, a in base.items()}))
    return found


def test_text_encoders_of_an_all_in_one_file_and_a_pipeline(tmp_path):
    (first, first_tuned), (second, second_tuned) = encoders(whole_low_rank(1))
    base = all_in_one(tmp_path / "base.safetensors", first, second)
    tuned = tmp_path / "tuned"
    unet = {f"unet.{n}": a for n, a in changed(diffusers_arrays("sdxl"), whole_low_rank(1)).items()}
    for part, arrays in (("unet", unet), ("text_encoder", first_tuned), ("text_encoder_2", second_tuned)):
        save(tuned / part / "model.safetensors", {n.removeprefix("unet."): a for n, a in arrays.items()})
    out = tmp_path / "out.safetensors"
    report = extract(base, tuned, out, options(4))
    tensors = read(out)[0]
    for prefix, one, two in (("lora_te1", first, first_tuned), ("lora_te2", second, second_tuned)):
        for name, values in one.items():
            stem, end = f"{prefix}_{name.rpartition('.')[0].replace('.', '_')}", name.rpartition(".")[2]
            if values.ndim == 1:
                keys = [f"{stem}.{slot}" for slot in (("w_norm",) if end == "weight" else ("diff_b", "b_norm"))]
                found = next((tensors[key].f64() for key in keys if key in tensors), 0.0)
                assert np.allclose(found, two[name] - values)
            elif "embedding" in name or (prefix == "lora_te1" and "projection" in name):
                assert f"{stem}.lora_up.weight" not in tensors
            else:
                up, down = (tensors[f"{stem}.lora_{side}.weight"].f64() for side in ("up", "down"))
                assert np.allclose(up @ down, two[name] - values, atol=1e-6)
    assert "an embedding" in report.reasons()
    whole = extract(base, tuned, tmp_path / "all.safetensors", options(4, small="all"))
    assert "an embedding" not in whole.reasons()
    none = extract(base, tuned, tmp_path / "unet.safetensors", options(4, text_encoders=False))
    assert {m.component for m in none.modules} == {"denoiser"}
    assert any(one.reason == "a text encoder's" for one in none.left_out)
    kept = extract(base, tuned, tmp_path / "kept.safetensors", options(4, encoder_min_diff=1e3))
    assert {m.component for m in kept.modules} == {"denoiser"}


def test_parameters_of_a_known_model_are_spelled_as_comfyui_reads_them(tmp_path):
    """Every parameter is in its key map: weights without ``.weight``, all others under their whole name."""
    own = {"blocks.0.modulation": (1, 6, 8), "vace_blocks.0.q.weight": (6, 4), "vace_blocks.0.q.bias": (6,)}
    base = original_arrays("wan-2.1-t2v-1.3b") | {name: np.ones(shape) for name, shape in own.items()}
    tuned = changed(base, whole_low_rank(1))
    out = tmp_path / "out.safetensors"
    report = taken(pair(tmp_path, base, tuned), out, options(2, target="comfyui"))
    tensors = read(out)[0]
    for name in own:
        found = tensors[f"diffusion_model.{name.removesuffix('.weight')}.diff"]
        assert np.array_equal(found.f64(), tuned[name] - base[name])
    assert calm(report.warnings) == []
    assert sum(m.kind == "parameter" for m in report.modules) == 3
