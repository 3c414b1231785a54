"""Other ranks from DyLoRA and other nested files, against dense float64 products made from the bytes."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorasurgery.errors import BrokenModuleError, NotAnAdapterError, RequestError
from lorasurgery.io.header import read_safetensors
from lorasurgery.linalg.prefix import falling_share, order_score, prefix_curve, tucker_curve
from lorasurgery.linalg.tucker import truncate_tucker
from lorasurgery.verbs.rerank.nested import origin
from lorasurgery.verbs.rerank.rerank import Request, open_nested, rerank
from tests.edges import run
from tests.oracle import Raw, raw, read, write

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

FIXTURE = Path(__file__).parent / "fixtures" / "producers" / "lycoris_dylora.safetensors"
DYLORA = {
    "ss_network_module": "networks.dylora",
    "ss_network_dim": "8",
    "ss_network_alpha": "3.0",
    "ss_network_args": '{"unit": "2", "conv_dim": "8"}',
    "ss_training_comment": "cats",
}
RANK, ALPHA = 8, 3.0
EPSILON = {"BF16": 2.0**-8, "F16": 2.0**-10, "F32": 2.0**-22}


def made(dtype: str = "F16", *, decay: float = 0.7, seed: int = 0) -> dict[str, Raw]:
    """A linear layer, a convolution and a Tucker one of a model that no table knows, in falling order."""
    rng = np.random.default_rng(seed)
    fall = decay ** np.arange(RANK)
    shapes = {"lora_unet_odd_linear": (24, 20), "lora_unet_odd_conv": (12, 10, 3, 3), "lora_unet_odd_tucker": (14, 9, 3, 3)}
    tensors = {}
    for stem, (out, inside, *kernel) in shapes.items():
        ones = [1] * len(kernel)
        up = rng.standard_normal((out, RANK, *ones)) * fall.reshape(1, RANK, *ones)
        down = rng.standard_normal((RANK, inside, *(ones if "tucker" in stem else kernel)))
        tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"] = raw(up, dtype), raw(down, dtype)
        if "tucker" in stem:
            tensors[f"{stem}.lora_mid.weight"] = raw(rng.standard_normal((RANK, RANK, *kernel)), dtype)
        tensors[f"{stem}.alpha"] = raw(ALPHA, dtype)
    return tensors


def product(tensors: dict[str, Raw], stem: str) -> Array:
    """The change without its scale, (out, in*k*k)."""
    up, down = (tensors[f"{stem}.lora_{side}.weight"].f64() for side in ("up", "down"))
    up, flat = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)
    if f"{stem}.lora_mid.weight" not in tensors:
        return up @ flat
    whole: Array = np.einsum("ijkl,pi,jr->prkl", tensors[f"{stem}.lora_mid.weight"].f64(), up, flat)
    return whole.reshape(len(up), -1)


def stems(tensors: dict[str, Raw]) -> list[str]:
    return [key.removesuffix(".lora_up.weight") for key in tensors if key.endswith(".lora_up.weight")]


def scale(tensors: dict[str, Raw], stem: str) -> float:
    return tensors[f"{stem}.alpha"].item() / tensors[f"{stem}.lora_down.weight"].shape[0]


def relative(old: dict[str, Raw], new: dict[str, Raw]) -> float:
    """The error at the old file's strength over all modules."""
    pairs = [(scale(old, s) * product(old, s), scale(old, s) * product(new, s)) for s in stems(old)]
    return math.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(a**2) for a, _ in pairs))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write(tmp_path / "dylora.safetensors", made(), DYLORA)
    return tmp_path / "dylora.safetensors"


