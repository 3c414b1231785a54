"""What a file is when it is not the safetensors file its name promises, from its first bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.errors import FileFormatError

if TYPE_CHECKING:
    from pathlib import Path

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin"})

_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for", "git lfs pull"),
    (
        b"<!doctype",
        "an HTML page, most likely an error page saved in place of the download",
        "download it again, logged in",
    ),
    (
        b"<html",
        "an HTML page, most likely an error page saved in place of the download",
        "download it again, logged in",
    ),
    (
        b"sqlite format 3\0",
        "an SQLite database, most likely a model or LoRA of Draw Things",
        "the .safetensors file that was imported there",
    ),
    (b"gguf", "a GGUF model, not a safetensors file", "the adapter in safetensors form"),
    (b"<?xml", "an XML page, most likely an error page saved in place of the download", "download it again, logged in"),
    (b"pk\x03\x04", "a zip archive (a PyTorch checkpoint?) with another suffix", "rename it to .pt"),
    (b"\x80\x02", "a Python pickle (an old PyTorch checkpoint?) with another suffix", "rename it to .pt"),
    (b"\x80\x03", "a Python pickle (an old PyTorch checkpoint?) with another suffix", "rename it to .pt"),
    (b"\x80\x04", "a Python pickle (an old PyTorch checkpoint?) with another suffix", "rename it to .pt"),
    (b"\x80\x05", "a Python pickle (an old PyTorch checkpoint?) with another suffix", "rename it to .pt"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"rar!", "a RAR archive", "unpack it first"),
    (b"\x89png", "a PNG image", "the .safetensors file that goes with it"),
    (b"\xff\xd8\xff", "a JPEG image", "the .safetensors file that goes with it"),
    (b"{", "a JSON text, not a safetensors file", "the .safetensors file next to it"),
)


def explain(path: Path, head: bytes, size: int) -> FileFormatError | None:
    """The error that tells what ``path`` is, or None when its first bytes could begin a safetensors file.

    ``head``: the first bytes of the file; ``size``: its length in bytes.
    """
    if size == 0:
        return FileFormatError("the file is empty", path=path, hint="download it again")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, what, hint in _SIGNATURES:
        if start.startswith(signature) and not _plausible_header(head):
            return FileFormatError(f"this is {what}", path=path, hint=hint)
    if size < 8:
        return FileFormatError(
            f"truncated: {size} bytes are too few for a safetensors header", path=path, hint="download it again"
        )
    return None


def a_folder(path: Path) -> FileFormatError:
    """The error for a folder that is no PEFT adapter."""
    return FileFormatError(
        "this is a folder", path=path,
        hint="a file inside it, a PEFT folder with adapter_config.json, or --out-dir for every adapter in it",
    )  # fmt: skip


def explain_torch(path: Path, head: bytes, size: int) -> FileFormatError | None:
    """The error that tells what a file with a PyTorch suffix is, or None when it can be a PyTorch file."""
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return None
    if _plausible_header(head):
        return FileFormatError("this is a safetensors file with a PyTorch suffix", path=path, hint="rename it to .safetensors")
    return explain(path, head, size) or FileFormatError("this is no PyTorch file", path=path, hint="download it again")


def _plausible_header(head: bytes) -> bool:
    """A length that makes sense followed by an opening brace: a safetensors file whose length looks like text."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000
