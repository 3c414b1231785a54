"""``lorasurgery check``: verdicts on files, what converting makes of them, the command line."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lorasurgery
from lorasurgery.architectures import architectures
from lorasurgery.checking.consumers import CONSUMERS, consumer
from lorasurgery.checking.engine import check
from lorasurgery.checking.result import CHANGED, IGNORED, LOADS, UNKNOWN, Result
from lorasurgery.checking.subject import read_subject
from lorasurgery.errors import RequestError
from tests.builders import Builder, can, fused_weights, modules_of, plain_weights
from tests.oracle import REFERENCES, Model, model, raw, write

FIXTURES = Path(__file__).parent / "fixtures"
TARGETS = {"comfyui": "comfyui", "diffusers": "diffusers", "sd-scripts": "sd-scripts", "musubi": "sd-scripts",
           "peft": "peft", "onetrainer": "onetrainer", "lycoris": "lycoris", "forge": "sd-scripts"}  # fmt: skip
"""Program -> what ``convert --target`` writes for it."""


def result_of(path: Path, program: str, arch: str | None = None) -> Result:
    return check(read_subject(path, arch=arch), consumer(program))


def small(of: Model, layout: str, *, alpha: float | None = 2.0) -> Builder:
    """A file with a fused weight's modules, where there is one, and two plain ones, in blocks."""
    build = Builder.start(of, layout)
    blocks = (*fused_weights(of)[:1], *plain_weights(of)[-2:])
    for weight in dict.fromkeys(blocks):
        for name in modules_of(of, layout, weight):
            build.add(name, "lora", rank=4, alpha=alpha)
    return build


@pytest.mark.parametrize("key", REFERENCES)
def test_what_convert_writes_loads_completely(key: str, tmp_path: Path) -> None:
    of = model(key)
    build = small(of, "sd-scripts")
    path = build.made.save(tmp_path)
    for program, target in TARGETS.items():
        own, arch = consumer(program), architectures()[key]
        if not own.models.get(arch.id, own.default) or not can(of, target):
            continue
        adapter = lorasurgery.load(path, arch=key)
        converted, report = lorasurgery.convert(adapter, target)
        out = tmp_path / (program if target == "peft" else f"{program}.safetensors")
        lorasurgery.save(converted, out, report=report)
        assert result_of(out, program, key).verdict == "loads completely", program


def test_the_command_that_mends_does(tmp_path: Path) -> None:
    path = FIXTURES / "samples" / "z_image_lokr.safetensors"
    before = result_of(path, "comfyui")
    assert (before.counts[LOADS], before.counts[IGNORED]) == (9, 12)
    assert before.verdict == "loads 9 of 21 modules: ComfyUI does not know these names after lora_unet_ (12 modules)"
    assert before.mend is not None
    words = shlex.split(before.mend)
    words[3] = str(tmp_path / "mended.safetensors")
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    assert result_of(tmp_path / "mended.safetensors", "comfyui").complete


def test_alpha_in_the_header_is_not_read_by_comfyui() -> None:
    result = result_of(FIXTURES / "producers" / "diffusers_qwen.safetensors", "comfyui")
    assert {f.status for f in result.findings} == {CHANGED}
    assert {f.reason for f in result.findings} == {"strength"}
    assert "times as strong" in result.verdict
    assert result_of(FIXTURES / "producers" / "diffusers_qwen.safetensors", "diffusers").complete


def made(tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    write(tmp_path / "made.safetensors", tensors, metadata)
    return tmp_path / "made.safetensors"


def zeros(*shape: int) -> Any:
    import numpy as np

    return raw(np.zeros(shape), "F16")


def z_image(*suffixes: tuple[str, tuple[int, ...]], stem: str = "diffusion_model.layers.0.attention.to_q") -> dict[str, Any]:
    """A Z-Image file of 3840 x 3840 modules; every layer has the same suffixes."""
    return {stem.replace("0", str(i)) + suffix: zeros(*shape) for i in range(30) for suffix, shape in suffixes}


AB = ((".lora_A.weight", (4, 3840)), (".lora_B.weight", (3840, 4)))


def test_dora_spellings(tmp_path: Path) -> None:
    path = made(tmp_path, z_image(*AB, (".lora_magnitude_vector", (3840,))))
    result = result_of(path, "comfyui")
    assert {f.reason for f in result.findings} == {"dora"}
    assert result_of(made(tmp_path, z_image(*AB, (".dora_scale", (1, 3840)))), "comfyui").complete


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((3840, 1), "norm of the base weight alone"), ((3840,), "multiplied with the columns"),
        ((3840, 1, 1, 1), "skipped"), ((1, 64), "skipped"),
    ],
)  # fmt: skip
def test_a_magnitude_that_comfyui_takes_otherwise_is_altered(shape: tuple[int, ...], text: str, tmp_path: Path) -> None:
    result = result_of(made(tmp_path, z_image(*AB, (".dora_scale", shape))), "comfyui")
    assert not result.complete
    assert result.counts == {CHANGED: 30}
    assert text in result.findings[0].text


