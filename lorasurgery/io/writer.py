"""Writing safetensors: streamed, hashed on the way, and moved into place only when complete."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.errors import OutputExistsError
from lorasurgery.interrupts import held
from lorasurgery.io.behind import CHUNK, Behind
from lorasurgery.io.blame import blamed_on
from lorasurgery.io.finite import computed_bytes
from lorasurgery.io.hashes import legacy_hash, legacy_window
from lorasurgery.io.header import header_bytes, serialiser_order

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Iterator, Mapping, Sequence

    from lorasurgery.io.behind import Item
    from lorasurgery.io.sources import Region
    from lorasurgery.io.tensors import Tensor

LARGE = 8 << 20
"""Bytes of a tensor of which only one shall wait in memory."""
MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"


def check_output(path: Path, inputs: Sequence[Path], *, force: bool = False) -> None:
    """Raises OutputExistsError when ``path`` is (in) one of the inputs, or exists and ``force`` is off.

    ``force`` replaces a file, a PEFT folder, or an empty folder; never a folder with anything else in it.
    """
    if not path.exists():
        return
    for given in (given for given in inputs if given.exists()):
        if path.samefile(given) or (given.is_dir() and given.resolve() in path.resolve().parents):
            raise OutputExistsError("the output is the input; it is never overwritten", path=path, hint="another name")
    if not force:
        raise OutputExistsError("the output exists already", path=path, hint="--force to replace it")
    if path.is_dir():
        strangers = [child.name for child in _files(path) if not child.name.startswith("adapter_")]
        if strangers:
            raise OutputExistsError(
                f"the output is a folder with more than a PEFT adapter in it ({strangers[0]})", path=path, hint="another name"
            )


def _files(folder: Path) -> Iterator[Path]:
    """Every file in a folder and the folders in it; an empty PEFT component folder is none."""
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink():
            yield from child.iterdir()
        else:
            yield child


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, hashes: bool = False
) -> dict[str, str]:
    """Write ``tensors`` in the serialiser's order and return the metadata as written.

    ``hashes`` computes ``sshs_model_hash`` and ``sshs_legacy_hash`` while the data streams. Nothing appears at ``path``
    until the file is complete; on any failure the temporary file is removed. Raises BrokenModuleError when a computed
    tensor holds NaN or infinity.
    """
    written = {k: v for k, v in metadata.items() if k not in (MODEL_HASH, LEGACY_HASH)}
    if hashes:  # fixed widths, so that the header can be filled in afterwards
        written |= {MODEL_HASH: "0" * 64, LEGACY_HASH: "0" * 8}
    written = dict(sorted(written.items()))
    head = header_bytes(tensors, written)
    with replacing(path) as fd:
        write_all(fd, head)
        digest = _write_data(fd, tensors, hashes=hashes)
        if digest is not None:
            part, start, stop = legacy_window(tensors, metadata)
            os.lseek(fd, len(head) + start, os.SEEK_SET)
            window = os.read(fd, stop - start)
            written |= {MODEL_HASH: digest, LEGACY_HASH: legacy_hash(part, window)}
            os.lseek(fd, 0, os.SEEK_SET)
            write_all(fd, header_bytes(tensors, written))
    return written


def _write_data(fd: int, tensors: Mapping[str, Tensor], *, hashes: bool) -> str | None:
    """Copy every tensor's bytes to ``fd`` in order; the sha256 of them when asked."""
    out = BlockWriter(fd, hashes=hashes, behind=any(tensor.compute is not None for tensor in tensors.values()))
    try:
        for name in serialiser_order(tensors):
            if tensors[name].compute is not None:
                out.add(computed_bytes(name, tensors[name]))
            for region in tensors[name].regions:
                out.add_region(region)
        return out.finish()
    finally:
        out.close()


def sha256() -> hashlib._Hash:
    """hashlib's, which takes 3 ms to import."""
    import hashlib

    return hashlib.sha256()


