"""One account of every file: each key is used, harmless or lost, in exactly one of them, and ``exact`` follows from it.

What a file does is computed by the dense oracle, which knows no table of the package.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorasurgery
from lorasurgery.errors import DroppedKeysError, SurgeryError
from tests.builders import Builder, plain_weights
from tests.edges import run
from tests.oracle import Raw, Tensors, model, raw, read, rule, write
from tests.test_own_names import assert_effect, effect

if TYPE_CHECKING:
    from pathlib import Path

ARCHS = ("sdxl", "z-image", "flux1-dev", "wan-2.1-t2v-1.3b")
FAMILIES = ("lora", "loha", "lokr", "full")
HARMLESS = ("lokr_factor", "step", "optimizer.state.0")
"""Keys that change nothing in any program."""
STRANGE = ("ema.decay", "adapter.gate.table", "lora_unet_lens.some_word", "notes")
"""Keys that no program's file has, or that say nothing of what they are."""
BROKEN = (".lora_up.weight", ".hada_w1_a", ".lokr_w2_b")
"""One tensor of a module, without the others."""


@dataclass(frozen=True)
class Mixture:
    """What is in a file."""

    arch: str
    family: str
    known: int
    own: int
    harmless: tuple[str, ...] = ()
    strange: tuple[str, ...] = ()
    broken: tuple[str, ...] = field(default=())

    def tensors(self) -> Tensors:
        """The file, in sd-scripts' words."""
        of = model(self.arch)
        builder = Builder.start(of, "sd-scripts", "F32", self.known)
        small = set(sorted(plain_weights(of), key=lambda name: math.prod(of.shapes[name]))[:24])
        names = of.names(rule("sd-scripts", of).naming)
        some = [name for name, place in names.items() if len(place) == 1 and place[0].weight in small]
        for i, name in enumerate(some[: self.known]):
            builder.add(name, self.family, rank=2 + i % 2, alpha=1.5)
        for i in range(self.own):
            builder.put(f"lora_unet_novel_{i}_proj", (24, 16), FAMILIES[i % 3], rank=2, alpha=3.0)
        found = builder.made.tensors
        found |= {key: raw(np.array(-1), "I64") for key in self.harmless}
        found |= {key: raw(np.ones(3), "F32") for key in self.strange}
        found |= {f"lora_unet_torn{i}{end}": raw(np.ones((4, 2)), "F32") for i, end in enumerate(self.broken)}
        order = list(found)
        random.Random(self.own).shuffle(order)
        return {key: found[key] for key in order}


MIXTURES = st.builds(
    Mixture, st.sampled_from(ARCHS), st.sampled_from(FAMILIES), st.integers(6, 9), st.integers(0, 3),
    st.sets(st.sampled_from(HARMLESS)).map(lambda own: tuple(sorted(own))),
    st.sets(st.sampled_from(STRANGE), max_size=3).map(lambda own: tuple(sorted(own))),
)  # fmt: skip


def keys_of(ledger: dict[str, Any]) -> tuple[int, set[str], set[str]]:
    """Of the JSON form: the number of used keys, the harmless and the lost ones."""
    harmless, lost = ({row["key"] for row in ledger[name]} for name in ("harmless", "lost"))
    return ledger["used"], harmless, lost


def saved(path: Path, mixture: Mixture) -> Tensors:
    tensors = mixture.tensors()
    write(path, tensors, {"format": "pt"})
    return tensors


