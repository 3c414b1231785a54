"""Modules that no table has, beside those it has: every verb does the same to both, and writes every key as it was.

What a file does is computed here key by key in float64; no table and no code of the package has a part in it.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import lorasurgery
from lorasurgery.architectures import named
from lorasurgery.errors import NotRepresentableError
from tests.builders import Builder, plain_weights
from tests.edges import run
from tests.headers import hollow
from tests.oracle import Raw, Reader, Tensors, delta, model, modules, raw, read, rule, write

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Effect = dict[str, NDArray[np.float64]]

OWN = ("vace_blocks.0.self_attn.q", "blocks.0.gate_logits", "extra.3.proj", "blocks.1.attn.lens", "tail.linear")
"""Weights that no table has."""
BARE = ("blocks.0.modulation", "pad_token")
"""Parameters that are no module's weight."""
PREFIXES = {"sd-scripts": "lora_unet_", "comfyui": "diffusion_model.", "diffusers": "{}.", "onetrainer": "lora_transformer_"}
ARCHS = ("flux1-dev", "wan-2.1-t2v-1.3b", "sdxl", "z-image", "qwen-image", "sd3-medium")
FAMILIES = ("lora", "loha", "lokr", "full")
SIZE = (24, 16)


@dataclass(frozen=True)
class Case:
    """A file of known and other modules."""

    arch: str
    layout: str
    family: str
    own: int
    dtype: str

    def tensors(self, seed: int = 0) -> Tensors:
        """The file."""
        of = model(self.arch)
        builder = Builder.start(of, self.layout, self.dtype, seed)
        family = "lora" if self.layout == "diffusers" else self.family
        small = sorted(plain_weights(of), key=lambda name: math.prod(of.shapes[name]))
        names = of.names(rule(self.layout, of).naming)
        known = [name for name, place in names.items() if len(place) == 1 and place[0].weight in small[:24]][:5]
        for i, name in enumerate(known):
            builder.add(name, family, rank=2 + i % 3, alpha=1.5)
        for i, name in enumerate(OWN[: self.own]):
            builder.put(self.stem(name), SIZE, family, rank=2 + i % 2, alpha=3.0)
        if self.layout == "comfyui" and self.own > 2:
            for i, name in enumerate(BARE):
                builder.made.tensors[f"diffusion_model.{name}.diff"] = builder.random(*((1, 6, 20), (8,))[i])
        return builder.made.tensors

    def stem(self, name: str) -> str:
        """A name as the layout spells it."""
        prefix = PREFIXES[self.layout].format(named(self.arch)[0].denoiser)
        return prefix + (name.replace(".", "_") if prefix.endswith("_") else name)

    def __str__(self) -> str:
        return "-".join(map(str, (self.arch, self.layout, self.family, self.own, self.dtype)))


