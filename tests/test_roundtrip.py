"""There and back: renames bit for bit, fuses undone, nothing lost, and nothing left to do the second time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import lorasurgery
from lorasurgery.adapter import Adapter
from lorasurgery.architectures import architectures
from lorasurgery.architectures.table import ORIGINAL, Architecture
from lorasurgery.files.read import parse
from lorasurgery.io.header import RawFile
from lorasurgery.io.tensors import scalar, zeros
from lorasurgery.layouts.emit import emit
from lorasurgery.layouts.peft_config import PREFIX, adapter_config, components, header_metadata, model_names
from lorasurgery.layouts.scales import HEADER_KEY, PeftConfig
from lorasurgery.layouts.targets import LAYOUTS, Speller, layout, namings
from lorasurgery.site import DENOISER, Site
from tests.builders import (
    Builder,
    Made,
    convert,
    convolutions,
    factors,
    fused_weights,
    granularity,
    layouts_of,
    modules_of,
    plain_weights,
    swapped_weights,
)
from tests.oracle import REFERENCES, Meaning, Model, assert_same, fixture, model, raw, rule

if TYPE_CHECKING:
    from lorasurgery.io.tensors import Tensor

KEEPING = ("sd-scripts", "comfyui", "lycoris", "onetrainer")
"""Layouts whose alphas are tensors."""
every_model = pytest.mark.parametrize("key", sorted(REFERENCES))
FAMILIES = ("lora", "dora", "loha", "lokr")
FUSED = ("flux1-dev", "z-image", "sd3-3.5-medium", "lumina2", "hunyuan-video", "chroma")


def same_granularity(of: Model, first: str, second: str) -> list[str]:
    """A few weights that two layouts have as the same number of modules, permuted or not."""
    one, two = (granularity(of, rule(layout_id, of).naming) for layout_id in (first, second))
    fused, swapped, convs, plain = fused_weights(of), swapped_weights(of), convolutions(of), plain_weights(of)
    picked = [*fused[:1], *fused[-1:], *swapped, *convs[:1], *convs[-1:], *plain[:2], *plain[-2:]]
    return [w for w in dict.fromkeys(picked) if len(one.get(w, ())) == len(two.get(w, ())) > 0]


def file_of(of: Model, layout_id: str, weights: list[str], family: str, dtype: str = "BF16", seed: int = 0) -> Made:
    """Modules for all rows of some weights, alpha never the rank; a LoKr has blocks of one width in all its parts."""
    builder = Builder.start(of, layout_id, dtype, seed)
    for i, weight in enumerate(weights):
        tucker = len(of.shapes[weight]) > 2 and i % 2 == 0 and family in ("lora", "loha", "lokr")
        for name in modules_of(of, layout_id, weight):
            rows = of.shape(of.names(rule(layout_id, of).naming)[name])[0]
            how: dict[str, object] = {"tucker": True} if tucker else {}
            if family == "lokr":
                how["blocks"] = next(n for n in (14, 10, 6, 5, 4, 3, 2, 1) if rows % n == 0 and even(of, weight, rows // n))
            builder.add(name, family, rank=2 + i % 3, alpha=0.5 + i % 4, **how)
    return builder.made


def even(of: Model, weight: str, size: int) -> bool:
    """Whether blocks of ``size`` rows fit into every part and half of a weight."""
    parts = [rows for name in granularity(of, "diffusers").get(weight, ()) for rows in of.diffusers[name]]
    return all(rows.start % size == 0 and rows.count % size == 0 for rows in parts)


def there_and_back(made: Made, through: str, folder: Path, **how: object) -> Made:
    """Convert to a layout and back to the file's own."""
    middle = convert(made, through, folder, **how)
    assert middle.report.exact
    assert not middle.report.carried
    back = convert(middle.as_made(), made.layout, folder)
    assert back.report.exact
    return back.as_made()


@every_model
def test_renames_return_every_byte(key: str, tmp_path: Path) -> None:
    """Tensors, dtypes and alpha tensors; halves that are swapped on the way are swapped back."""
    of = model(key)
    layouts = [name for name in KEEPING if name in layouts_of(of)]
    pairs = [(a, b) for a in layouts for b in layouts if a != b]
    for i, (first, second) in enumerate(pairs):
        weights = same_granularity(of, first, second)
        made = file_of(of, first, weights, FAMILIES[i % 4], ("BF16", "F16", "F32")[i % 3], seed=i)
        assert there_and_back(made, second, tmp_path).tensors == made.tensors, (first, second)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", FUSED)
