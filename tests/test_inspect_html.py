"""``inspect --html``: one page, self-contained, safe against its own metadata, and working in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from html import unescape
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from lorasurgery.cli.app import app
from lorasurgery.inspection import describe
from lorasurgery.inspection.charts import bars, components
from lorasurgery.inspection.description import Description
from lorasurgery.inspection.page import render
from lorasurgery.inspection.spectrum import ModuleSpectrum, Spectrum
from tests.headers import HERE
from tests.pages import EVIL, make_page

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_page(tmp_path_factory.mktemp("page"))


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


def test_json_comes_too(page: Path, tmp_path: Path) -> None:
    source = page.with_name("flux.safetensors")
    result = CliRunner().invoke(app, ["inspect", str(source), "--html", str(tmp_path / "x.html"), "--json"])
    assert json.loads(result.stdout)["architecture"] == "flux1"
    assert (tmp_path / "x.html").exists()


def test_the_policy_allows_this_script_only(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    script = text[text.index("<script>") + 8 : text.index("</script>")]
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in text


def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for kind in ('href="#', 'aria-labelledby="', 'aria-controls="', 'for="'):
        assert set(re.findall(rf'{kind}([^"]+)"', text)) <= set(ids), kind
    table = text[text.index('<table id="table"') : text.index("</table>", text.index('<table id="table"'))]
    heads = len(re.findall(r"<th scope=\"col\"", table))
    for row in re.findall(r"<tr id=.*?</tr>", table, re.DOTALL):
        assert len(re.findall(r"<t[dh][ >]", row)) == heads


def test_jinja_is_imported_for_a_page_only_and_torch_never(page: Path, tmp_path: Path) -> None:
    source = str(page.with_name("flux.safetensors"))
    for arguments, wanted in ((["--spectrum"], False), (["--html", str(tmp_path / "x.html")], True)):
        code = (
            "import sys\nfrom lorasurgery.cli.app import app\n"
            f"app(['inspect', {source!r}, *{arguments!r}], standalone_mode=False)\n"
            f"assert ('jinja2' in sys.modules) is {wanted}\nassert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("where", ["metadata", "tag", "dataset", "key", "problem", "file", "thumbnail"])
def test_text_from_the_file_stays_text(page: Path, where: str) -> None:
    own = describe(page.with_name("flux.safetensors"), spectrum=True, tags=True)
    assert own.tags is not None
    assert own.spectrum is not None
    first, spectrum = own.modules[0], own.spectrum.modules[0]
    changed: dict[str, dict[str, Any]] = {
        "metadata": {"metadata": {EVIL: {"type": EVIL, "value": {EVIL: [EVIL * 50]}}}, "training": {EVIL: {EVIL: EVIL}}},
        "tag": {"tags": ((EVIL, 9), *own.tags), "triggers": {"phrase": EVIL, "tags": [{"tag": EVIL, "count": 9}]}},
        "dataset": {"training": {"datasets": [{"name": EVIL, "images": EVIL, "repeats": EVIL}], "buckets": {EVIL: 3}}},
        "key": {
            "modules": (first._replace(name=EVIL, kind=EVIL, block=EVIL, component=EVIL, dtype=EVIL), *own.modules[1:]),
            "spectrum": own.spectrum._replace(
                modules=(spectrum._replace(name=EVIL, kind=EVIL, block=EVIL, component=EVIL), *own.spectrum.modules[1:]),
            ),
            "unexplained": ((EVIL, EVIL),),
        },
        "problem": {"modules": (first._replace(problem=EVIL), *own.modules[1:]), "summary": EVIL},
        "file": {"path": f"x/{EVIL.replace('/', '')}.safetensors"},
        "thumbnail": {"metadata": {"modelspec.thumbnail": {"type": "string", "value": f"data:image/png;base64,AA{EVIL}"}}},
    }
    reader = Reader()
    text = render(own._replace(**changed[where]))
    reader.feed(text)
    assert reader.outside == []
    assert reader.tags.count("script") == 1
    assert "img" not in reader.tags
    assert "owned" in unescape(text)


def test_a_small_picture_in_the_metadata_is_shown(page: Path) -> None:
    own = describe(page.with_name("flux.safetensors"))
    url = "data:image/jpeg;base64,/9j/4AAQ"
    assert f'src="{url}"' in render(own._replace(metadata={"modelspec.thumbnail": {"type": "string", "value": url}}))


def test_text_without_a_utf8_form_is_replaced(page: Path) -> None:
    own = describe(page.with_name("flux.safetensors"))
    odd = {"x": {"type": "json", "value": {"a": chr(0xD800)}}}
    assert b"<footer>" in render(own._replace(path=f"{chr(0xDCFF)}.safetensors", metadata=odd)).encode()


def test_a_large_file_makes_a_small_page(page: Path) -> None:
    """1,000 modules of rank 512, and megabytes of metadata, tags and unexplained keys."""
    own = describe(page.with_name("flux.safetensors"))
    values = tuple(float(f"{1 / (1 + i):.9g}") for i in range(512))
    infos = tuple(
        own.modules[i % 23]._replace(name=f"lora_unet_single_transformer_blocks_{i // 20}_attention_to_out_projection_{i % 20}",
                block=f"single_transformer_blocks.{i // 20}", kind=f"attention.to_out.projection.{i % 20}")
        for i in range(1000)
    )  # fmt: skip
    spectra = tuple(
        ModuleSpectrum(info.name, info.block, info.kind, "denoiser", "ok", 1.0 + i, 1e-4 * (1 + i), 9.5, True, values,
                       ((0.9, 100),)) for i, info in enumerate(infos)
    )  # fmt: skip
    large = own._replace(
        modules=infos, spectrum=Spectrum(spectra, ((1, 0.6), (512, 1.0)), (), ()),
        metadata={f"key {i}": {"type": "string", "value": "x" * 50_000} for i in range(300)},
        tags=tuple((f"tag {i}", 20_000 - i) for i in range(20_000)),
        unexplained=tuple((f"key.{i}", "not part of any module") for i in range(20_000)),
    )  # fmt: skip
    text = render(large)
    assert len(text.encode()) < 2_000_000
    assert text.count('<tr id="m') == 1000
    assert "and 19800 more" in text


@pytest.mark.parametrize("name", ["lycoris_loha", "lycoris_lokr_tucker", "lycoris_norms", "diffusers_sd15_dora"])
def test_other_families_have_a_page(name: str) -> None:
    assert '<table class="map' in render(describe(HERE / "producers" / f"{name}.safetensors", spectrum=True, tags=True))


def test_what_is_no_adapter_has_a_page() -> None:
    text = render(Description("vae.safetensors", "vae", "a VAE", "safetensors", 9, components={"vae": 4}))
    assert "A VAE" in text
    assert 'id="table"' not in text


def test_heat_maps_follow_the_blocks() -> None:
    """Blocks inside blocks are columns; outliers, zeros and odd names do no harm."""

    def module(block: str, kind: str, value: float) -> ModuleSpectrum:
        return ModuleSpectrum(f"{block}|{kind}", block, kind, "denoiser", "ok" if value else "dead", value, value, 3.0)

    own = [module(f"input_blocks.{i}", f"1.transformer_blocks.{k}.attn1.to_q", 1.0 + i) for i in (10, 4) for k in range(2)]
    own += [module("", "img_in", 1e6), module("a.#", "x", 0.0), module("a.1", "x", 1.0), module("a.2", "x", 1.0)]
    (found,) = components(Spectrum(tuple(own), (), (), ()))
    titles = {m.title: m for m in found.maps}
    nested = titles["input_blocks.n.1.transformer_blocks.m"]
    assert nested.columns == ("4.0", "4.1", "10.0", "10.1")
    assert [kind for kind, _ in nested.rows] == ["attn1.to_q"]
    assert found.states == ("dead",)
    assert titles["outside the repeated blocks"].rows[0][0] == "img_in"


def test_bars_are_as_high_as_the_values() -> None:
    assert bars((2.0, 1.0, 0.0)) == "M0 20V0h3V10h3V20h3V20z"
    assert bars(()) == bars((0.0,)) == ""
    assert bars(tuple(range(100, 0, -1))).count("h3") == 32
