"""What PEFT's layers do with a file whose modules have unlike parts.

PEFT 0.21 makes a layer for every module that a key names (``inject_adapter``), with a bias or a magnitude in all of them
when one has it (``LoraConfig``). Diffusers 0.42 has them made on the meta device, so a part that the file lacks has no numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.layouts.words import BIAS, MAGNITUDE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.checking.job import Job

PARTS = {"down": "down factor", "up": "up factor", BIAS: "bias", MAGNITUDE: "magnitude"}


def without_numbers(job: Job, others: Sequence[str]) -> list[str]:
    """Why every forward pass fails after loading; empty when it does not. A file without any up factor is refused."""
    if job.route.keeps_words:
        for key in others:
            stem = key.rpartition(".lora_")[0]
            if stem in job.known.sites:
                job.layers.setdefault(stem, set())
    if not job.layers:
        return []
    if "up" not in job.parts:
        job.refuse("IndexError: no module of the denoiser has an up factor")
    needed = {"down", "up"} | job.parts
    lacking = {stem: [PARTS[p] for p in PARTS if p in needed - parts] for stem, parts in job.layers.items() if needed - parts}
    if not lacking:
        return []
    first, words = next(iter(lacking.items()))
    count = f", as {len(lacking) - 1} other modules are" if len(lacking) > 2 else ", as another module is" if len(lacking) == 2 else ""
    why = "others have one" if set(words) & {PARTS[BIAS], PARTS[MAGNITUDE]} else "its layer needs both factors"
    return [f"{first} is left without its {' and '.join(words)} ({why}){count}"]