def test_a_fused_file_survives_being_split(key: str, family: str, tmp_path: Path) -> None:
    """Split members share their down (LoRA), their right sides (LoHa) or w2 (LoKr), and fuse to the same bytes."""
    of = model(key)
    weights = fused_weights(of)
    made = file_of(of, "comfyui", [weights[0], weights[-1]], family)
    for through in ("onetrainer", "lycoris"):
        middle = convert(made, through, tmp_path)
        assert middle.report.exact
        assert middle.report.actions()["split"] > 2
        assert_same(made.meaning(), middle.meaning())
        assert convert(middle.as_made(), "comfyui", tmp_path).tensors == made.tensors


@pytest.mark.parametrize("family", ["lora", "dora", "loha"])
@pytest.mark.parametrize("key", FUSED)
def test_undoing_a_fuse_gives_back_the_factors(key: str, family: str, tmp_path: Path) -> None:
    """Members of unequal rank and equal scale: bit for bit, through a block-diagonal file."""
    of = model(key)
    builder = Builder.start(of, "onetrainer", "BF16", 3)
    for weight in (fused_weights(of)[0], fused_weights(of)[-1]):
        for i, name in enumerate(modules_of(of, "onetrainer", weight)):
            builder.add(name, family, rank=i + 2, alpha=(i + 2) * 0.75)
    made = builder.made
    back = there_and_back(made, "comfyui", tmp_path)
    assert factors(back.tensors) == factors(made.tensors)
    assert {k: t.item() for k, t in back.tensors.items() if k.endswith("alpha")} == {
        k: t.item() for k, t in made.tensors.items() if k.endswith("alpha")
    }


def test_a_missing_member_stays_missing(tmp_path: Path) -> None:
    of = model("flux1-dev")
    builder = Builder.start(of, "onetrainer", "BF16", 3)
    builder.add("transformer_blocks.3.attn.to_q", "lora", rank=3, alpha=1.5)
    builder.add("transformer_blocks.3.attn.to_v", "lora", rank=2, alpha=1.0)
    middle = convert(builder.made, "comfyui", tmp_path)
    assert middle.tensors["diffusion_model.double_blocks.3.img_attn.qkv.lora_down.weight"].shape == (5, 3072)
    assert_same(builder.made.meaning(), middle.meaning())
    back = convert(middle.as_made(), "onetrainer", tmp_path)
    ours = {k: t for k, t in factors(back.tensors).items() if "to_k" not in k}
    assert ours == factors(builder.made.tensors)
    zero = [t for k, t in back.tensors.items() if "to_k.lora_up" in k or "to_k_lora_up" in k]
    assert all(not np.any(t.f64()) for t in zero)


@pytest.mark.parametrize("through", ["diffusers", "peft", "other"])
@pytest.mark.parametrize("key", ["flux1-dev", "z-image", "sd1", "wan-2.1-t2v-1.3b"])
def test_scales_in_headers_and_configurations(key: str, through: str, tmp_path: Path) -> None:
    """OneTrainer to a layout without alpha tensors and back: the same factors, the same alphas."""
    of = model(key)
    weights = [w for w in same_granularity(of, "onetrainer", "diffusers") if w not in fused_weights(of)]
    made = file_of(of, "onetrainer", [w for w in weights if w not in convolutions(of)], "lora")
    how = {"alpha": "keep" if through == "other" else "header"}
    back = there_and_back(made, through, tmp_path, **how)
    assert factors(back.tensors) == factors(made.tensors)
    assert {k: t.item() for k, t in back.tensors.items() if k.endswith("alpha")} == {
        k: t.item() for k, t in made.tensors.items() if k.endswith("alpha")
    }


