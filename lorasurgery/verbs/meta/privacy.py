"""What tells about the person and the machine behind a file: keys to remove, and paths to shorten in the rest."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

PRIVATE_KEYS = MappingProxyType(
    {
        "ss_datasets": "dataset folders, captions' prefixes, tags",
        "ss_dataset_dirs": "dataset folders",
        "ss_reg_dataset_dirs": "dataset folders",
        "ss_val_dataset_dirs": "dataset folders",
        "ss_tag_frequency": "every tag of every caption, by folder",
        "ss_session_id": "ties the files of one training together",
        "ss_training_started_at": "when the machine was busy",
        "ss_training_finished_at": "when the machine was busy",
        "ss_training_comment": "free text of the training run",
        "ot_config": "OneTrainer's whole configuration: folders, prompts",
        "prompt": "ComfyUI's graph, with file names and prompts",
        "workflow": "ComfyUI's graph, with file names and prompts",
        "*sample_prompt*": "prompts",
        "*tag_frequency*": "tags",
        "*session_id*": "session ids",
        "*host*name*": "host names",
        "*user*name*": "user names",
        "*wandb*": "accounts and run names",
        "*api_key*": "credentials",
        "*_token": "credentials",
        "*_dir": "folders",
        "*_dirs": "folders",
        "*_directory": "folders",
        "*_path": "paths",
        "*_paths": "paths",
    }
)
"""Key patterns (case ignored) that ``--privacy`` removes, with what they give away.

Source: what sd-scripts, musubi-tuner, OneTrainer (``include_train_config``) and ComfyUI's savers write.
"""

_PUBLISHED = "modelspec."
"""Keys written for readers: only paths inside their text are shortened, the text is never taken for a path as a whole."""

_LONGEST_PATH = 4096

_INSIDE = re.compile(
    r"(?:file://|(?<![\w.:/\\~-]))(?P<folders>"
    r"(?:[A-Za-z]:[\\/]|\\\\)(?:[^\\/:*?\"<>|\r\n,;=]+[\\/]+)+"  # a Windows drive or share: spaces belong to names
    r"|/(?:home|Users|root|mnt|media|Volumes)/+(?:[^/\r\n\"'<>|:;,=()]+/+)*"  # where people's folders are: likewise
    r"|~?/(?:[^\s\\/\"'<>|:;,=()\[\]{}]+/+)+"  # any other absolute path
    r")(?P<last>[^\\/\s\"'<>|:;,=()\[\]{}]*)"
)
_WHOLE = re.compile(r"(?P<folders>(?:file://)?(?:[A-Za-z]:[\\/]|\\\\|~?/)[^\\/][^\r\n]*?[\\/]+)(?P<last>[^\\/\r\n]+)[\\/]*")
_LISTED = re.compile(r"[,;]\s|\n|\s(?:[A-Za-z]:[\\/]|\\\\|~?/)")
_HOMES = re.compile(r"(?:file://)?(?:/home|/Users|[A-Za-z]:[\\/]+Users)[\\/]+")


def private_keys(metadata: Mapping[str, str]) -> list[str]:
    """The keys of ``metadata`` that match :data:`PRIVATE_KEYS`."""
    return [key for key in metadata if any(fnmatchcase(key.lower(), pattern) for pattern in PRIVATE_KEYS)]


def without_paths(key: str, text: str) -> str:
    """``text`` with every absolute path shortened to its last part, in nested JSON too; the same text when there is none."""
    if text.startswith("data:"):
        return text
    if text[:1] in ("{", "["):
        try:
            value = json.loads(text)
            shorter = _walk(value)
            return text if shorter == value else json.dumps(shorter)
        except (ValueError, RecursionError):
            return _shorten(text, whole=False)
    return _shorten(text, whole=not key.startswith(_PUBLISHED))


def _walk(value: Any) -> Any:  # noqa: ANN401  JSON is anything
    if isinstance(value, str):
        return _shorten(value, whole=True)
    if isinstance(value, list):
        return [_walk(one) for one in value]
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, one in value.items():
            short = name = _shorten(key, whole=True)
            count = 2
            while name in found:
                name, count = f"{short} ({count})", count + 1
            found[name] = _walk(one)
        return found
    return value


def _shorten(text: str, *, whole: bool) -> str:
    if whole and len(text) <= _LONGEST_PATH and not _LISTED.search(text):
        path = _WHOLE.fullmatch(text)
        if path is not None:
            return _last(path)
    return _INSIDE.sub(_last, text)


def _last(path: re.Match[str]) -> str:
    """The last part of a path; nothing for a home folder, whose last part is a person."""
    return "" if _HOMES.fullmatch(path["folders"]) else path["last"]
