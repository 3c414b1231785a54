"""A pretended accelerator: tensors that say they are on ``cuda:0`` and behave so, with their numbers on the CPU.

What real devices refuse is refused: operands on two devices, ``numpy()``, float64 on mps, more bytes than there are. Copies,
waits for the device and the bytes in use are counted. It says nothing of speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from tests.pretended_board import Board, Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest
    from typing_extensions import Self

MIXED = "Expected all tensors to be on the same device, but found at least two devices, {} and {}! (in {})"
NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32."
TO_NUMPY = "can't convert {} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
NOT_ON_MPS = ("aten._linalg_eigh", "aten.linalg_qr")
FACTORIES = ("zeros", "ones", "empty", "full", "eye", "arange", "tensor", "as_tensor", "randn", "rand")


class Pretended(torch.Tensor):
    """A tensor on a pretended device."""

    numbers: torch.Tensor
    board: Board
    place: str
    memory: Memory

    @staticmethod
    def __new__(cls, inner: torch.Tensor, board: Board, place: str, memory: Memory) -> Self:
        """Around the numbers of a CPU tensor."""
        layout: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        own: Self = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=torch.device(place))
        own.numbers, own.board, own.place, own.memory = inner, board, place, memory
        return own

    def numpy(self, **_: Any) -> Any:
        """As on a real one."""
        raise TypeError(TO_NUMPY.format(self.place))

    def __array__(self, *_: Any) -> Any:
        raise TypeError(TO_NUMPY.format(self.place))

    def tolist(self) -> Any:
        """One copy."""
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> Any:
        """A view, or a copy by an index; one of the host's travels."""
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, list) or (isinstance(part, torch.Tensor) and not isinstance(part, Pretended)):
                self.board.copied(8 * len(part), to_device=True)
        return _wrapped_again(self.numbers[pytree.tree_map(_unwrapped, index)], [self])

    def __setitem__(self, index: Any, value: Any) -> None:
        to = self[index]
        to.copy_(value) if isinstance(value, torch.Tensor) else to.fill_(value)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Any:
        """Over its numbers."""
        if not isinstance(source, Pretended):
            self.board.copied(source.nbytes, to_device=True, waits=not non_blocking)
        self.numbers.copy_(_unwrapped(source))
        return self

    def contiguous(self, **_: Any) -> Any:  # type: ignore[override]
        """Itself or a copy."""
        return self if self.is_contiguous() else self.clone(memory_format=torch.contiguous_format)

    def item(self) -> Any:
        """The host waits for it."""
        self.board.copied(self.nbytes, to_device=False)
        return self.numbers.item()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __iter__(self) -> Iterator[Any]:
        return iter([self[at] for at in range(len(self))])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({tuple(self.shape)}, {self.dtype}, {self.place})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operation on the numbers within."""
        del types
        kwargs, name = dict(kwargs or {}), str(func)
        next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Pretended)).board.ran(name)
        if name == "aten._to_copy.default":
            return _copied(args[0], **kwargs)
        target = kwargs.pop("device", None)
        outcome = _within(func, name, args, kwargs)
        return pytree.tree_map(_unwrapped, outcome) if target == torch.device("cpu") else outcome


def wrapped(inner: torch.Tensor, board: Board, place: str, memory: Memory | None = None) -> Pretended:
    """A CPU tensor as one of a device; raises TypeError for float64 on mps."""
    if board.kind == "mps" and inner.dtype == torch.float64:
        raise TypeError(NO_FLOAT64)
    return Pretended(inner.detach(), board, place, memory or Memory(board, place, inner.untyped_storage().nbytes()))


def _within(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on the numbers within."""
    operands = pytree.tree_leaves((args, kwargs))
    theirs = [x for x in operands if isinstance(x, Pretended)]
    _check(theirs[0], name, operands)
    inside = pytree.tree_map(_unwrapped, (args, kwargs))
    return pytree.tree_map(lambda x: _wrapped_again(x, theirs), func(*inside[0], **inside[1]))


