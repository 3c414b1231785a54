"""Shapes, biases and families that real programs write, against formulas of their own in float64."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import lorasurgery
from lorasurgery.adapter import written_in
from lorasurgery.architectures import architectures, named
from lorasurgery.architectures.table import DIFFUSERS
from lorasurgery.checking.consumers import consumer
from lorasurgery.checking.engine import check
from lorasurgery.checking.subject import read_subject
from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.dora import magnitude_shape
from lorasurgery.deltas.full import Opaque
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.orthogonal import clamped_rotations, rotations, turn_parts, turn_rows
from lorasurgery.deltas.sparse import Sparse
from lorasurgery.errors import (
    BrokenModuleError,
    NotRepresentableError,
)
from lorasurgery.files.opened import read_any
from lorasurgery.files.read import adapter_of, parse
from lorasurgery.files.taken import Unparsed, taken_apart
from lorasurgery.inspection import describe
from lorasurgery.io.tensors import of_array, scalar
from lorasurgery.layouts.detect import expected_shape, has_bias
from lorasurgery.layouts.emit import emit
from lorasurgery.layouts.group import build, group
from lorasurgery.operations.cut import ResizeOptions, resize
from lorasurgery.operations.onto import turned
from lorasurgery.operations.onto.rules import Rules
from lorasurgery.operations.onto.step import Wanted
from lorasurgery.report import Report
from lorasurgery.verbs.apply import dense_multiplied
from lorasurgery.verbs.merge import merge
from tests.format_files import RNG, file, lora, some, wan_control, written
from tests.test_architectures import REFERENCES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.io.tensors import Float64, Tensor

REFERENCE = Path(__file__).parent / "fixtures" / "reference"


# shapes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "axis", "axes", "peft", "shape"),
    [
        (320, "out", 2, False, (320, 1)), (320, "in", 2, False, (1, 320)), (320, "out", 4, False, (320, 1, 1, 1)),
        (320, "in", 4, False, (1, 320, 1, 1)), (320, "out", 2, True, (320,)), (320, "out", 4, True, (1, 320, 1, 1)),
        (8, "out", 5, True, (1, 8, 1, 1, 1)),
    ],
)  # fmt: skip
def test_shape_of_a_magnitude(size: int, axis: str, axes: int, peft: bool, shape: tuple[int, ...]) -> None:
    assert magnitude_shape(size, axis, axes, peft=peft) == shape


CONV, LINEAR = "down_blocks_0_resnets_0_conv1", "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("family", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("target", ["lycoris", "comfyui", "sd-scripts", "diffusers", "peft"])
def test_magnitudes_keep_the_axes_of_the_weight(family: str, axis: str, target: str) -> None:
    source: dict[str, Tensor] = {}
    for name, kernel in ((CONV, (3, 3)), (LINEAR, ())):
        stem, columns = f"lora_unet_{name}", 320 * (9 if kernel else 1)
        if family == "lora":
            source |= {
                f"{stem}.lora_down.weight": some(4, 320, *kernel),
                f"{stem}.lora_up.weight": some(320, 4, *(1 for _ in kernel)),
            }
        elif family == "loha":
            source |= {
                f"{stem}.hada_w{n}_{s}": some(*shape) for n in (1, 2) for s, shape in (("a", (320, 4)), ("b", (4, columns)))
            }
        else:
            source |= {
                f"{stem}.lokr_w1": some(8, 8),
                f"{stem}.lokr_w2_a": some(40, 4),
                f"{stem}.lokr_w2_b": some(4, columns // 8),
            }
        shape = (320, 1) if axis == "out" else (1, 320)
        source |= {f"{stem}.alpha": scalar(2.0), f"{stem}.dora_scale": some(*shape, *(1 for _ in kernel))}
    adapter = parse(file(source), among=named("sd1"))
    peft = target in ("diffusers", "peft")
    if peft and axis == "in":
        return
    tensors = written(adapter, target, as_lora=peft)
    found = {key: tensor.shape for key, tensor in tensors.items() if "dora_scale" in key or "magnitude" in key}
    conv, linear = (
        ((1, 320, 1, 1), (320,)) if peft else ((320, 1, 1, 1), (320, 1)) if axis == "out" else ((1, 320, 1, 1), (1, 320))
    )
    assert sorted(found.values()) == sorted((conv, linear))
    magnitudes = {source[f"lora_unet_{name}.dora_scale"].tobytes() for name in (CONV, LINEAR)}
    assert {tensors[key].tobytes() for key in found} == magnitudes


def test_magnitudes_whose_names_keep_their_dots() -> None:
    """What Diffusers' ``convert_state_dict_to_kohya`` makes of a DoRA."""
    import torch
    from diffusers.utils import convert_state_dict_to_kohya

    state: dict[str, Any] = {}
    for part in ("to_q", "to_k", "to_out.0"):
        stem = f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.{part}"
        columns = 768 if part == "to_k" else 320
        state |= {f"{stem}.lora_A.weight": torch.randn(4, columns), f"{stem}.lora_B.weight": torch.randn(320, 4)}
        state[f"{stem}.lora_magnitude_vector"] = torch.randn(320)
    source = {
        key: of_array(value.numpy(), "F32") if value.ndim else scalar(value.item())
        for key, value in convert_state_dict_to_kohya(state).items()
    }
    adapter = parse(file(source), among=named("sd1"))
    assert not adapter.leftovers
    assert [module.family for module in adapter.modules.values()] == ["dora"] * 3
    back = written(adapter, "diffusers")
    assert {key: np.asarray(state[key]).tobytes() for key in back} == {key: tensor.tobytes() for key, tensor in back.items()}


