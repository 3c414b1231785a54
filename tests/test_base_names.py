"""Adapters of a model that no table knows: merged, averaged, divided and pruned by their own names, or the base model's."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.edges import run
from tests.models.small import diffusers_arrays, save
from tests.oracle import Raw, raw, read, write
from tests.unknown import (
    SHAPES,
    SPELLINGS,
    Aviary,
    assert_close,
    dense,
    folder_meaning,
    make,
    make_peft_folder,
    meaning,
    save_model,
    total,
)

if TYPE_CHECKING:
    from pathlib import Path

NOTE = "no table knows the model: its modules are called as the files spell them"


def done(*args: object) -> str:
    """What a successful run says."""
    outcome = run(*args)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out


def refused(*args: object) -> str:
    """What a refused one says, in one line."""
    outcome = run(*args)
    assert outcome.code in (1, 2)  # 2 where the request is at fault
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1
    return outcome.err


# merge --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_files_in_one_spelling_need_no_base(tmp_path: Path, how: str, dtype: str) -> None:
    a, b, out = (tmp_path / f"{name}.safetensors" for name in "abo")
    one = make(a, how, rank=2, dtype=dtype)
    two = make(b, how, rank=1, alpha=0.75, dtype=dtype, without=("head",), seed=1)
    said = done("merge", f"{a}:0.5", f"{b}:-1:re=mix.in:3", "-o", out)
    assert NOTE in said
    others = {name: own * (3.0 if "mix_in" in name else -1.0) for name, own in two.items()}
    assert_close(meaning(out, how), total([(one, 0.5), (others, 1.0)]), 2e-2 if dtype == "BF16" else 1e-6)
    assert set(read(out)[0]) == set(read(a)[0])
    assert {own.dtype for key, own in read(out)[0].items() if not key.endswith("alpha")} == {dtype}


def test_a_cut_is_the_best_of_its_rank(tmp_path: Path) -> None:
    a, b, out = (tmp_path / f"{name}.safetensors" for name in "abo")
    wanted = total([(make(a, "kohya", rank=2), 1.0), (make(b, "kohya", rank=2, seed=1), 0.5)])
    done("merge", a, f"{b}:0.5", "-o", out, "--rank", 2, "--rank", "spatial=3")
    found = meaning(out, "kohya")
    for name, own in wanted.items():
        values = np.linalg.svd(own.reshape(len(own), -1), compute_uv=False)
        least = np.linalg.norm(values[3 if "spatial" in name else 2 :])
        assert np.linalg.norm(found[name] - own) == pytest.approx(least, rel=1e-5, abs=1e-5 * np.linalg.norm(own))


@pytest.mark.parametrize(("first", "second"), [("kohya", "peft"), ("peft", "kohya"), ("dotted", "old"), ("kohya", "old")])
def test_two_spellings_of_the_same_modules(tmp_path: Path, first: str, second: str) -> None:
    """All of the second's modules are in the first, so nothing has to be made up."""
    a, b, out = (tmp_path / f"{name}.safetensors" for name in "abo")
    one, two = make(a, first, rank=2), make(b, second, rank=1, without=("hatch",), seed=1)
    done("merge", a, b, "-o", out)
    assert_close(meaning(out, first), total([(one, 1.0), (two, 1.0)]))


@pytest.mark.parametrize("first", SPELLINGS)
@pytest.mark.parametrize("second", ["peft", "kohya"])
def test_other_spellings_need_the_base(tmp_path: Path, first: str, second: str) -> None:
    a, b, out = (tmp_path / f"{name}.safetensors" for name in "abo")
    one, two = make(a, first, rank=1, without=("head",)), make(b, second, rank=2, without=("hatch",), seed=1)
    base = save_model(tmp_path / "base.safetensors")
    if first == "own":  # a prefix that no program has
        assert "has no module for lora_aviary_hatch (7 of the 7 modules)" in refused("merge", a, b, "-o", out, "--base", base)
        return
    if first != second:
        error = refused("merge", a, b, "-o", out)
        assert f"spelled otherwise than a.safetensors, and {SPELLINGS[second].stem('head')} is none of" in error
        assert "Try: --base MODEL" in error
        assert not out.exists()
    said = done("merge", a, b, "-o", out, "--base", base)
    assert NOTE not in said
    assert_close(meaning(out, first), total([(one, 1.0), (two, 1.0)]))


