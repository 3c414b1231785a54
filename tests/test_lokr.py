"""LoKr: cut and fused where it stays a Kronecker product, kept split or made a LoRA where it does not, strengths agreed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import lorasurgery
from lorasurgery import load, save
from lorasurgery.architectures import named
from lorasurgery.checking.consumers import consumer
from lorasurgery.checking.engine import check
from lorasurgery.checking.subject import read_subject
from lorasurgery.errors import NotRepresentableError
from tests.builders import Builder, Made, convert, factors, granularity, modules_of
from tests.oracle import Raw, Reader, assert_same, dense_deltas, model, modules, raw, relative_errors

if TYPE_CHECKING:
    from pathlib import Path

QKV = "double_blocks.3.img_attn.qkv"
LINEAR1 = "single_blocks.7.linear1"


def fused_file(blocks: int, weight: str = QKV, **how: object) -> Made:
    builder = Builder.start(model("flux1-dev"), "comfyui", "BF16", 11)
    builder.add(weight, "lokr", rank=3, alpha=1.5, blocks=blocks, **how)
    return builder.made


def split_file(key: str = "flux1-dev", weight: str = QKV, dtype: str = "BF16", **how: object) -> Made:
    """Members that share nothing, of unequal strength."""
    builder = Builder.start(model(key), "onetrainer", dtype, 12)
    for i, name in enumerate(modules_of(model(key), "onetrainer", weight)):
        builder.add(name, "lokr", rank=2 + i, alpha=1.5 + i, **how)
    return builder.made


@pytest.mark.parametrize("whole1", [True, False])
@pytest.mark.parametrize("whole2", [True, False])
@pytest.mark.parametrize(("blocks", "weight"), [(3, QKV), (48, QKV), (7, LINEAR1), (14, LINEAR1)])
def test_split_between_blocks(blocks: int, weight: str, whole1: bool, whole2: bool, tmp_path: Path) -> None:
    made = fused_file(blocks, weight, whole1=whole1, whole2=whole2)
    parts = convert(made, "onetrainer", tmp_path)
    assert parts.report.exact
    assert parts.report.families() == {"lokr": len(granularity(model("flux1-dev"), "diffusers")[weight])}
    assert_same(made.meaning(), parts.meaning())
    assert convert(parts.as_made(), "comfyui", tmp_path).tensors == made.tensors


def test_split_inside_one_block(tmp_path: Path) -> None:
    """A w1 of one row: every cut goes through w2, whole or a product, and a fuse puts w2 together again."""
    for whole in (True, False):
        made = fused_file(1, whole2=whole)
        parts = convert(made, "onetrainer", tmp_path)
        assert_same(made.meaning(), parts.meaning())
        assert convert(parts.as_made(), "comfyui", tmp_path).tensors == made.tensors


@pytest.mark.parametrize("ratio", [4.0, 0.3])
def test_members_that_share_a_row_are_fused_whatever_their_scales(ratio: float, tmp_path: Path) -> None:
    """The scale of the third member goes into its own w2, not into the w1 that all share."""
    parts = convert(fused_file(1, whole2=False), "onetrainer", tmp_path).as_made()
    name = [key for key in parts.tensors if key.endswith(".alpha")][2]
    parts.tensors[name] = raw(np.array(float(parts.tensors[name].item()) * ratio), parts.tensors[name].dtype)
    fused = convert(parts, "comfyui", tmp_path)
    assert fused.report.families() == {"lokr": 1}
    assert fused.report.exact == (ratio == 4.0)
    assert_same(parts.meaning(), fused.meaning(), 0.0 if ratio == 4.0 else 3e-3)


@pytest.mark.parametrize("target", ["onetrainer", "lycoris"])
def test_cuts_through_blocks_are_refused(target: str, tmp_path: Path) -> None:
    made = fused_file(4)
    with pytest.raises(NotRepresentableError, match="blocks of 2304 rows") as refused:
        convert(made, target, tmp_path)
    assert "--qkv fuse" in str(refused.value) or "--as lora" in str(refused.value)
    assert not list(tmp_path.glob("*/out*"))


def test_cuts_through_blocks_as_lora(tmp_path: Path) -> None:
    made = fused_file(4, whole1=False)
    output = convert(made, "onetrainer", tmp_path, as_lora=True)
    assert_same(made.meaning(), output.meaning(), 0.02)


@pytest.mark.parametrize("key", ["z-image", "flux1-dev", "sd3-medium"])
def test_what_cannot_be_fused_keeps_split_names_for_comfyui(key: str, tmp_path: Path) -> None:
    of = model(key)
    weight = next(w for w, own in granularity(of, "diffusers").items() if len(own) == 3)
    made = split_file(key, weight)
    output = convert(made, "comfyui", tmp_path)
    assert output.report.exact
    assert output.report.families() == {"lokr": 3}
    assert set(output.tensors.values()) == set(made.tensors.values())
    assert_same(made.meaning(), output.meaning())
    assert any("split names" in warning for warning in output.report.warnings)


def test_what_cannot_be_fused_is_refused_where_split_names_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(NotRepresentableError, match="share neither factor") as refused:
        convert(split_file(), "sd-scripts", tmp_path)
    assert "--qkv fuse" in str(refused.value)
    assert refused.value.module.endswith("to_q")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("how", [{"whole1": True}, {"whole1": False}, {"whole2": True}])
def test_fused_to_an_exact_lora(dtype: str, how: dict[str, bool], tmp_path: Path) -> None:
    """Rank: the sum of rank(w1) * rank(w2); what is lost is the rounding of products, and it is reported."""
    made = split_file("flux1-dev", QKV, dtype, **how)
    output = convert(made, "comfyui", tmp_path, qkv="fuse")
    parts, _ = modules(output.tensors)
    (only,) = parts.values()
    assert only.family == "lora"
    error = max(relative_errors(made.meaning(), output.meaning()).values())
    assert error < {"BF16": 4e-3, "F16": 6e-4, "F32": 1e-6}[dtype]
    reported = output.report.losses.total()
    if how.get("whole2"):  # products with the identity are not rounded
        assert error == reported == 0.0
        return
    assert error / 2 < reported < error * 2


@pytest.mark.parametrize(
    ("as_lora", "options"),
    [(False, {"rank": 5}), (True, {"rank": 5}), (True, {"energy": 0.9}), (True, {"rank": 4, "energy": 0.99})],
)
def test_the_reported_error_of_a_cut_is_the_true_one(as_lora: bool, options: dict[str, float], tmp_path: Path) -> None:
    """All columns of a small model, so that the oracle's error is the error."""
    of = model("sd1") if as_lora else model("lumina2")
    layout = "sd-scripts" if as_lora else "onetrainer"
    builder = Builder.start(of, layout, "F32", 13)
    weight = "time_embed.0" if as_lora else next(w for w in of.shapes if w.endswith("layers.3.attention.qkv"))
    for i, name in enumerate(modules_of(of, layout, weight)):
        builder.add(name, "lokr", rank=3, alpha=1.5 + i)
    output = convert(builder.made, "comfyui", tmp_path, qkv="fuse", as_lora=as_lora, **options)
    before, after = whole(builder.made.tensors, of, layout), whole(output.tensors, of, "comfyui")
    true = float(np.linalg.norm(before - after) / np.linalg.norm(before))
    assert 1e-3 < true < 1
    assert output.report.losses.total() == pytest.approx(true, rel=1e-3)
    (module,) = {p.stem: p for p in modules(output.tensors)[0].values()}.values()
    rank = module.slots["down"].shape[0]
    values = np.linalg.svd(reduced(before), compute_uv=False)
    if "rank" in options:
        assert rank <= options["rank"]
    if options.keys() == {"energy"}:
        assert rank == int(np.searchsorted(np.cumsum(values**2), options["energy"] * (values**2).sum())) + 1
    assert true == pytest.approx(float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())), rel=1e-3)


