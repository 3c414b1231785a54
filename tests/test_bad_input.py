"""What cannot be converted: one line that names file and key, what was expected and what to try, and nothing left behind."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

import lorasurgery
from lorasurgery.errors import BrokenModuleError, SurgeryError
from lorasurgery.io.dtypes import BLOCK, all_finite, numpy_dtype
from lorasurgery.io.header import read_safetensors
from tests.edges import DIM, TO_Q, dotted, loha, lokr, lora, refused, run, save, to_bytes, with_header

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.edges import Arrays

DOWN, UP, ALPHA = f"{TO_Q}.lora_down.weight", f"{TO_Q}.lora_up.weight", f"{TO_Q}.alpha"


def convert(path: Path, *more: object, target: str = "comfyui") -> tuple[object, ...]:
    return ("convert", path, path.parent / "out.safetensors", "--target", target, *more)


# not a readable file ------------------------------------------------------------------------------------------------------


def entry(shape: list[int], begin: int, end: int, dtype: str = "F16") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return buffer.getvalue()


GOOD = to_bytes(lora())
HEADER = int.from_bytes(GOOD[:8], "little") + 8
BYTES = {
    "empty": (b"", ["the file is empty", "download it again"]),
    "five bytes": (b"\x10\0\0\0\0", ["truncated: 5 bytes", "download it again"]),
    "header cut": (GOOD[:100], [f"truncated: the header needs {HEADER} bytes, the file has 100", "download it again"]),
    "data cut": (GOOD[:-100], [f"the header describes {len(GOOD)} bytes, the file has {len(GOOD) - 100}"]),
    "length too large": (b"\xff" * 8 + GOOD[8:], ["the header claims", "no safetensors file"]),
    "length too short": ((20).to_bytes(8, "little") + GOOD[8:], ["the header is not JSON"]),
    "length too long": ((HEADER + 40).to_bytes(8, "little") + GOOD[8:], ["the header is not JSON"]),
    "not JSON": (with_header(b"{'single': quotes}"), ["the header is not JSON"]),
    "not UTF-8": (with_header(b'{"\xff\xfe": 1}'), ["the header is not JSON"]),
    "a JSON list": (with_header([1, 2]), ["not a JSON object"]),
    "nested too deep": (with_header(b"[" * 100_000), ["the header is not JSON"]),
    "a lone surrogate": (
        with_header(b'{"\\ud800.alpha":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"\0" * 4),
        ["not JSON"],
    ),
    "a key twice": (
        with_header(b'{"a.alpha":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a.alpha":{}}', b"\0" * 4),
        ["the key a.alpha stands twice"],
    ),
    "metadata not strings": (with_header({"__metadata__": {"a": 1}}), ["__metadata__", "strings to strings"]),
    "an entry without shape": (with_header({"a.alpha": {"dtype": "F32"}}), ["a.alpha", "shape and data_offsets"]),
    "a negative side": (with_header({"a.alpha": entry([-1, 2], 0, 4)}, b"\0" * 4), ["a.alpha", "shape"]),
    "a side that is true": (with_header({"a.alpha": entry([True], 0, 2)}, b"\0" * 2), ["a.alpha", "shape"]),
    "an unknown dtype": (
        with_header({"a.alpha": entry([1], 0, 4, "F128")}, b"\0" * 4),
        ["a.alpha has dtype F128", "F32, F16, BF16"],
    ),
    "offsets and shape": (
        with_header({"a.alpha": entry([3], 0, 4)}, b"\0" * 4),
        ["a.alpha", "needs 6 bytes, data_offsets give 4"],
    ),
    "overlap": (with_header({"a.x": entry([2], 0, 4), "a.y": entry([2], 2, 6)}, b"\0" * 6), ["a.y overlaps its neighbour"]),
    "a hole": (with_header({"a.x": entry([2], 0, 4), "a.y": entry([2], 6, 10)}, b"\0" * 10), ["a.y leaves a hole before it"]),
    "trailing bytes": (GOOD + b"\0" * 8, ["8 bytes follow the last tensor"]),
    "no tensors": (with_header({"__metadata__": {"format": "pt"}}), ["holds no tensors"]),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ["Git LFS pointer", "git lfs pull"]),
    "HTML page": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", ["HTML page", "logged in"]),
    "HTML after a mark": (b"\xef\xbb\xbf<html>", ["HTML page"]),
    "XML page": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ["XML page"]),
    "JSON text": (b'{"error": "Repository not found"}', ["JSON text"]),
    "pickle": (pickle.dumps({"a": 1}, protocol=4), ["Python pickle", "rename it to .pt"]),
    "new pickle": (pickle.dumps({"a": 1}, protocol=5), ["Python pickle"]),
    "zip": (zipped(), ["zip archive", "rename it to .pt"]),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 40, ["GGUF"]),
    "gzip": (b"\x1f\x8b\x08\0" + b"\0" * 40, ["gzip", "unpack"]),
    "image": (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, ["PNG image"]),
}


@pytest.mark.parametrize("name", BYTES)
def test_unreadable(name: str, tmp_path: Path) -> None:
    content, texts = BYTES[name]
    path = tmp_path / "some lora.safetensors"
    path.write_bytes(content)
    refused(tmp_path, convert(path), str(path), "Try: ", *texts)


def test_every_cut_and_every_flipped_header_byte_is_an_error_of_ours(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    good = to_bytes({key: tensor[:2, :2] if tensor.ndim else tensor for key, tensor in lora().items()})
    path = tmp_path / "fuzzed.safetensors"
    for at in range(len(good)):
        path.write_bytes(good[:at])
        with pytest.raises(SurgeryError):
            read_safetensors(path)
    for at in random.integers(0, int.from_bytes(good[:8], "little") + 8, 400):
        broken = bytearray(good)
        broken[at] ^= int(random.integers(1, 256))
        path.write_bytes(broken)
        with suppress(SurgeryError):  # anything else is a traceback
            lorasurgery.load(path)


def test_missing_file_and_folders(tmp_path: Path) -> None:
    refused(tmp_path, convert(tmp_path / "absent.safetensors"), "absent.safetensors", "No such file")
    for suffix in ("", ".safetensors", ".pt"):
        folder = tmp_path / f"a{suffix}"
        folder.mkdir()
        refused(tmp_path, convert(folder), str(folder), "a folder", "adapter_config.json", "Try: ")


def test_peft_folder(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    config = folder / "adapter_config.json"
    weights = {
        f"base_model.model.layers.0.attention.to_q.lora_{s}.weight": t for s, t in zip("AB", lora().values(), strict=False)
    }
    config.write_text("{}")
    refused(tmp_path, convert(folder), str(folder), "neither adapter_model.safetensors nor adapter_model.bin", "Try: ")
    save(folder / "adapter_model.safetensors", weights)
    for text, expected in (
        ("{", "not readable JSON"),
        ("[]", "not a JSON object"),
        ('{"r": "many"}', "a rank or alpha that is none"),
        ('{"r": -4}', "a rank below 1"),
        ('{"r": 2, "alpha_pattern": {"(": 1}}', "a rank or alpha that is none"),
        ('{"r": 2, "rank_pattern": [1]}', "a rank or alpha that is none"),
        ('{"r": 2, "lora_alpha": 1e400}', "inf"),
    ):
        config.write_text(text)
        refused(tmp_path, convert(folder), str(folder), expected, "Try: ")
    config.write_text('{"r": 2, "lora_alpha": 4}')
    assert run(*convert(folder)).code == 0


# torch files --------------------------------------------------------------------------------------------------------------


class Evil:
    """What unpickling it would do."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return (eval, ("open('owned', 'w').close()",))