def test_blocks_by_the_bases_names(tmp_path: Path) -> None:
    """Underscores do not tell where a block begins; the base does."""
    a, b, out = (tmp_path / f"{name}.safetensors" for name in "abo")
    one, two = make(a, "kohya"), make(b, "kohya", seed=1)
    base = save_model(tmp_path / "base.safetensors")
    assert "warblers=0" in refused("merge", f"{a}:1:warblers=0:0.5", b, "-o", out)
    done("merge", f"{a}:1:warblers=0:0.5", b, "-o", out, "--base", base)
    weighted = {name: own * (0.5 if "warblers.0" in name else 1.0) for name, own in one.items()}
    found = meaning(out, "kohya")
    assert_close(found, total([(weighted, 1.0), (two, 1.0)]))


@pytest.mark.parametrize("how", ["kohya", "dotted", "peft"])
def test_another_layout_needs_the_base(tmp_path: Path, how: str) -> None:
    a, b, out = (tmp_path / f"{name}.safetensors" for name in "abo")
    wanted = total([(make(a, how, rank=1), 1.0), (make(b, how, rank=1, seed=1), 1.0)])
    stem = SPELLINGS[how].stem("hatch")
    error = refused("merge", a, b, "-o", out, "--target", "comfyui")
    assert f"no table knows the model, so what {stem} is called in the layout comfyui is not known" in error
    assert "--base MODEL" in error
    done("merge", a, b, "-o", out, "--target", "comfyui", "--base", save_model(tmp_path / "base.safetensors"))
    spelled = SPELLINGS["comfyui"]._replace(down="lora_down.weight", up="lora_up.weight")
    assert_close(dense(read(out)[0], spelled), wanted)


def test_the_layout_that_a_file_is_in_is_known(tmp_path: Path) -> None:
    a, b, out = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "o"))
    wanted = total([(make(a, "peft"), 1.0), (make(b, "peft", seed=1), 1.0)])
    done("merge", a, b, "-o", out, "--target", "peft")
    assert_close(folder_meaning(out), wanted)


def test_underscores_that_stand_for_two_modules(tmp_path: Path) -> None:
    """`a.b_c` and `a_b.c` are one name to sd-scripts: nothing tells which, whatever the base has."""
    rng = np.random.default_rng(0)
    names, base = ("gate.in_proj", "gate_in.proj"), tmp_path / "base.safetensors"
    write(base, {f"{name}.weight": raw(rng.standard_normal((4, 6)), "F32") for name in names})
    dotted, flat, out = (tmp_path / f"{name}.safetensors" for name in ("dotted", "flat", "out"))

    def pair(stem: str) -> dict[str, Raw]:
        return {f"{stem}.lora_{s}.weight": raw(rng.standard_normal(n), "F32") for s, n in (("up", (4, 2)), ("down", (2, 6)))}

    write(dotted, {key: own for name in names for key, own in pair(f"diffusion_model.{name}").items()})
    write(flat, pair("lora_unet_gate_in_proj"))
    text = "lora_unet_gate_in_proj can be gate.in_proj or gate_in.proj"
    assert text in refused("merge", dotted, flat, "-o", out)
    assert text in refused("merge", flat, dotted, "-o", out, "--base", base)
    assert text in refused("prune", flat, out, "--base", base, "--scale", 2)
    done("merge", flat, flat, "-o", out)


def test_a_base_that_lacks_modules(tmp_path: Path) -> None:
    a, out = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    make(a, "kohya")
    base = save_model(tmp_path / "base.safetensors", [name for name in SHAPES if "warblers" in name])
    count = f"base.safetensors has no module for lora_unet_hatch (2 of the {len(SHAPES)} modules)"
    for command in (("merge", a, a, "-o", out), ("prune", a, out, "--negate"), ("split", a, "-o", out)):
        error = refused(*command, "--base", base)
        assert count in error
        assert "the model it was trained on" in error
    assert list(tmp_path.glob("o*")) == []


def test_a_base_of_other_sizes(tmp_path: Path) -> None:
    a, base = tmp_path / "a.safetensors", tmp_path / "base.safetensors"
    make(a, "peft")
    write(
        base, {f"{name}.weight": raw(np.zeros((shape[0], shape[1] + 1, *shape[2:])), "F16") for name, shape in SHAPES.items()}
    )
    error = refused("prune", a, tmp_path / "o.safetensors", "--negate", "--base", base)
    assert "base_model.model.hatch is [12, 3, 1, 1], base expects [12, 4, 1, 1]" in error


