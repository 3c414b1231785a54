"""What a trainer's configuration says about families that multiply the weight, where their tensors do not say it.

Sources: PEFT 0.21 ``OFTConfig`` (``use_cayley_neumann``, ``num_cayley_neumann_terms``, ``coft``, ``eps``) and ``IA3Config``
(``feedforward_modules``, ``IA3Model._check_target_module_feedforward``); OneTrainer ``modules/module/LoRAModule.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasurgery.deltas.orthogonal import NEUMANN_TERMS
from lorasurgery.errors import FileFormatError
from lorasurgery.layouts.peft_own import is_named

if TYPE_CHECKING:
    from collections.abc import Mapping

PEFT_PREFIX = "base_model.model."
"""Keys of PEFT's own begin so, those of OneTrainer's OFT never."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How to read what multiplies a weight."""

    terms: int | None = NEUMANN_TERMS
    """Of the series that an OFT's rotations are; None: they are Cayley's transform."""
    longest: float | None = None
    """COFT's ``eps``; None: nothing is shortened."""
    backwards: bool = False
    """Whether a convolution's columns are turned by R, as OneTrainer does, not by R^T, as PEFT does."""
    feedforward: tuple[str, ...] | str | None = None
    """Ends of the names of modules whose (IA)^3 multiplies inputs, or one pattern; None: not told."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Rules:
        """From ``adapter_config.json``; absent fields have PEFT's defaults.

        Raises FileFormatError for fields of another kind than PEFT writes.
        """
        forward = fields.get("feedforward_modules")
        try:
            terms = int(fields.get("num_cayley_neumann_terms", NEUMANN_TERMS))
            return cls(
                terms if fields.get("use_cayley_neumann", True) else None,
                float(fields.get("eps", 6e-5)) if fields.get("coft") else None,
                feedforward=forward if forward is None or isinstance(forward, str) else tuple(map(str, forward)),
            )
        except (TypeError, ValueError) as error:
            raise FileFormatError(
                f"adapter_config.json has eps or num_cayley_neumann_terms that is no number ({error})",
                hint="the configuration PEFT wrote",
            ) from error

    def is_feedforward(self, name: str) -> bool | None:
        """Whether a module, by its name in the wrapped model, is one of :attr:`feedforward`; None: not told."""
        return None if self.feedforward is None else is_named(self.feedforward, name)