def _unwrapped(value: Any) -> Any:
    return value.numbers if isinstance(value, Pretended) else value


def _wrapped_again(value: Any, theirs: list[Pretended]) -> Any:
    """The wrapper of an operand that was changed in place; a view shares its memory."""
    if not isinstance(value, torch.Tensor):
        return value
    for own in theirs:
        if own.numbers is value:
            return own
    storage = value.untyped_storage()._cdata
    shared = next((x.memory for x in theirs if x.numbers.untyped_storage()._cdata == storage), None)
    return wrapped(value, theirs[0].board, theirs[0].place, shared)


def _check(first: Pretended, name: str, operands: list[Any]) -> None:
    """Raises for operands elsewhere and for what mps has not; the host's numbers without a dimension may be anywhere."""
    board = first.board
    for value in operands:
        if isinstance(value, Pretended):
            if value.place != first.place:
                raise RuntimeError(MIXED.format(first.place, value.place, name))
        elif isinstance(value, torch.Tensor) and value.ndim:
            if not name.startswith("aten.index.") or value.dtype.is_floating_point:
                raise RuntimeError(MIXED.format(first.place, "cpu", name))
            board.copied(value.nbytes, to_device=True)
    if board.kind == "mps" and (name.startswith(NOT_ON_MPS) or torch.float64 in operands):
        raise NotImplementedError(f"{name} is not there on mps")


def _copied(source: Pretended, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any) -> Any:
    """A tensor of a device to the host, or in another dtype."""
    if device is not None and device.type == "cpu":
        if source.board.kind == "mps" and dtype == torch.float64:
            raise TypeError(NO_FLOAT64)
        source.board.copied(source.nbytes, to_device=False)
        return source.numbers.to(dtype or source.dtype, copy=True)
    return wrapped(source.numbers.to(dtype or source.dtype, copy=True), source.board, source.place)


def pretend(monkeypatch: pytest.MonkeyPatch, kind: str = "cuda", limit: int | None = None) -> Board:
    """From now on torch has devices of this kind, of ``limit`` bytes each; on every thread, until the patch is undone."""
    board = Board(kind, limit)
    monkeypatch.setattr(torch.Tensor, "to", _to(board, torch.Tensor.to))
    monkeypatch.setattr(torch, "where", _where(torch.where))  # makes its number on the device, where nothing comes between
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # several wait for each other where other tests run
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    for name in FACTORIES:
        monkeypatch.setattr(torch, name, _factory(board, getattr(torch, name)))
    return board


def _to(board: Board, real: Callable[..., Any]) -> Callable[..., Any]:
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        device = next((x for x in (*args, kwargs.get("device")) if isinstance(x, (str, torch.device))), None)
        if device is None or not board.has(device):
            return real(self, *args, **kwargs)
        dtype = next((x for x in (*args, kwargs.get("dtype")) if isinstance(x, torch.dtype)), self.dtype)
        place, inner = board.named(device), _unwrapped(self)
        if isinstance(self, Pretended) and self.place == place:
            return real(self, dtype)
        if not isinstance(self, Pretended):
            waits = not (kwargs.get("non_blocking") and getattr(self, "pinned", False))
            board.copied(self.nbytes, to_device=True, waits=waits)
        return wrapped(real(inner, dtype, copy=True), board, place)

    return to


def _factory(board: Board, real: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        device, pinned = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
        if board.has(device):
            return wrapped(real(*args, **kwargs), board, board.named(device))
        own = real(*args, **kwargs, **({} if device is None else {"device": device}))
        if pinned:
            own.pinned = True
        return own

    return made


def _where(real: Callable[..., Any]) -> Callable[..., Any]:
    def where(*args: Any) -> Any:
        return _within(real, "where", args, {}) if any(isinstance(x, Pretended) for x in args) else real(*args)

    return where