@pytest.mark.parametrize("key", ["wan-2.1-t2v-1.3b", "hunyuan-video", "qwen-image", "z-image"])
@pytest.mark.parametrize("family", ["lora", "loha", "lokr"])
def test_default_and_other_are_inverse(key: str, family: str, tmp_path: Path) -> None:
    of = model(key)
    weights = [*fused_weights(of)[:1], *plain_weights(of)[:2], *plain_weights(of)[-2:]]
    made = file_of(of, "sd-scripts", weights, family)
    other = convert(made, "other", tmp_path)
    assert_same(made.meaning(), other.meaning(), 2.0**-8)
    assert all(k.startswith("diffusion_model.") for k in other.tensors)
    if family == "lora":
        assert all(k.endswith((".lora_A.weight", ".lora_B.weight")) for k in other.tensors)
    else:  # their keys and alphas are kept
        assert convert(other.as_made(), "default", tmp_path, alpha="keep").tensors == made.tensors
    back = convert(other.as_made(), "default", tmp_path)
    assert set(back.tensors) == set(made.tensors)
    assert_same(other.meaning(), meaning_as(back.as_made(), "sd-scripts"))


def meaning_as(made: Made, layout_id: str) -> Meaning:
    """What a file means in sd-scripts' layout, whatever its alias was called."""
    return Made(made.of, layout_id, made.tensors, made.metadata, made.configs).meaning()


@pytest.mark.parametrize("target", sorted(LAYOUTS))
@pytest.mark.parametrize("key", ["flux1-dev", "z-image", "sd1", "sd3-medium"])
def test_converting_twice_changes_nothing(key: str, target: str, tmp_path: Path) -> None:
    of = model(key)
    weights = [*fused_weights(of)[:1], *swapped_weights(of)[:1], *plain_weights(of)[:1]]
    builder = Builder.start(of, "sd-scripts", "F16", 5)
    for i, weight in enumerate(weights):
        for name in modules_of(of, "sd-scripts", weight):
            builder.add(name, "lora", rank=3 + i, alpha=1.0)
    once = convert(builder.made, target, tmp_path)
    twice = convert(once.as_made(), target, tmp_path)
    assert twice.tensors == once.tensors
    assert twice.configs == once.configs
    assert set(twice.report.actions()) == {"renamed"}
    assert twice.report.exact
    kept = {k: v for k, v in once.metadata.items() if not k.startswith("lorasurgery.")}
    assert {k: v for k, v in twice.metadata.items() if not k.startswith("lorasurgery.")} == kept


# everything a table has -------------------------------------------------------------------------------------------------------


def whole_table(arch: Architecture) -> Adapter:
    """An adapter with a module for every weight of an architecture and its text encoders, each of its own scale."""
    tensors: dict[str, Tensor] = {}
    for i, (name, shape) in enumerate(arch.shapes.items()):
        stem = f"diffusion_model.{name}"
        if len(shape) == 1:
            tensors[f"{stem}.w_norm"] = zeros("BF16", shape)
            continue
        ones = tuple(1 for _ in shape[2:])
        tensors[f"{stem}.lora_up.weight"] = zeros("BF16", (shape[0], 1, *ones))
        tensors[f"{stem}.lora_down.weight"] = zeros("BF16", (1, *shape[1:]))
        tensors[f"{stem}.alpha"] = scalar(2.0 ** (i % 7 - 3))
    for encoder in arch.encoders:
        for name, shape in fixture("text_encoders")[encoder.table].items():
            stem = f"{encoder.comfyui}.{name}"
            tensors[f"{stem}.lora_up.weight"] = zeros("BF16", (shape[0], 1))
            tensors[f"{stem}.lora_down.weight"] = zeros("BF16", (1, shape[1]))
            tensors[f"{stem}.alpha"] = scalar(0.5)
    return parse(RawFile(Path("x"), tensors, {}), among=(arch,))


def sites(adapter: Adapter) -> dict[Site, float]:
    """Every module's place with its scale."""
    return {site: module.scale.value for site, module in adapter if module.delta is not None}