def test_files_for_two_models(tmp_path: Path) -> None:
    a, b, z, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "z", "o"))
    make(a, "kohya")
    tensors, _ = read(a)
    wide = {
        k: raw(np.zeros((*t.shape[:1], 7)), "F32") if k == "lora_unet_head.lora_down.weight" else t for k, t in tensors.items()
    }
    write(b, wide)
    assert "lora_unet_head is [5, 7], in a.safetensors [5, 12]" in refused("merge", a, b, "-o", out)
    stem = "lora_unet_layers_0_feed_forward_w1"
    factors = {f"{stem}.lora_{s}.weight": raw(np.ones(n), "F16") for s, n in (("up", (10240, 1)), ("down", (1, 3840)))}
    write(z, factors)
    assert "z.safetensors is for Z-Image, and no table knows the model of" in refused("merge", a, z, "-o", out)
    assert "z.safetensors is for Z-Image" in refused("merge", z, a, "-o", out)


def test_a_changed_model_of_a_known_kind(tmp_path: Path) -> None:
    """A FLUX.1 of other sizes: a table has its names in every layout, the base its sizes."""
    base, one, two, out = (tmp_path / f"{name}.safetensors" for name in ("base", "one", "two", "out"))
    save(base, diffusers_arrays("flux1-dev"))
    rng = np.random.default_rng(3)
    name = "single_transformer_blocks.0.proj_mlp"
    rows, width = diffusers_arrays("flux1-dev")[f"{name}.weight"].shape
    up, down = rng.standard_normal((rows, 2)), rng.standard_normal((2, width))
    write(one, {f"transformer.{name}.lora_B.weight": raw(up, "F32"), f"transformer.{name}.lora_A.weight": raw(down, "F32")})
    done("convert", one, two, "--target", "comfyui", "--base", base)
    assert "(closest: flux1-" in done("merge", one, one, "-o", out)
    assert "--base MODEL" in refused("merge", one, two, "-o", out, "--force")
    done("merge", one, f"{two}:0.5", "-o", out, "--force", "--base", base)
    tensors, _ = read(out)
    (a,), (b,) = ([own.f64() for key, own in tensors.items() if f"{name}.{side}." in key] for side in ("lora_A", "lora_B"))
    assert np.allclose(b @ a, 1.5 * raw(up, "F32").f64() @ raw(down, "F32").f64(), rtol=1e-5)


def test_the_base_is_never_overwritten(tmp_path: Path) -> None:
    a, base = tmp_path / "a-1.safetensors", save_model(tmp_path / "base.safetensors")
    make(a, "kohya")
    before = base.read_bytes()
    for command in (("merge", a, a, "-o", base), ("prune", a, base, "--negate"), ("ema", a, a, "--on", "delta", "-o", base)):
        assert (
            "never overwritten" in refused(*command, "--sort", "given", "--base", base, "--force")
            if command[0] == "ema"
            else (refused(*command, "--base", base, "--force"))
        )
    assert base.read_bytes() == before


# ema ----------------------------------------------------------------------------------------------------------------------


def test_an_average_of_changes(tmp_path: Path) -> None:
    files = [tmp_path / f"run-{i}.safetensors" for i in (1, 2, 3)]
    spelled = ("kohya", "peft", "peft")
    changes = [make(file, how, rank=1, seed=i) for i, (file, how) in enumerate(zip(files, spelled, strict=True))]
    out = tmp_path / "o.safetensors"
    done("ema", *files, "-o", out, "--on", "delta", "--beta", 0.5)
    assert_close(meaning(out, "kohya"), total(list(zip(changes, (0.25, 0.25, 0.5), strict=True))))
    make(files[0], "kohya", rank=1, without=("head",))
    base = save_model(tmp_path / "base.safetensors")
    command = ("ema", *files, "-o", out, "--on", "delta", "--beta", 0.5, "--force")
    assert "--base MODEL" in refused(*command)
    done(*command, "--base", base)
    changes[0].pop("head")
    assert_close(meaning(out, "kohya"), total(list(zip(changes, (0.25, 0.25, 0.5), strict=True))))