class BlockWriter:
    """Writes a stream of bytes in blocks of 1 MiB, and hashes each on another thread; :meth:`finish` writes the rest.

    Tensors are often a few kilobytes: one by one, the threads would spend their time on taking turns for the interpreter.
    ``behind``: write on the other thread, too, because this one has something to compute.
    """

    def __init__(self, fd: int, *, hashes: bool, behind: bool) -> None:
        self._fd, self._used, self._here = fd, 0, not behind
        self._digest = sha256() if hashes else None
        steps = (self._hash,) * hashes + (self._write,) * behind
        self._behind = Behind(*steps) if steps else None
        self._block = memoryview(bytearray(CHUNK))

    def add(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        view = memoryview(data)
        if len(view) > CHUNK - self._used:
            self._flush()
        if len(view) > CHUNK:
            self._send(view)
            if len(view) > LARGE and self._behind is not None:
                self._behind.wait()
            return
        self._block[self._used : self._used + len(view)] = view
        self._used += len(view)

    def add_region(self, region: Region) -> None:
        """The next bytes, from where they lie: many at once inside the kernel, unless they are to be hashed."""
        if self._digest is None and region.length >= CHUNK // 16:
            self._flush()
            self._send(region)
            return
        offset, left = region.offset, region.length
        while left:
            count = min(left, CHUNK - self._used)
            region.source.read_into(offset, self._block[self._used : self._used + count])
            self._used, offset, left = self._used + count, offset + count, left - count
            if self._used == CHUNK:
                self._flush()

    def finish(self) -> str | None:
        """Write what is left; the sha256 of everything when asked for.

        Raises what writing raises (OSError), as every other method may: the other thread's failures arrive late.
        """
        self._flush()
        if self._behind is not None:
            self._behind.finish()
        return None if self._digest is None else self._digest.hexdigest()

    def close(self) -> None:
        """Stop the other thread; idempotent."""
        if self._behind is not None:
            self._behind.close()

    def _flush(self) -> None:
        if self._used:
            self._send(self._block[: self._used])
            self._used = 0
            if self._behind is not None:  # it may not have come to this one yet
                self._block = self._behind.spare()

    def _send(self, item: Item) -> None:
        if self._behind is not None:
            self._behind.add(item)
        if self._here:
            self._write(item)

    def _hash(self, item: Item) -> None:
        assert self._digest is not None  # noqa: S101  it is a step only where there is one
        assert isinstance(item, memoryview)  # noqa: S101  regions are read where they are to be hashed
        self._digest.update(item)

    def _write(self, item: Item) -> None:
        if isinstance(item, memoryview):
            write_all(self._fd, item)
        else:
            copy_region(self._fd, item)


def copy_region(fd: int, region: Region) -> None:
    """Append a region to ``fd``, inside the kernel where it can."""
    offset, left = region.offset, region.length
    source = region.source.descriptor()
    if source is not None and hasattr(os, "copy_file_range") and left >= CHUNK // 16:
        with suppress(OSError):  # another file system, or one without support: fall through to reads and writes
            while left and (n := os.copy_file_range(source, fd, left, offset_src=offset)):
                offset, left = offset + n, left - n
    while left:
        data = region.source.read(offset, min(CHUNK, left))
        write_all(fd, data)
        offset, left = offset + len(data), left - len(data)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """All of ``data`` to a descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A descriptor of a temporary file beside ``path`` that takes its place when the block ends without an error.

    Where it replaces a file, the new one is synced to disk first, so that a power cut leaves one of the two. A new file
    is not: nothing could be lost but the copy, and syncing costs as much again as writing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with blamed_on(path):
        fd, name = -1, ""
        try:
            with held():
                fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
            yield fd
            if path.exists():
                os.fsync(fd)
            os.close(fd)
            Path(name).chmod(0o666 & ~umask())
            Path(name).replace(path)
        except BaseException:
            if name:
                with suppress(OSError):
                    os.close(fd)
                Path(name).unlink(missing_ok=True)
            raise


def umask() -> int:
    """The process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