def reread(adapter: Adapter, target: str) -> Adapter:
    """Converted, emitted and parsed again, in memory."""
    arch = adapter.architecture
    result, report = lorasurgery.convert(adapter, target)
    assert report.exact
    way = next(a for a in ("header", "keep") if a in layout(target).alphas)
    emitted = emit(result, layout(target), report, alpha=way)
    metadata, configs = {}, None
    if target == "diffusers":
        metadata[HEADER_KEY] = header_metadata(emitted.written, arch)
    elif target == "peft":
        configs = {}
        for component, own in components(emitted.written, arch).items():
            prefix = PREFIX if own[0].stem.startswith(PREFIX) else component + "."
            fields = adapter_config(own, model_names(component, arch), prefix)
            configs[prefix.removesuffix(".")] = PeftConfig.from_dict(fields, "adapter_config.json")
    read = parse(RawFile(Path("x"), emitted.tensors, metadata), among=(arch,), configs=configs)
    assert not read.leftovers
    same = sites(read) == sites(result)  # one comparison: pytest's explanation of a thousand takes minutes
    assert same, sorted(sites(read).items() ^ sites(result).items())[:4]
    return read


@pytest.mark.parametrize("key", sorted(architectures()))
def test_every_module_of_every_table_goes_everywhere(key: str) -> None:
    arch = architectures()[key]
    adapter = whole_table(arch)
    assert not adapter.leftovers
    start = sites(adapter)
    assert len(start) == len(arch.shapes) + sum(len(fixture("text_encoders")[e.table]) for e in arch.encoders)
    targets = [t for t in sorted(LAYOUTS) if arch.namings[namings(layout(t), arch)[0].naming]]
    targets = [t for t in targets if t != "comfyui" or arch.has_comfyui]
    rng = np.random.default_rng(len(key))
    current = adapter
    for target in [str(t) for t in rng.permutation(targets)]:
        if target in ("diffusers", "peft"):  # norms and text encoders that are not loaded stay behind
            speller = Speller(layout(target), arch)
            kept = {s: m for s, m in current if m.family == "lora" and (s.component == DENOISER or speller.stem(s))}
            current = Adapter(arch, kept, {}, current.layout)
            encoders = {s for s in kept if s.component != DENOISER}
            start = {s: v for s, v in start.items() if s in encoders or len(arch.shapes.get(s.spans[0].weight, ())) > 1}
        current = reread(current, target)
    same = sites(reread(current, "comfyui" if arch.has_comfyui else "sd-scripts")) == start
    assert same
    assert len(start) >= sum(len(shape) > 1 for shape in arch.shapes.values())


@pytest.mark.parametrize("key", sorted(k for k in REFERENCES if k != "framepack"))
def test_comfyui_accepts_every_denoiser_key(key: str) -> None:
    arch = architectures()[key]
    accepted = fixture("comfyui_key_maps")[REFERENCES[key]]
    adapter = whole_table(arch)
    for source in ("comfyui", "onetrainer"):
        if arch.namings[namings(layout(source), arch)[0].naming]:
            adapter, _ = lorasurgery.convert(adapter, source)
        result, report = lorasurgery.convert(adapter, "comfyui")
        stems = {w.stem for w in emit(result, layout("comfyui"), report).written}
        denoiser = {s for s in stems if not s.startswith("text_encoders.")}
        assert len(denoiser) == len(arch.shapes) - len(arch.beside)
        assert denoiser <= accepted.keys()
        assert {own for _, own in arch.beside} <= stems
    assert arch.namings[ORIGINAL].keys() == arch.shapes.keys()


# what stands beside the modules -----------------------------------------------------------------------------------------------


FACTORS = [("I64", 16), ("BF16", 8), ("F16", -1)]


def lokr_file(key: str, layout_id: str, *, whole: bool = False) -> Builder:
    """A few LoKr modules that every layout can hold."""
    of = model(key)
    builder = Builder.start(of, layout_id, "BF16", 7)
    for i, name in enumerate(modules_of(of, layout_id, plain_weights(of)[-1 - k])[0] for k in range(3)):
        shape = of.shape(of.names(rule(layout_id, of).naming)[name])
        inner = shape[0] // 8 if not whole else 64
        blocks = shape[0] // inner
        stem = builder.add(name, "lokr", rank=4, alpha=2.0 + i, blocks=blocks, whole2=whole)
        if whole:
            builder.made.tensors[f"{stem}.alpha"] = raw(2.0 + i, "F32")
    return builder