def rerun(*args: object) -> dict[str, Any]:
    outcome = run("rerank", *args, "--json")
    assert outcome.code == 0, outcome.err
    report: dict[str, Any] = json.loads(outcome.out)
    return report


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_prefix_is_byte_for_byte(dtype: str, rank: int, tmp_path: Path) -> None:
    old = made(dtype)
    write(tmp_path / "in.safetensors", old, DYLORA)
    report = rerun(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--rank", rank)["outputs"][0]
    new, metadata = read(tmp_path / "out.safetensors")
    for key, tensor in old.items():
        wanted = tensor.f64()
        if "down" in key:
            wanted = wanted[:rank]
        elif "up" in key:
            wanted = wanted[:, :rank]
        elif "mid" in key:
            wanted = wanted[:rank, :rank]
        assert new[key].dtype == dtype
        assert new[key].shape == wanted.shape
        assert np.array_equal(new[key].f64(), wanted)
    assert new.keys() == old.keys()
    assert report["error"] == pytest.approx(relative(old, new), rel=1e-6, abs=1e-7)
    assert metadata["ss_network_dim"] == str(rank)
    assert metadata["ss_network_alpha"] == "3.0"


def test_names_and_metadata_as_sd_scripts_writes_them(source: Path, tmp_path: Path) -> None:
    report = rerun("--model", source, "--unit", 3, "--save_to", tmp_path / "sub" / "cat.safetensors")
    names = ["cat-0003.safetensors", "cat-0006.safetensors", "cat-0008.safetensors"]
    assert [Path(out["output"]).name for out in report["outputs"]] == names
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == names
    _, metadata = read(tmp_path / "sub" / names[0])
    assert metadata["ss_training_comment"] == "split from DyLoRA, rank 8 to 3; cats"
    assert metadata["ss_network_dim"] == "3"
    assert json.loads(metadata["ss_network_args"]) == {"unit": "2", "conv_dim": "3"}
    assert metadata["ss_network_module"] == "networks.dylora"
    data = (tmp_path / "sub" / names[0]).read_bytes()
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    whole, metadata = read(tmp_path / "sub" / names[2])
    assert whole == made()
    assert metadata["ss_training_comment"] == "cats"


@pytest.mark.parametrize("policy", ["keep", "kohya", "rescale", "lycoris", "scale"])
def test_alpha_and_strength(policy: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    report = rerun(source, out, "--rank", 2, "--alpha", policy)
    (strength,) = report["outputs"][0]["strength"]
    wanted = {"keep": 3.0, "kohya": 3.0, "rescale": 3 * math.sqrt(2 / 8), "lycoris": 6.0, "scale": 3 * 2 / 8}[policy]
    new, metadata = read(out)
    assert {new[f"{stem}.alpha"].item() for stem in stems(new)} == {wanted}
    assert float(metadata["ss_network_alpha"]) == pytest.approx(wanted)
    assert strength["file"] == ALPHA / 8
    assert strength["written"] == pytest.approx(wanted / 2)
    assert strength["trained"] == pytest.approx(ALPHA / 8 * math.sqrt(8 / 2))  # networks/dylora.py: scale * sqrt(R / r)
    assert report["alpha"] == ("keep" if policy == "kohya" else policy)
    if policy == "scale":
        assert new["lora_unet_odd_linear.alpha"].dtype == "F32"


def test_lycoris_file_is_known_and_its_strength(tmp_path: Path) -> None:
    report = rerun(FIXTURE, tmp_path / "out.safetensors", "--all", "--alpha", "lycoris")
    assert (report["kind"], report["trainer"], report["unit"], report["rank"]) == ("dylora", "LyCORIS", 2, 4)
    assert all("inside a unit" not in note for out in report["outputs"] for note in out["notes"])
    split = rerun(FIXTURE, "--rank", 3, "--dry-run")["outputs"][0]
    assert split["notes"] == ["rank 3 ends inside a unit of 2 components, which were trained together"]
    assert [out["rank"] for out in report["outputs"]] == [2, 4]
    old, _ = read(FIXTURE)
    new, _ = read(tmp_path / "out-0002.safetensors")
    for stem in stems(old):  # modules/dylora.py: alpha / number of blocks
        assert scale(new, stem) == pytest.approx(old[f"{stem}.alpha"].item() / (2 // 2))
        assert new[f"{stem}.lora_up.weight"].shape[1] == new[f"{stem}.lora_down.weight"].shape[0] == 2
    kept = rerun(FIXTURE, tmp_path / "kept.safetensors", "--rank", 2)["outputs"][0]["strength"]
    assert all(one["written"] / one["trained"] == pytest.approx(0.5) for one in kept)
    assert sum(one["modules"] for one in kept) == 5
    new, _ = read(tmp_path / "kept.safetensors")
    assert {t.dtype for k, t in new.items() if k.endswith("to_q.alpha")} == {"I64"}


@pytest.mark.parametrize("dtype", EPSILON)
def test_svd_is_the_optimum_at_the_files_strength(dtype: str, tmp_path: Path) -> None:
    old = {k: t for k, t in made(dtype, decay=1.0).items() if "tucker" not in k}
    write(tmp_path / "in.safetensors", old, DYLORA)
    report = rerun(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--rank", 4, "--svd")["outputs"][0]
    new, metadata = read(tmp_path / "out.safetensors")
    lost = norm = 0.0
    for stem in stems(old):
        values = np.linalg.svd(product(old, stem), compute_uv=False)
        lost, norm = lost + scale(old, stem) ** 2 * np.sum(values[4:] ** 2), norm + scale(old, stem) ** 2 * np.sum(values**2)
        assert scale(new, stem) == pytest.approx(scale(old, stem), rel=1e-6)
        assert new[f"{stem}.lora_up.weight"].shape[2:] == old[f"{stem}.lora_up.weight"].shape[2:]
    assert relative(old, new) == pytest.approx(math.sqrt(lost / norm), abs=4 * EPSILON[dtype])
    assert report["error"] == pytest.approx(relative(old, new), rel=1e-6)
    assert report["best_error"] == pytest.approx(math.sqrt(lost / norm), rel=1e-6)
    assert metadata["ss_training_comment"] == "dimension is resized from 8 to 4; cats"
    assert float(metadata["ss_network_alpha"]) == pytest.approx(1.5)


def test_svd_of_a_tucker_core_stays_one_and_beats_the_prefix(tmp_path: Path) -> None:
    old = {k: t for k, t in made("F32", decay=1.0).items() if "tucker" in k}
    write(tmp_path / "in.safetensors", old)
    first = rerun(tmp_path / "in.safetensors", tmp_path / "a.safetensors", "--rank", 3)["outputs"][0]
    best = rerun(tmp_path / "in.safetensors", tmp_path / "b.safetensors", "--rank", 3, "--svd")["outputs"][0]
    new, _ = read(tmp_path / "b.safetensors")
    (stem,) = stems(old)
    assert new[f"{stem}.lora_mid.weight"].shape == (3, 3, 3, 3)
    assert best["error"] == pytest.approx(relative(old, new), rel=1e-5)
    assert best["error"] < first["error"]
    whole = product(old, stem)
    side = np.linalg.svd(whole, compute_uv=False)
    assert best["error"] >= math.sqrt(np.sum(side[3:] ** 2) / np.sum(side**2)) - 1e-7
    assert best["error"] <= best["best_error"] + 1e-6


def test_best_is_the_smallest_rank_that_meets_the_bound(source: Path, tmp_path: Path) -> None:
    old, _ = read(source)
    errors = {}
    for rank in range(1, 9):
        rerun(source, tmp_path / "r.safetensors", "--rank", rank, "--force")
        errors[rank] = relative(old, read(tmp_path / "r.safetensors")[0])
    for bound in (0.9, 0.3, 0.1, 0.0):
        report = rerun(source, "--best", "--error", bound, "--unit", 1, "--dry-run")
        assert report["outputs"][0]["rank"] == min(r for r, e in errors.items() if e <= bound + 1e-9)
    energy = rerun(source, "--best", "--energy", 0.9, "--dry-run")["outputs"][0]["rank"]
    assert energy == min(r for r, e in errors.items() if r % 2 == 0 and 1 - e**2 >= 0.9)


def test_kinds(tmp_path: Path) -> None:
    def kind(tensors: dict[str, Raw], metadata: dict[str, str]) -> str:
        write(tmp_path / "k.safetensors", tensors, metadata)
        return open_nested(read_safetensors(tmp_path / "k.safetensors")).verdict[0]

    plain = {"ss_network_module": "networks.lora"}
    assert kind(made(), DYLORA) == "dylora"
    assert kind(made(), {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "dylora"}'}) == "dylora"
    many: dict[str, Raw] = {}
    falling: dict[str, Raw] = {}
    for i in range(12):
        many |= {k.replace("odd", f"odd_{i}"): t for k, t in made(decay=1.0, seed=i).items()}
        falling |= {k.replace("odd", f"odd_{i}"): t for k, t in made(decay=0.8, seed=i).items()}
    assert kind(many, plain) == "unordered"
    assert kind(falling, plain) == "ordered"
    assert kind({k: t for k, t in made(decay=1.0).items() if "linear" in k}, {}) == "unknown"
    write(tmp_path / "k.safetensors", many, plain)
    assert "networks.lora" in rerun(tmp_path / "k.safetensors", "--rank", 1, "--dry-run")["reason"]


def test_origin_of_a_part() -> None:
    of = origin(DYLORA | {"ss_training_comment": "split from DyLoRA, rank 16 to 8; cats"})
    assert of.split == "split from DyLoRA, rank 16 to 8"
    assert origin({"lycoris_config": '{"algo": "dylora", "block_size": 8}'}).unit == 8
    assert origin({"ss_network_args": "no json"}).trainer is None


def test_diagonal_blocks_are_noted(tmp_path: Path) -> None:
    up = np.zeros((12, 4))
    up[:6, :2], up[6:, 2:] = 1.0, 2.0
    tensors = {"a.lora_up.weight": raw(up, "F16"), "a.lora_down.weight": raw(np.ones((4, 5)), "F16")}
    write(tmp_path / "in.safetensors", tensors)
    (note,) = rerun(tmp_path / "in.safetensors", "--rank", 2, "--dry-run")["outputs"][0]["notes"]
    assert "diagonal blocks" in note


def test_without_alpha_the_scale_stays_one(tmp_path: Path) -> None:
    old = {k: t for k, t in made().items() if not k.endswith(".alpha")}
    write(tmp_path / "in.safetensors", old)
    for policy, wanted in (("keep", None), ("scale", None), ("rescale", math.sqrt(2 * 8))):
        rerun(tmp_path / "in.safetensors", tmp_path / "o.safetensors", "--rank", 2, "--alpha", policy, "--force")
        new, _ = read(tmp_path / "o.safetensors")
        alphas = {t.item() for k, t in new.items() if k.endswith(".alpha")}
        assert alphas == (set() if wanted is None else {np.float32(wanted)})


def test_configuration_in_the_header_follows(tmp_path: Path) -> None:
    """Diffusers' header is the only place of rank and alpha there."""
    rng = np.random.default_rng(1)
    tensors, ranks = {}, {"x.to_q": 6, "x.to_k": 2, "x.to_v": 6}
    for name, rank in ranks.items():
        tensors[f"transformer.{name}.lora_A.weight"] = raw(rng.standard_normal((rank, 8)), "BF16")
        tensors[f"transformer.{name}.lora_B.weight"] = raw(rng.standard_normal((9, rank)), "BF16")
    config = {"r": 6, "lora_alpha": 12, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 5}, "use_dora": False}
    header = json.dumps({f"transformer.{k}": v for k, v in config.items()})
    write(tmp_path / "in.safetensors", tensors, {"lora_adapter_metadata": header})
    for policy, alpha in (("keep", 12), ("scale", 6), ("rescale", 12 * math.sqrt(0.5))):
        report = rerun(tmp_path / "in.safetensors", tmp_path / "o.safetensors", "--rank", 3, "--alpha", policy, "--force")
        strengths = {s["old_rank"]: s["written"] for s in report["outputs"][0]["strength"]}
        assert strengths == {6: pytest.approx(alpha / 3), 2: 2.5}
        new, metadata = read(tmp_path / "o.safetensors")
        assert not [k for k in new if "alpha" in k]
        assert json.loads(metadata["lora_adapter_metadata"]) == {
            "transformer.r": 3, "transformer.lora_alpha": pytest.approx(alpha), "transformer.use_dora": False,
            "transformer.rank_pattern": {r"^x\.to_k": 2}, "transformer.alpha_pattern": {r"^x\.to_k": 5},
        }  # fmt: skip
        assert "ss_network_dim" not in metadata


def test_other_families_and_dtype(tmp_path: Path) -> None:
    tensors = made("F16") | {"n.diff": raw(np.ones((3, 4)), "F16"), "top": raw(np.ones(2), "F32")}
    write(tmp_path / "in.safetensors", tensors, DYLORA)
    report = rerun(tmp_path / "in.safetensors", tmp_path / "o.safetensors", "--rank", 2, "--dtype", "bf16")["outputs"][0]
    new, _ = read(tmp_path / "o.safetensors")
    assert {t.dtype for k, t in new.items() if k.endswith((".weight", ".diff"))} == {"BF16"}
    assert new["top"].dtype == "F32"
    assert new["lora_unet_odd_conv.alpha"] == tensors["lora_unet_odd_conv.alpha"]
    assert report["error"] == pytest.approx(relative(tensors, new), rel=1e-6)
    assert "other families" in report["notes"][0]


def test_refusals(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    for args, code, text in (
        ((source, tmp_path / "o.safetensors"), 2, "--rank N"),
        ((source, tmp_path / "o.safetensors", "--rank", 9), 2, "the file's 8"),
        ((source, tmp_path / "o.safetensors", "--rank", 0), 2, "at least 1"),
        ((source, tmp_path / "o.safetensors", "--rank", 2, "--all"), 2, "one of"),
        ((source, tmp_path / "o.safetensors", "--rank", 2, "--energy", 0.5), 2, "--best"),
        ((source, tmp_path / "o.safetensors", "--best"), 2, "--best goes with"),
        ((source, tmp_path / "o.safetensors", "--rank", 2, "--alpha", "fold"), 2, "--alpha is"),
        ((source, source, "--rank", 2), 1, "the input"),
        ((source, "-o", tmp_path / "dylora.safetensors", "--rank", 2, "--force"), 1, "the input"),
    ):
        outcome = run("rerank", *args)
        assert outcome.code == code, (args, outcome)
        assert text in outcome.err
        assert len(outcome.err.splitlines()) == 1
    assert source.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["dylora.safetensors"]
    run("rerank", source, tmp_path / "o.safetensors", "--rank", 2)
    assert "--force" in run("rerank", source, tmp_path / "o.safetensors", "--rank", 2).err
    assert run("rerank", source, tmp_path / "o.safetensors", "--rank", 2, "--force").code == 0
    with pytest.raises(RequestError, match="block size"):
        rerank(open_nested(read_safetensors(_undescribed(tmp_path))), 2, Request(rank=2, alpha="lycoris"))


def _undescribed(folder: Path) -> Path:
    write(folder / "plain.safetensors", made())
    return folder / "plain.safetensors"


def test_broken_and_foreign_files(tmp_path: Path) -> None:
    tensors = made("F32")
    tensors["lora_unet_odd_linear.lora_up.weight"] = raw(np.full((24, 8), np.nan), "F32")
    write(tmp_path / "nan.safetensors", tensors)
    with pytest.raises(BrokenModuleError, match="lora_unet_odd_linear"):
        rerank(open_nested(read_safetensors(tmp_path / "nan.safetensors")), 2, Request(rank=2))
    loha = {f"m.hada_w{n}_{s}": raw(np.ones((4, 4)), "F16") for n in (1, 2) for s in "ab"}
    write(tmp_path / "loha.safetensors", loha)
    with pytest.raises(NotAnAdapterError, match="none of its 1 modules is a LoRA"):
        open_nested(read_safetensors(tmp_path / "loha.safetensors"))


def test_many_files_and_the_table(source: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    outcome = run("rerank", tmp_path, "--out-dir", tmp_path / "out", "--all", "--unit", 4)
    assert outcome.code == 3
    assert "bad.safetensors" in outcome.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["dylora-0004.safetensors", "dylora-0008.safetensors"]
    assert "by its metadata (units of 2)" in outcome.out
    assert "x training" in outcome.out


def test_curves_agree_with_dense_errors() -> None:
    rng = np.random.default_rng(3)
    up, down = rng.standard_normal((15, 5)), rng.standard_normal((5, 11))
    curve = prefix_curve(up, down)
    values = np.linalg.svd(up @ down, compute_uv=False)
    for r in range(6):
        assert curve.prefix[r] == pytest.approx(np.sum((up @ down - up[:, :r] @ down[:r]) ** 2), abs=1e-9)
        assert curve.best[r] == pytest.approx(np.sum(values[r:] ** 2), abs=1e-9)
    mid = rng.standard_normal((5, 4, 9))
    right = rng.standard_normal((4, 11))
    whole = np.einsum("pi,ijk,jr->pkr", up, mid, right)
    curve = tucker_curve(up, mid, right)
    for r in range(6):
        cut = np.einsum("pi,ijk,jr->pkr", up[:, :r], mid[:r, :r], right[:r])
        assert curve.prefix[r] == pytest.approx(np.sum((whole - cut) ** 2), abs=1e-8)
        if r:
            a, core, b = truncate_tucker(up, mid, right, r)
            assert np.sum((whole - np.einsum("pi,ijk,jr->pkr", a, core, b)) ** 2) <= curve.best[r] + 1e-8


def test_order() -> None:
    falling = [np.arange(8.0)[::-1] + 1] * 3
    assert order_score(falling)[0] == pytest.approx(-1)
    assert falling_share(falling) == 1
    assert order_score([np.zeros(8), np.ones(2)]) == (0.0, 0.0)
    rng = np.random.default_rng(0)
    assert abs(order_score([rng.random(16) for _ in range(200)])[1]) < 4


def test_a_dry_run_names_another_file_than_the_input(source: Path, tmp_path: Path) -> None:
    outputs = rerun(source, "--rank", 2, "--dry-run")["outputs"]
    assert [(Path(one["output"]).name, one["written"]) for one in outputs] == [("dylora-reranked.safetensors", False)]
    every = rerun(source, "--all", "--unit", 4, "--dry-run")["outputs"]
    assert [Path(one["output"]).name for one in every] == [f"dylora-reranked-{n:04d}.safetensors" for n in (4, 8)]
    folder = run("rerank", tmp_path, "--rank", 2, "--dry-run")
    assert folder.code == 0
    assert "reranked/dylora.safetensors (not written)" in folder.out
    assert [p.name for p in tmp_path.iterdir()] == ["dylora.safetensors"]


def numbered() -> dict[str, Raw]:
    """cloneofsimo's own form of Stable Diffusion 1: modules in the order of the model's tree, without alphas."""
    rng, tensors = np.random.default_rng(0), {}
    for key, shape in {"unet:0": (320, 320), "unet:4": (2560, 320), "unet:6": (320, 768), "text_encoder:1": (768, 768)}.items():
        tensors[f"{key}:up"] = raw(rng.standard_normal((shape[0], 4)), "F32")
        tensors[f"{key}:down"] = raw(rng.standard_normal((4, shape[1])), "F32")
    return tensors


@pytest.mark.parametrize("svd", [False, True])
def test_numbered_modules_keep_their_numbers(svd: bool, tmp_path: Path) -> None:
    before = numbered()
    write(tmp_path / "a.safetensors", before)
    run("rerank", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--rank", "2", *["--svd"] * svd)
    after, _ = read(tmp_path / "b.safetensors")
    assert set(after) == set(before)
    for key in {key.rpartition(":")[0] for key in before}:
        up, down, new_up, new_down = (of[f"{key}:{side}"].f64() for of in (before, after) for side in ("up", "down"))
        if svd:
            left, values, right = np.linalg.svd(up @ down)
            np.testing.assert_allclose(new_up @ new_down, (left[:, :2] * values[:2]) @ right[:2], atol=1e-4)
        else:
            assert np.array_equal(new_up, up[:, :2])
            assert np.array_equal(new_down, down[:2])


def test_numbered_modules_have_no_alpha(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", numbered())
    nested = open_nested(read_safetensors(tmp_path / "a.safetensors"))
    with pytest.raises(RequestError, match="unet:0:down: a file that numbers its modules has no alphas"):
        rerank(nested, 2, Request(rank=2, alpha="rescale"))
