"""The page of ``inspect --html`` in a real browser: it works, and nothing in it complains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from typing import TYPE_CHECKING

import pytest

from tests.pages import make_page

if TYPE_CHECKING:
    from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=3000",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_page(tmp_path_factory.mktemp("page"))


TRY = """
<script>addEventListener("load", () => {
  const $ = (selector) => document.querySelector(selector), $$ = (selector) => [...document.querySelectorAll(selector)];
  const head = (key) => $(`#table th[data-key=${key}]`);
  const column = (key) => { const i = [...head(key).parentNode.cells].indexOf(head(key));
    return $$("#table tbody tr").map((row) => row.cells[i].textContent); };
  const found = { width: innerWidth, page: document.documentElement.scrollWidth, sorts: [] };
  const names = column("name");
  for (const key of ["rms", "rms", "rms", "name", "name"]) {
    head(key).querySelector("button").click();
    found.sorts.push([key, head(key).getAttribute("aria-sort"), column(key)]);
  }
  found.sorted = $$("#table th[aria-sort=ascending], #table th[aria-sort=descending]").length;
  found.names = names;
  const filter = $("#filter");
  filter.value = "SINGLE linear1"; filter.dispatchEvent(new Event("input"));
  found.filtered = $$("#table tbody tr").filter((row) => !row.hidden).length;
  found.status = $("#count").textContent;
  filter.value = ""; filter.dispatchEvent(new Event("input"));
  const cell = $("table.map td a"), press = (key) => document.activeElement.dispatchEvent(
    new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  cell.focus(); press("ArrowRight"); press("ArrowDown"); press("ArrowLeft"); press("ArrowLeft");
  found.focused = document.activeElement.closest("tr").rowIndex + "," + document.activeElement.closest("td").cellIndex;
  found.stops = $$("table.map a").filter((link) => link.tabIndex === 0).length;
  found.maps = $$("table.map").length;
  found.readout = $("#readout").textContent;
  const colour = () => getComputedStyle(document.body).backgroundColor;
  const at = () => getComputedStyle(cell.parentNode).backgroundColor;
  found.themes = ["light", "dark"].map((value) => { $(`input[name=theme][value=${value}]`).click(); return colour(); });
  found.cells = ["a", "c"].map((value) => { $(`input[name=metric][value=${value}]`).click(); return at(); });
  parent.postMessage(JSON.stringify(found), "*");
});</script>"""
FRAME = """<!doctype html><title>frame</title><pre id="result"></pre><script>
addEventListener("message", (event) => { document.getElementById("result").textContent = event.data; });
</script><iframe src="page.html" width="WIDTH" height="900" style="border:0"></iframe>"""
"""A window is never narrower than 500 pixels; a frame is."""


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


def in_chromium(page: Path, profile: Path) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    flags = [*FLAGS, f"--user-data-dir={profile}", "--window-size=1400,1200", "--enable-logging=stderr", "--v=0"]
    return subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1366])
def test_sorting_filtering_keys_and_themes(page: Path, tmp_path: Path, width: int) -> None:
    """A copy without the policy, which would rightly refuse it, gets a second script that uses the page."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{TRY}</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    shown = in_chromium(frame, tmp_path / "profile")
    assert ":CONSOLE" not in shown.stderr
    match = re.search(r'<pre id="result">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert match
    found = json.loads(unescape(match[1]))
    assert found["width"] == width
    assert found["page"] <= width, "the page itself does not scroll sideways"
    falling, rising, back, up, down = found["sorts"]
    assert [sort[1] for sort in found["sorts"]] == ["descending", "ascending", "none", "ascending", "descending"]
    numbers = [float(value) for value in falling[2]]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) > 5
    assert [float(value) for value in rising[2]] == sorted(numbers)
    assert back[0] == "rms"
    assert up[2] == found["names"]
    assert down[2] == found["names"][::-1]
    assert found["sorted"] == 1
    assert found["filtered"] == 1
    assert found["status"] == "1 of 23 modules"
    assert found["focused"] == "2,1"
    assert found["stops"] == found["maps"]
    assert re.search(r"double_blocks_0_.*RMS .* norm .* effective rank .* rank 4", found["readout"])
    assert len(set(found["themes"])) == 2
    assert len(set(found["cells"])) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
def test_the_browser_has_nothing_to_complain_about(page: Path, tmp_path: Path) -> None:
    assert ":CONSOLE" not in in_chromium(page, tmp_path / "profile").stderr