def test_a_widened_weight() -> None:
    adapter = parse(file(wan_control()))
    assert adapter.architecture.key == "wan-2.1-t2v-1.3b"
    (site,) = (site for site in adapter.modules if site.spans[0].weight == "patch_embedding")
    assert expected_shape(adapter.architecture, site) == (1536, 32, 1, 2, 2)
    for target in ("comfyui", "sd-scripts"):
        tensors = written(adapter, target)
        (key,) = (key for key in tensors if "reshape" in key)
        assert tensors[key].array().tolist() == [1536, 32, 1, 2, 2]


def test_a_widened_weight_in_every_command(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file
    from typer.testing import CliRunner

    from lorasurgery.cli.app import app

    path, out = tmp_path / "control.safetensors", tmp_path / "out.safetensors"
    save_file({key: tensor.array() for key, tensor in wan_control().items()}, path)
    stem = "diffusion_model.patch_embedding"
    for command in (
        ["convert", str(path), str(out), "--target", "comfyui"], ["resize", str(path), "--rank", "2", "-o", str(out)],
        ["merge", f"{path}:0.5", f"{path}:0.25", "-o", str(out)],
        ["prune", str(path), "--drop", "re=self_attn", "-o", str(out)],
    ):  # fmt: skip
        result = CliRunner().invoke(app, [*command, "--force"])
        assert result.exit_code == 0, result.output
        made = load_file(out)
        assert made[f"{stem}.reshape_weight"].tolist() == [1536, 32, 1, 2, 2]
        down = next(value for key, value in made.items() if key.startswith(stem) and ("lora_A" in key or "lora_down" in key))
        assert down.shape[1:] == (32, 1, 2, 2)
    assert describe(path).unexplained == ()


@pytest.mark.parametrize("rank", [8, 4, 3])
def test_a_dora_that_is_not_cut_stays(rank: int) -> None:
    """Only a smaller change needs another magnitude, which the base model alone can give."""
    stem = "diffusion_model.blocks.{}.self_attn.q"
    source = lora(stem.format(0), 5120, 5120, 16) | lora(stem.format(1), 5120, 5120, 4)
    source[f"{stem.format(1)}.dora_scale"] = some(5120, 1)
    adapter = parse(file(source))
    if rank < 4:
        with pytest.raises(NotRepresentableError, match="a smaller one needs another magnitude"):
            resize(adapter, ResizeOptions(rank=rank))
        return
    result, _ = resize(adapter, ResizeOptions(rank=rank))
    tensors = emit(result, written_in(result), Report()).tensors
    assert tensors[f"{stem.format(0)}.lora_A.weight"].shape == (rank, 5120)
    assert all(tensors[key].tobytes() == tensor.tobytes() for key, tensor in source.items() if "blocks.1." in key)


PATCH = "diffusion_model.patch_embedding"


def widths() -> dict[str, dict[str, Tensor]]:
    """Files for one model, of which some make its first layer wider, to more or less, and others do not or have none."""
    block = {key: tensor for key, tensor in wan_control().items() if PATCH not in key}

    def one(columns: int, rank: int = 4, *, said: bool = True, flat: bool = False, diff: bool = False) -> dict[str, Tensor]:
        kernel, ones = ((), ()) if flat else ((1, 2, 2), (1, 1, 1))
        made = {
            f"{PATCH}.lora_A.weight": some(rank, columns * (4 if flat else 1), *kernel),
            f"{PATCH}.lora_B.weight": some(1536, rank, *ones),
        }
        made = {f"{PATCH}.diff": some(1536, columns, 1, 2, 2)} if diff else made
        return block | made | ({f"{PATCH}.reshape_weight": of_array(np.array([1536, columns, 1, 2, 2]), "I64")} if said else {})

    return {
        "plain": block, "narrow": one(16, said=False), "flat": one(16, said=False, flat=True), "wide": one(32),
        "wider": one(48, 3), "difference": one(16, said=False, diff=True), "wide difference": one(32, diff=True),
    }  # fmt: skip


def patch(tensors: Mapping[str, Tensor]) -> Float64 | None:
    """The change of the first layer, (1536, columns, 4), in float64."""
    if f"{PATCH}.diff" in tensors:
        return tensors[f"{PATCH}.diff"].f64().reshape(1536, -1, 4)
    down = tensors.get(f"{PATCH}.lora_A.weight")
    if down is None:
        return None
    up = tensors[f"{PATCH}.lora_B.weight"].f64()
    return (up.reshape(1536, -1) @ down.f64().reshape(down.shape[0], -1)).reshape(1536, -1, 4)


@pytest.mark.parametrize(("first", "second"), list(permutations(widths(), 2)))
def test_files_of_several_widths_are_merged(first: str, second: str) -> None:
    """ComfyUI pads the base with zeros, so that the narrower change is one of the first columns."""
    files = widths()
    adapters = [parse(file(files[name])) for name in (first, second)]
    result, _ = merge(list(zip(adapters, (1.0, 2.0), strict=True)))
    tensors = emit(result, written_in(result), Report()).tensors
    one, two, made = patch(files[first]), patch(files[second]), patch(tensors)
    columns = max(0 if change is None else change.shape[1] for change in (one, two))
    expected = np.zeros((1536, columns, 4))
    for change, weight in ((one, 1.0), (two, 2.0)):
        if change is not None:
            expected[:, : change.shape[1]] += weight * change
    assert made is not None
    assert np.allclose(made, expected, rtol=0, atol=1e-6)
    said = tensors.get(f"{PATCH}.reshape_weight")
    assert (None if said is None else said.array().tolist()) == (None if columns == 16 else [1536, columns, 1, 2, 2])


def test_the_table_that_is_as_wide_comes_first() -> None:
    """A control LoRA in ComfyUI's layout is one, not a widened FLUX.1 dev."""
    source = lora("diffusion_model.img_in", 3072, 128) | lora("diffusion_model.double_blocks.0.img_attn.qkv", 9216, 3072)
    source["diffusion_model.img_in.reshape_weight"] = of_array(np.array([3072, 128]), "I64")
    assert parse(file(source), among=named("flux1")).architecture.key == "flux1-control"
    source["diffusion_model.img_in.reshape_weight"] = of_array(np.array([3072, 200]), "I64")
    source["diffusion_model.img_in.lora_A.weight"] = some(4, 200)
    assert parse(file(source)).architecture.shapes["img_in"] == (3072, 200)
    source["diffusion_model.img_in.lora_A.weight"] = some(4, 100)
    with pytest.raises(BrokenModuleError, match="100"):
        parse(file(source))


# biases -------------------------------------------------------------------------------------------------------------------


def test_tables_tell_where_biases_are() -> None:
    maps = json.loads(gzip.decompress((REFERENCE / "comfyui_key_maps.json.gz").read_bytes()))
    for key, reference in REFERENCES.items():
        arch, accepted = architectures()[key], maps.get(reference)
        assert arch.no_bias is not None
        for name in arch.shapes if accepted is not None else ():
            assert arch.has_bias(name) is (f"diffusion_model.{name}.bias" in accepted), (key, name)
    assert architectures()["sd1"].has_bias("no.such.weight") is None


@pytest.mark.parametrize("key", ["mochi", "pixart-sigma", "framepack"])
def test_biases_of_models_without_a_key_map(key: str) -> None:
    import diffusers
    import torch

    made = {
        "mochi": lambda: diffusers.MochiTransformer3DModel(num_layers=2),
        "pixart-sigma": lambda: diffusers.PixArtTransformer2DModel(
            num_layers=2, cross_attention_dim=1152, caption_channels=4096
        ),
        "framepack": lambda: diffusers.HunyuanVideoFramepackTransformer3DModel(
            num_layers=2, num_single_layers=2, has_clean_x_embedder=True, has_image_proj=True
        ),
    }
    with torch.device("meta"):
        parameters = dict(made[key]().named_parameters())
    arch = architectures()[key]
    known = {name: spans for name, spans in arch.namings[DIFFUSERS].items() if f"{name}.weight" in parameters}
    assert len(known) > 20
    for name, spans in known.items():
        if not any(f"blocks.{i}." in name for i in range(1, 60)):  # the last block of a short model is another one
            assert arch.has_bias(spans[0].weight) is (f"{name}.bias" in parameters), name


def test_a_bias_where_the_model_has_none() -> None:
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    source: dict[str, Tensor] = {}
    for part in ("to_q", "to_out.0"):
        source |= lora(f"{stem}.{part}", 320, 320) | {f"{stem}.{part}.lora_B.bias": some(320)}
    adapter = parse(file(source), among=named("sd1"))
    assert [has_bias(adapter.architecture, site) for site in adapter.modules] == [False, True]
    for target in ("comfyui", "sd-scripts", "lycoris"):
        with pytest.raises(NotRepresentableError, match=r"to_q: .*a bias for a layer that has none"):
            written(adapter, target)
        assert sum(key.endswith(".diff_b") for key in written(adapter, target, lossy=True)) == 1
    assert sum(key.endswith(".bias") for key in written(adapter, "diffusers")) == 2


# families -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_longcats_stacked_rows(blocks: int) -> None:
    """delta = alpha_scale x rows stacked of up_i @ down[i r:(i+1) r]."""
    hyphen = "___lorahyphen___"
    stem = hyphen.join(("lora", "blocks", "0", "attn", "qkv"))
    down, scale = some(4 * blocks, 16), 0.37
    ups = [some(24, 4) for _ in range(blocks)]
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.alpha_scale": scalar(scale)}
    tensors |= {f"{stem}.lora_up.blocks.{i}.weight": up for i, up in enumerate(ups)}
    groups, others = group(file(tensors))
    (own,) = groups.values()
    delta = build(own, None)
    assert (own.stem, own.spelled, others) == ("blocks.0.attn.qkv", stem, {})
    assert isinstance(delta, LowRank)
    expected = np.concatenate([up.f64() @ down.f64()[4 * i : 4 * i + 4] for i, up in enumerate(ups)])
    assert np.allclose(delta.dense(), expected, rtol=1e-12, atol=0)
    alpha = own.modifier("alpha")
    assert alpha is not None
    assert alpha.tensor.item() / delta.rank == float(np.float32(scale))
    assert {entry.key for entry in own.entries.values()} == tensors.keys()


def longcat(rank: int) -> dict[str, Tensor]:
    """A fused and a plain layer as LongCat-Video's trainer saves them."""
    hyphen = "___lorahyphen___"
    fused, plain = (hyphen.join(("lora", "blocks", "0", "attn", name)) for name in ("qkv", "proj"))
    tensors = {f"{fused}.lora_up.blocks.{i}.weight": some(24, rank) for i in range(3)}
    tensors |= {f"{fused}.lora_down.weight": some(3 * rank, 24), f"{plain}.lora_up.weight": some(24, rank)}
    return tensors | {
        f"{plain}.lora_down.weight": some(rank, 24), **{f"{stem}.alpha_scale": scalar(0.37) for stem in (fused, plain)}
    }  # fmt: skip


def longcat_changes(tensors: Mapping[str, Tensor]) -> dict[str, Float64]:
    """By the trainer's own formula; every key must be one of its words."""
    found = {}
    for stem in {key.partition(".")[0] for key in tensors}:
        scale, down = tensors[f"{stem}.alpha_scale"].item(), tensors[f"{stem}.lora_down.weight"].f64()
        ups = [tensors[key] for key in sorted(tensors) if key.startswith(f"{stem}.lora_up")]
        rank = ups[0].shape[1]
        runs = [up.f64() @ down[i * rank : (i + 1) * rank] for i, up in enumerate(ups)]
        assert len(down) == rank * len(ups)
        found[stem] = scale * np.concatenate(runs)
    assert len(tensors) == 8
    return found


@pytest.mark.parametrize("how", ["half", "negated", "sum", "cut", "kept"])
def test_longcats_words_stay(how: str) -> None:
    """What changes numbers changes no word: LongCat-Video's loader knows no others."""
    files = [longcat(4), longcat(3)]
    adapters = [adapter_of(taken_apart(Unparsed(file(tensors), None)), None) for tensors in files]
    before = [longcat_changes(tensors) for tensors in files]
    weights = {"half": [(0.5)], "negated": [-1.0], "sum": [0.5, 0.25]}.get(how)
    if weights is not None:
        result, _ = merge(list(zip(adapters, weights, strict=False)))
    else:
        result, _ = resize(adapters[0], ResizeOptions(rank=2 if how == "cut" else 12))
    made = longcat_changes(emit(result, written_in(result), Report()).tensors)
    assert made.keys() == before[0].keys()
    for stem, change in made.items():
        if how == "cut":
            left, values, right = np.linalg.svd(before[0][stem], full_matrices=False)
            assert np.allclose(change, (left[:, :2] * values[:2]) @ right[:2], atol=1e-5)
        else:
            pairs = zip(weights or [1.0], before, strict=False)
            assert np.allclose(change, sum(weight * changes[stem] for weight, changes in pairs), rtol=0, atol=1e-6)


def test_longcats_ranks_must_add_up() -> None:
    tensors = {"a.lora_down.weight": some(8, 16), "a.lora_up.blocks.0.weight": some(24, 4)}
    (own,) = group(file(tensors))[0].values()
    with pytest.raises(BrokenModuleError, match="rank 4, its down factor 8"):
        build(own, None)


def test_sd_scripts_oft_of_fused_layers() -> None:
    """``networks/oft_flux.py`` (``get_weight``, ``forward``), in float64."""
    import torch

    parts = [some(4, n, n) for n in (3, 3, 3, 7)]
    stem = "oft_unet_single_blocks_29_linear1"
    groups, _ = group(file({f"{stem}.oft_blocks.{i}": part for i, part in enumerate(parts)} | {f"{stem}.alpha": scalar(0.02)}))
    delta = build(groups[stem], None)
    assert isinstance(delta, Opaque)
    assert (delta.family, list(delta.tensors)) == ("oft", [f".oft_blocks.{i}" for i in range(4)])
    weight = RNG.standard_normal((4 * 16, 10))
    for alpha, strength in ((0.02, 1.0), (0.0, 1.0), (5.0, 0.6)):
        expected, at = [], 0
        for part in parts:
            blocks = torch.from_numpy(part.f64())
            count, size = blocks.shape[:2]
            skew = blocks - blocks.transpose(1, 2)
            norm = torch.norm(skew.flatten())
            skew = skew * ((torch.clamp(norm, max=alpha * count * size) + 1e-8) / (norm + 1e-8))
            eye = torch.eye(size, dtype=torch.float64)
            turn = strength * ((eye + skew) @ (eye - skew).inverse() - eye) + eye
            rows = torch.from_numpy(weight[at : at + count * size]).reshape(count, size, -1)
            expected.append(torch.einsum("knm,knp->kmp", turn, rows).reshape(count * size, -1))
            at += count * size
        ours = weight.copy()
        turn_parts(ours, [clamped_rotations(p.f64(), alpha * p.shape[0] * p.shape[1], strength) for p in parts])
        assert np.allclose(ours, torch.cat(expected).numpy(), rtol=0, atol=1e-12)
        turn_parts(ours, [clamped_rotations(p.f64(), alpha * p.shape[0] * p.shape[1], strength) for p in parts], undo=True)
        assert np.allclose(ours, weight, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("alpha", "strength"), [(0.02, 1.0), (5.0, 0.5), (0.0, 1.0)])
def test_oft_of_fused_layers_is_applied(alpha: float, strength: float) -> None:
    """The step that is taken and the formula that ``--verify`` has."""
    parts = [some(4, n, n) for n in (3, 3, 3, 7)]
    delta = Opaque("oft", tuple((f".oft_blocks.{i}", part) for i, part in enumerate(parts)))
    module: Any = SimpleNamespace(scale=SimpleNamespace(alpha=scalar(alpha)), out=64)
    placed: Any = SimpleNamespace(module=module, strength=strength)
    weight = RNG.standard_normal((64, 10))
    ours = weight.copy()
    wanted = Wanted(64, 10, 10, False, "float64", strength, False, "interpolate", Rules(), None)
    turned.oft(module, delta, wanted).change(ours, 0)
    assert np.allclose(ours, dense_multiplied.multiplied(placed, delta, weight, (0, 64)), rtol=0, atol=1e-13)
    with pytest.raises(CannotError, match="make 64 rows, the layer has 63"):
        turned.oft(module, delta, wanted._replace(out=63))


def test_oft_lists_stay_with_sd_scripts() -> None:
    stem = "oft_unet_double_blocks_0_img_attn_qkv"
    source = {f"{stem}.oft_blocks.{i}": some(64, 48, 48) for i in range(3)} | {f"{stem}.alpha": scalar(1e-3)}
    adapter = parse(file(source), among=named("flux1-dev"))
    with pytest.raises(NotRepresentableError, match="OFT"):
        written(adapter, "comfyui")
    one = "oft_unet_double_blocks_0_img_attn_proj"
    alone = {f"{one}.oft_blocks.0": some(64, 48, 48), f"{one}.alpha": scalar(1e-3)}
    (delta,) = (module.delta for module in parse(file(alone), among=named("flux1-dev")).modules.values())
    assert isinstance(delta, Opaque)
    assert list(delta.tensors) == [".oft_blocks"]  # a list of one is what other programs read


ATTENTION = "input_blocks_4_1_transformer_blocks_0_attn1_to_{}"
SD_SCRIPTS_OFT = {
    "flux1-dev": {"double_blocks_0_img_attn_qkv": 3, "double_blocks_0_img_attn_proj": 1, "single_blocks_3_linear1": 4},
    "sdxl": {ATTENTION.format("q"): 0, ATTENTION.format("out_0"): 0},
}
"""Model -> module -> how many parts its list has; 0: it has no list."""


def oft_of_sd_scripts(key: str, blocks: Mapping[str, int], alpha: Mapping[str, float]) -> dict[str, Tensor]:
    tensors = {}
    for name, parts in SD_SCRIPTS_OFT[key].items():
        rows = [3072, 3072, 3072, 12288] if key == "flux1-dev" else [640]
        for i in range(max(parts, 1)):
            word = f"oft_blocks.{i}" if parts else "oft_blocks"
            size = rows[i] // blocks.get(name, 64)
            tensors[f"oft_unet_{name}.{word}"] = some(blocks.get(name, 64), size, size)
        if name in alpha:
            tensors[f"oft_unet_{name}.alpha"] = scalar(alpha[name])
    return tensors


@pytest.mark.parametrize("key", SD_SCRIPTS_OFT)
@pytest.mark.parametrize("change", ["", "unlike blocks", "unlike constraints", "no constraint", "a LoRA beside it"])
def test_oft_for_sd_scripts(key: str, change: str, tmp_path: Path) -> None:
    """Its own network keeps its names, and loads; what is none goes under LyCORIS' names, and the report says so."""
    first, *others = SD_SCRIPTS_OFT[key]
    last = others[-1]
    alpha = dict.fromkeys(SD_SCRIPTS_OFT[key], 0.001)
    if change in ("unlike constraints", "no constraint"):
        alpha = {**alpha, last: 2e-3} if change == "unlike constraints" else {}
    source = oft_of_sd_scripts(key, {first: 32} if change == "unlike blocks" else {}, alpha)
    if change == "a LoRA beside it":
        stem = "lora_unet_" + ("double_blocks_1_img_attn_proj" if key == "flux1-dev" else ATTENTION.format("k"))
        source |= lora(stem, 3072 if key == "flux1-dev" else 640, 3072 if key == "flux1-dev" else 640)
    adapter = parse(file(source), among=named(key))
    converted, report = lorasurgery.convert(adapter, "sd-scripts")
    out = tmp_path / "out.safetensors"
    report = lorasurgery.save(converted, out, report=report)
    keys = set(read_any(out).tensors)
    result = check(read_subject(out, arch=key), consumer("sd-scripts"))
    own = {name for name in keys if name.startswith("oft_unet_")}
    if change:
        assert not own
        assert not result.complete
        assert any("sd-scripts" in warning for warning in report.warnings)
    else:
        assert keys == set(source)
        assert result.complete
        assert not any("nothing loads" in warning for warning in report.warnings)


def test_oft_of_a_text_encoder_is_no_part_of_sd_scripts_network(tmp_path: Path) -> None:
    """``networks/oft.py`` has no prefix for one: the names stay LyCORIS', and the report says what sd-scripts makes of them."""
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    source = oft_of_sd_scripts("sdxl", {}, dict.fromkeys(SD_SCRIPTS_OFT["sdxl"], 1e-3))
    source |= {f"{name}.oft_blocks": some(64, 48, 48), f"{name}.alpha": scalar(1e-3)}
    converted, report = lorasurgery.convert(parse(file(source), among=named("sdxl")), "sd-scripts")
    report = lorasurgery.save(converted, tmp_path / "out.safetensors", report=report)
    keys = set(read_any(tmp_path / "out.safetensors").tensors)
    assert f"{name}.oft_blocks" in keys
    assert all(key.startswith(("lora_te1_", "lora_unet_")) for key in keys)
    assert any("sd-scripts" in warning for warning in report.warnings)


def test_oft_of_sd_scripts_is_told_from_models_it_does_not_train() -> None:
    source = oft_of_sd_scripts("flux1-dev", {}, {})
    assert parse(file(source)).architecture.id == "flux1"
    assert not [key for key, _ in parse(file(source)).candidates if not key.startswith("flux1")]


@pytest.mark.parametrize("constraint", [0.0, 1e-4, 0.5])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_diag_oft_is_lycoris(constraint: float, rescaled: bool, strength: float) -> None:
    """Constraint times rows is the longest Q may be; rescale multiplies rows at any strength."""
    import torch
    from lycoris.modules.diag_oft import DiagOFTModule

    torch.manual_seed(3)
    layer = torch.nn.Conv2d(6, 12, 3)
    blocks = torch.randn(4, 3, 3) * 0.2
    rescale = torch.rand(12, 1, 1, 1) + 0.5 if rescaled else None
    with torch.no_grad():
        module = DiagOFTModule.make_module_from_state_dict("lora_x", layer, blocks, rescale, torch.tensor(constraint))
        theirs = module.get_merged_weight(strength)[0].double().numpy().reshape(12, -1)
    ours = layer.weight.detach().double().numpy().reshape(12, -1).copy()
    turns = rotations(blocks.double().numpy(), constraint * 12, strength)
    turn_rows(ours, turns, None if rescale is None else rescale.double().numpy().reshape(-1))
    assert np.allclose(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("both", [False, True])
def test_lokr_tucker_convolution_is_lycoris(both: bool) -> None:
    import torch
    from lycoris.modules.lokr import LokrModule

    torch.manual_seed(5)
    layer = torch.nn.Conv2d(16, 24, 3)
    module = LokrModule("lora_x", layer, lora_dim=1, alpha=1.5, use_tucker=True, factor=4, decompose_both=both)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        theirs = module.get_weight(layer.weight.shape).double().numpy()  # of its forward pass; its merge scales twice
    state = {key.removeprefix("lokr_"): value for key, value in module.state_dict().items() if key.startswith("lokr_")}
    assert "t2" in state
    assert ("w1_a" in state) is both
    ours = Kronecker(**{slot: of_array(value.detach().numpy(), "F32") for slot, value in state.items()})
    assert ours.rank == 1
    assert ours.shape == (24, 16, 3, 3)
    assert np.allclose(ours.dense() * 1.5, theirs.reshape(ours.shape), rtol=0, atol=1e-6)
    assert np.allclose(ours.to_low_rank().dense(), ours.dense(), rtol=0, atol=1e-12)


# sparse residuals ---------------------------------------------------------------------------------------------------------


def residual(out: int, columns: int, count: int = 40) -> dict[str, Tensor]:
    places = np.stack([RNG.integers(0, out, count), RNG.integers(0, columns, count)])
    return {
        "bias_indices": of_array(places, "I16"),
        "bias_values": some(count, dtype="F16"),
        "bias_size": of_array(np.array([out, columns]), "I16"),
    }


def with_residual(stem: str, kernel: tuple[int, ...] = (), *, factors: bool = True) -> dict[str, Tensor]:
    columns = 320 * int(np.prod(kernel or (1,)))
    found = {f"{stem}.{slot}": tensor for slot, tensor in residual(320, columns).items()}
    if factors:
        found |= {
            f"{stem}.lora_down.weight": some(4, 320, *kernel),
            f"{stem}.lora_up.weight": some(320, 4, *(1 for _ in kernel)),
        }
        found[f"{stem}.alpha"] = scalar(3.0)
    return found


def dense_residual(tensors: dict[str, Tensor], stem: str) -> Float64:
    indices, values, size = (tensors[f"{stem}.bias_{slot}"].array() for slot in ("indices", "values", "size"))
    found = np.zeros(size)
    for row, column, value in zip(*indices, values.astype(float), strict=True):
        found[row, column] += value
    return found


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("factors", [True, False])
def test_sparse_residual_is_the_sum(kernel: tuple[int, ...], factors: bool) -> None:
    stem = f"lora_unet_{CONV if kernel else LINEAR}"
    source = with_residual(stem, kernel, factors=factors)
    adapter = parse(file(source), among=named("sd1"))
    (module,) = adapter.modules.values()
    expected = dense_residual(source, stem)
    if factors:
        up, down = (source[f"{stem}.lora_{side}.weight"].f64() for side in ("up", "down"))
        expected = (expected + up.reshape(320, 4) @ down.reshape(4, -1)) * 3.0 / 4
    assert module.family == "sparse"
    assert np.allclose(module.dense().reshape(320, -1), expected, rtol=0, atol=1e-14)
    delta = module.delta
    assert isinstance(delta, Sparse)
    whole = delta.dense()
    assert np.allclose(delta.to_low_rank().dense().reshape(whole.shape), whole, rtol=0, atol=1e-12)
    ranges = [(200, 320), (10, 15)]
    assert np.array_equal(delta.rows(ranges).dense(), np.concatenate([whole[low:high] for low, high in ranges]))
    assert np.allclose(delta.scaled(0.5).dense(), whole * 0.5, rtol=0, atol=1e-15)
    made = written(adapter, "comfyui", as_lora=True, dtype="fp32")
    (up_key,), (down_key,) = ([key for key in made if key.endswith(f".lora_{side}.weight")] for side in ("up", "down"))
    product = made[up_key].f64().reshape(320, -1) @ made[down_key].f64().reshape(made[down_key].shape[0], -1)
    alpha = next((t.item() for key, t in made.items() if key.endswith(".alpha")), made[down_key].shape[0])
    assert np.allclose(product * alpha / made[down_key].shape[0], expected, rtol=0, atol=1e-5)


def test_sparse_rows_in_chunks() -> None:

    source = with_residual("x")
    (own,) = group(file(source))[0].values()
    delta = build(own, None)
    assert delta is not None
    rows = delta.by_rows("float64", 0.7)
    found = np.concatenate([rows(low, high) for low, high in pairwise((0, 100, 101, 320))])
    assert np.allclose(found, delta.dense() * 0.7, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("slot", "tensor", "message"),
    [
        ("bias_size", of_array(np.array([320, 321]), "I16"), "bias_size says"),
        ("bias_indices", of_array(np.zeros((2, 3)), "I16"), "no sparse matrix"),
        ("bias_indices", some(2, 40), "no sparse matrix"),
        ("bias_values", None, "no bias_values"),
    ],
)
def test_broken_residuals(slot: str, tensor: Tensor | None, message: str) -> None:
    source = with_residual("x")
    source.pop(f"x.{slot}")
    if tensor is not None:
        source[f"x.{slot}"] = tensor
    (own,) = group(file(source))[0].values()
    with pytest.raises(BrokenModuleError, match=message):
        build(own, None)
