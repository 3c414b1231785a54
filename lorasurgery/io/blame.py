"""Errors of the operating system about the output that was asked for, not about what stands in for it until it is complete."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""A disk or a quota is full, or the file system has no files of that size: only writing ends like this."""


@contextmanager
def blamed_on(path: Path) -> Iterator[None]:
    """An OSError names ``path`` where it would name a temporary file or folder beside it, called ``.NAME...``, or nothing."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            error.filename = str(path)
        elif isinstance(error.filename, str | os.PathLike):
            error.filename = _named(os.fspath(error.filename), path)
        raise


def _named(name: str, path: Path) -> str:
    temporary = os.path.abspath(path.with_name(f".{path.name}."))  # noqa: PTH100  resolve would follow links
    if not os.path.abspath(name).startswith(temporary):  # noqa: PTH100
        return name
    inside = os.path.abspath(name)[len(temporary) :].partition(os.sep)  # noqa: PTH100
    return str(path) + inside[1] + inside[2]
