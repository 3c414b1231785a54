"""What a conversion may do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.errors import RequestError
from lorasurgery.io.dtypes import widest
from lorasurgery.operations.conversion.reduce import Budget

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lorasurgery.io.tensors import Tensor

AUTO, FUSE, SPLIT = "auto", "fuse", "split"
DTYPES = MappingProxyType({"fp32": "F32", "fp16": "F16", "bf16": "BF16"})


@dataclass(frozen=True, slots=True)
class Options:
    """What :func:`convert` may do. The defaults are exact or refuse."""

    qkv: str = AUTO
    """``auto``: fuse and split where exact, else keep split names where the target reads them; ``fuse``: make a LoRA
    where a fuse is not exact in the family; ``split``: Diffusers' names for fused weights, where the target reads them."""
    rank: int | None = None
    """Cut LoRAs made from other families to this rank (``--lokr-rank``)."""
    energy: float | None = None
    """Cut them to this share of the squared norm."""
    as_lora: bool = False
    """Turn LoHa, LoKr and full differences into LoRA."""
    family: str | None = None
    """Turn every module that has such a form into ``lokr``, ``loha`` or ``full``; for ``lokr``, :attr:`rank` and
    :attr:`energy` are w2's."""
    factor: int | None = None
    """For ``lokr``: LyCORIS' factor; None is -1, balanced, and leaves a LoKr as it is."""
    lossy: bool = False
    """Leave out what the target cannot hold (biases, norms, input-axis magnitudes) and list it."""
    drop: tuple[str, ...] = ()
    """``te``, ``unet``, or regular expressions on module names, to leave out on purpose."""
    prefix: str = "diffusion_model"
    """For the layout ``other``."""
    dtype: str = "keep"
    fix_split_alpha: bool = False
    """Multiply the scale of fused modules written by sd-scripts' ``split_qkv`` by the number of parts."""

    @property
    def budget(self) -> Budget:
        """The cut that was asked for."""
        return Budget() if self.family == "lokr" else Budget(self.rank, self.energy)

    def dtype_for(self, tensors: Iterable[Tensor]) -> str:
        """The dtype to compute a result in: the asked one, so that it is rounded once, else the widest of these."""
        return DTYPES.get(self.dtype) or widest([tensor.dtype for tensor in tensors])

    def check(self) -> None:
        """Raises RequestError for values out of range."""
        if self.qkv not in (AUTO, FUSE, SPLIT):
            raise RequestError(f"--qkv is auto, fuse or split, not {self.qkv}")
        if self.rank is not None and self.rank < 1:
            raise RequestError(f"the rank must be at least 1, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RequestError(f"the energy must lie in (0, 1], not {self.energy}")
        if self.family not in (None, "lokr", "loha", "full") or (self.family and self.as_lora):
            raise RequestError(f"--as is one of lora, lokr, loha and full, not {self.family}")
        if self.factor is not None and (self.family != "lokr" or (self.factor < 1 and self.factor != -1)):
            raise RequestError("--factor is a number from 1 up, or -1 for balanced factors, with --as lokr")
        if self.family == "full" and not self.budget.exact:
            raise RequestError("a full difference has no rank to cut", hint="--as full alone, or --as lora --rank N")
        if self.dtype not in ("keep", *DTYPES):
            raise RequestError(f"--dtype is keep, fp32, fp16 or bf16, not {self.dtype}")
        try:
            re.compile("|".join(f"(?:{pattern})" for pattern in self.drop))
        except re.error as error:
            raise RequestError(f"--drop {' --drop '.join(self.drop)} is no regular expression ({error})") from error
