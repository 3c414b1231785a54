"""GGUF models that the gguf library's own writer made."""

import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import gguf
import numpy as np
import pytest

from lorasurgery.architectures.table import Span
from lorasurgery.errors import FileFormatError, RequestError
from lorasurgery.models import open_model
from tests.models.small import original_arrays, save, save_gguf
from tests.oracle import raw, write

KEY = "z-image"
WIDE = "layers.0.feed_forward.w2"
"""Its rows are 256 numbers or a few blocks long."""


def arrays():
    """A Z-Image whose feed-forward is wide enough for K-quants."""
    rng = np.random.default_rng(1)
    found = dict(original_arrays(KEY))
    for block in {name.rsplit(".feed_forward", 1)[0] for name in found if ".feed_forward." in name}:
        found[f"{block}.feed_forward.w1.weight"] = rng.standard_normal((256, 48)).astype(np.float32)
        found[f"{block}.feed_forward.w3.weight"] = rng.standard_normal((256, 48)).astype(np.float32)
        found[f"{block}.feed_forward.w2.weight"] = rng.standard_normal((48, 256)).astype(np.float32)
    return found


def written(path, tensors, kind, *, prefix="", big_endian=False):
    """A GGUF file; matrices whose rows are whole blocks are quantised, the rest stays float32. Returns what it holds."""
    held, stored = {}, {}
    for name, values in tensors.items():
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if values.ndim == 2 and values.shape[1] % block == 0:
            data = gguf.quants.quantize(values, kind)
            stored[prefix + name] = (data, kind)
            held[name] = gguf.quants.dequantize(data, kind)
        else:
            stored[prefix + name] = values
            held[name] = values
    save_gguf(path, stored, big_endian=big_endian)
    return held


TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "TQ2_0")
"""The kinds that the library can write; TQ2_0 has 256 numbers to a block, as the K-quants have."""


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_gguf_model_is_read_as_its_dequantised_self(tmp_path, kind, prefix):
    kind = gguf.GGMLQuantizationType[kind]
    held = written(tmp_path / "a.gguf", arrays(), kind, prefix=prefix)
    model = open_model(tmp_path / "a.gguf")
    same = open_model(save(tmp_path / "b.safetensors", held))
    assert (model.architecture.id, model.layout) == (KEY, "comfyui" if prefix else "original")
    assert set(model.sites()) == set(same.sites())
    for name, values in held.items():
        weight = model.weights[prefix + name]
        assert weight.shape == values.shape
        assert np.array_equal(weight.array(), values)
    for component, spans in same.sites():
        assert np.array_equal(model.reader(component, spans).rows(), same.reader(component, spans).rows())
    assert model.content != same.content


def test_a_k_quant_is_dequantised_as_the_library_does_it(tmp_path):
    rng = np.random.default_rng(2)
    kind = gguf.GGMLQuantizationType.Q4_K
    blocks = rng.integers(0, 256, (48, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    blocks[:, :4] = np.frombuffer(np.array([0.5, 0.25], np.float16).tobytes(), np.uint8)  # finite scales
    save_gguf(tmp_path / "a.gguf", arrays() | {f"{WIDE}.weight": (blocks, kind)})
    reader = open_model(tmp_path / "a.gguf").reader("denoiser", (Span(WIDE, 3, 40), Span(WIDE, 0, 3)))
    expected = gguf.quants.dequantize(blocks, kind)[[*range(3, 40), 0, 1, 2]]
    assert reader.dtype == "F32"
    assert np.array_equal(reader.rows(), expected)
    with ThreadPoolExecutor(4) as pool:
        for at, rows in pool.map(lambda at: (at, reader.rows(at, at + 2)), range(38)):
            assert np.array_equal(rows, expected[at : at + 2])


def test_a_flattened_convolution_has_its_shape_in_the_metadata(tmp_path):
    rng = np.random.default_rng(2)
    values = rng.standard_normal((6, 4, 1, 2, 2)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    data = gguf.quants.quantize(values.reshape(3, 32), kind)
    shapes = {"patch_embedding.weight": values.shape}
    save_gguf(tmp_path / "a.gguf", {"patch_embedding.weight": (data, kind)}, shapes=shapes)
    weight = open_model(tmp_path / "a.gguf").weights["patch_embedding.weight"]
    expected = gguf.quants.dequantize(data, kind).reshape(values.shape)
    assert np.array_equal(weight.array(), expected)
    for start, stop in combinations(range(7), 2):  # a row of 16 numbers is half a block
        assert np.array_equal(weight.rows(start, stop), expected[start:stop].reshape(stop - start, 16))


def test_broken_files(tmp_path):
    path = tmp_path / "a.gguf"
    written(path, arrays(), gguf.GGMLQuantizationType.Q8_0)
    whole = path.read_bytes()
    for length in (3, 20, 400, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"no GGUF file|cannot read it|truncated"):
            open_model(path)
    write(path, {"x.weight": raw(np.ones((2, 2)), "F32")})
    with pytest.raises(FileFormatError, match="no GGUF file"):
        open_model(path)
    written(path, arrays(), gguf.GGMLQuantizationType.F32, big_endian=True)
    with pytest.raises(FileFormatError, match="byte order"):
        open_model(path)


def test_without_the_library_the_command_is_named(tmp_path, monkeypatch):
    written(tmp_path / "a.gguf", arrays(), gguf.GGMLQuantizationType.F16)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RequestError, match="gguf library, which is not installed") as caught:
        open_model(tmp_path / "a.gguf")
    assert caught.value.hint == "pip install gguf"
