"""What a conversion may do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType

from lorasurgery.errors import RequestError
from lorasurgery.surgery.reduce import Budget

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
        return Budget(self.rank, self.energy)

    def check(self) -> None:
        """Raises RequestError for values out of range."""
        if self.qkv not in (AUTO, FUSE, SPLIT):
            raise RequestError(f"--qkv is auto, fuse or split, not {self.qkv}")
        if self.rank is not None and self.rank < 1:
            raise RequestError(f"the rank must be at least 1, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RequestError(f"the energy must lie in (0, 1], not {self.energy}")
        if self.dtype not in ("keep", *DTYPES):
            raise RequestError(f"--dtype is keep, fp32, fp16 or bf16, not {self.dtype}")
        try:
            re.compile("|".join(f"(?:{pattern})" for pattern in self.drop))
        except re.error as error:
            raise RequestError(f"--drop {' --drop '.join(self.drop)} is no regular expression ({error})") from error
