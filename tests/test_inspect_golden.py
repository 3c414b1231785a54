"""The whole JSON of one small file in each trainer's layout.

``LORASURGERY_GOLDEN=write pytest tests/test_inspect_golden.py`` writes them anew; read the difference before keeping it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lorasurgery.inspection import describe
from tests.headers import FLUX, HERE, hollow, lora

GOLDEN = HERE / "golden"
QKV = [9216, 3072]
TAGS = {"10_sks cat": {"cat": 30, "sitting": 12}}
SS = {
    "ss_base_model_version": "flux1", "ss_network_module": "networks.lora_flux", "ss_network_dim": "8",
    "ss_network_alpha": "4.0",
    "ss_sd_scripts_commit_hash": "0" * 40, "ss_steps": "1000", "ss_optimizer": "adafactor",
    "ss_tag_frequency": json.dumps(TAGS),
    "ss_bucket_info": '{"buckets": {"0": {"resolution": [1024, 1024], "count": 42}}}', "ss_output_name": "cat",
    "modelspec.architecture": "flux-1-dev/lora", "modelspec.trigger_phrase": "sks cat",
}  # fmt: skip
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
Z_IMAGE = {f"layers.{i}.attention.to_{x}": [3840, 3840] for i in range(2) for x in "qkv"}
WAN = {"blocks.0.self_attn.q": [5120, 5120], "blocks.39.ffn.0": [13824, 5120]}
LOKR = {"lokr_w1": [16, 16], "lokr_w2_a": [192, 4], "lokr_w2_b": [4, 192], "alpha": []}

FILES: dict[str, tuple[dict[str, list[int]], dict[str, str]]] = {
    "sd-scripts": (lora(FLUX), SS),
    "diffusers": (
        lora({f"transformer.{n}": s for n, s in Z_IMAGE.items()}, alpha=False, words="peft"),
        {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in CONFIG.items()}), "format": "pt"},
    ),
    "comfyui": (
        lora({f"diffusion_model.{n}": s for n, s in WAN.items()}, alpha=False, words="peft"),
        {"software": '{"name": "ai-toolkit", "version": "0.7.1"}', "training_info": '{"step": 500, "epoch": 3}'},
    ),
    "peft": (lora({f"base_model.model.{n}": s for n, s in Z_IMAGE.items()}, alpha=False, words="peft"), {}),
    "onetrainer": (
        {
            **lora(
                {"lora_transformer_transformer_blocks_0_attn_to_q": [3072, 3072], "lora_transformer_x_embedder": [3072, 64]}
            ),
            "lora_transformer_transformer_blocks_0_attn_to_q.dora_scale": [1, 3072],
            "bundle_emb.cat.clip_l": [2, 768],
        },
        {"ot_revision": "abc", "ot_config": '{"base_model_name": "flux", "lora_rank": 8}'},
    ),
    "lycoris": (
        {f"lycoris_transformer_blocks_{i}_attn_add_q_proj.{slot}": s for i in (0, 59) for slot, s in LOKR.items()},
        {"lycoris_config": '{"algo": "lokr", "factor": 16}'},
    ),
    "bfl": (
        {
            **lora({"img_in": [3072, 128], "double_blocks.0.img_attn.qkv": QKV}, alpha=False, words="peft"),
            "img_in.lora_B.bias": [3072],
            "double_blocks.0.img_attn.norm.query_norm.scale": [128],
        },
        {},
    ),
    "xlabs": (
        {
            f"double_blocks.{i}.processor.{name}.{side}.weight": shape
            for i in (0, 18)
            for name in ("qkv_lora1", "qkv_lora2")
            for side, shape in (("down", [16, 3072]), ("up", [9216, 16]))
        },
        {},
    ),
    "bare": (lora(WAN, alpha=False, words="peft"), {}),
    "unknown": (lora({"lora_unet_mystery_0_thing": [64, 32]}), {"ss_base_model_version": "mystery"}),
}


def written(name: str, folder: Path) -> Path:
    """The file (or PEFT's folder) of one layout."""
    shapes, metadata = FILES[name]
    if name != "peft":
        return hollow(folder / f"{name}.safetensors", shapes, metadata)
    (folder / name).mkdir()
    (folder / name / "adapter_config.json").write_text(json.dumps(CONFIG))
    hollow(folder / name / "adapter_model.safetensors", shapes, metadata)
    return folder / name


@pytest.mark.parametrize("name", FILES)
def test_golden(name: str, tmp_path: Path) -> None:
    own: dict[str, Any] = describe(written(name, tmp_path), tags=True).to_json()
    own["path"] = Path(own["path"]).name
    text = json.dumps(own, indent=1) + "\n"
    golden = GOLDEN / f"{name}.json"
    if os.environ.get("LORASURGERY_GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(text)
    assert json.loads(golden.read_text()) == json.loads(text)
    assert own["layout"] == ("sd-scripts" if name == "unknown" else name)
