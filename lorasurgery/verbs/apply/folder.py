"""A model's folder: what besides its weights goes into the new one, and how that takes its place all at once."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.errors import OutputExistsError
from lorasurgery.io.blame import blamed_on
from lorasurgery.io.sniff import TORCH_SUFFIXES
from lorasurgery.io.writer import umask

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

WEIGHTS = frozenset({".safetensors", ".gguf", ".onnx", ".msgpack", ".h5", *TORCH_SUFFIXES})


def check_folder(out: Path, source: Path, names: Collection[str], *, force: bool) -> None:
    """Raises OutputExistsError when ``out`` is, is in or is around the model's folder, or holds a file not among ``names``."""
    if (
        out.resolve() == source.resolve()
        or source.resolve() in out.resolve().parents
        or out.resolve() in source.resolve().parents
    ):
        raise OutputExistsError("the output is, is in, or is around the model's folder", path=out, hint="another name")
    if not out.exists():
        return
    if not force:
        raise OutputExistsError("the output exists already", path=out, hint="--force to replace it")
    if not out.is_dir():
        raise OutputExistsError("the output is a file, and the model is a folder", path=out, hint="another name")
    strange = next((p for p in sorted(out.rglob("*")) if p.is_file() and p.relative_to(out).as_posix() not in names), None)
    if strange is not None:
        raise OutputExistsError(
            f"the folder holds a file that the new model does not have ({strange.relative_to(out)})",
            path=out,
            hint="another name",
        )


@contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place when the block ends without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with blamed_on(out):
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        try:
            yield made
            made.chmod(0o777 & ~umask())
            if out.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
                out.replace(old / out.name)
                made.replace(out)
                shutil.rmtree(old, ignore_errors=True)
            else:
                made.replace(out)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


def companions(folder: Path, used: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(files to copy, weight files to leave out) of a model's folder, ``used`` being the ones that are rewritten.

    Weights beside rewritten ones are other versions of the same (``.fp16.``, ``.bin``): copied they would be the old model.
    """
    taken = {path.resolve() for path in used}
    places = {path.parent.resolve() for path in used} | {folder.resolve()}
    copied: list[Path] = []
    left: list[Path] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or path.resolve() in taken or any(part.startswith(".") for part in parts):
            continue
        weights = path.suffix.lower() in WEIGHTS
        (left if weights and path.parent.resolve() in places else copied).append(path)
    return copied, left