def whole(tensors: dict[str, Raw], of: object, layout: str) -> np.ndarray:
    """One weight's whole delta."""
    from tests import oracle

    kept = oracle.COLUMNS
    oracle.COLUMNS = 1 << 30
    try:
        (delta,) = dense_deltas(tensors, of, Reader(layout)).deltas.values()  # type: ignore[arg-type]
    finally:
        oracle.COLUMNS = kept
    return delta


def reduced(matrix: np.ndarray) -> np.ndarray:
    """A small matrix of the same singular values."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return np.asarray(np.linalg.qr(tall, mode="r"))


# strength -----------------------------------------------------------------------------------------------------------------


def whole_lokr(alpha: float, dtype: str = "BF16", *, alpha_dtype: str = "F32", factor: bool = False) -> Made:
    builder = Builder.start(model("z-image"), "sd-scripts", dtype, 14)
    stem = builder.add("layers.3.feed_forward.w1", "lokr", rank=4, blocks=160, whole2=True)
    builder.made.tensors[f"{stem}.alpha"] = raw(alpha, alpha_dtype)
    if factor:
        builder.made.tensors["lokr_factor"] = raw(16, "I64")
    return builder.made


TARGETS = ["sd-scripts", "comfyui", "other", "lycoris", "onetrainer"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("alpha", [1e10, np.inf, 4.0])
def test_a_whole_lokr_ignores_alpha(target: str, alpha: float, tmp_path: Path) -> None:
    """ai-toolkit writes 1e10, which half precision makes infinite."""
    for alpha_dtype in ("F32", "F16") if np.isinf(alpha) else ("F32", "BF16"):
        made = whole_lokr(alpha, alpha_dtype=alpha_dtype)
        output = convert(made, target, tmp_path)
        assert_same(made.meaning(), output.meaning())
        assert output.report.exact
        assert all(np.all(np.isfinite(t.f64())) and np.all(np.abs(t.f64()) < 1e8) for t in output.tensors.values())
        assert set(factors(output.tensors).values()) == set(factors(made.tensors).values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("alpha", [16.0, 24.0, 64.0])
def test_the_forks_strength_is_baked_for_everybody(target: str, alpha: float, tmp_path: Path) -> None:
    """alpha / max(w2.shape) in the file with the buffer: afterwards every rule gives the same delta."""
    made = whole_lokr(alpha, factor=True)
    assert made.tensors["lora_unet_layers_3_feed_forward_w1.lokr_w2"].shape == (64, 60)
    before = made.meaning()
    output = convert(made, target, tmp_path)
    tolerance = 2.0**-8 if alpha == 24.0 else 1e-12
    for rule in (True, False):
        reader = Reader(target, whole_lokr_by_shape=rule)
        assert_same(before, dense_deltas(drop_factor(output.tensors), model("z-image"), reader), tolerance)
    assert output.report.exact == (alpha != 24.0)
    if alpha == 24.0:
        true = max(relative_errors(before, output.meaning()).values())
        assert true / 2 < output.report.losses.total() < 2 * true


def drop_factor(tensors: dict[str, Raw]) -> dict[str, Raw]:
    return {k: t for k, t in tensors.items() if k != "lokr_factor"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("explicit", [False, True])
def test_a_factor_that_comes_back_changes_no_strength(target: str, explicit: bool, tmp_path: Path) -> None:
    """A buffer written from the metadata or an option turns on the fork's rule: alpha must then be neutral."""
    made = whole_lokr(4.0)
    if not explicit:
        made.metadata["ss_lokr_factor"] = "16"
    output = convert(made, target, tmp_path, **({"lokr_factor": 16} if explicit else {}))
    assert output.tensors["lokr_factor"].item() == 16
    assert_same(made.meaning(), output.meaning())
    assert_same(output.meaning(), convert(output.as_made(), "sd-scripts", tmp_path).meaning())


