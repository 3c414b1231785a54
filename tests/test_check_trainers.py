"""What `check` says of PEFT and LyCORIS equals what their own loaders do with the same keys; Forge's and SD.Next's oddities."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from lorasurgery.architectures import named
from lorasurgery.checking.consumers import consumer
from lorasurgery.checking.engine import check
from lorasurgery.checking.result import CHANGED, IGNORED, LOADS, REJECTED
from lorasurgery.checking.subject import read_subject, subject_of
from lorasurgery.cli.app import app
from lorasurgery.io.header import RawFile
from lorasurgery.io.tensors import Tensor, scalar
from lorasurgery.layouts.scales import PeftConfig

if TYPE_CHECKING:
    from lorasurgery.checking.result import Result

PRODUCERS = Path(__file__).parent / "fixtures" / "producers"
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
Shapes = dict[str, tuple[int, ...]]
LORA: Shapes = {"lora_down.weight": (4, 320), "lora_up.weight": (320, 4)}
AB: Shapes = {"lora_A.weight": (4, 320), "lora_B.weight": (320, 4)}
LOHA: Shapes = {"hada_w1_a": (320, 4), "hada_w1_b": (4, 320), "hada_w2_a": (320, 4), "hada_w2_b": (4, 320)}
LOKR: Shapes = {"lokr_w1": (16, 16), "lokr_w2_a": (20, 4), "lokr_w2_b": (4, 20)}


def judged(program: str, stems: list[str], shapes: Shapes, arch: str = "sd1", *, folder: bool = False) -> Result:
    """The verdict on a file whose modules all have these tensors."""
    raw: dict[str, Tensor] = {}
    for stem in stems:
        for suffix, shape in shapes.items():
            raw[f"{stem}.{suffix}"] = scalar(4.0) if suffix == "alpha" else Tensor("F32", shape)
    configs = {"": PeftConfig("adapter_config.json", 4, 4.0)} if folder else None
    return check(subject_of(RawFile(Path("x.safetensors"), raw, {}), among=named(arch), configs=configs), consumer(program))


def one_layer() -> Any:
    """A model that has SD 1's first query projection, where it is in Diffusers' UNet, and nothing else."""
    import torch

    *path, last = Q.split(".")
    root = inner = torch.nn.Module()
    for name in path:
        inner.add_module(name, torch.nn.Module())
        inner = inner.get_submodule(name)
    inner.add_module(last, torch.nn.Linear(320, 320, bias=False))
    return root


# PEFT --------------------------------------------------------------------------------------------------------------------

PREFIX = "base_model.model."


def peft_accepts(prefix: str, shapes: Shapes, kind: str, options: dict[str, Any]) -> bool:
    """Whether every key arrives in the model that PEFT makes of its own configuration."""
    import peft
    import torch

    config = getattr(peft, kind)(target_modules=["to_q"], r=4, **options)
    model = peft.get_peft_model(one_layer(), config)
    state = {f"{prefix}{Q}.{suffix}": torch.full(shape, 0.25) for suffix, shape in shapes.items()}
    peft.set_peft_model_state_dict(model, state)
    loaded = peft.get_peft_model_state_dict(model)
    values = [value for key, value in loaded.items() if key.startswith(f"{PREFIX}{Q}.")]
    return len(values) == len(shapes) and all(bool((value == 0.25).all()) for value in values)


@pytest.mark.parametrize(
    ("prefix", "shapes", "kind", "options"),
    [
        (PREFIX, AB, "LoraConfig", {}),
        (PREFIX, {**AB, "lora_magnitude_vector": (320,)}, "LoraConfig", {"use_dora": True}),
        (PREFIX, {**AB, "lora_B.bias": (320,)}, "LoraConfig", {"lora_bias": True}),
        (PREFIX, LOHA, "LoHaConfig", {}),
        (PREFIX, LOKR, "LoKrConfig", {}),
        (PREFIX, LORA, "LoraConfig", {}),
        ("", AB, "LoraConfig", {}),
        ("diffusion_model.", AB, "LoraConfig", {}),
    ],
    ids=["lora", "dora", "bias", "loha", "lokr", "kohya words", "no prefix", "comfyui"],
)
@pytest.mark.filterwarnings("ignore")
def test_peft(prefix: str, shapes: Shapes, kind: str, options: dict[str, Any]) -> None:
    result = judged("peft", [prefix + Q], shapes, folder=True)
    assert (result.counts[LOADS] == 1) == peft_accepts(prefix, shapes, kind, options), result.findings


# LyCORIS -----------------------------------------------------------------------------------------------------------------


def lycoris_makes(stem: str, shapes: Shapes) -> str:
    """What ``create_lycoris_from_weights`` makes of these tensors."""
    import torch
    from lycoris import LycorisNetwork, create_lycoris_from_weights

    LycorisNetwork.LORA_PREFIX = "lycoris"
    state = {f"{stem}.{suffix}": torch.full(shape, 0.25) for suffix, shape in shapes.items()}
    try:
        network, _ = create_lycoris_from_weights(1.0, "", one_layer(), weights_sd=state)
    except AttributeError:  # what it makes of a module without a word it knows
        return "refused"
    return "loads" if network.loras else "ignored"


@pytest.mark.parametrize(
    ("prefix", "shapes"),
    [
        ("lycoris_", {**LORA, "alpha": ()}), ("lycoris_", {**LOHA, "alpha": ()}), ("lycoris_", {**LOKR, "alpha": ()}),
        ("lycoris_", {"diff": (320, 320)}),
        ("lycoris_", {**AB, "alpha": ()}), ("lora_transformer_", {**LORA, "alpha": ()}),
    ],
    ids=["lora", "loha", "lokr", "full", "peft words", "another prefix"],
)  # fmt: skip
def test_lycoris(prefix: str, shapes: Shapes) -> None:
    stem = prefix + Q.replace(".", "_")
    result = judged("lycoris", [stem], shapes)
    verdict = "refused" if result.refusals else "loads" if result.counts[LOADS] else "ignored"
    assert verdict == lycoris_makes(stem, shapes), result.verdict


# Forge and SD.Next ----------------------------------------------------------------------------------------------------------

FLUX: Shapes = {"lora_A.weight": (4, 3072), "lora_B.weight": (3072, 4)}
SD3: Shapes = {"lora_A.weight": (4, 1536), "lora_B.weight": (1536, 4)}
Z_IMAGE: Shapes = {"lora_A.weight": (4, 3840), "lora_B.weight": (3840, 4)}
FLUX_KOHYA: Shapes = {"lora_down.weight": (4, 3072), "lora_up.weight": (3072, 4)}


def flux_stems(template: str, count: int = 4) -> list[str]:
    return [template.format(i=i) for i in range(count)]


def test_forge_knows_flux_in_diffusers_names_and_drops_what_is_mostly_strange() -> None:
    stems = flux_stems("transformer.transformer_blocks.{i}.attn.to_q")
    assert judged("forge", stems, FLUX, "flux1-dev").complete
    strange = flux_stems("base_model.model.transformer_blocks.{i}.attn.to_k", 7)
    result = judged("forge", [*stems, *strange], {**FLUX, "alpha": ()}, "flux1-dev")
    assert result.counts[REJECTED] == len(stems) + len(strange)
    assert "more than 12 keys" in result.refusals[0]
    assert "(21 keys)" in result.refusals[0]
    assert judged("forge", [*stems, *strange[:4]], {**FLUX, "alpha": ()}, "flux1-dev").counts[LOADS] == len(stems)
    assert "no loader for" in judged("forge", ["diffusion_model.layers.0.attention.to_q"], Z_IMAGE, "z-image").verdict


def test_forge_reads_neither_norms_of_flux_nor_sd3_in_diffusers_names() -> None:
    gains = judged("forge", flux_stems("transformer.transformer_blocks.{i}.attn.norm_q"), {"w_norm": (128,)}, "flux1-dev")
    assert gains.counts[IGNORED] == 4
    assert judged("forge", ["transformer.transformer_blocks.0.attn.to_q"], SD3, "sd3-medium").counts[IGNORED] == 1


@pytest.mark.parametrize(
    ("stem", "shapes", "loads"),
    [
        ("transformer.transformer_blocks.{i}.attn.to_q", FLUX, False),
        ("transformer.transformer_blocks.{i}.attn.to_q", FLUX_KOHYA, True),
        ("lora_transformer_transformer_blocks_{i}_attn_to_q", FLUX_KOHYA, True),
        ("lycoris_transformer_blocks_{i}_attn_to_q", FLUX_KOHYA, True),
        ("lora_unet_double_blocks_{i}_img_attn_proj", {**FLUX_KOHYA, "alpha": ()}, True),
        ("lora_unet_double_blocks_{i}_img_attn_proj", FLUX_KOHYA, False),
        ("lora_unet_double_blocks_{i}_img_attn_proj", {**FLUX_KOHYA, "alpha": (), "dora_scale": (3072, 1)}, False),
    ],
)
def test_sdnext_reads_flux_its_own_way(stem: str, shapes: Shapes, loads: bool) -> None:
    assert judged("sdnext", flux_stems(stem), shapes, "flux1-dev").complete == loads


def test_sdnext_loses_the_denoiser_beside_a_text_encoder() -> None:
    stems = [*flux_stems("lora_unet_double_blocks_{i}_img_attn_proj"), "lora_te1_text_model_encoder_layers_0_mlp_fc1"]
    assert judged("sdnext", stems, {**FLUX_KOHYA, "alpha": ()}, "flux1-dev").counts[REJECTED] == 5


def test_sdnext_exchanges_the_attention_of_sd3_and_hands_the_rest_to_diffusers() -> None:
    qkv = {"lora_down.weight": (4, 1536), "lora_up.weight": (4608, 4), "alpha": ()}
    assert judged("sdnext", ["lora_unet_joint_blocks_0_x_block_attn_qkv"], qkv, "sd3-medium").counts[CHANGED] == 1
    path = PRODUCERS / "diffusers_qwen.safetensors"
    assert check(read_subject(path), consumer("sdnext")).complete, "Diffusers reads the alpha in the header"
    assert not check(read_subject(path), consumer("onetrainer")).complete


# what mends -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["comfyui", "diffusers", "sd-scripts", "onetrainer", "peft", "lycoris", "forge", "sdnext"])
def test_the_command_that_mends_makes_a_file_that_loads(program: str, tmp_path: Path) -> None:
    """Every producer's file that has such a command, run as it is printed but for the place of the output."""
    mended = 0
    for path in sorted(PRODUCERS.iterdir()):
        if ".truth." in path.name or path.suffix not in {"", ".safetensors"}:
            continue
        before = check(read_subject(path), consumer(program))
        if before.mend is None:
            continue
        words = shlex.split(before.mend)[1:]
        words[2] = str(tmp_path / Path(words[2]).name)
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (before.mend, done.stderr)
        after = check(read_subject(words[2], arch=before.architecture), consumer(program))
        assert after.complete or before.notes[-1] == f"after the command below it {after.verdict}", (before.mend, after.verdict)
        mended += 1
    assert mended


def test_a_refusal_is_said_once_with_the_number_of_its_keys() -> None:
    stems = [f"lora_unet_{Q.replace('.', '_')}", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"]
    result = judged("diffusers", stems[:1], {**LOHA, "alpha": ()})
    assert result.refusals == (f"ValueError for keys it does not read, first {stems[0]}.hada_w1_a (4 keys)",)
