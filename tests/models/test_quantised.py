"""Scaled fp8 against float64, and the formats that are refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest

from lorasurgery.architectures.table import Span
from lorasurgery.errors import FileFormatError
from lorasurgery.models import open_model
from tests.models.small import original_arrays, save
from tests.oracle import Raw, raw, write

KEY = "z-image"
FP8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
NAME = "layers.0.feed_forward.w1"


def fp8(values, dtype):
    stored = np.asarray(values).astype(FP8[dtype])
    return Raw(dtype, stored.shape, stored.tobytes()), stored.astype(np.float64)


def model_with(path, extra, prefix="", metadata=None):
    """A Z-Image whose tensors ``extra`` replaces and adds to."""
    tensors = {name: raw(v, "BF16") for name, v in original_arrays(KEY).items()} | extra
    write(path, {prefix + name: one for name, one in tensors.items()}, metadata)
    return path


SCALES = {
    "scalar": lambda rng, out: rng.uniform(0.1, 3.0, ()),
    "one number": lambda rng, out: rng.uniform(0.1, 3.0, (1,)),
    "per row": lambda rng, out: rng.uniform(0.1, 3.0, (out,)),
    "per row, a column": lambda rng, out: rng.uniform(0.1, 3.0, (out, 1)),
    "per block": lambda rng, out: rng.uniform(0.1, 3.0, (out, 3, 1)),
}


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("kind", SCALES)
def test_scaled_fp8(tmp_path, dtype, suffix, kind):
    rng = np.random.default_rng(3)
    values = original_arrays(KEY)[f"{NAME}.weight"]
    stored, exact = fp8(values, dtype)
    scale = raw(SCALES[kind](rng, len(values)), "F32")
    factors = scale.f64()
    if factors.size == 1:
        factors = factors.reshape(1, 1)
    else:  # (out, blocks) numbers, each for as many columns
        factors = np.repeat(factors.reshape(len(values), -1), values.shape[1] // max(factors[0].size, 1), axis=1)
    extra = {
        f"{NAME}.weight": stored, f"{NAME}.{suffix}": scale, f"{NAME}.scale_input": raw(2.0, "F32"),
        f"{NAME}.input_scale": raw(2.0, "F32"), "scaled_fp8": fp8(np.zeros(2), dtype)[0],
    }  # fmt: skip
    model = open_model(model_with(tmp_path / "a.safetensors", extra, prefix="model.diffusion_model."))
    assert (model.architecture.id, model.layout) == (KEY, "comfyui")
    reader = model.reader("denoiser", (Span(NAME, 3, 40),))
    assert reader.dtype == dtype
    np.testing.assert_allclose(reader.rows(), (exact * factors)[3:40], rtol=2**-23, atol=0)
    np.testing.assert_allclose(reader.rows(5, 9), (exact * factors)[8:12], rtol=2**-23, atol=0)
    for name in ("scale_weight", "weight_scale", "scale_input", "input_scale"):
        other = model.weights.get(f"model.diffusion_model.{NAME}.{name}")
        assert other is None or (other.role, other.place) == ("other", None)
    assert model.weights["model.diffusion_model.scaled_fp8"].role == "other"


@pytest.mark.parametrize("dtype", FP8)
def test_plain_fp8_is_taken_as_it_is(tmp_path, dtype):
    stored, exact = fp8(original_arrays(KEY)[f"{NAME}.weight"], dtype)
    model = open_model(model_with(tmp_path / "a.safetensors", {f"{NAME}.weight": stored}))
    assert np.array_equal(model.weights[f"{NAME}.weight"].array(), exact)


def quant(settings):
    text = json.dumps(settings).encode()
    return Raw("U8", (len(text),), text)


def test_comfyui_says_which_fp8_it_is(tmp_path):
    stored, exact = fp8(original_arrays(KEY)[f"{NAME}.weight"], "F8_E4M3")
    scale = {f"{NAME}.weight": stored, f"{NAME}.weight_scale": raw(0.5, "F32")}
    path = model_with(tmp_path / "a.safetensors", scale | {f"{NAME}.comfy_quant": quant({"format": "float8_e4m3fn"})})
    assert np.array_equal(open_model(path).weights[f"{NAME}.weight"].array(), exact * 0.5)
    for settings, why in (
        ({"format": "nvfp4"}, "ComfyUI's nvfp4"), ({"format": "int8_tensorwise"}, "ComfyUI's int8_tensorwise"),
        ({"format": "float8_e4m3fn", "convrot": True}, "float8_e4m3fn with a rotation"), ({}, "ComfyUI's None"),
    ):  # fmt: skip
        with pytest.raises(FileFormatError, match=why):
            open_model(model_with(tmp_path / "b.safetensors", scale | {f"{NAME}.comfy_quant": quant(settings)}))
        described = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {NAME: settings}})}
        with pytest.raises(FileFormatError, match=why):
            open_model(model_with(tmp_path / "c.safetensors", scale, metadata=described))
    with pytest.raises(FileFormatError, match="_quantization_metadata is not JSON"):
        open_model(model_with(tmp_path / "d.safetensors", scale, metadata={"_quantization_metadata": "{"}))


def of(dtype, *shape):
    sizes = {"U8": 1, "I8": 1, "I32": 4, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "BF16": 2}
    return Raw(dtype, shape, bytes(int(np.prod(shape)) * sizes[dtype]))


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({f"{NAME}.weight": of("U8", 768, 1), f"{NAME}.weight.absmax": of("F32", 24)}, "bitsandbytes 4 bit"),
        ({f"{NAME}.weight.nested_absmax": of("F32", 4)}, "bitsandbytes 4 bit"),
        ({f"{NAME}.weight.quant_map": of("F32", 16)}, "bitsandbytes 4 bit"),
        ({f"{NAME}.weight.quant_state.bitsandbytes__nf4": of("U8", 9)}, "bitsandbytes 4 bit"),
        ({f"{NAME}.weight": of("I8", 128, 48), f"{NAME}.SCB": of("F32", 128)}, "bitsandbytes 8 bit"),
        ({f"{NAME}.qweight": of("I8", 128, 24), f"{NAME}.smooth_factor": of("BF16", 48)}, r"SVDQuant \(nunchaku\)"),
        ({f"{NAME}.qweight": of("I32", 6, 128), f"{NAME}.g_idx": of("I32", 48)}, "GPTQ"),
        ({f"{NAME}.qweight": of("I32", 48, 16), f"{NAME}.qzeros": of("I32", 1, 16)}, "AWQ or GPTQ"),
        ({f"{NAME}._weight_qdata": of("I8", 128, 48), f"{NAME}._weight_scale": of("F32", 128, 1)}, "torchao"),
        ({f"{NAME}.weight:qdata": of("I8", 128, 48)}, "torchao"),
        ({f"{NAME}.weight._data": of("I8", 128, 48), f"{NAME}.weight._scale": of("F32", 128, 1)}, "optimum-quanto"),
        ({f"{NAME}.W_q": of("U8", 64, 48)}, "HQQ"),
        ({f"{NAME}.weight": of("F8_E4M3", 128, 48), f"{NAME}.weight_scale_inv": of("F32", 1, 1)}, "block-wise fp8"),
        ({f"{NAME}.weight": of("U8", 128, 24), f"{NAME}.weight_scale_2": of("F32", 1)}, "NVFP4"),
        ({f"{NAME}.weight": of("F8_E4M3", 128, 48), f"{NAME}.weight_scale": of("F8_E8M0", 128, 2)}, "MXFP8"),
        ({f"{NAME}.qweight": of("I32", 48, 16)}, "packed integers"),
        ({f"{NAME}.weight": of("I8", 128, 48), f"{NAME}.weight_scale": of("F32", 128, 1)}, "stored as I8"),
        ({f"{NAME}.weight": of("F8_E4M3FNUZ", 128, 48)}, "stored as F8_E4M3FNUZ"),
    ],
)  # fmt: skip
def test_other_formats_are_refused_by_name(tmp_path, extra, why):
    with pytest.raises(FileFormatError, match=rf"quantised: {why}.*\.w1") as caught:
        open_model(model_with(tmp_path / "a.safetensors", extra))
    assert "bf16" in str(caught.value)


@pytest.mark.parametrize(
    ("weight", "scale"),
    [("F8_E4M3", (4, 3)), ("F8_E4M3", (64,)), ("F8_E4M3", (128, 5, 1)), ("F8_E4M3", (128, 3)), ("BF16", ()), ("F8_E4M3", (0,))],
)
def test_scales_that_do_not_fit_are_refused(tmp_path, weight, scale):
    extra = {f"{NAME}.weight": of(weight, 128, 48), f"{NAME}.weight_scale": of("F32", *scale)}
    with pytest.raises(FileFormatError, match=rf"{NAME}\.weight_scale is F32 .* for a {weight} weight of \[128, 48\]"):
        open_model(model_with(tmp_path / "a.safetensors", extra))


def test_lora_like_names_alone_are_no_svdquant(tmp_path):
    arrays = {"block.0.proj_down.weight": np.ones((4, 4)), "block.0.smooth": np.ones(4), "block.0.proj_down": np.ones(4)}
    assert open_model(save(tmp_path / "a.safetensors", arrays)).architecture.id == "custom"
