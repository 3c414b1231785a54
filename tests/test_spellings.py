"""The command lines of sd-scripts' and musubi-tuner's scripts: what they mean here, and what is another command's."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from lorasurgery.cli.spellings import SPELLINGS, translated
from lorasurgery.errors import RequestError
from lorasurgery.io.header import read_safetensors
from tests.edges import lora, refused, run, save

if TYPE_CHECKING:
    from pathlib import Path

LISTED = [
    ("--models a b --ratios 0.5 -0.25 --save_to o", "--out o a:0.5 b:-0.25"),
    ("--models a b --save_to o", "--out o a b"),
    ("--save_to=o --models=a --ratios=1.5", "--out o a:1.5"),
    ("--models a --ratios 1 --lbws [1,0,0.5] --new_rank 8 --new_conv_rank 4", "--rank 8 --conv-rank 4 a:1:lbw=1,0,0.5"),
    ("--models a b --lbws [1,0] 0,1 -o o", "-o o a:1:lbw=1,0 b:1:lbw=0,1"),
    ("--save_precision float --precision float --concat --no_metadata --device cuda a", "--dtype fp32 --metadata strip a"),
    ("--models a b --concat --shuffle --save_to o", "--out o a b"),
    ("a:0.5 b:-1 -o o --strict", "a:0.5 b:-1 -o o --strict"),
    ("a -o o -- --models", "a -o o -- --models"),
]
CONVERTED = [
    ("--src ai-toolkit --dst sd-scripts --src_path a --dst_path b", "--target sd-scripts --input a --output b"),
    ("--dst=ai-toolkit a b", "--target diffusers a b"),
    ("a b --reverse", "a b --target sd-scripts"),
    ("a b --target other --diffusers_prefix dit --lokr_rank 4", "a b --target other --diffusers-prefix dit --lokr-rank 4"),
]

BAKED = [
    ("--sd_model m --models a b --ratios 0.5 -1 --save_to o --precision float", "--out o m a:0.5 b:-1"),
    ("--flux_model m --models a --ratios 0.7 --save_to o --mem_eff_load_save --loading_device cpu", "--out o m a:0.7"),
    ("--dit m --lora_weight a b --lora_multiplier 0.5 1.0 --save_merged_model o --device cuda", "--out o m a:0.5 b:1.0"),
    ("--dit=m --lora_weight=a --save_merged_model=o --dit_in_channels 16", "--out o m a"),
    ("m a:0.5 -o o --verify", "m a:0.5 -o o --verify"),
]


@pytest.mark.parametrize(
    ("command", "theirs", "ours"),
    [*(("merge", *own) for own in LISTED), *(("convert", *own) for own in CONVERTED), *(("apply", *own) for own in BAKED)],
)
def test_words(command: str, theirs: str, ours: str) -> None:
    assert translated(theirs.split(), SPELLINGS[command]) == ours.split()


@pytest.mark.parametrize(
    ("command", "words", "text"),
    [
        ("merge", "--models a b --ratios 1", "--ratios has 1 values for 2 --models"),
        ("merge", "--models a --sd_model m", "lorasurgery apply MODEL LORA:RATIO"),
        ("merge", "--models a --flux_model m --clip_l c --t5xxl t", "--flux_model: merging into a model"),
        ("merge", "--dit m --lora_weight a --save_merged_model o", "lorasurgery apply MODEL LORA:RATIO"),
        ("apply", "--flux_model m --clip_l c --models a --save_to o", "--clip_l: a text encoder's file is a model of its own"),
        ("apply", "--sd_model m --dit n --models a --save_to o", "names two models"),
        ("apply", "--sd_model m --models a b --ratios 1 --save_to o", "--ratios has 1 values for 2 --models"),
        ("apply", "--sd_model m --models a --save_precision fp16 --save_to o", "keep the model's own dtype"),
        ("merge", "--models a --save_precision fp8", "float or fp16 or bf16, not fp8"),
        ("merge", "--models a --save_to b --out c", "are the same thing"),
        ("convert", "--dst onetrainer", "sd-scripts or ai-toolkit, not onetrainer"),
        ("convert", "a b --target comfyui --reverse", "--reverse and --target are the same thing"),
        ("convert", "a b --dst", "not nothing"),
    ],
)
def test_refusals(command: str, words: str, text: str) -> None:
    with pytest.raises(RequestError, match=re.escape(text)):
        translated(words.split(), SPELLINGS[command])


def test_a_merge_of_sd_scripts_is_ours(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.safetensors", lora(rank=2), {}), save(tmp_path / "b.safetensors", lora(rank=3), {})
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    assert run("merge", f"{a}:0.5", f"{b}:-0.25", "-o", ours, "--dtype", "fp16", "--rank", 2).code == 0
    words = (
        "--models",
        a,
        b,
        "--ratios",
        0.5,
        -0.25,
        "--save_to",
        theirs,
        "--save_precision",
        "fp16",
        "--new_rank",
        2,
        "--concat",
    )
    done = run("merge", *words, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["resize"]["ranks"] == {"2": 1}
    assert ours.read_bytes() == theirs.read_bytes()


def test_another_command_is_named(tmp_path: Path) -> None:
    a = save(tmp_path / "a.safetensors", lora(), {})
    text = refused(
        tmp_path, ["merge", "--sd_model", "m", "--models", a, "--ratios", 1, "--save_to", "o"], "apply MODEL", code=2
    )
    assert "merging into a model is another command" in text


@pytest.mark.parametrize(
    ("spelling", "start"),
    [([], "diffusion_model."), (["--diffusers-prefix", "-"], ""), (["--diffusers_prefix", ""], ""),
     (["--diffusers_prefix", "dit"], "dit."), (["--diffusers-prefix", "a.b."], "a.b.")],
)  # fmt: skip
def test_prefixes(tmp_path: Path, spelling: list[str], start: str) -> None:
    a, out = save(tmp_path / "a.safetensors", lora(), {}), tmp_path / "o.safetensors"
    done = run("convert", a, out, "--target", "other", *spelling)
    assert done.code == 0, done.err
    assert set(read_safetensors(out).tensors) == {f"{start}layers.0.attention.to_q.lora_{x}.weight" for x in "AB"} | (
        {f"{start}layers.0.attention.to_q.alpha"} & set(read_safetensors(out).tensors)
    )