def test_an_infinite_alpha_beside_the_buffer_is_ignored(tmp_path: Path) -> None:
    for alpha in (np.inf, 1e10):
        output = convert(whole_lokr(alpha, "F16", factor=True), "comfyui", tmp_path)
        assert_same(
            whole_lokr(4.0, "F16").meaning(), dense_deltas(drop_factor(output.tensors), model("z-image"), Reader("comfyui"))
        )


@pytest.mark.parametrize("whole2", [False, True])
def test_peft_scales_by_its_configuration(whole2: bool, tmp_path: Path) -> None:
    """alpha / r even for two whole factors; everybody else would ignore it, so it is baked."""
    builder = Builder.start(model("z-image"), "peft", "F32", 15)
    builder.add("layers.3.feed_forward.w1", "lokr", rank=4, alpha=3.0, blocks=80, whole2=whole2)
    config = builder.made.configs[""]
    config |= {"peft_type": "LOKR", "alpha": config.pop("lora_alpha")}
    output = convert(builder.made, "comfyui", tmp_path)
    assert_same(builder.made.meaning(), output.meaning(), 1e-7)


def lokr_file(path: Path, key: str, modules: dict[str, tuple[int, int]], extra: dict[str, np.ndarray] | None = None) -> Path:
    """A file of Diffusers' names under ``diffusion_model.``: name -> (blocks, rank)."""
    (arch,) = named(key)
    names = {**arch.namings["diffusers"], **arch.alias_names}
    shapes = {name: arch.module_shape(spans) for name, spans in names.items()}
    rng, tensors = np.random.default_rng(3), dict(extra or {})
    for name, (blocks, rank) in modules.items():
        out, columns = shapes[name][:2]
        sizes = {"w1": (blocks, blocks), "w2_a": (out // blocks, rank), "w2_b": (rank, columns // blocks)}
        for slot, size in sizes.items():
            tensors[f"diffusion_model.{name}.lokr_{slot}"] = rng.standard_normal(size).astype(np.float32)
        tensors[f"diffusion_model.{name}.alpha"] = np.array(3.0, np.float32)
    save_file(tensors, path)
    return path


Z, FLUX2 = "layers.{}.attention.to_q", "transformer_blocks.{}.attn."


@pytest.mark.parametrize(
    ("key", "modules", "reason"),
    [
        ("z-image", {Z.format(0): (8, 4), Z.format(1): (8, 2), Z.format(2): (8, 4)}, ""),
        ("z-image", {Z.format(0): (8, 4), Z.format(1): (6, 4)}, "no one decompose_factor"),
        ("flux2-klein-4b", {FLUX2.format(0) + "to_qkv": (8, 4), FLUX2.format(1) + "to_added_qkv": (8, 4)}, ""),
        ("flux2-klein-4b", {FLUX2.format(0) + "to_qkv": (8, 4), FLUX2.format(1) + "to_k": (8, 4)}, "fuses q, k and v"),
        ("flux1-dev", {FLUX2.format(0) + "to_k": (8, 4)}, "does not load LoKr"),
    ],
)  # fmt: skip
def test_lokr_for_diffusers_under_its_conditions(
    key: str, modules: dict[str, tuple[int, int]], reason: str, tmp_path: Path
) -> None:
    """What conversion writes loads completely by our check, and what it refuses the check refuses too; LoRA is the way out."""
    source = lokr_file(tmp_path / "in.safetensors", key, modules)
    adapter, out = load(source), tmp_path / "out.safetensors"
    if reason:
        with pytest.raises(NotRepresentableError, match=reason) as failure:
            save(adapter, out, layout="diffusers")
        assert "--as lora" in str(failure.value)
        assert not out.exists()
        converted, report = lorasurgery.convert(adapter, "diffusers", lorasurgery.Options(as_lora=True))
        save(converted, out, report=report)
    else:
        save(adapter, out, layout="diffusers")
    with safe_open(out, "np") as written:
        keys = list(written.keys())
    assert all((".lora_" if reason else ".lokr_") in each for each in keys)
    result = check(read_subject(out), consumer("diffusers"))
    assert result.complete, result


def test_lokr_beside_lora_is_none_for_diffusers(tmp_path: Path) -> None:
    lora = {f"diffusion_model.{Z.format(3)}.lora_{side}.weight": np.ones(size, np.float32)
            for side, size in (("A", (4, 3840)), ("B", (3840, 4)))}  # fmt: skip
    source = lokr_file(tmp_path / "in.safetensors", "z-image", {Z.format(0): (8, 4)}, lora)
    with pytest.raises(NotRepresentableError, match="LoKr alone"):
        save(load(source), tmp_path / "out.safetensors", layout="diffusers")
