"""``inspect --html``: one page, self-contained, safe against its own metadata, and working in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import numpy as np
import pytest
from typer.testing import CliRunner

from lorasurgery.architectures import named
from lorasurgery.cli.app import app
from lorasurgery.io.tensors import of_array, scalar
from lorasurgery.io.writer import write_safetensors

if TYPE_CHECKING:
    from pathlib import Path

EVIL = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=3000",
]  # fmt: skip


def adapter(path: Path) -> Path:
    """A few FLUX.1 blocks with falling spectra, tags, and markup where people can write text."""
    arch, rng = named("flux1-dev")[0], np.random.default_rng(0)
    tensors = {}
    for name in arch.shapes:
        if not name.startswith(("double_blocks.0.", "double_blocks.1.", "single_blocks.0.")) or len(arch.shapes[name]) != 2:
            continue
        out, width = arch.shapes[name]
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = of_array(rng.standard_normal((4, width), np.float32) * 0.02, "BF16")
        tensors[f"{stem}.lora_up.weight"] = of_array(rng.standard_normal((out, 4), np.float32) / [1, 2, 4, 8], "BF16")
        tensors[f"{stem}.alpha"] = scalar(2.0)
    tags = {"10_x": {"watercolor": 200, EVIL: 100, "river": 3}}
    metadata = {"ss_base_model_version": "flux1", "ss_output_name": EVIL, "modelspec.title": EVIL}
    write_safetensors(path, tensors, {**metadata, "ss_tag_frequency": json.dumps(tags)})
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    out = folder / "page.html"
    result = CliRunner().invoke(app, ["inspect", str(adapter(folder / "flux.safetensors")), "--html", str(out)])
    assert result.exit_code == 0, result.output
    return out


class Reader(HTMLParser):
    """Collects what would reach out of the page, and the tags it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "data") and value and not value.startswith(("#", "data:")):
                self.outside.append(f"{tag} {name}={value}")
            assert not name.startswith("on"), f"{tag} has an inline handler"


def test_nothing_is_fetched_and_nothing_is_smuggled_in(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.outside == []
    assert reader.tags.count("script") == 1
    assert "img" not in reader.tags
    assert "Content-Security-Policy" in text
    assert not re.search(r"@import|url\((?!data:)", text)
    assert EVIL not in text


def test_what_stands_on_the_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for expected in ("FLUX.1", "sd-scripts", "watercolor", "double_blocks", "linear1", "aria-sort", "prefers-color-scheme"):
        assert expected in text
    assert len(text) < 3_000_000


def test_a_page_is_about_one_file_and_is_not_replaced(page: Path) -> None:
    source = page.with_name("flux.safetensors")
    again = CliRunner().invoke(app, ["inspect", str(source), "--html", str(page)])
    assert again.exit_code == 1
    assert "--force" in again.stderr
    assert CliRunner().invoke(app, ["inspect", str(source), "--html", str(page), "--force"]).exit_code == 0
    two = CliRunner().invoke(app, ["inspect", str(source), str(source), "--html", str(page)])
    assert two.exit_code == 2
    onto_itself = CliRunner().invoke(app, ["inspect", str(source), "--html", str(source), "--force"])
    assert onto_itself.exit_code == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1366])
def test_in_a_browser(page: Path, tmp_path: Path, width: int) -> None:
    """The script ran, nothing was injected, and the page is drawn."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000"]
    dom = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "<title>owned" not in dom.stdout
    assert "<title>1<" not in dom.stdout
    assert "Uncaught" not in dom.stderr
    assert ">23 modules<" in dom.stdout, "the script counts the table's rows"
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True)
    assert shot.stat().st_size > 20_000
