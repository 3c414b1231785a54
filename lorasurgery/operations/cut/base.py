"""The base model beside an adapter: its weights by site, read one at a time, and their norms, remembered by content."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lorasurgery.errors import RequestError
from lorasurgery.io.writer import replacing
from lorasurgery.linalg.policies import References
from lorasurgery.linalg.randomized import dense_svd
from lorasurgery.models import open_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorasurgery.architectures.table import Architecture, Spans
    from lorasurgery.linalg.factors import AnyArray, Array
    from lorasurgery.models import Reader
    from lorasurgery.operations.cut.subject import Subject
    from lorasurgery.site import Site


@dataclass(slots=True)
class NormCache:
    """Norms of base weights by content id, in a JSON file; without a path only in memory."""

    path: Path | None = None
    _norms: dict[str, dict[str, float]] = field(default_factory=dict)
    _changed: bool = False

    def __post_init__(self) -> None:
        if self.path is not None and self.path.is_file():
            try:
                stored = json.loads(self.path.read_text("utf-8"))
                self._norms = {str(k): {str(n): float(v) for n, v in own.items()} for k, own in stored.items()}
            except (ValueError, AttributeError, TypeError):  # a cache that cannot be read is made again
                self._norms = {}

    def get(self, content: str, name: str, compute: Callable[[], float]) -> float:
        """The remembered number, or ``compute()``, which is remembered."""
        own = self._norms.setdefault(content, {})
        if name not in own:
            own[name] = compute()
            self._changed = True
        return own[name]

    def save(self) -> None:
        """Write the file if something is new."""
        if self.path is None or not self._changed:
            return
        with replacing(self.path) as fd, open(fd, "w", encoding="utf-8", closefd=False) as file:
            json.dump(self._norms, file)
        self._changed = False


class Weights(Protocol):
    """What is asked of a base model; :class:`lorasurgery.models.Model` is one."""

    @property
    def path(self) -> Path:
        """Where the model is."""

    @property
    def content(self) -> str:
        """Names, dtypes, shapes and samples of the data, hashed."""

    def reader(self, component: str, spans: Spans) -> Reader:
        """The rows of a site."""


@dataclass(slots=True)
class BaseModel:
    """Weights of a base model by site, and what is measured of them."""

    model: Weights
    cache: NormCache

    @property
    def path(self) -> Path:
        """Where the model is."""
        return self.model.path

    @property
    def content(self) -> str:
        """Names, dtypes, shapes and samples of the data, hashed: the same for a copy, another for a finetune."""
        return self.model.content

    def weight(self, site: Site) -> Callable[[], AnyArray]:
        """A function that reads the weight of a site as (out, in*k*k) in float32.

        Raises RequestError when the base model lacks any of its rows.
        """
        return self._reader(site).rows

    def frobenius(self, site: Site) -> float:
        """``||W||_F``."""
        squares = (float(np.sum(rows.astype(np.float64) ** 2)) for _, rows in self._reader(site).chunks())
        return self._norm("fro", site, lambda: float(np.sqrt(sum(squares))))

    def spectral(self, site: Site) -> float:
        """The largest singular value of W, to 1e-3."""
        weight = self.weight(site)
        return self._norm("spn", site, lambda: float(dense_svd(weight(), rank=1).singular_values[0]))

    def along(self, subject: Subject) -> Array:
        """``u_i^T W v_i`` for every singular pair of the module; raises RequestError for a LoKr that stays one."""
        module, source = subject.module, subject.source
        if subject.form != "lora":
            raise RequestError(
                f"{module.name}: only a LoRA has the directions that the score subspace looks at", hint="as LoRA"
            )
        every = np.arange(len(source.values))
        left, right = (side(every, np.ones(len(every))) for side in (source.left, source.right))
        found = np.zeros(len(every))
        for at, rows in self._reader(module.site).chunks():
            found += np.sum((rows @ right.T) * left[at : at + len(rows)], axis=0)
        return found

    def references(self, subject: Subject) -> References:
        """What the scores of a module are measured against."""
        site = subject.module.site
        return References(
            subject.per_rank, lambda: self.spectral(site), lambda: self.frobenius(site), lambda: self.along(subject)
        )

    def _reader(self, site: Site) -> Reader:
        return self.model.reader(site.component, site.spans)

    def _norm(self, kind: str, site: Site, compute: Callable[[], float]) -> float:
        name = ",".join(f"{span.weight}[{span.start}:{span.stop}]" for span in site.spans)
        return self.cache.get(self.content, f"{kind}:{site.component}:{name}", compute)


def open_base(path: str | Path, architecture: Architecture, cache: NormCache | None = None) -> BaseModel:
    """A base model from whatever :func:`lorasurgery.models.open_model` reads; only headers are read.

    Raises RequestError when none of its weights is one of the architecture's, FileFormatError and OSError for the files.
    """
    model = open_model(path, arch=architecture)
    if next(model.sites(), None) is None:
        raise RequestError(
            f"no weight of {architecture.name} is in it", path=path, hint="the base model that the adapter was trained on"
        )
    return BaseModel(model, cache or NormCache())
