"""Options about how inputs are read that several commands have."""

from __future__ import annotations

from typing import Annotated, Optional

from typer import Option

# typer evaluates this on Python 3.10 too, so it stays Optional
TrainedAlpha = Annotated[Optional[float], Option("--trained-alpha", help="The alpha it was trained at, for a file that does not say it (PEFT's weights without adapter_config.json).", show_default=False)]  # noqa: UP045, E501  # fmt: skip
