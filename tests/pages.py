"""A page of ``inspect --html`` for the tests, about a file with markup wherever people can write text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from typer.testing import CliRunner

from lorasurgery.architectures import named
from lorasurgery.cli.app import app
from lorasurgery.io.tensors import of_array, scalar
from lorasurgery.io.writer import write_safetensors

if TYPE_CHECKING:
    from pathlib import Path

EVIL = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">'


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


def make_page(folder: Path) -> Path:
    """The page about ``flux.safetensors`` beside it."""
    out = folder / "page.html"
    result = CliRunner().invoke(app, ["inspect", str(adapter(folder / "flux.safetensors")), "--html", str(out)])
    assert result.exit_code == 0, result.output
    return out
