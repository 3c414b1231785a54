"""Many small decompositions at once: N Python threads, each with one BLAS thread."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from lorasurgery.interrupts import held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_threads(fn: Callable[[Item], Result], items: Iterable[Item], workers: int) -> list[Result]:
    """``[fn(item) for item in items]`` on ``workers`` threads; the order is kept.

    The first exception (in the order of the items) is raised again here and items not yet begun are dropped. BLAS is
    held to one thread meanwhile, if threadpoolctl is installed; results then do not depend on ``workers``. Raises
    ``ValueError`` for fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    with one_blas_thread():
        if workers == 1:
            return [fn(item) for item in items]
        from concurrent.futures import ThreadPoolExecutor  # 6 ms, which a rename need not pay

        with ThreadPoolExecutor(workers) as pool:
            with held():
                results = pool.map(fn, items)
            return list(results)


def one_blas_thread() -> AbstractContextManager[Any]:
    """A context in which BLAS uses one thread; does nothing where threadpoolctl is not installed."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    limits: AbstractContextManager[Any] = threadpool_limits(1, user_api="blas")
    return limits