@given(mixture=MIXTURES)
@settings(max_examples=20, deadline=None)
def test_every_key_is_in_one_place_and_exact_is_so(mixture: Mixture, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    source, out = folder / "a.safetensors", folder / "o.safetensors"
    tensors = saved(source, mixture)
    adapter = lorasurgery.load(source, arch=mixture.arch)
    ledger = adapter.ledger
    places = [set(own) for own in (ledger.used, ledger.harmless, ledger.lost)]
    assert set.union(*places) == set(tensors)
    assert sum(map(len, places)) == len(tensors)
    assert places[2] == set(mixture.strange)
    assert set(mixture.harmless) <= places[1]
    for dtype in ("keep", "bf16"):
        made, report = lorasurgery.convert(adapter, None, lorasurgery.Options(dtype=dtype))
        report = lorasurgery.save(made, out, report=report, options=lorasurgery.SaveOptions(force=True))
        assert report.ledger is not None
        assert set(report.ledger.lost) == set(mixture.strange)
        before, after = (modules_of(path, mixture) for path in (source, out))
        same = before.keys() == after.keys() and all(np.allclose(after[k], before[k], rtol=1e-9, atol=0) for k in before)
        assert report.exact == (same and not mixture.strange)
        assert read(out)[0].keys() == tensors.keys()


def modules_of(path: Path, mixture: Mixture) -> dict[str, Any]:
    """The dense changes of the modules, the keys aside that are none."""
    tensors, metadata = read(path)
    aside = (*mixture.strange, *mixture.harmless)
    own = {key: value for key, value in tensors.items() if key not in aside}
    write(path.with_name("plain.safetensors"), own, metadata)
    return effect(path.with_name("plain.safetensors"))


@given(mixture=MIXTURES, broken=st.sampled_from(BROKEN))
@settings(max_examples=6, deadline=None)
def test_a_torn_module_is_named_and_nothing_is_written(
    mixture: Mixture, broken: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    source, out = folder / "a.safetensors", folder / "o.safetensors"
    torn = Mixture(mixture.arch, mixture.family, mixture.known, mixture.own, broken=(broken,))
    saved(source, torn)
    with pytest.raises(SurgeryError, match="lora_unet_torn0"):
        lorasurgery.load(source, arch=mixture.arch)
    for words in (
        ("convert", source, out, "-t", "comfyui"),
        ("prune", source, out, "--drop", "te"),
        ("merge", source, "-o", out),
    ):
        outcome = run(*words, "--arch", mixture.arch)
        assert outcome.code != 0
        assert "lora_unet_torn0" in outcome.err
        assert not out.exists()


VERBS: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "convert": (("{in}", "{out}", "-t", "comfyui"), ("ledger",)),
    "prune": (("{in}", "{out}", "--drop", "te"), ("ledger",)),
    "resize": (("{in}", "{out}", "--rank", 1, "--as", "lora"), ("ledger",)),
    "rerank": (("{in}", "{out}", "--rank", 1), ("ledger",)),
    "merge": (("{in}", "-o", "{out}"), ("ledgers", "0")),
    "split": (("{in}", "--by", "component", "--out-dir", "{out}"), ("ledger",)),
}
"""Verb -> its words, and where in its JSON the account is."""


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("strange", [(), ("adapter.gate.table", "notes")], ids=["clean", "strange"])
def test_every_verb_shows_the_account_and_strict_fails_on_what_is_lost(
    verb: str, strange: tuple[str, ...], tmp_path: Path
) -> None:
    source, out = tmp_path / "a.safetensors", tmp_path / ("out" if verb == "split" else "o.safetensors")
    tensors = saved(source, Mixture("sdxl", "lora", 4, 0, ("lokr_factor",), strange))
    words = [str(word).replace("{in}", str(source)).replace("{out}", str(out)) for word in VERBS[verb][0]]
    known = () if verb == "rerank" else ("--arch", "sdxl")
    strict = run(verb, *words, *known, "--strict", "--json")
    assert (strict.code == 0) == (not strange), strict.err
    if strange:
        assert any(key in strict.err for key in strange)
        assert not out.exists() or not list(out.iterdir())
    done = run(verb, *words, *known, "--json", *(() if strange else ("--force",)))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    for step in VERBS[verb][1]:
        found = found[int(step)] if step.isdigit() else found[step]
    used, harmless, lost = keys_of(found)
    assert lost == set(strange)
    assert used + len(harmless) + len(lost) == len(tensors)


def test_a_merge_is_exact_only_where_all_of_its_files_are_understood(tmp_path: Path) -> None:
    first, second, out = (tmp_path / f"{name}.safetensors" for name in "abo")
    saved(first, Mixture("sdxl", "lora", 4, 0))
    saved(second, Mixture("sdxl", "lora", 3, 0, strange=("adapter.gate.table",)))
    done = run("merge", first, f"{second}:0.5", "-o", out, "--arch", "sdxl")
    assert done.code == 0, done.err
    assert "b.safetensors: adapter.gate.table" in done.out
    own = run("merge", first, f"{first}:0.5", "-o", out, "--arch", "sdxl", "--force")
    assert "adapter.gate.table" not in own.out
    before = effect(first)
    assert_effect(effect(out), {stem: 1.5 * change for stem, change in before.items()}, 1e-6)


def test_strict_extraction_fails_on_what_it_would_leave_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base: dict[str, Raw] = {f"blocks.{i}.proj.weight": raw(rng.integers(-4, 5, (40, 30)), "F32") for i in range(4)}
    tuned = {key: raw(value.f64() + np.outer(np.ones(40), np.ones(30)), "F32") for key, value in base.items()}
    more = tuned | {"blocks.9.proj.weight": raw(np.ones((40, 30)), "F32")}
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "more")]
    for path, own in zip(paths, (base, tuned, more), strict=True):
        write(path, own)
    out = tmp_path / "out.safetensors"
    refused = run("extract", paths[0], paths[2], "-o", out, "--rank", 1, "--strict")
    assert refused.code != 0
    assert "blocks.9.proj" in refused.err
    assert not out.exists()
    done = run("extract", paths[0], paths[1], "-o", out, "--rank", 1, "--strict", "--force")
    assert done.code == 0, done.err