@pytest.mark.parametrize(("dtype", "value"), FACTORS)
@pytest.mark.parametrize("target", ["comfyui", "other", "lycoris", "onetrainer", "sd-scripts"])
def test_the_lokr_factor_survives(target: str, dtype: str, value: int, tmp_path: Path) -> None:
    made = lokr_file("z-image", "sd-scripts").made
    made.tensors["lokr_factor"] = raw(value, dtype)
    middle = convert(made, target, tmp_path)
    assert middle.metadata["ss_lokr_factor"] == str(value)
    assert middle.tensors["lokr_factor"] == made.tensors["lokr_factor"]
    back = convert(middle.as_made(), "sd-scripts", tmp_path)
    assert back.tensors == made.tensors
    assert back.metadata["ss_lokr_factor"] == str(value)


@pytest.mark.parametrize(("dtype", "value"), FACTORS)
def test_the_lokr_factor_survives_without_its_buffer(dtype: str, value: int, tmp_path: Path) -> None:
    """Diffusers refuses keys it does not know: the header alone brings the factor back, dtype included."""
    builder = lokr_file("z-image", "sd-scripts")
    builder.made.tensors["lokr_factor"] = raw(value, dtype)
    middle = convert(builder.made, "diffusers", tmp_path, as_lora=True)
    assert "lokr_factor" not in middle.tensors
    assert middle.metadata["ss_lokr_factor"] == str(value)
    lokr = lokr_file("z-image", "comfyui").made
    lokr.metadata |= {k: v for k, v in middle.metadata.items() if "lokr_factor" in k}
    back = convert(lokr, "sd-scripts", tmp_path)
    assert back.tensors["lokr_factor"] == builder.made.tensors["lokr_factor"]


def test_an_explicit_lokr_factor_wins_and_warns(tmp_path: Path) -> None:
    made = lokr_file("z-image", "sd-scripts").made
    made.tensors["lokr_factor"] = raw(16, "BF16")
    output = convert(made, "sd-scripts", tmp_path, lokr_factor=8)
    assert output.tensors["lokr_factor"] == raw(8, "BF16")
    assert output.metadata["ss_lokr_factor"] == "8"
    assert any("16" in warning and "8" in warning for warning in output.report.warnings)


def true_hashes(path: Path) -> tuple[str, str]:
    """sd-scripts' two hashes by its own algorithm: serialise with the ``ss_*`` metadata alone and hash that."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  no mapping
        metadata = {k: v for k, v in file.metadata().items() if k.startswith("ss_")}
    assert all(isinstance(t, torch.Tensor) for t in tensors.values())
    data = save(tensors, metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    legacy = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    return hashlib.sha256(data[start:]).hexdigest(), legacy


@pytest.mark.parametrize("big", [False, True])
def test_hashes_are_sd_scripts_own(big: bool, tmp_path: Path) -> None:
    of = model("flux1-dev")
    builder = Builder.start(of, "onetrainer", "BF16", 5)
    names = [f"transformer_blocks.{i}.ff.net.0.proj" for i in range(6 if big else 1)]
    for name in names:
        builder.add(name, "lora", rank=8 if big else 1, alpha=4.0)
    builder.made.metadata |= {"ss_network_dim": "8", "ss_tag_frequency": json.dumps({"é": 1}), "modelspec.title": "x"}
    output = convert(builder.made, "sd-scripts", tmp_path)
    model_hash, legacy = true_hashes(output.path)
    assert (legacy != "e3b0c442") == big  # of nothing: the window begins at 1 MiB
    assert output.metadata["sshs_model_hash"] == model_hash
    assert output.metadata["sshs_legacy_hash"] == legacy
    assert output.metadata["modelspec.title"] == "x"


def test_network_metadata_is_made_true(tmp_path: Path) -> None:
    of = model("flux1-dev")
    builder = Builder.start(of, "onetrainer", "BF16", 5)
    for part in ("to_q", "to_k", "to_v"):
        builder.add(f"transformer_blocks.0.attn.{part}", "lora", rank=4, alpha=2.0)
    builder.made.metadata |= {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_output_name": "mine"}
    output = convert(builder.made, "sd-scripts", tmp_path)
    assert (output.metadata["ss_network_dim"], float(output.metadata["ss_network_alpha"])) == ("12", 6.0)
    assert output.metadata["ss_network_module"] == "networks.lora_flux"
    assert output.metadata["ss_output_name"] == "mine"