STEM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_input_blocks_4_0_in_layers_2"
BLOCKS = ("oft_blocks", (8, 80, 80))


@pytest.mark.parametrize(
    ("stem", "shapes", "alpha", "text"),
    [
        (STEM, (BLOCKS,), None, ""),
        (STEM, (BLOCKS,), 0.0, ""),
        (STEM, (BLOCKS,), 0.5, "another constraint"),
        (STEM, (BLOCKS, ("rescale", (640, 1))), None, "rescale"),
        (STEM, (("oft_blocks", (3, 8, 80, 80)),), None, "BOFT without alpha"),
        (STEM, (("oft_blocks", (3, 8, 80, 80)), ("rescale", (640, 1))), 0.0, ""),
        (
            CONV,
            (("lokr_w1", (16, 20)), ("lokr_w2_a", (4, 40)), ("lokr_w2_b", (4, 16)), ("lokr_t2", (4, 4, 3, 3))),
            4.0,
            "torch.kron",
        ),
        (CONV, (("lokr_w1", (16, 20)), ("lokr_w2", (40, 16, 3, 3))), 4.0, ""),
        (STEM, (("lora_down.weight", (4, 640)), ("lora_up.weight", (640, 4)), ("diff_b", (640,))), 4.0, "has none there"),
        (
            STEM.replace("to_q", "to_out_0"),
            (("lora_down.weight", (4, 640)), ("lora_up.weight", (640, 4)), ("diff_b", (640,))),
            4.0,
            "",
        ),
    ],
)
def test_what_comfyui_reads_and_uses_otherwise_is_altered(
    stem: str, shapes: tuple[tuple[str, tuple[int, ...]], ...], alpha: float | None, text: str, tmp_path: Path
) -> None:
    tensors = {f"{stem}.{word}": zeros(*shape) for word, shape in shapes}
    tensors |= {} if alpha is None else {f"{stem}.alpha": raw(alpha, "F32")}
    result = result_of(made(tmp_path, tensors), "comfyui", "sdxl")
    assert result.complete == (not text), result.verdict
    assert text in result.findings[0].text


@pytest.mark.parametrize("kernel", [(1, 2, 2), (2, 2)])
def test_a_core_of_a_convolution_that_is_not_flat_stops_comfyui(kernel: tuple[int, ...], tmp_path: Path) -> None:
    stem, ones = "diffusion_model.patch_embedding", tuple(1 for _ in kernel)
    shapes = {"lora_down.weight": (4, 16, *ones), "lora_up.weight": (1536, 4, *ones), "lora_mid.weight": (4, 4, *kernel)}
    path = made(tmp_path, {f"{stem}.{word}": zeros(*shape) for word, shape in shapes.items()})
    (finding,) = result_of(path, "comfyui", "wan-2.1-t2v-1.3b").findings
    assert ("Tucker core" in finding.text) == (len(kernel) == 3)


def test_complete_never_stands_beside_a_key_with_an_effect(tmp_path: Path) -> None:
    tensors = z_image(*AB) | {"diffusion_model.layers.0.attention_norm1.strange": zeros(3840)}
    result = result_of(made(tmp_path, tensors), "comfyui")
    assert result.counts == {LOADS: 30}
    assert not result.complete
    assert "passed over" in result.verdict
    harmless = made(tmp_path, z_image(*AB) | {"lokr_factor": raw(8, "I64")})
    assert result_of(harmless, "comfyui").complete


def test_a_mend_that_leaves_out_says_so(tmp_path: Path) -> None:
    """A norm has no place in Diffusers' file: leaving it out is offered as the choice that it is."""
    tensors = z_image(*AB) | {"diffusion_model.layers.0.attention_norm1.w_norm": zeros(3840)}
    result = result_of(made(tmp_path, tensors), "diffusers")
    assert result.mend is not None
    assert "--lossy" in result.mend
    assert any("leaves out" in note and "choice" in note for note in result.notes)


def test_a_part_of_a_fused_weight_has_no_bias_in_comfyui(tmp_path: Path) -> None:
    assert {f.reason for f in result_of(made(tmp_path, z_image(*AB, (".diff_b", (3840,)))), "comfyui").findings} == {"bias"}


def test_whole_lokr_with_the_forks_meaning(tmp_path: Path) -> None:
    lokr = ((".lokr_w1", (8, 8)), (".lokr_w2", (480, 480)))
    tensors = z_image(*lokr, stem="lora_unet_layers_0_attention_to_q")
    tensors |= {f"lora_unet_layers_{i}_attention_to_q.alpha": raw(48.0, "F32") for i in range(30)}
    assert result_of(made(tmp_path, tensors), "musubi").complete
    fork = made(tmp_path, tensors | {"lokr_factor": raw(8, "I64")})
    assert {f.reason for f in result_of(fork, "musubi").findings} == {"strength"}


def test_alpha_of_ten_billion(tmp_path: Path) -> None:
    tensors = z_image(*AB) | {f"diffusion_model.layers.{i}.attention.to_q.alpha": raw(1e10, "F32") for i in range(30)}
    assert "1e+10" in result_of(made(tmp_path, tensors), "comfyui").findings[0].text