def test_an_average_of_tensors_in_another_dtype_and_layout(tmp_path: Path) -> None:
    files = [tmp_path / f"run-{i}.safetensors" for i in (1, 2)]
    for i, file in enumerate(files):
        make(file, "kohya", rank=2, seed=i)
    out, base = tmp_path / "o.safetensors", save_model(tmp_path / "base.safetensors")
    assert NOTE in done("ema", *files, "-o", out, "--beta", 0.5, "--dtype", "bf16")
    first, second, found = (read(path)[0] for path in (*files, out))
    assert found.keys() == first.keys()
    for key in (key for key in first if not key.endswith("alpha")):
        assert found[key] == raw(((first[key].f64() + second[key].f64()) / 2).astype("f4"), "BF16")
    command = ("ema", *files, "-o", out, "--beta", 0.5, "--target", "comfyui", "--force")
    assert "--base MODEL" in refused(*command)
    done(*command, "--base", base)
    assert "diffusion_model.warblers.0.mix_in.lora_up.weight" in read(out)[0]
    assert "need no --base" in refused("ema", *files, "-o", out, "--base", base)


def test_the_first_file_with_a_weight_has_the_spelling(tmp_path: Path) -> None:
    """With a power function the first checkpoint only marks the start."""
    files = [tmp_path / f"run-{i}.safetensors" for i in (1, 2, 3)]
    changes = [
        make(file, how, rank=1, seed=i) for i, (file, how) in enumerate(zip(files, ("kohya", "peft", "peft"), strict=True))
    ]
    out = tmp_path / "o.safetensors"
    done("ema", *files, "-o", out, "--on", "delta", "--sigma-rel", 0.25)
    found = json.loads(done("ema", *files, "--dry-run", "--on", "delta", "--sigma-rel", 0.25, "--json"))
    weights = [file["weight"] for file in found["files"]]
    assert weights[0] == 0.0
    assert_close(meaning(out, "peft"), total(list(zip(changes, weights, strict=True))))


# split and prune ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("by", ["kind", "block", "family"])
def test_parts_are_the_same_bytes(tmp_path: Path, how: str, by: str) -> None:
    source, back = tmp_path / "a.safetensors", tmp_path / "back.safetensors"
    make(source, how, dtype="F16")
    assert NOTE in done("split", source, "--by", by, "-o", tmp_path / "part")
    parts = sorted(tmp_path.glob("part-*"))
    assert len(parts) == {"kind": 5, "block": 3, "family": 1}[by]
    together = {key: own for part in parts for key, own in read(part)[0].items()}
    assert together == read(source)[0]
    done("merge", *parts, "-o", back)
    assert read(back)[0] == read(source)[0]


def test_parts_by_the_bases_names(tmp_path: Path) -> None:
    source, base = tmp_path / "a.safetensors", save_model(tmp_path / "base.safetensors")
    make(source, "kohya")
    found = json.loads(done("split", source, "--by", "block", "-o", tmp_path / "part", "--base", base, "--json"))
    assert {part["part"]: part["modules"] for part in found["parts"]} == {"rest": 2, "warblers.0": 3, "warblers.1": 3}
    assert found["warnings"] == []
    assert {k for p in tmp_path.glob("part-*") for k in read(p)[0]} == set(read(source)[0])


@pytest.mark.parametrize("how", SPELLINGS)
def test_prune_by_name_and_scale(tmp_path: Path, how: str) -> None:
    source, out = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    wanted = {name: own * -0.5 for name, own in make(source, how).items() if "spatial" not in name}
    assert NOTE in done("prune", source, out, "--drop", "re=spatial", "--scale", 0.5, "--negate")
    assert_close(meaning(out, how), wanted, 0.0)


def test_prune_by_the_bases_blocks(tmp_path: Path) -> None:
    source, out = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    wanted = make(source, "kohya")
    assert "warblers=1" in refused("prune", source, out, "--keep", "warblers=1")
    done("prune", source, out, "--keep", "warblers=1", "--base", save_model(tmp_path / "base.safetensors"))
    assert_close(meaning(out, "kohya"), {name: own for name, own in wanted.items() if "warblers.1" in name}, 0.0)
    make(source, "peft")
    done("prune", source, out, "--keep", "warblers=1", "--force")
    assert {key.split(".")[3] for key in read(out)[0]} == {"1"}


def test_prune_for_a_smaller_model(tmp_path: Path) -> None:
    source, out = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    wanted = make(source, "kohya")
    model = save_model(tmp_path / "model.safetensors", [name for name in SHAPES if name != "head"])
    done("prune", source, out, "--prune-for", model, "--base", save_model(tmp_path / "base.safetensors"))
    assert_close(meaning(out, "kohya"), {name: own for name, own in wanted.items() if name != "head"}, 0.0)


