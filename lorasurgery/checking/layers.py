"""What PEFT's layers do with a file whose modules have unlike parts.

PEFT 0.21 makes a layer for every module that a key names (``inject_adapter``), with a bias or a magnitude in all of them
when one has it (``LoraConfig``). Diffusers 0.42 has them made on the meta device, so a part that the file lacks has no numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.checking.rules import LOKR
from lorasurgery.layouts.diffusers_lokr import unfit
from lorasurgery.layouts.targets import LAYOUTS, names_in, namings
from lorasurgery.layouts.words import BIAS, MAGNITUDE

if TYPE_CHECKING:
    from lorasurgery.checking.job import Job
    from lorasurgery.checking.subject import Subject

PARTS = {"down": "down factor", "up": "up factor", BIAS: "bias", MAGNITUDE: "magnitude"}


def without_numbers(job: Job, subject: Subject) -> list[str]:
    """Why every forward pass fails after loading; empty when it does not. A file without any up factor is refused."""
    if job.route.reads >= LOKR:
        known = [item for item in subject.items if item.stem in job.known.sites]
        own = namings(LAYOUTS["diffusers"], job.architecture)
        names = {spans: name for naming in own for name, spans in names_in(naming, job.architecture).items()}
        refusal, odd = unfit({names.get(job.known.sites[i.stem].spans, i.stem): i.delta for i in known})
        if refusal:
            job.refuse(refusal)
        return [f"{odd[0]} has other factors than PEFT makes for its rank" + _more(len(odd))] if odd else []
    if job.route.keeps_words:
        for key in subject.others:
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
    why = "others have one" if set(words) & {PARTS[BIAS], PARTS[MAGNITUDE]} else "its layer needs both factors"
    return [f"{first} is left without its {' and '.join(words)} ({why})" + _more(len(lacking))]


def _more(count: int) -> str:
    return f" ({count} modules)" if count > 1 else ""
