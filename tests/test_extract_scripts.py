"""sd-scripts' extraction command lines take the layers that its scripts take.

What those take is derived here from the module classes of the real models, the way ``networks/lora.py`` walks them, and
from the key filters of the other scripts; the package's own table has names instead.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorasurgery.verbs.extract.sd_scripts import CONV_ONLY, OTHER_LAYER
from tests.edges import run
from tests.extracting import changed, differences, grid, whole_low_rank
from tests.models.small import built, original_of, save
from tests.models.test_encoders import all_in_one, arrays_of, encoder
from tests.oracle import read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ATTENTION, CONVOLUTIONS = {"Transformer2DModel"}, {"ResnetBlock2D", "Downsample2D", "Upsample2D"}
ENCODER = {"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"}


def layers_in(model: Any, classes: set[str], *, conv: bool) -> Iterator[str]:
    """Every Linear and Conv2d inside modules of these classes; those with a kernel only with ``conv``."""
    for name, module in model.named_modules():
        if type(module).__name__ in classes:
            for child, layer in module.named_modules():
                kind = type(layer).__name__
                plain = kind == "Linear" or (kind == "Conv2d" and layer.kernel_size == (1, 1))
                if plain or (kind == "Conv2d" and conv):
                    yield f"{name}.{child}"


def unet_stems(key: str, *, conv: bool) -> set[str]:
    """SDXL is trained by its original names, SD 1 by Diffusers'."""
    names = set(layers_in(built(key), ATTENTION | CONVOLUTIONS if conv else ATTENTION, conv=conv))
    if key == "sdxl":
        names = {
            n.removesuffix(".weight")
            for n in original_of(key, {f"{name}.weight": np.zeros((2, 2), np.float32) for name in names})
        }
    return {f"lora_unet_{name.replace('.', '_')}" for name in names}


def in_flux(key: str) -> bool:
    """``flux_extract_lora.py``."""
    return ("single_block" in key or "double_block" in key) and ".bias" not in key and "norm" not in key


def in_qwen(key: str) -> bool:
    """``qwen_extract_lora.py``, of matrices."""
    starts = (
        "transformer_blocks.",
        "img_in",
        "txt_in",
        "proj_out",
        "norm_out.linear",
        "time_text_embed.timestep_embedder.linear_",
    )
    return key.endswith(".weight") and key.startswith(starts)


def extracted(folder: Path, base: Path, tuned: Path, *more: object) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    out = folder / "out.safetensors"
    outcome = run(
        "extract", "--model_org", base, "--model_tuned", tuned, "--save_to", out, "--json", "--quiet", "--force", *more
    )
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out), *read(out)


def stems(tensors: dict[str, Any]) -> set[str]:
    return {key.partition(".")[0] for key in tensors}


@pytest.mark.parametrize("conv", [None, 9])
@pytest.mark.parametrize("key", ["sd1", "sdxl"])
def test_unet_layers_ranks_and_what_is_left_out(key: str, conv: int | None, tmp_path: Path) -> None:
    base = grid(key)
    tuned = changed(base, whole_low_rank(3))
    paths = save(tmp_path / "base.safetensors", base, "F16"), save(tmp_path / "tuned.safetensors", tuned, "F16")
    more = () if conv is None else ("--conv_dim", conv)
    report, tensors, metadata = extracted(tmp_path, *paths, "--dim", 14, *more)
    assert stems(tensors) == unet_stems(key, conv=conv is not None)
    assert {tensor.dtype for name, tensor in tensors.items() if "lora_" in name.partition(".")[2]} == {"F32"}
    for stem in stems(tensors):
        up, down = tensors[f"{stem}.lora_up.weight"].shape, tensors[f"{stem}.lora_down.weight"].shape
        asked = 14 if math.prod(down[2:]) == 1 else conv
        assert down[0] == min(asked, up[0], down[1])  # input channels, whatever the kernel
        assert tensors[f"{stem}.alpha"].item() == down[0]
    assert ("conv_dim" in json.loads(metadata["ss_network_args"])) == (conv is not None)
    squares = {name: float(np.sum(v**2)) for name, v in differences(key, base, tuned, original=False).items()}
    total = sum(squares.values())
    taken = set(layers_in(built(key), ATTENTION | CONVOLUTIONS if conv else ATTENTION, conv=bool(conv)))
    share = 1.0 - sum(squares[f"{name}.weight"] for name in taken) / total
    assert math.isclose(report["share_left_out"], share, rel_tol=1e-5)
    reasons = {one["reason"] for one in report["left_out"]}
    assert OTHER_LAYER in reasons
    assert (CONV_ONLY in reasons) == (conv is None)
    assert any(one["name"] in ("lora_unet_time_embed_0", "lora_unet_time_embedding_linear_1") for one in report["left_out"])


