"""apply: single files, shards, folders and pipelines; what is copied, refused, and left behind by a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import DroppedKeysError, OutputExistsError, RequestError, UnknownArchitectureError
from lorasurgery.models import open_model
from lorasurgery.verbs.apply import ApplyOptions, ApplyReport, apply, read_source
from tests.applied import LINEAR1, PROJ, QKV, Added, Base, assert_nearest, numbers, read, stem
from tests.oracle import Raw, fixture, raw, write


def lora(folder: Path, *names: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A LoRA file for weights of the small FLUX.1, and its changes."""
    adapter = Added("BF16")
    deltas = {name: adapter.lora(stem(name), Base.make().weights[name].shape, 3, 2.0) for name in names}
    return adapter.save(folder / "lora.safetensors"), deltas


def alive(pid: int) -> bool:
    """Whether a process runs: it may be over and still wait for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run(
    model: Path, source: Path, out: Path, *, arch: str | None = None, force: bool = False, dry_run: bool = False, **how: object
) -> ApplyReport:
    """Apply at weight 1."""
    opened = open_model(model, arch=arch)
    options = ApplyOptions(**how)  # type: ignore[arg-type]
    return apply(opened, [read_source(source, opened.architecture)], out, options, force=force, dry_run=dry_run)


def sharded(folder: Path, tensors: dict[str, Raw], stem_of: str = "diffusion_pytorch_model") -> Path:
    """Three shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    names = list(tensors)
    for i in range(3):
        file = f"{stem_of}-{i + 1:05}-of-00003.safetensors"
        own = names[i::3]
        write(folder / file, {name: tensors[name] for name in own})
        where |= dict.fromkeys(own, file)
    index = folder / f"{stem_of}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": where}))
    return index