def test_refusals_list_every_key(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    saved(source, Mixture("z-image", "lora", 4, 1, strange=("notes", "ema.decay")))
    adapter = lorasurgery.load(source, arch="z-image")
    with pytest.raises(DroppedKeysError) as caught:
        lorasurgery.save(adapter, tmp_path / "o.safetensors", options=lorasurgery.SaveOptions(strict=True))
    assert set(caught.value.keys) == {"notes", "ema.decay"}


@pytest.mark.parametrize("lost", [(), ("some.gate.table",)])
def test_apply_and_ema_have_the_same_ledger(lost: tuple[str, ...], tmp_path: Path) -> None:
    """Every key of every file is in one place; ``--strict`` fails where one is lost, and not for what is harmless."""
    of = model("z-image")
    names = sorted(plain_weights(of), key=lambda name: math.prod(of.shapes[name]))[:3]
    builder = Builder.start(of, "comfyui", "F32", 5)
    for name in names[:2]:
        builder.add(name, "lora", rank=2, alpha=1.0)
    harmless = {"lokr_factor": raw(-1, "F32"), "step": raw(7, "F32")}
    strange = {key: raw([1.0, 2.0], "F32") for key in lost}
    base, source, out = (tmp_path / f"{name}.safetensors" for name in ("base", "source", "out"))
    write(base, {f"{name}.weight": raw(np.zeros(of.shapes[name]), "F32") for name in names})
    write(source, {**builder.made.tensors, **harmless, **strange})
    commands = {
        "apply": ("apply", base, source, "-o", out, "--arch", "z-image", "--force"),
        "factors": ("ema", source, source, "-o", out, "--force", "--sort", "given"),
        "changes": ("ema", source, source, "-o", out, "--force", "--sort", "given", "--on", "delta"),
    }
    for name, args in commands.items():
        done = run(*args, "--json")
        assert done.code == 0, done.err
        ledgers = json.loads(done.out)["ledgers"]
        assert len(ledgers) == (1 if name == "apply" else 2)
        for own in ledgers:
            keys = len(builder.made.tensors) + len(harmless) + len(strange)
            assert own["used"] + len(own["harmless"]) + len(own["lost"]) == keys
            if name != "factors":  # the average of the tensors is of every one
                assert {row["key"] for row in own["harmless"]} == set(harmless)
                assert {row["key"] for row in own["lost"]} == set(lost)
        assert run(*args, "--strict").code == (1 if lost and name != "factors" else 0), name