def test_torch_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.pt"
    for writer in ("zip", "pickle"):
        if writer == "zip":
            torch.save({"weight": Evil()}, bad)
        else:
            bad.write_bytes(pickle.dumps({"weight": Evil()}))
        line = refused(tmp_path, convert(bad), "bad.pt", "weights-only loader refuses it", "may run any code", ".safetensors")
        assert "weights_only=False" not in line
        assert "protocol" not in line  # torch's warning about how it was written
    assert not (tmp_path / "owned").exists()
    for name, content, text in (
        ("cut.pt", bad.read_bytes()[:200], "refuses it"),
        ("page.bin", b"<html>", "HTML page"),
        ("other.ckpt", b"GGUF" + b"\0" * 99, "GGUF"),
        ("noise.pt", b"\x80\x02" + b"\x99" * 99, "refuses it"),
        ("renamed.pt", GOOD, "rename it to .safetensors"),
        ("empty.pt", b"", "empty"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        refused(tmp_path, convert(path), name, text, "Try: ")
    for name, value in (("list.pt", [1]), ("numbers.pt", {"a": 1}), ("numbered.pt", {0: torch.zeros(1)})):
        torch.save(value, tmp_path / name)
        refused(tmp_path, convert(tmp_path / name), name, "no tensors by name", "Try: ")
    torch.save({"a.alpha": torch.zeros(2, 2).to_sparse()}, tmp_path / "sparse.pt")
    refused(tmp_path, convert(tmp_path / "sparse.pt"), "sparse.pt", "a.alpha is a torch.sparse_coo tensor", "Try: ")


def test_good_torch_file(tmp_path: Path) -> None:
    import torch

    tensors = {key: torch.from_numpy(array) for key, array in lora().items()}
    torch.save({"state_dict": tensors}, tmp_path / "good.pt")
    save(tmp_path / "good.safetensors", lora())
    for name in ("good.pt", "good.safetensors"):
        assert run("convert", tmp_path / name, tmp_path / f"{name}.out", "-t", "comfyui").code == 0
    first, second = (read_safetensors(tmp_path / f"good.{kind}.out").tensors for kind in ("pt", "safetensors"))
    assert {k: t.tobytes() for k, t in first.items()} == {k: t.tobytes() for k, t in second.items()}


def test_output_with_a_torch_suffix(tmp_path: Path) -> None:
    path = save(tmp_path / "in.safetensors", lora())
    refused(
        tmp_path, ("convert", path, tmp_path / "out.pt", "-t", "comfyui"), "out.pt", "PyTorch suffix", "out.safetensors", code=2
    )


# another kind of file -----------------------------------------------------------------------------------------------------

W = np.zeros((2, 2), "f2")
OTHERS: dict[str, tuple[list[str], str]] = {
    "SD checkpoint": (["model.diffusion_model.out.2.weight", "first_stage_model.encoder.conv_in.weight"], "whole checkpoint"),
    "ControlNet": (["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"], "a ControlNet"),
    "Diffusers ControlNet": (["controlnet_cond_embedding.conv_in.weight", "conv_in.weight"], "a ControlNet"),
    "Control-LoRA": (["lora_controlnet", "input_blocks.0.0.weight", "input_blocks.1.1.proj_in.up"], "a Control-LoRA"),
    "LLLite": (["lllite_unet_input_blocks_4_1.conditioning1.0.weight", "lllite_unet_input_blocks_4_1.down.0.weight"], "LLLite"),
    "LLLite, musubi": (["lllite_dit_blocks_0.up.weight", "lllite_dit_blocks_0.down.weight"], "LLLite"),
    "embedding": (["emb_params"], "embedding"),
    "SDXL embedding": (["clip_g", "clip_l"], "embedding"),
    "VAE": (["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"], "a VAE"),
    "IP-Adapter": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
    "IP-Adapter, FLUX": (["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], "an IP-Adapter"),
    "SVDQuant": (["transformer_blocks.0.attn.qweight", "transformer_blocks.0.attn.lora_down"], "SVDQuant"),
    "FLUX.1 checkpoint": (
        ["double_blocks.0.img_attn.norm.query_norm.scale", *(f"double_blocks.0.img_attn.{n}.weight" for n in "abc")],
        "a model's own weights: of its 4 keys only 1 end like an adapter's",
    ),
    "other weights": (["layers.0.attention.qkv.weight", "layers.0.attention.qkv.bias"], "a model's own weights"),
    "anything": (["x", "y"], "no LoRA-family adapter: of its 2 keys none ends like an adapter's (first: x)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_not_an_adapter(name: str, tmp_path: Path) -> None:
    keys, text = OTHERS[name]
    path = save(tmp_path / "other.safetensors", dict.fromkeys(keys, W))
    refused(tmp_path, convert(path), "other.safetensors", text, "Try: ")


def test_mangled_keys(tmp_path: Path) -> None:
    for key, expected in (
        ("lora_unet_unet_down_blocks_0_attn1_to_k_lora_down.weight", "lora_unet_down_blocks_0_attn1_to_k.lora_down.weight"),
        ("transformer.transformer.layers.0.to_q_lora_A", "transformer.layers.0.to_q.lora_A.weight"),
        ("lora_unet_layers_0_attention_to_q_lokr_w1", "lora_unet_layers_0_attention_to_q.lokr_w1"),
        ("layers.0.attention.to_q.lora.down.default.weight.x", "layers.0.attention.to_q.lora_down.weight"),
    ):
        path = save(tmp_path / "mangled.safetensors", {key: W})
        refused(tmp_path, convert(path), "mangled adapter keys", f"first {key}, expected {expected}", "Try: ")


# one module ---------------------------------------------------------------------------------------------------------------


def without(key: str) -> Arrays:
    return {k: t for k, t in lora().items() if k != key}


def changed(key: str, shape: tuple[int, ...], dtype: str = "f2") -> Arrays:
    return {**lora(), key: np.ones(shape, dtype)}


MODULES: dict[str, tuple[Arrays, list[str]]] = {
    "no up": (without(UP), [DOWN, "no up factor"]),
    "no down": (without(DOWN), [UP, "no down factor"]),
    "alpha alone": ({ALPHA: np.array(1, "f4")}, [ALPHA, "stands alone"]),
    "no hada_w2_b": ({k: t for k, t in loha().items() if "w2_b" not in k}, [TO_Q, "has no hada_w2_b"]),
    "no lokr_w2_b": ({k: t for k, t in lokr().items() if "w2_b" not in k}, [TO_Q, "has no lokr_w2_b"]),
    "ranks differ": (changed(UP, (DIM, 3)), [TO_Q, "up has rank 3 but down has 2"]),
    "a vector": (changed(UP, (DIM,)), [UP, "shape [3840]", "rows and columns"]),
    "a number": (changed(DOWN, ()), [DOWN, "shape []"]),
    "rank 0": (lora(rank=0), [DOWN, "shape [0, 3840]"]),
    "integers": (changed(UP, (DIM, 2), "i1"), [UP, "dtype I8", "floating-point"]),
    "wrong input": (
        {**lora(), **lora("lora_unet_layers_1_attention_to_q"), DOWN: np.ones((2, 3072), "f2")},
        [TO_Q, "[3840, 3072]", "Z-Image", "[3840, 3840]"],
    ),
    "two numbers for alpha": (changed(ALPHA, (2,), "f4"), [ALPHA, "shape [2]", "one number"]),
    "alpha NaN": (changed(ALPHA, (), "f4") | {ALPHA: np.array(np.nan, "f4")}, [ALPHA, "alpha of nan"]),
    "alpha infinite": ({**lora(), ALPHA: np.array(np.inf, "f2")}, [ALPHA, "alpha of inf"]),
    "alpha beyond reason": ({**lora(), ALPHA: np.array(1e300, "f8")}, [ALPHA, "1e+300"]),
    "alpha NaN of a difference": ({f"{TO_Q}.diff": np.zeros((DIM, DIM), "f2"), ALPHA: np.array(np.nan, "f4")}, [ALPHA, "nan"]),
    "a magnitude that fits nothing": (
        {**lora(), f"{TO_Q}.dora_scale": np.ones((7, 1), "f2")},
        ["dora_scale", "[7, 1]", "3840 rows"],
    ),
    "an empty magnitude": ({**lora(), f"{TO_Q}.dora_scale": np.ones((0, 1), "f2")}, ["dora_scale", "[0, 1]"]),
    "a bias that fits nothing": ({**lora(), f"{TO_Q}.diff_b": np.ones(7, "f2")}, [TO_Q, "bias", "7", "3840"]),
    "arms differ": (
        {**loha(), f"{TO_Q}.hada_w2_a": np.ones((DIM - 1, 2), "f2")},
        [TO_Q, "first arm", "[3840, 3840]", "[3839, 3840]"],
    ),
    "one core": ({**loha(), f"{TO_Q}.hada_t1": np.ones((DIM, 2, 1, 1), "f2")}, [TO_Q, "only one of hada_t1 and hada_t2"]),
    "two families": ({**lora(), **lokr()}, [TO_Q, "two families (lora and lokr)"]),
    "two adapters": (
        {f"base_model.model.layers.0.attention.to_q.lora_A.{name}.weight": W for name in ("default", "other")},
        ["lora_A.default.weight", "lora_A.other.weight", "two adapters"],
    ),
    "one weight spelled twice": (
        {**lora(), **dotted(lora())},
        [TO_Q, "diffusion_model.layers.0.attention.to_q", "same weight"],
    ),
    "whole and part": (
        {**lora(), **lora("diffusion_model.layers.0.attention.qkv", 3 * DIM)},
        [TO_Q, "diffusion_model.layers.0.attention.qkv", "both hold rows of layers.0.attention.qkv"],
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_broken_module(name: str, tmp_path: Path) -> None:
    tensors, texts = MODULES[name]
    path = save(tmp_path / "broken.safetensors", tensors)
    for target in ("comfyui", "sd-scripts", "diffusers"):
        refused(tmp_path, convert(path, target=target), "broken.safetensors", "Try: ", *texts)


def test_shape_that_fits_no_table(tmp_path: Path) -> None:
    path = save(tmp_path / "wide.safetensors", lora(out=4096, inp=4096))
    refused(tmp_path, convert(path), TO_Q, "[4096, 4096]", "[3840, 3840]", "--base MODEL")


def test_unknown_architecture(tmp_path: Path) -> None:
    path = save(tmp_path / "llama.safetensors", lora("base_model.model.model.layers.0.self_attn.q_proj", 64, 64))
    refused(tmp_path, convert(path), "base_model.model.model.layers.0.self_attn.q_proj", "--base MODEL")


def test_a_prefix_put_twice(tmp_path: Path) -> None:
    good = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    bad = good.replace("lora_unet_", "lora_unet_unet_")
    path = save(tmp_path / "twice.safetensors", lora(bad, 320, 320))
    refused(tmp_path, convert(path), bad, f"looks mangled, expected {good}", "Try: ")


def test_keys_that_fit_several_architectures(tmp_path: Path) -> None:
    """Nothing is guessed where the results would differ, and asked for nothing where they would not."""
    keys = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    path = save(tmp_path / "shared.safetensors", {k: t for key in keys for k, t in lora(key, 3072, 3072).items()})
    refused(tmp_path, convert(path), "shared.safetensors", "flux1-dev", "qwen-image", "equally well", "Try: --arch")
    for arch in ("flux1", "qwen-image"):
        assert run(*convert(path, "--arch", arch, "--force")).code == 0


def test_keys_cannot_talk_to_the_terminal(tmp_path: Path) -> None:
    path = save(tmp_path / "odd\nname.safetensors", lora("a\x1b[31m\nb"))
    line = refused(tmp_path, convert(path), r"odd\nname", r"a\x1b[31m\nb")
    assert line.isprintable()


# values -------------------------------------------------------------------------------------------------------------------


def spoiled(key: str, value: float, tensors: Arrays | None = None) -> Arrays:
    tensors = dict(tensors or lora())
    tensors[key] = tensors[key].copy()
    tensors[key][-1, -1] = value
    return tensors


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_computed_with(tmp_path: Path, value: float) -> None:
    path = save(tmp_path / "nan.safetensors", spoiled(UP, value, lora(alpha=3.1)))
    refused(tmp_path, convert(path, target="diffusers"), "nan.safetensors", f"{UP} holds NaN or infinity", "Try: ")
    refused(tmp_path, convert(path, "--alpha", "fold", target="peft"), UP, "holds NaN or infinity")
    refused(tmp_path, convert(path, "--dtype", "bf16"), UP, "holds NaN or infinity")
    refused(tmp_path, convert(path, "--dry-run", target="diffusers"), UP, "holds NaN or infinity")


def test_values_that_only_move(tmp_path: Path) -> None:
    path = save(tmp_path / "nan.safetensors", spoiled(DOWN, np.nan))
    refused(tmp_path, convert(path, "--strict", target="lycoris"), f"{DOWN} holds NaN or infinity", "Try: ")
    assert run(*convert(path, target="lycoris")).code == 0


def test_values_a_decomposition_needs(tmp_path: Path) -> None:
    key = f"{TO_Q}.lokr_w1"
    path = save(tmp_path / "nan.safetensors", spoiled(key, np.nan, lokr()))
    refused(
        tmp_path, convert(path, "--as", "lora", "--lokr-rank", 4, target="diffusers"), TO_Q, "w1 holds NaN or infinity", "Try: "
    )
    refused(tmp_path, convert(path, "--as", "lora", target="diffusers"), "lokr_w1 holds NaN or infinity")


def test_overflow_is_not_called_nan(tmp_path: Path) -> None:
    large = {key: (t.astype("f4") * 1e5 if t.ndim else t) for key, t in lora().items()}
    path = save(tmp_path / "large.safetensors", large)
    line = refused(tmp_path, convert(path, "--dtype", "fp16"), "large.safetensors", "F16", "--dtype")
    assert "input is finite" in line or "beyond the range of F16" in line
    assert run(*convert(path, "--dtype", "bf16")).code == 0
    strong = save(tmp_path / "strong.safetensors", lora(alpha=1e13))
    line = refused(tmp_path, ("convert", strong, tmp_path / "out", "-t", "other"), "strong.safetensors", "F16", "--dtype fp32")


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"])
def test_scan_sees_every_place_and_only_nan_and_infinity(dtype: str) -> None:
    kind = numpy_dtype(dtype)
    largest = (
        float(np.finfo(kind).max)
        if dtype in ("F64", "F32", "F16")
        else {"BF16": 3.38e38, "F8_E5M2": 57344.0, "F8_E4M3": 448.0}[dtype]
    )
    values = np.array([0, 1, -1, largest, -largest, 1e-5], "f8").astype(kind)
    values = np.resize(values, BLOCK // kind.itemsize * 2 + 3)
    assert all_finite(dtype, values.tobytes())
    bad = [np.nan, -np.nan] if dtype == "F8_E4M3" else [np.nan, np.inf, -np.inf]
    for place in (0, BLOCK // kind.itemsize, values.size - 1):
        for value in bad:
            spoilt = values.copy()
            spoilt[place] = value
            assert not all_finite(dtype, spoilt.tobytes())
    assert all_finite("I64", np.full(4, -1, "i8").tobytes())


def test_strict_scan_takes_little_memory(tmp_path: Path) -> None:
    path = save(
        tmp_path / "full.safetensors",
        {f"lora_unet_layers_{i}_feed_forward_w1.diff": np.zeros((10240, DIM), "f2") for i in range(2)},
    )
    code = (
        "import resource, sys; from lorasurgery.cli.app import app\n"
        "import numpy; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    args = convert(path, "--strict", target="lycoris")
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 24, "MiB above what numpy takes"


# what the target cannot hold ----------------------------------------------------------------------------------------------

DORA_IN = {**lora(), f"{TO_Q}.dora_scale": np.ones((1, DIM), "f2")}


@pytest.mark.parametrize(
    ("tensors", "target", "texts"),
    [
        (loha(), "diffusers", ["LoHa", "--as lora"]),
        ({**lora(), **lokr("lora_unet_layers_1_attention_to_q")}, "diffusers", ["LoKr alone", "--as lora", "--lokr-rank"]),
        ({f"{TO_Q}.diff": np.zeros((DIM, DIM), "f2")}, "diffusers", ["full-difference", "--as lora"]),
        ({"lora_unet_layers_0_attention_norm1.w_norm": np.zeros(DIM, "f2")}, "diffusers", ["norm", "--lossy"]),
        ({**lora(), "lora_unet_layers_0_attention_to_k.diff_b": np.zeros(DIM, "f2")}, "diffusers", ["a bias", "--lossy"]),
        (DORA_IN, "diffusers", ["magnitude", "per output row", "--lossy"]),
        ({**lora(), **loha("lora_unet_layers_1_attention_to_q")}, "peft", ["one type", "--as lora"]),
        ({f"{TO_Q}.oft_blocks": np.zeros((4, 960, 960), "f2")}, "diffusers", ["OFT", "--lossy"]),
    ],
)
def test_family_the_target_cannot_hold(tensors: Arrays, target: str, texts: list[str], tmp_path: Path) -> None:
    path = save(tmp_path / "family.safetensors", tensors)
    refused(tmp_path, convert(path, target=target), "family.safetensors", "lora_unet_layers_", "Try: ", *texts)


def test_nothing_left(tmp_path: Path) -> None:
    path = save(tmp_path / "norms.safetensors", {"lora_unet_layers_0_attention_norm1.w_norm": np.zeros(DIM, "f2")})
    refused(tmp_path, convert(path, "--lossy", target="diffusers"), "norms.safetensors", "nothing would be left", "Try: ")


def test_what_cannot_be_fused(tmp_path: Path) -> None:
    """Into FLUX.1's fused qkv, which sd-scripts has no split names for; ComfyUI reads those."""
    names = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    kronecker = {k: t for i, n in enumerate(names) for k, t in lokr(n, 3072, 3072, block=(48, 64, 32)[i]).items()}
    magnitude = {k: t for n in names for k, t in {**lora(n, 3072, 3072), f"{n}.dora_scale": np.ones((1, 3072), "f2")}.items()}
    for tensors, texts in (
        (kronecker, ["different Kronecker products", "--target comfyui", "--qkv fuse", "--lokr-rank"]),
        (magnitude, ["magnitudes per input column", "--lossy"]),
    ):
        path = save(tmp_path / "parts.safetensors", tensors)
        refused(tmp_path, convert(path, "--arch", "flux1", target="sd-scripts"), names[0], "parts.safetensors", *texts)
        assert run(*convert(path, "--arch", "flux1")).code == 0
        (tmp_path / "out.safetensors").unlink()


# outputs ------------------------------------------------------------------------------------------------------------------


def test_output_that_exists(tmp_path: Path) -> None:
    path = save(tmp_path / "in.safetensors", lora())
    (tmp_path / "out.safetensors").write_text("precious")
    refused(tmp_path, convert(path), "out.safetensors", "exists already", "--force")
    assert run(*convert(path, "--force")).code == 0
    assert (tmp_path / "out.safetensors").read_bytes()[8:9] == b"{"
    bad = save(tmp_path / "bad.safetensors", spoiled(UP, np.nan, lora(alpha=3.1)))
    (tmp_path / "out.safetensors").write_text("precious")
    refused(tmp_path, convert(bad, "--force", target="diffusers"), "NaN")


def test_output_that_is_the_input(tmp_path: Path) -> None:
    path = save(tmp_path / "in.safetensors", lora())
    (tmp_path / "symbolic.safetensors").symlink_to(path)
    (tmp_path / "hard.safetensors").hardlink_to(path)
    for name in ("in", "symbolic", "hard"):
        out = tmp_path / f"{name}.safetensors"
        refused(tmp_path, ("convert", path, out, "-t", "comfyui", "--force"), "the output is the input", "another name")
        refused(tmp_path, ("convert", out, path, "-t", "comfyui", "--force"), "the output is the input")


def test_output_inside_the_input_and_over_the_base(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", lora())
    folder = tmp_path / "peft"
    assert run("convert", source, folder, "-t", "peft").code == 0
    weights = folder / "adapter_model.safetensors"
    refused(tmp_path, ("convert", folder, weights, "-t", "comfyui", "--force"), "the output is the input")
    base = save(tmp_path / "base.safetensors", {"layers.0.attention.qkv.weight": np.zeros((2, 2), "f2")})
    refused(tmp_path, ("convert", source, base, "-t", "comfyui", "--force", "--base", base), "the output is the base model")


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", lora())
    for inside in ("models/checkpoint.safetensors", "models/deep/notes.txt"):
        (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / inside).write_text("precious")
        refused(
            tmp_path, ("convert", source, tmp_path / "models", "-t", "peft", "--force"), "models", "more than a PEFT adapter"
        )
        (tmp_path / inside).unlink()
    out = tmp_path / "adapter"
    for more in ((), ("--force",), ("--force", "--dtype", "fp32")):
        assert run("convert", source, out, "-t", "peft", *more).code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "in.safetensors", "models"]


# options ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--lokr-rank", "0"], ["rank must be at least 1"]),
        (["--energy", "2"], ["energy", "(0, 1]"]),
        (["--energy", "nan"], ["energy"]),
        (["--qkv", "maybe"], ["--qkv is auto, fuse or split"]),
        (["--dtype", "int4"], ["--dtype is keep, fp32, fp16 or bf16"]),
        (["--arch", "flux9"], ["flux9", "flux1"]),
        (["--alpha", "header"], ["ComfyUI", "--alpha keep or fold"]),
        (["--drop", "("], ["--drop (", "regular expression"]),
        (["--drop", "unet"], ["leaves nothing"]),
    ],
)
def test_bad_options(options: list[str], texts: list[str], tmp_path: Path) -> None:
    path = save(tmp_path / "in.safetensors", lora())
    refused(tmp_path, convert(path, *options), *texts, code=2)


def test_bad_target_and_usage(tmp_path: Path) -> None:
    path = save(tmp_path / "in.safetensors", lora())
    refused(tmp_path, convert(path, target="forge"), "no layout is called forge", "sd-scripts, diffusers, comfyui", code=2)
    for args, text in (
        (["convert", path, "out"], "--target"),
        (["convert", "-t", "comfyui"], "one input and one output"),
        (["convert", path, path, path, "-t", "comfyui"], "one input and one output"),
        (["convert", path, "out", "-t", "comfyui", "--as", "oft"], "lora, lokr, loha or full"),
        (["convert", path, "-o", "out", "--out-dir", "there", "-t", "comfyui"], "either --output or --out-dir"),
        (["convert", path, "out", "-t", "comfyui", "--lokr-rank", "many"], "many"),
        (["transmogrify"], "transmogrify"),
    ):
        outcome = run(*args)
        assert outcome.code == 2
        assert text in outcome.err


def test_as_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "page.safetensors"
    path.write_bytes(b"<!DOCTYPE html>")
    command = [sys.executable, "-m", "lorasurgery", "convert", str(path), str(tmp_path / "out"), "-t", "comfyui"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {path}: this is an HTML page, most likely an error page saved in place of the download."
        " Try: download it again, logged in\n"
    )
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_errors_carry_their_data(tmp_path: Path) -> None:
    path = save(tmp_path / "in.safetensors", without(UP))
    with pytest.raises(BrokenModuleError) as caught:
        lorasurgery.load(path)
    assert caught.value.key == DOWN
    assert caught.value.path == str(path)
    assert caught.value.hint
    assert json.dumps(str(caught.value))
