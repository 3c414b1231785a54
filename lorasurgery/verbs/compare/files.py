"""Two files read as adapters of one model, where they can be."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.errors import BrokenModuleError, RequestError, UnknownArchitectureError
from lorasurgery.files.opened import open_together, read_unparsed, refuse_needless, together

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.adapter import Adapter


def open_both(
    a: Path, b: Path, *, arch: str | None = None, base: Path | None = None, alpha: float | None = None
) -> tuple[Adapter, Adapter]:
    """The two adapters, for one model where both fit one.

    A file of a few modules fits several models: it is read as the other's. Files of a model that no table knows get
    their names from ``base``; without it they are compared by their names as spelled, of which one file must then have all of
    the other's if they are spelled differently. Files of two models, and modules of other sizes, are a difference to be shown.
    ``alpha`` is what a file was trained at that does not say it. Raises what :func:`lorasurgery.load` raises.
    """
    try:
        first, second = open_together([a, b], arch=arch, base=base, alpha=alpha)
    except (BrokenModuleError, RequestError):
        first, second = (together([replace(read_unparsed(p), alpha=alpha)], arch=arch, base=base)[0] for p in (a, b))
        refuse_needless(alpha, (first, second))
    except UnknownArchitectureError:
        if base is not None or arch is not None:
            raise
        second, first = open_together([b, a], alpha=alpha)
    return first, second