def test_rslora_flag(tmp_path: Path) -> None:
    tensors = z_image(
        (".lora_down.weight", (4, 3840)), (".lora_up.weight", (3840, 4)), stem="lora_unet_layers_0_attention_to_q"
    )
    tensors |= {f"lora_unet_layers_{i}_attention_to_q.alpha": raw(4.0, "F32") for i in range(30)}
    tensors["use_rslora_flag"] = raw(1, "BOOL")
    finding = result_of(made(tmp_path, tensors), "musubi").findings[0]
    assert finding.text == "0.5 times as strong: the rsLoRA flag is not read"


def test_a_factor_without_its_partner_stops_comfyui(tmp_path: Path) -> None:
    tensors = z_image(*AB)
    del tensors["diffusion_model.layers.3.attention.to_q.lora_A.weight"]
    result = result_of(made(tmp_path, tensors), "comfyui")
    assert result.verdict.startswith("nothing loads: KeyError: diffusion_model.layers.3.attention.to_q has")


def test_two_names_for_one_weight(tmp_path: Path) -> None:
    tensors = z_image(*AB) | z_image(*AB, stem="lycoris_layers_0_attention_to_q")
    assert result_of(made(tmp_path, tensors), "comfyui").counts == {LOADS: 30, IGNORED: 30}


def test_split_qkv_is_pointed_out(tmp_path: Path) -> None:
    path = made(tmp_path, z_image(*AB), {"ss_network_args": '{"split_qkv": "True"}'})
    assert any("split_qkv" in note for note in result_of(path, "comfyui").notes)


def test_numbered_modules_are_read_nowhere(tmp_path: Path) -> None:
    tensors = {}
    for i in range(3):
        tensors[f"unet:{i}:up"], tensors[f"unet:{i}:down"] = zeros(320, 4), zeros(4, 320)
    assert "cloneofsimo/lora's keys number the modules" in result_of(made(tmp_path, tensors), "comfyui").verdict


def test_unknown_is_said() -> None:
    result = result_of(FIXTURES / "producers" / "diffusers_wan.safetensors", "onetrainer")
    assert not result.known
    assert result.verdict.startswith("unknown")
    assert result.counts.keys() == {UNKNOWN}
    with pytest.raises(RequestError, match="comfyui, diffusers"):
        consumer("photoshop")


# the command line ---------------------------------------------------------------------------------------------------------


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorasurgery", "check", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_base_decides_names_and_shapes(tmp_path: Path) -> None:
    """A base that is narrower than the table's: the file no longer fits it."""
    of = model("z-image")
    base = {f"{name}.weight": zeros(*(max(n // 16, 1) for n in shape)) for name, shape in of.shapes.items()}
    write(tmp_path / "base.safetensors", base)
    path = FIXTURES / "samples" / "z_image_lokr.safetensors"
    plain, narrow = run(path, "--for", "musubi"), run(path, "--for", "musubi", "--base", tmp_path / "base.safetensors")
    assert "loads completely" in plain.stdout
    assert "loads completely" not in narrow.stdout


def test_folder_gives_one_line_a_file_and_strict_fails(tmp_path: Path) -> None:
    made(tmp_path, z_image(*AB))
    (tmp_path / "below").mkdir()
    write(tmp_path / "below" / "other.safetensors", z_image(*AB, stem="base_model.model.layers.0.attention.to_q"))
    found = run(tmp_path, "--for", "comfyui")
    assert found.returncode == 0
    assert sorted(line.split(": ", 1)[1] for line in found.stdout.splitlines()) == [
        "z-image, loads completely",
        "z-image, nothing loads: ComfyUI knows the prefix base_model.model. for SD3 and PixArt only",
    ]
    assert run(tmp_path, "--for", "comfyui", "--strict").returncode == 1
    assert run(tmp_path / "made.safetensors", "--for", "comfyui", "--strict").returncode == 0
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    assert run(tmp_path, "--for", "comfyui").returncode == 3
    assert run(tmp_path / "broken.safetensors", "--for", "comfyui").returncode == 1
    assert run(tmp_path, "--for", "nobody").returncode == 2


def test_json_has_the_documented_fields(tmp_path: Path) -> None:
    path = made(tmp_path, z_image(*AB))
    found = json.loads(run(path, "--for", "diffusers", "--json").stdout)
    page = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in found)
    assert found["complete"]
    assert found["schema"] == 1


def test_torch_and_numpy_are_not_imported() -> None:
    code = (
        "import sys; from lorasurgery.checking.consumers import consumer; from lorasurgery.checking.engine import check;"
        "from lorasurgery.checking.subject import read_subject;"
        f"check(read_subject({str(FIXTURES / 'samples' / 'z_image_lokr.safetensors')!r}), consumer('musubi'));"
        "print({'torch', 'numpy', 'safetensors'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_every_program_has_a_version_and_a_source() -> None:
    assert all(c.version and c.source for c in CONSUMERS.values())