def pipeline(folder: Path, base: Base) -> Path:
    """A Diffusers pipeline: a sharded transformer, a text encoder, a VAE, and files of other kinds."""
    sharded(folder / "transformer", base.tensors("diffusers"))
    (folder / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    write(folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors", {"x": raw([1.0], "F16")})
    (folder / "vae").mkdir()
    write(folder / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.conv_in.weight": raw(np.ones((2, 2, 1, 1)), "F32")})
    (folder / "text_encoder").mkdir()
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    clip = raw(np.random.default_rng(4).standard_normal((768, 768)) * 0.05, "F16")
    write(folder / "text_encoder" / "model.safetensors", {f"{layer}.weight": clip, f"{layer}.bias": raw(np.ones(768), "F16")})
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("x")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_shards_keep_their_names_and_untouched_ones_their_bytes(tmp_path: Path) -> None:
    base = Base.make("BF16")
    index = sharded(tmp_path / "model", base.tensors("comfyui"), "model")
    source, deltas = lora(tmp_path, PROJ)
    run(index, source, tmp_path / "out")
    before, after = files(tmp_path / "model"), files(tmp_path / "out")
    assert list(before) == list(after)
    changed = [name for name in before if before[name] != after[name]]
    assert len(changed) == 1
    where = json.loads(index.read_text())["weight_map"]
    key = f"diffusion_model.{PROJ}.weight"
    assert changed == [where[key]]
    assert_nearest(read(tmp_path / "out" / changed[0])[key], base.weights[PROJ] + deltas[PROJ])
    assert open_model(tmp_path / "out").layout == "comfyui"


def test_a_pipeline_is_written_with_everything_beside_the_weights(tmp_path: Path) -> None:
    base = Base.make("BF16")
    folder = pipeline(tmp_path / "model", base)
    adapter = Added("F32")
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    qkv = adapter.lora(stem(QKV), (72, 24), 3, 2.0)
    te = adapter.lora(f"lora_te1_{layer.replace('.', '_')}", (768, 768), 2, 1.0)
    bias = adapter.put(f"lora_te1_{layer.replace('.', '_')}.diff_b", 768)
    report = run(folder, adapter.save(tmp_path / "lora.safetensors"), tmp_path / "out")
    before, after = files(folder), files(tmp_path / "out")
    variant = "transformer/diffusion_pytorch_model.fp16.safetensors"
    assert set(after) == set(before) - {variant, ".cache/junk"}
    assert report.left_out == [(variant, "another version of weights that change")]
    assert after["vae/diffusion_pytorch_model.safetensors"] == before["vae/diffusion_pytorch_model.safetensors"]
    assert after["model_index.json"] == before["model_index.json"]
    own = read(tmp_path / "out" / "text_encoder" / "model.safetensors")
    was = read(folder / "text_encoder" / "model.safetensors")
    assert_nearest(own[f"{layer}.weight"], numbers(was[f"{layer}.weight"]) + te)
    assert_nearest(own[f"{layer}.bias"], numbers(was[f"{layer}.bias"]) + bias)
    parts: dict[str, Raw] = {}
    for shard in sorted((tmp_path / "out" / "transformer").glob("*.safetensors")):
        parts |= read(shard)
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        rows = slice(24 * i, 24 * i + 24)
        assert_nearest(parts[f"transformer_blocks.0.attn.{name}.weight"], base.weights[QKV][rows] + qkv[rows])
    assert report.unmatched == []


def test_fused_text_encoder_weights_take_split_modules(tmp_path: Path) -> None:
    """OpenCLIP's in_proj_weight holds q, k and v, its bias likewise; Tucker and flat convolutions stand beside it."""
    rng = np.random.default_rng(0)
    prefix = "conditioner.embedders.1.model.transformer.resblocks.3.attn"
    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2"
    base = {
        f"{prefix}.in_proj_weight": raw(rng.standard_normal((3840, 1280)) * 0.02, "F16"),
        f"{prefix}.in_proj_bias": raw(rng.standard_normal(3840), "F16"),
        f"{conv}.weight": raw(rng.standard_normal((320, 320, 3, 3)) * 0.02, "F16"),
        "model.diffusion_model.input_blocks.0.0.weight": raw(rng.standard_normal((320, 4, 3, 3)), "F16"),
    }
    write(tmp_path / "m.safetensors", base)
    adapter = Added("F32", size=0.05)
    te = "lora_te2_text_model_encoder_layers_3_self_attn"
    k = adapter.lora(f"{te}_k_proj", (1280, 1280), 2, 1.0)
    bias = adapter.put(f"{te}_v_proj.diff_b", 1280)
    up, down = adapter.put("lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight", 320, 4, 1, 1), None
    down = adapter.put("lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight", 4, 320, 1, 1)
    mid = adapter.put("lora_unet_input_blocks_1_0_in_layers_2.lora_mid.weight", 4, 4, 3, 3)
    flat = adapter.lora("lora_unet_input_blocks_0_0", (320, 36), 3, 2.0)
    adapter.save(tmp_path / "lora.safetensors")
    report = run(tmp_path / "m.safetensors", tmp_path / "lora.safetensors", tmp_path / "o.safetensors", arch="sdxl")
    assert report.unmatched == []
    after = read(tmp_path / "o.safetensors")
    fused = numbers(base[f"{prefix}.in_proj_weight"])
    fused[1280:2560] += k
    assert_nearest(after[f"{prefix}.in_proj_weight"], fused)
    biases = numbers(base[f"{prefix}.in_proj_bias"])
    biases[2560:] += bias
    assert_nearest(after[f"{prefix}.in_proj_bias"], biases)
    tucker = np.einsum("ijkl,pi,jr->prkl", mid, up[:, :, 0, 0], down[:, :, 0, 0])
    assert_nearest(after[f"{conv}.weight"], numbers(base[f"{conv}.weight"]) + tucker)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    assert_nearest(after[first], numbers(base[first]) + flat.reshape(320, 4, 3, 3))


def test_a_pytorch_file_becomes_safetensors(tmp_path: Path) -> None:
    import torch

    base = Base.make("F32")
    state = {key: torch.from_numpy(numbers(t).astype("f4")) for key, t in base.tensors("all-in-one").items()}
    torch.save({"state_dict": state}, tmp_path / "m.ckpt")
    source, deltas = lora(tmp_path, PROJ)
    run(tmp_path / "m.ckpt", source, tmp_path / "o.safetensors")
    after = read(tmp_path / "o.safetensors")
    assert_nearest(after[f"model.diffusion_model.{PROJ}.weight"], base.weights[PROJ] + deltas[PROJ])
    assert (numbers(after[f"model.diffusion_model.{QKV}.weight"]) == base.weights[QKV]).all()
    with pytest.raises(RequestError, match="safetensors"):
        run(tmp_path / "m.ckpt", source, tmp_path / "o.ckpt")


def test_gguf_is_refused_with_advice(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "flux")
    base = Base.make("F32")
    for key, tensor in base.tensors("original").items():
        writer.add_tensor(key, numbers(tensor).astype("f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source, _ = lora(tmp_path, PROJ)
    with pytest.raises(RequestError, match="GGUF") as caught:
        run(tmp_path / "m.gguf", source, tmp_path / "o.safetensors")
    assert "bf16" in str(caught.value.hint)


def test_an_existing_output_is_replaced_only_by_force_and_the_input_never(tmp_path: Path) -> None:
    path = Base.make("BF16").save(tmp_path / "m.safetensors")
    source, _ = lora(tmp_path, PROJ)
    out = tmp_path / "o.safetensors"
    out.write_bytes(b"mine")
    before = path.read_bytes()
    with pytest.raises(OutputExistsError):
        run(path, source, out)
    assert out.read_bytes() == b"mine"
    run(path, source, out, force=True)
    assert len(out.read_bytes()) > 1000
    for force in (False, True):
        for own in (path, source):
            with pytest.raises(OutputExistsError):
                run(path, source, own, force=force)
    assert path.read_bytes() == before


def test_a_folder_is_replaced_only_by_force_and_only_a_model(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model", Base.make("BF16"))
    source, _ = lora(tmp_path, PROJ)
    out = tmp_path / "out"
    run(folder, source, out)
    first = files(out)
    with pytest.raises(OutputExistsError):
        run(folder, source, out)
    run(folder, source, out, force=True)
    assert files(out) == first
    (out / "diary.txt").write_text("mine")
    for place in (out, folder, folder / "inside", tmp_path):
        with pytest.raises(OutputExistsError):
            run(folder, source, place, force=True)
    assert (out / "diary.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora.safetensors", "model", "out"]


def test_a_dry_run_writes_nothing_and_measures(tmp_path: Path) -> None:
    path = Base.make("BF16").save(tmp_path / "m.safetensors")
    source, _ = lora(tmp_path, PROJ, QKV)
    dry = run(path, source, tmp_path / "o.safetensors", dry_run=True)
    assert not (tmp_path / "o.safetensors").exists()
    assert not dry.written
    wet = run(path, source, tmp_path / "o.safetensors")
    assert dry.total.relative_change == pytest.approx(wet.total.relative_change)
    assert dry.total.relative_loss == pytest.approx(wet.total.relative_loss)


def test_strict_fails_for_a_key_that_matches_nothing(tmp_path: Path) -> None:
    path = Base.make("BF16").save(tmp_path / "m.safetensors")
    adapter = Added()
    adapter.lora(stem(PROJ), (24, 24), 2, None)
    adapter.lora(stem("double_blocks.5.img_attn.proj"), (24, 24), 2, None)
    source = adapter.save(tmp_path / "lora.safetensors")
    with pytest.raises(DroppedKeysError) as caught:
        run(path, source, tmp_path / "o.safetensors", strict=True)
    assert set(caught.value.keys) == {key for key in adapter.tensors if "_5_" in key}
    assert not (tmp_path / "o.safetensors").exists()


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    path = Base.make("BF16").save(tmp_path / "m.safetensors")
    shapes = fixture("sdxl")["comfyui"]
    adapter = Added("F16")
    for name in [n for n in shapes if "attn1.to_q" in n][:3]:
        adapter.lora(stem(name), tuple(shapes[name]), 1, None)
    with pytest.raises((UnknownArchitectureError, RequestError)):
        run(path, adapter.save(tmp_path / "lora.safetensors"), tmp_path / "o.safetensors")


def test_verify_finds_a_value_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Base.make("BF16").save(tmp_path / "m.safetensors")
    source, _ = lora(tmp_path, PROJ, LINEAR1)
    good = run(path, source, tmp_path / "o.safetensors", verify=True)
    assert {own.tensor for own in good.verified} == {f"{PROJ}.weight", f"{LINEAR1}.weight"}
    assert sum(own.wrong for own in good.verified) == 0
    own = LowRank.flat_factors
    monkeypatch.setattr(LowRank, "flat_factors", lambda delta, work, by=1.0: own(delta, work, by * 1.1))
    bad = run(path, source, tmp_path / "o.safetensors", verify=True, force=True)
    assert sum(own.wrong for own in bad.verified) > 100
    monkeypatch.setattr("lorasurgery.verbs.apply.verify.expected", lambda _placed, weight, *_: weight * np.nan)
    assert all(own.wrong == own.values for own in run(path, source, tmp_path / "q.safetensors", verify=True).verified)


@pytest.mark.parametrize("kind", ["ia3_l", "ia3_l in", "oft_R"])
def test_verify_knows_pefts_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path, adapter = Base.make("BF16").save(tmp_path / "m.safetensors"), Added("F32", size=0.1)
    module, slot = f"base_model.model.{QKV}", kind.removesuffix(" in")
    if slot == "oft_R":
        adapter.put(f"{module}.oft_R.weight", 6, 6)
    else:
        adapter.put(f"{module}.{slot}", *((1, 24) if kind.endswith("in") else (72, 1)), at=1.0)
    source = adapter.save(tmp_path / "a.safetensors")
    good = run(path, source, tmp_path / "o.safetensors", verify=True)
    bias = {f"{QKV}.bias"} if kind == "ia3_l" else set()  # it multiplies the layer's outputs
    assert {own.tensor for own in good.verified if not own.wrong} == {f"{QKV}.weight"} | bias
    monkeypatch.setattr("lorasurgery.verbs.apply.verify.expected", lambda _placed, weight, *_: weight)
    found = run(path, source, tmp_path / "p.safetensors", verify=True).verified
    assert next(own for own in found if own.tensor == f"{QKV}.weight").wrong > 100


def test_a_failed_write_names_the_output_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Base.make("BF16").save(tmp_path / "m.safetensors")
    source, _ = lora(tmp_path, PROJ, LINEAR1)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lorasurgery.verbs.apply.output.Output.write", full)
    with pytest.raises(OSError, match=r"o\.safetensors") as caught:
        run(path, source, tmp_path / "o.safetensors")
    assert caught.value.errno == errno.ENOSPC
    assert sorted(own.name for own in tmp_path.iterdir()) == ["lora.safetensors", "m.safetensors"]


def test_threads_that_have_to_seek_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, which has no pwrite: the copies and every thread move one position in the file."""
    path = Base.make("BF16").save(tmp_path / "m.safetensors")
    source, _ = lora(tmp_path, PROJ, LINEAR1, QKV)
    run(path, source, tmp_path / "usual.safetensors")
    seek = os.lseek

    def slow(*own: int) -> int:
        found = seek(*own)
        time.sleep(0.002)
        return found

    monkeypatch.delattr(os, "pwrite")
    monkeypatch.setattr(os, "lseek", slow)
    run(path, source, tmp_path / "seeking.safetensors", workers=3)
    assert (tmp_path / "seeking.safetensors").read_bytes() == (tmp_path / "usual.safetensors").read_bytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals")
@pytest.mark.parametrize("least", [0, 1 << 40], ids=["processes", "threads"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_kill_in_the_middle_leaves_no_output_and_no_process(tmp_path: Path, number: signal.Signals, least: int) -> None:
    base = Base.make("BF16")
    rng = np.random.default_rng(0)
    base.extra = {"filler": raw(rng.standard_normal((64, 64)), "F32")}
    path = base.save(tmp_path / "m.safetensors")
    source, _ = lora(tmp_path, PROJ)
    out = tmp_path / "o" / "o.safetensors"
    out.parent.mkdir()
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests in the background inherit that it is ignored
        "import numpy as np\n"
        "from lorasurgery.verbs.apply import forks, produce, writing\n"
        "def slow(self, change, put, put_scale):\n"
        "    print('begun', os.getpid(), flush=True)\n"
        "    for _ in range(600):\n"
        "        time.sleep(0.05)\n"
        "        put(0, np.zeros((1, change.shape[1]), np.uint16))\n"
        "produce.Producer._make = slow\n"
        f"writing.WORTH, forks.STEP = {least}, 0\n"
        "from lorasurgery.cli.app import main\n"
        f"sys.argv = ['lorasurgery', 'apply', {str(path)!r}, {str(source)!r}, '-o', {str(out)!r}]\n"
        "main()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    with child:
        assert child.stdout is not None
        begun, pid = child.stdout.readline().split()
        assert begun == b"begun"
        assert (int(pid) != child.pid) == (least == 0 and sys.platform == "linux")
        if number == signal.SIGINT:
            os.killpg(child.pid, number)  # as the terminal does
        else:
            child.send_signal(number)
        assert child.wait(timeout=20) != 0
        assert child.stderr is not None
        assert b"Process" not in child.stderr.read()
    until = time.monotonic() + 20
    while alive(int(pid)):
        assert time.monotonic() < until
        time.sleep(0.05)
    left = [p.name for p in out.parent.iterdir()]
    assert left == [] if number != signal.SIGKILL else all(name.startswith(".o.safetensors.") for name in left)