ALL = [
    Case(arch, layout, family, own, dtype)
    for i, (arch, layout, family) in enumerate(itertools.product(ARCHS, ("sd-scripts", "comfyui", "diffusers"), FAMILIES))
    for own, dtype in [((1, 3, 5)[i % 3], ("F32", "BF16", "F16")[i // 3 % 3])]
    if layout != "diffusers" or family == "lora"
]
CASES = ALL[::3]


def effect(path: Path) -> Effect:
    """Module as spelled -> its change, dense."""
    tensors, _ = read(path)
    found, others = modules(tensors)
    assert not others
    reader = Reader("any")
    return {stem: delta(own, np.arange(columns(own.slots))) * reader.scale(own) for stem, own in found.items()}


def columns(slots: dict[str, Raw]) -> int:
    """Of a module's weight."""
    if "down" in slots:
        return math.prod(slots["down"].shape[1:])
    if "diff" in slots:
        return math.prod(slots["diff"].shape[1:])
    if "w1_b" in slots and "w2_a" in slots and "w1_a" in slots and slots["w1_b"].shape == slots["w2_b"].shape:
        return slots["w1_b"].shape[1]
    outer = slots["w1"].shape[1] if "w1" in slots else slots["w1_b"].shape[1]
    return outer * math.prod((slots["w2"] if "w2" in slots else slots["w2_b"]).shape[1:])


def assert_effect(found: Effect, wanted: Effect, tolerance: float) -> None:
    """The same modules with the same changes."""
    assert found.keys() == wanted.keys()
    for stem, own in wanted.items():
        assert np.linalg.norm(found[stem] - own) <= tolerance * max(float(np.linalg.norm(own)), 1e-30), stem


def told(*args: object) -> dict[str, Any]:
    """The JSON of a run that works."""
    outcome = run(*args, "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def close(case: Case) -> float:
    """What rounding to the dtype may cost."""
    return {"F32": 1e-6, "F16": 3e-3, "BF16": 2e-2}[case.dtype]


@pytest.fixture
def source(case: Case, tmp_path: Path) -> Path:
    write(tmp_path / "a.safetensors", case.tensors(), {"format": "pt"})
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("case", CASES, ids=str)
class TestEveryVerb:
    def test_scales_all_alike(self, case: Case, source: Path, tmp_path: Path) -> None:
        out, before = tmp_path / "o.safetensors", effect(source)
        told("merge", f"{source}:0.3", "-o", out, "--strict")
        assert_effect(effect(out), {stem: 0.3 * own for stem, own in before.items()}, close(case))
        told("prune", source, out, "--scale", 0.5, "--negate", "--strict", "--force")
        assert_effect(effect(out), {stem: -0.5 * own for stem, own in before.items()}, 1e-7)
        assert read(out)[0].keys() == read(source)[0].keys()

    def test_adds_all_alike(self, case: Case, source: Path, tmp_path: Path) -> None:
        other, out = tmp_path / "b.safetensors", tmp_path / "o.safetensors"
        write(other, case.tensors(seed=1), {"format": "pt"})
        told("merge", f"{source}:0.5", f"{other}:0.25", "-o", out, "--strict")
        first, second = effect(source), effect(other)
        assert_effect(effect(out), {stem: 0.5 * own + 0.25 * second[stem] for stem, own in first.items()}, close(case))

    def test_leaves_out_what_is_named_and_keeps_names(self, case: Case, source: Path, tmp_path: Path) -> None:
        out, tensors = tmp_path / "o.safetensors", read(source)[0]
        gone = modules(tensors)[0][case.stem(OWN[0])].stem
        report = told("prune", source, out, "--drop", f"re=^{gone.replace('.', '[.]')}$", "--strict")
        assert [row["name"] for row in report["pruned"]] == [gone]
        assert read(out)[0] == {key: own for key, own in tensors.items() if not key.startswith(gone + ".")}

    def test_splits_and_comes_together(self, case: Case, source: Path, tmp_path: Path) -> None:
        for by in ("component", "block", "kind"):
            report = told("split", source, "--by", by, "--out-dir", tmp_path / by, "--strict")
            parts = [read(part["output"])[0] for part in report["parts"]]
            assert {key: own for part in parts for key, own in part.items()} == read(source)[0]
        whole = tmp_path / "whole.safetensors"
        told("merge", *(part["output"] for part in report["parts"]), "-o", whole, "--strict")
        assert read(whole)[0] == read(source)[0]

    def test_cuts_all_alike(self, case: Case, source: Path, tmp_path: Path) -> None:
        if case.family != "lora":
            pytest.skip("only the cut of a LoRA is a module of the oracle's with the same words")
        out = tmp_path / "o.safetensors"
        told("resize", source, out, "--rank", 1)
        found, before = effect(out), effect(source)
        assert found.keys() == before.keys()
        for stem, own in before.items():
            values = np.linalg.svd(own.reshape(own.shape[0], -1), compute_uv=False)
            if stem.rsplit(".", 1)[-1] not in ("modulation", "pad_token"):
                best = math.sqrt(float(np.sum(values[1:] ** 2)))
                distance = float(np.linalg.norm(found[stem] - own))
                assert best - 1e-9 <= distance <= best * 1.01 + close(case) * float(values[0])
        assert read(out)[0].keys() == read(source)[0].keys()

    def test_compares_all_alike(self, case: Case, source: Path, tmp_path: Path) -> None:
        other = tmp_path / "b.safetensors"
        tensors = dict(read(source)[0])
        key = next(k for k in tensors if k.startswith(case.stem(OWN[0]) + ".") and not k.endswith("alpha"))
        tensors[key] = raw(2 * tensors[key].f64(), tensors[key].dtype)
        write(other, tensors, {"format": "pt"})
        assert run("compare", source, source).code == 0
        outcome = run("compare", source, other, "--json")
        assert outcome.code == 1
        found = json.loads(outcome.out)
        assert [pair["a"]["name"] for pair in found["modules"] if pair["status"] == "different"] == [case.stem(OWN[0])]

    def test_another_layout_refuses_what_it_has_no_name_for(self, case: Case, source: Path, tmp_path: Path) -> None:
        adapter = lorasurgery.load(source, arch=case.arch)
        for target in ("sd-scripts", "comfyui", "diffusers", "onetrainer", "lycoris", "peft"):
            how = lorasurgery.Options(lossy=True, as_lora=True)
            made, report = lorasurgery.convert(adapter, target, how)
            lorasurgery.save(made, tmp_path / f"to-{target}", report=report, options=lorasurgery.SaveOptions(force=True))
            ledger = report.ledger
            assert ledger is not None
            assert {**ledger.used, **ledger.harmless, **ledger.lost}.keys() == read(source)[0].keys()
            lost = {key for key in read(source)[0] if key.startswith(tuple(case.stem(name) + "." for name in OWN))}
            kept = len(made) == len(adapter)
            assert kept or not report.exact
            if not kept:
                assert set(ledger.lost) <= lost | {key for key in ledger.lost if key.endswith(".diff")}
                with pytest.raises(NotRepresentableError):
                    lorasurgery.convert(adapter, target, lorasurgery.Options(as_lora=True))


# a base model ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sd-scripts", "comfyui"])
def test_a_base_tells_what_they_are(layout: str, tmp_path: Path) -> None:
    """With the model's header a module of a newer variant goes where the model's own names are read."""
    arch = named("wan-2.1-t2v-1.3b")[0]
    case = Case(arch.key, layout, "lora", 5, "F32")
    source, base = tmp_path / "a.safetensors", tmp_path / "base.safetensors"
    write(source, case.tensors(), {"format": "pt"})
    shapes = {f"{name}.weight": list(shape) for name, shape in arch.shapes.items()} | {f"{n}.weight": list(SIZE) for n in OWN}
    hollow(base, {**shapes, BARE[0]: [1, 6, 20], BARE[1]: [8]})
    for target, prefix in (("comfyui", "diffusion_model."), ("sd-scripts", "lora_unet_")):
        out = tmp_path / f"{target}.safetensors"
        report = told("convert", source, out, "--target", target, "--base", base)
        assert report["exact"] or report["error"]["total"] < 1e-6
        assert not report["ledger"]["lost"]
        stems = modules(read(out)[0])[0].keys()
        assert {prefix + (n.replace(".", "_") if prefix.endswith("_") else n) for n in OWN} <= stems
    outcome = run("convert", source, tmp_path / "d.safetensors", "--target", "diffusers", "--base", base)
    assert outcome.code == 1
    assert "Diffusers has no name for this module" in outcome.err or "Diffusers does not load NORM" in outcome.err


def test_a_base_with_the_names_of_diffusers_beside_it(tmp_path: Path) -> None:
    """LTX-2's blocks are called alike in both, so a new module in them is, too."""
    arch = named("ltx2")[0]
    name = "transformer_blocks.0.attn1.to_gate_logits"
    source, base, out = (tmp_path / f"{n}.safetensors" for n in ("a", "base", "out"))
    hollow(base, {f"{n}.weight": list(shape) for n, shape in (*arch.shapes.items(), (name, (32, 64)))})
    rng, tensors = np.random.default_rng(0), dict[str, Raw]()
    known = "transformer_blocks.0.attn1.to_q"
    for own, (rows, inputs) in ((known, arch.shapes[known]), (name, (32, 64))):
        tensors[f"diffusion_model.{own}.lora_A.weight"] = raw(rng.standard_normal((2, inputs)), "F32")
        tensors[f"diffusion_model.{own}.lora_B.weight"] = raw(rng.standard_normal((rows, 2)), "F32")
    write(source, tensors, {})
    report = told("convert", source, out, "--target", "diffusers", "--base", base)
    assert report["exact"]
    assert read(out)[0] == {key.replace("diffusion_model.", "transformer."): own for key, own in tensors.items()}