def test_every_family_is_carried(tmp_path: Path) -> None:
    """LoKr, LoHa, a full difference, a DoRA and, of which the file does not say the shape, an OFT."""
    rng = np.random.default_rng(0)
    sizes: dict[str, dict[str, tuple[int, ...]]] = {
        "loha": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6), "alpha": ()},
        "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 3), "alpha": ()},
        "full": {"diff": (8, 6), "diff_b": (8,)},
        "dora": {"lora_up.weight": (8, 2), "lora_down.weight": (2, 6), "dora_scale": (8, 1), "alpha": ()},
        "oft": {"oft_blocks": (2, 4, 4), "alpha": ()},
        "norm": {"w_norm": (8,), "b_norm": (8,)},
    }
    tensors = {f"lora_unet_{m}.{w}": raw(rng.standard_normal(n), "F32") for m, own in sizes.items() for w, n in own.items()}
    tensors["a_strange_key"] = raw([1.0], "F32")
    source, out = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    write(source, tensors)
    done("split", source, "--by", "family", "-o", tmp_path / "part")
    assert len(list(tmp_path.glob("part-*"))) == len(sizes)
    assert {key: own for part in tmp_path.glob("part-*") for key, own in read(part)[0].items()} == tensors
    assert "carried: a_strange_key" in done("prune", source, out, "--drop", "re=oft")
    assert read(out)[0] == {key: own for key, own in tensors.items() if "oft" not in key}
    done("merge", *tmp_path.glob("part-*"), "-o", out, "--force")
    assert read(out)[0] == tensors


def test_peft_words_are_carried(tmp_path: Path) -> None:
    """Magnitudes, biases, and PEFT's LoKr and LoHa, which have no alpha."""
    rng = np.random.default_rng(0)
    sizes: dict[str, dict[str, tuple[int, ...]]] = {
        "one": {"lora_A.weight": (2, 6), "lora_B.weight": (8, 2), "lora_B.bias": (8,), "lora_magnitude_vector": (8,)},
        "two": {"lora_A.weight": (1, 6), "lora_B.weight": (8, 1), "lora_B.bias": (8,), "lora_magnitude_vector": (8,)},
        "three": {"lokr_w1": (2, 2), "lokr_w2": (4, 3)},
        "four": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)},
    }
    named = {f"base_model.model.{m}.{w}": n for m, own in sizes.items() for w, n in own.items()}
    tensors = {key: raw(rng.standard_normal(shape), "F16") for key, shape in named.items()}
    write(tmp_path / "a.safetensors", tensors)
    done("split", tmp_path / "a.safetensors", "--by", "family", "-o", tmp_path / "part")
    assert len(list(tmp_path.glob("part-*"))) == 3
    assert {key: own for part in tmp_path.glob("part-*") for key, own in read(part)[0].items()} == tensors


def test_a_miss_needs_the_base(tmp_path: Path) -> None:
    source, out = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    write(source, {"base_model.model.head.miss_block": raw(np.ones((2, 5)), "F32")})
    assert "the shape of base_model.model.head, a MiSS. Try: --base MODEL" in refused("prune", source, out, "--scale", 2)
    done("prune", source, out, "--scale", 2, "--base", save_model(tmp_path / "base.safetensors"))
    assert read(out)[0] == {"base_model.model.head.miss_block": raw(np.full((2, 5), 2.0), "F32")}


def test_an_adapters_name_stays_in_its_keys(tmp_path: Path) -> None:
    """A raw state dict of PEFT's has the adapter's name in its keys, and so has the result."""
    source, out = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    wanted = make(source, "peft")
    write(source, {key.replace(".weight", ".default.weight"): own for key, own in read(source)[0].items()})
    done("prune", source, out, "--scale", 2)
    assert read(out)[0].keys() == read(source)[0].keys()
    write(out, {key.replace(".default.weight", ".weight"): own for key, own in read(out)[0].items()})
    assert_close(meaning(out, "peft"), total([(wanted, 2.0)]))


# scales that stand beside the tensors -------------------------------------------------------------------------------------


def test_peft_folders(tmp_path: Path) -> None:
    a, b, out, cut = (tmp_path / name for name in ("a", "b", "o", "cut"))
    one, two = make_peft_folder(a, rank=2, alpha=3), make_peft_folder(b, rank=3, alpha=2, seed=1)
    done("merge", f"{a}:0.5", b, "-o", out)
    assert_close(folder_meaning(out), total([(one, 0.5), (two, 1.0)]))
    done("prune", a, cut, "--keep", "re=mix")
    assert_close(folder_meaning(cut), {name: own for name, own in one.items() if "mix" in name}, 0.0)