def test_text_encoders_are_attention_and_mlp_and_go_together(tmp_path: Path) -> None:
    first, second = encoder(1), encoder(2)
    arrays = [arrays_of(own) for own in (first, second)]
    base = all_in_one(tmp_path / "base.safetensors", *arrays)
    rng = np.random.default_rng(1)

    def tuned(size: Callable[[str], float]) -> Path:
        moved = [{n: v + size(n) * rng.uniform(-1, 1, v.shape) for n, v in own.items()} for own in arrays]
        path = all_in_one(tmp_path / "tuned.safetensors", *moved)
        unet, _ = read(path)
        values = {
            name: tensor.f64() + (rng.uniform(-1, 1, tensor.shape) if "diffusion" in name else 0)
            for name, tensor in unet.items()
        }
        return save(path, values)

    _, tensors, _ = extracted(tmp_path, base, tuned(lambda _: 0.02))
    wanted = {
        f"lora_te{i}_{name.replace('.', '_')}"
        if name.startswith("text_model")
        else f"lora_te{i}_text_model_{name.replace('.', '_')}"
        for i, model in ((1, first), (2, second))
        for name in layers_in(model, ENCODER, conv=False)
    }
    assert {stem for stem in stems(tensors) if stem.startswith("lora_te")} == wanted
    other = tuned(lambda name: 0.5 if "projection" in name or "embed" in name else 0.009)  # theirs looks at its own layers
    report, tensors, _ = extracted(tmp_path, base, other)
    assert stems(tensors) == unet_stems("sdxl", conv=False)
    assert "the text encoders changed by no more than 0.01" in {one["reason"] for one in report["left_out"]}


@pytest.mark.parametrize(("key", "takes"), [("flux1-dev", in_flux), ("chroma", in_flux), ("qwen-image", in_qwen)])
@pytest.mark.parametrize("original", [True, False])
def test_transformers(key: str, takes: Callable[[str], bool], original: bool, tmp_path: Path) -> None:
    base = grid(key)
    tuned = changed(base, whole_low_rank(2))
    names = original_of(key, base) if original else base
    files = (names, original_of(key, tuned) if original else tuned)
    paths = [save(tmp_path / f"{name}.safetensors", own) for name, own in zip(("base", "tuned"), files, strict=True)]
    report, tensors, metadata = extracted(tmp_path, *paths, "--dim", 3, "--save_precision", "bf16")
    wanted = {name for name, values in original_of(key, base).items() if values.ndim == 2 and takes(name)}
    assert stems(tensors) == {"lora_unet_" + name.removesuffix(".weight").replace(".", "_") for name in wanted}
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith("alpha")} == {"BF16"}
    assert metadata["ss_network_dim"] == "3"
    if key == "flux1-dev":
        assert {one["name"] for one in report["left_out"] if one["reason"] == OTHER_LAYER} >= {
            "lora_unet_img_in", "lora_unet_guidance_in_in_layer", "lora_unet_final_layer_linear"
        }  # fmt: skip


def test_models_without_a_script_are_extracted_whole(tmp_path: Path) -> None:
    base = grid("z-image")
    paths = [
        save(tmp_path / f"{name}.safetensors", own)
        for name, own in (("base", base), ("tuned", changed(base, whole_low_rank(2))))
    ]
    report, _, _ = extracted(tmp_path, *paths, "--dim", 2)
    assert not [one for one in report["left_out"] if one["kind"] in ("linear", "1x1", "conv")]


def test_our_own_spelling_takes_every_layer(tmp_path: Path) -> None:
    base = grid("sd1")
    paths = [
        save(tmp_path / f"{name}.safetensors", own)
        for name, own in (("base", base), ("tuned", changed(base, whole_low_rank(2))))
    ]
    outcome = run("extract", *paths, tmp_path / "out.safetensors", "--rank", 14, "--json", "--quiet")
    report = json.loads(outcome.out)
    assert {"lora_unet_conv_in", "lora_unet_time_embedding_linear_1"} <= {m["name"] for m in report["modules"]}
    assert max(m["rank"] for m in report["modules"] if m["kind"] == "conv") == 14  # beyond the 8 input channels of some


def test_two_models_at_once_are_refused(tmp_path: Path) -> None:
    outcome = run("extract", "--model_org", "a", "--model_tuned", "b", "--save_to", tmp_path / "c", "--sdxl", "--v2")
    assert outcome.code == 2
    assert "--sdxl and --v2 are two models" in outcome.err
