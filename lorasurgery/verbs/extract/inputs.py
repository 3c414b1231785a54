"""The two models and the output of an extraction, looked at before anything is read or written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures import named
from lorasurgery.errors import OutputExistsError, RequestError
from lorasurgery.io.writer import check_output
from lorasurgery.layouts.words import split_key
from lorasurgery.models import open_model
from lorasurgery.site import DENOISER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorasurgery.models import Model
    from lorasurgery.verbs.extract.options import ExtractOptions


def opened(base: str | Path, tuned: str | Path, arch: str | None, only: str | None = None) -> tuple[Model, Model]:
    """Both models, of which only headers are read; the second takes its names from the first where no table knows them.

    ``arch`` overrides detection; ``only``: raises RequestError for any other architecture.
    """
    one, two = open_model(base, arch=arch), open_model(tuned, arch=arch)
    for model in (one, two):
        _refuse_adapter(model)
    if one.architecture.id == two.architecture.id == "custom" and one.architecture.rows != two.architecture.rows:
        two = open_model(tuned, arch=one.architecture)
    if arch is None:
        one, two = _as_in(two, one), _as_in(one, two)
    if only is not None and one.architecture.id != only:
        wanted, found = named(only)[0], one.architecture
        raise RequestError(
            f"it is {found.name} ({found.key}), not {wanted.name}", path=one.path, hint=f"the same command for {found.id}"
        )
    return one, two


def _as_in(whole: Model, model: Model) -> Model:
    """A text encoder alone as the encoder of the other model's family, where that has it; anything else as it is."""
    has = any(own.table == model.component for own in whole.architecture.encoders)
    return open_model(model.path, arch=whole.architecture) if has and whole.component == DENOISER else model


def _refuse_adapter(model: Model) -> None:
    """Raises RequestError for a file most of whose keys end like an adapter's."""
    if model.architecture.id == "custom" and 2 * sum(split_key(key) is not None for key in model.weights) > len(model.weights):
        raise RequestError(
            "this is an adapter, not a model", path=model.path,
            hint="the two models; for the difference of two adapters: lorasurgery merge ONE TWO:-1 -o OUT",
        )  # fmt: skip


def check_devices(options: ExtractOptions) -> None:
    """Raises RequestError for a device that torch does not have."""
    if options.devices == ("cpu",):
        return
    import torch

    try:
        for name in options.devices:
            torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"torch has no device {options.device} here ({reason})", hint="--device cpu") from error


def check_files(output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Raises OutputExistsError for an output that is one of the inputs, or there already; OSError for a missing input."""
    for path in inputs:
        path.stat()
        if output.exists() and output.samefile(path):
            raise OutputExistsError(
                "the output is one of the models; it is never overwritten", path=output, hint="another name"
            )
    check_output(output, inputs, force=force)
    if inputs[0].samefile(inputs[1]):
        raise RequestError("the base and the tuned model are the same file", path=inputs[0])
