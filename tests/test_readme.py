"""The documents are true: the README's commands run, its tables and examples say what happens, the reference is current."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lorasurgery.layouts.targets import ALIASES, LAYOUTS

from tests.edges import DIM, lokr, loha, lora, run, save  # isort: skip

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OUT = "lora_unet_layers_0_attention_out"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_opens_with_the_two_commands() -> None:
    commands = [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert commands == ["./scripts/demo", "./scripts/test"]
    assert README.index("```sh") < 30
    assert all((ROOT / command).is_file() for command in commands)


def test_every_command_runs_and_prints_what_is_shown(here: Path) -> None:
    shown: list[tuple[list[str], list[str]]] = []
    for block in blocks("console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                shown.append((shlex.split(line[2:]), []))
            else:
                shown[-1][1].append(line)
    assert len(shown) > 6
    for (program, *args), expected in shown:
        assert program == "lorasurgery"
        outcome = run(*args)
        refused = bool(expected) and expected[0].startswith("error: ")
        assert outcome.code == (1 if refused else 0), (args, outcome.err)
        printed = (outcome.err if refused else outcome.out).splitlines()
        if expected:
            # rich pads the cells of a table to their column; Markdown has no spaces at the end of a line
            assert [line.rstrip() for line in printed if "  time " not in line] == [s for s in expected if "  time " not in s]


def test_python_example_runs(here: Path) -> None:
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("z-image sd-scripts 21\n")
    assert "--as lora" in done.stdout


def table(heading: str) -> list[list[str]]:
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


def test_target_table_is_complete() -> None:
    names = [re.findall(r"`([\w-]+)`", row[0]) for row in table("Targets")[1:]]
    assert [own[0] for own in names] == list(LAYOUTS)
    assert {alias for own in names for alias in own[1:]} == set(ALIASES)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype("f2")


SHIFT = "lora_unet_layers_0_adaLN_modulation_0"
"""A layer that has a bias."""
NORM = "lora_unet_layers_0_attention_norm1"
FAMILIES: dict[str, list[dict[str, np.ndarray]]] = {
    "LoRA, LoCon": [lora(OUT)],
    "DoRA, per output row": [{**lora(OUT), f"{OUT}.dora_scale": noise(DIM, 1)}],
    "DoRA, per input column": [{**lora(OUT), f"{OUT}.dora_scale": noise(1, DIM)}],
    "LoHa": [loha(OUT)],
    "LoKr": [lokr(OUT)],
    "full difference": [{f"{OUT}.diff": noise(DIM, DIM)}],
    "bias beside a LoRA": [{**lora(SHIFT, 15360, 256), f"{SHIFT}.diff_b": noise(15360)}],
    "bias alone, norm, replacement": [
        {f"{SHIFT}.diff_b": noise(15360)},
        {f"{NORM}.w_norm": noise(DIM)},
        {f"{NORM}.set_weight": noise(DIM)},
    ],
    "OFT, BOFT, GLoRA, (IA)^3": [
        {f"{OUT}.oft_blocks": noise(4, 8, 8)},
        {f"{OUT}.oft_blocks": noise(2, 4, 8, 8)},
        {f"{OUT}.{name}.weight": noise(2, 2) for name in ("a1", "a2", "b1", "b2")},
        {f"{OUT}.weight": noise(DIM), f"{OUT}.on_input": np.zeros((), "i1")},
    ],
}
BESIDE = lora("lora_unet_layers_1_feed_forward_w1", 10240, DIM)
"""Something that every target takes, so that the file is one whatever is left out."""


def test_family_table_names_every_family_and_target() -> None:
    head, *rows = table("Families and targets")
    assert sorted(head[1:]) == sorted(LAYOUTS)
    assert [row[0] for row in rows] == list(FAMILIES)


@pytest.mark.parametrize("row", table("Families and targets")[1:], ids=lambda row: row[0])
def test_family_table_says_what_happens(row: list[str], tmp_path: Path) -> None:
    targets = table("Families and targets")[0][1:]
    for i, tensors in enumerate(FAMILIES[row[0]]):
        alone = any(word in key for key in tensors for word in (".hada", ".lokr", ".lora"))
        source = save(tmp_path / f"{i}.safetensors", tensors if alone else {**BESIDE, **tensors})
        for target, cell in zip(targets, row[1:], strict=True):
            args = ("convert", source, tmp_path / "out", "-t", target, "--arch", "z-image", "--dry-run")
            plain = run(*args)
            if cell.startswith("yes"):
                assert plain.code == 0, (target, plain.err)
                assert "left out" not in plain.out
                continue
            assert plain.code == 1, target
            option = cell.strip("`")
            assert option in plain.err
            with_option = run(*args, *option.split())
            assert with_option.code == 0, (target, with_option.err)
            assert ("left out" in with_option.out) == (option == "--lossy")


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), (page.name, link)


def test_cli_reference_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/make_docs.py", "--check"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_package_has_the_readme() -> None:
    from importlib.metadata import metadata

    assert 'readme = "README.md"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert metadata("lorasurgery")["Name"] == "lorasurgery"
