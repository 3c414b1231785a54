"""``strip --privacy``: what tells about a person or a machine is gone, what was written for readers is left alone."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasurgery.io.header import read_safetensors
from lorasurgery.verbs.meta.privacy import PRIVATE_KEYS, private_keys, without_paths
from tests.edges import lora, run, save

DOCS = Path(__file__).parent.parent / "docs" / "meta.md"
PRIVATE = {
    "ss_dataset_dirs": '{"10_cat": {"n_repeats": 10}}',
    "ss_datasets": '[{"subsets": [{"image_dir": "/home/jane/cat"}]}]',
    "ss_tag_frequency": '{"10_cat": {"jane": 3}}',
    "ss_session_id": "123",
    "ss_training_comment": "jane's box",
    "ss_sd_model_name": "/home/jane/models/flux1-dev.safetensors",
    "ss_vae_name": "C:\\Users\\Jane Doe\\vae\\ae.safetensors",
    "ss_network_args": '{"pretrained": "/mnt/jane/x.safetensors", "factor": "8"}',
    "ot_config": '{"workspace_dir": "D:/jane"}',
    "prompt": '{"1": {"inputs": {"file": "jane.png"}}}',
    "hostname": "janes-pc",
    "lora_adapter_metadata": '{"transformer.base_model_name_or_path": "/home/jane/flux", "transformer.r": 4}',
}
PUBLIC = {
    "format": "pt",
    "ss_network_dim": "4",
    "ss_keep_tokens": "1",
    "ss_max_token_length": "225",
    "ss_resolution": "(1024, 1024)",
    "ss_output_name": "cat",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)",
    "modelspec.implementation": "https://github.com/black-forest-labs/flux",
    "modelspec.description": "use and/or /imagine, 1/2 strength; see https://x.org/home/a/b or @/x",
    "modelspec.architecture": "flux-1-dev/lora",
    "modelspec.thumbnail": "data:image/jpeg;base64,/9j/4AAQSkZJ/RgABAQ/x",
    "modelspec.date": "2025-01-01T00:00:00",
}


def test_privacy_preset(tmp_path):
    path, out = save(tmp_path / "a.safetensors", lora(), PRIVATE | PUBLIC), tmp_path / "out.safetensors"
    done = run("meta", "strip", path, "--privacy", "-o", out)
    assert "no trigger words are left" in done.out
    found = read_safetensors(out).metadata
    assert "jane" not in out.read_bytes()[:20000].decode("latin1").lower()
    assert found == PUBLIC | {
        "ss_sd_model_name": "flux1-dev.safetensors",
        "ss_vae_name": "ae.safetensors",
        "ss_network_args": '{"pretrained": "x.safetensors", "factor": "8"}',
        "lora_adapter_metadata": '{"transformer.base_model_name_or_path": "flux", "transformer.r": 4}',
    }


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/jane", ""),
        ("/home/jane/", ""),
        ("~/loras/x.safetensors", "x.safetensors"),
        ("file:///home/jane/x", "x"),
        ("\\\\janes-nas\\share\\x.safetensors", "x.safetensors"),
        ("trained at /Users/Jane Doe/loras/x, then /data/jane/y", "trained at x, then y"),
        ("C:/Users/Jane Doe/a b/x.png and D:\\jane\\z", "x.png and z"),
        ("--data=/workspace/jane/set --lr 1", "--data=set --lr 1"),
        ("home is /home/jane, really", "home is , really"),
        ("org/model", "org/model"),
        ("timm.optim.Lion", "timm.optim.Lion"),
        ("/", "/"),
        ("/data/a b/c d", "c d"),
        ("/home/jane/x, /home/jane/y", "x, y"),
        ("{broken /home/jane/x", "{broken x"),
    ],
)
def test_paths(text, left):
    assert without_paths("ss_x", text) == left


def test_json_keys_that_become_equal_stay_apart():
    text = json.dumps({"/a/b/x": 1, "/a/c/x": 2})
    assert json.loads(without_paths("k", text)) == {"x": 1, "x (2)": 2}
    assert without_paths("k", '{"a":  1}') == '{"a":  1}'  # nothing to shorten: not even the spaces change


FOLDER = "janesfolder"
NAMES = (
    st.text(string.ascii_letters + string.digits + "_-. ", min_size=1, max_size=8)
    .map(str.strip)
    .filter(lambda name: name.strip(".") and not name.startswith("."))
)


@given(st.sampled_from(["/", "~/", "C:\\", "d:/", "\\\\nas\\"]), st.lists(NAMES, max_size=3), NAMES, st.booleans())
def test_no_folder_survives(root, folders, name, nested):
    sign = "\\" if "\\" in root else "/"
    text = root + sign.join([*folders, FOLDER, name])
    found = without_paths("ss_x", json.dumps({text: [text]}) if nested else text)
    assert FOLDER not in found
    assert name in found


def test_every_pattern_is_documented():
    text = DOCS.read_text(encoding="utf-8")
    missing = [key for key in PRIVATE_KEYS if f"`{key}`" not in text]
    assert not missing
    assert private_keys({"SS_Session_ID": "", "ss_seed": "", "image_dir": ""}) == ["SS_Session_ID", "image_dir"]