def test_peft_itself_loads_the_sum(tmp_path: Path) -> None:
    """Two adapters as PEFT trains and saves them, and their sum as it loads that: what the model computes is the sum."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    model, changes = Aviary().double(), []
    before = {name: own.clone() for name, own in model.state_dict().items()}
    for i, targets in enumerate((["mix_in", "spatial"], ["mix_in", "mix_out", "hatch"])):
        config = LoraConfig(r=i + 2, lora_alpha=5, target_modules=targets, init_lora_weights=False)
        tuned = get_peft_model(copy.deepcopy(model), config)
        tuned.save_pretrained(tmp_path / f"{i}")
        changes.append(tuned.merge_and_unload().state_dict())
    done("merge", f"{tmp_path / '0'}:0.5", f"{tmp_path / '1'}:-2", "-o", tmp_path / "sum")
    merged = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "sum").merge_and_unload().state_dict()
    for name, own in before.items():
        wanted = 0.5 * (changes[0][name] - own) - 2 * (changes[1][name] - own)
        assert torch.allclose(merged[name] - own, wanted, atol=1e-6), name


@pytest.mark.parametrize("component", ["transformer", "unet"])
def test_a_header_that_has_the_scale(tmp_path: Path, component: str) -> None:
    """As Diffusers saves it: the parts' bytes and their header's scale are the file's.

    What is scaled is scaled for programs that do not read the header, too.
    """
    source, part, out = (tmp_path / f"{name}.safetensors" for name in ("a", "part", "o"))
    spelled = SPELLINGS["peft"]._replace(prefix=f"{component}.")
    make(source, "peft", rank=2)
    tensors = {k.replace("base_model.model", component): t for k, t in read(source)[0].items()}
    config = {f"{component}.r": 2, f"{component}.lora_alpha": 5, f"{component}.target_modules": sorted(SHAPES)}
    write(source, tensors, {"lora_adapter_metadata": json.dumps(config)})
    wanted = dense(tensors, spelled, dict.fromkeys(SHAPES, 2.5))
    done("prune", source, part, "--drop", "re=head")
    kept, metadata = read(part)
    assert kept == {key: own for key, own in tensors.items() if "head" not in key}
    header = json.loads(metadata["lora_adapter_metadata"])
    assert (header[f"{component}.r"], header[f"{component}.lora_alpha"], header[f"{component}.alpha_pattern"]) == (2, 5, {})
    done("merge", source, f"{part}:2", "-o", out)
    result, metadata = read(out)
    assert "lora_adapter_metadata" not in metadata
    scales = dict.fromkeys(SHAPES, 1.0)
    assert_close(dense(result, spelled, scales), {name: own * (1 if name == "head" else 3) for name, own in wanted.items()})


# beside these commands ----------------------------------------------------------------------------------------------------


def test_compare_across_spellings(tmp_path: Path) -> None:
    a, b, base = tmp_path / "a.safetensors", tmp_path / "b.safetensors", save_model(tmp_path / "base.safetensors")
    make(a, "peft", rank=2)
    kohya = {
        k.replace("base_model.model.", "lora_unet_").replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t
        for k, t in read(a)[0].items()
    }
    renamed = {k.split(".lora")[0].replace(".", "_") + ".lora" + k.split(".lora")[1]: t for k, t in kohya.items()}
    write(b, renamed)
    for more in ((), ("--base", base)):
        assert done("compare", a, b, *more).startswith("identical: the 8 modules")
        assert done("compare", b, a, *more).startswith("identical: the 8 modules")
    write(b, {k: t for k, t in renamed.items() if "head" not in k})
    for pair in ((a, b), (b, a)):
        outcome = run("compare", *pair)
        assert (outcome.code, outcome.err) == (1, "")
        assert "1 only in" in outcome.out


@pytest.mark.parametrize("how", SPELLINGS)
def test_resize_keeps_the_spelling(tmp_path: Path, how: str) -> None:
    source, out = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    wanted = make(source, how, rank=3)
    done("resize", source, out, "--rank", 2)
    assert read(out)[0].keys() == read(source)[0].keys()
    for name, own in meaning(out, how).items():
        values = np.linalg.svd(wanted[name].reshape(len(own), -1), compute_uv=False)
        assert np.linalg.norm(own - wanted[name]) == pytest.approx(np.linalg.norm(values[2:]), rel=1e-5)
