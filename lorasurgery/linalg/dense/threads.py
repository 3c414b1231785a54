"""How many threads torch uses inside one operation."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """A context in which torch uses ``count`` threads in each operation; the number before comes back at the end.

    The number belongs to the process: for several decompositions at once enter it around all of them, with 1.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
