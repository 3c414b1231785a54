"""Numbers that came out not finite: the input that is to blame, if one is."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from lorasurgery.errors import BrokenModuleError, SurgeryError
from lorasurgery.files.opened import read_any
from lorasurgery.io.finite import first_bad, not_finite
from lorasurgery.io.peft_folder import read_peft_folder

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def blamed(error: BrokenModuleError, inputs: Iterable[Path]) -> BrokenModuleError:
    """The same error about the first key of ``inputs`` with NaN or infinity, or about the narrow dtype where none has one.

    An error that names its file stays what it is.
    """
    if error.path is not None:
        return error
    paths = list(inputs)
    for path in paths:
        with suppress(SurgeryError, OSError):
            raw = read_peft_folder(path)[0] if path.is_dir() else read_any(path)
            key = first_bad(raw.tensors)
            if key is not None:
                return not_finite(key, path)
    if error.hint:
        return error
    return BrokenModuleError(
        f"{error.message}, though every value of the input is finite: the dtype is too narrow for the result",
        key=error.key, path=next(iter(paths), None),
        hint="--dtype fp32 or --dtype bf16, or --alpha keep where the target takes it",
    )  # fmt: skip
