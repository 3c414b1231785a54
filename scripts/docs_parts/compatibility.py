"""docs/compatibility.md from the rules of `lorasurgery check`: ``python -m scripts.docs_parts.compatibility [--check]``."""

from __future__ import annotations

import sys
from pathlib import Path

from lorasurgery.architectures import architectures
from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, SD_SCRIPTS, Architecture, flat
from lorasurgery.checking.consumers import CONSUMERS
from lorasurgery.checking.engine import check
from lorasurgery.checking.result import CHANGED, LOADS, Result
from lorasurgery.checking.subject import Subject, subject_of
from lorasurgery.io.header import RawFile
from lorasurgery.io.tensors import Tensor, scalar
from lorasurgery.layouts.scales import PeftConfig

OUT = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
RANK = 4
KOHYA, AB = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
MIXED = "Diffusers names under diffusion_model. (ai-toolkit)"
LAYOUTS = (
    ("sd-scripts, musubi-tuner", "lora_unet_", SD_SCRIPTS, True, KOHYA),
    ("ComfyUI", "diffusion_model.", ORIGINAL, False, KOHYA),
    ("Diffusers", "{denoiser}.", DIFFUSERS, False, AB),
    (MIXED, "diffusion_model.", DIFFUSERS, False, AB),
    ("OneTrainer", "lora_{denoiser}_", DIFFUSERS, True, KOHYA),
    ("SimpleTuner LyCORIS", "lycoris_", DIFFUSERS, True, KOHYA),
    ("PEFT folder", "base_model.model.", DIFFUSERS, False, AB),
)
"""(name, prefix, naming, flat, words); the words with lora_down go with alpha tensors."""

HEAD = """# What loads where

Written by `scripts/docs` from the rules of `lorasurgery check`; do not edit it here.

A row is a file as a trainer leaves it: LoRA modules of every matrix inside the model's blocks, in one layout. A column is
a program. `all`: every module loads with the effect it was trained for. `n/m`: only so many load, in silence. `none`:
the file is accepted and changes nothing. `refused`: an error (PEFT takes folders only). `-`: the program has no such model.
`?`: not known here.

`lorasurgery convert FILE OUT --target LAYOUT` makes an `all` of every other cell that has a model, except where noted;
`lorasurgery check FILE --for PROGRAM` says the same of a real file, with its own families, alphas and missing blocks.

"""
TAIL = """
## Not in the table

| what | who reads it |
|---|---|
| LoHa, LoKr | ComfyUI, Forge, musubi-tuner, OneTrainer, PEFT, LyCORIS; sd-scripts for SDXL and Anima |
| LoHa, LoKr | SD.Next where it has a loader of its own; Diffusers: LoKr of FLUX.2 and Z-Image |
| DoRA as `dora_scale` | ComfyUI, Forge, OneTrainer, LyCORIS, SD.Next where it has a loader of its own |
| DoRA as `dora_scale` | Diffusers deletes it, and refuses Wan files with it |
| DoRA as `lora_magnitude_vector` | Diffusers, PEFT, OneTrainer |
| `.diff`, `.diff_b`, norms | ComfyUI and Forge (no bias of a part of a fused weight), SD.Next, LyCORIS |
| alpha in the header or `adapter_config.json` | Diffusers and PEFT; every other program applies the file at another strength |
| alpha of a LoKr with two whole factors | nobody but PEFT and the musubi-tuner fork with `lokr_factor` |

## JSON

`lorasurgery check --json` prints one object a file (schema 1):

| field | content |
|---|---|
| `schema` | 1 |
| `input`, `for` | the file and the program's name on the command line |
| `consumer` | `name`, `version` |
| `architecture`, `candidates` | the architecture, and others the keys fit |
| `known` | false when nothing is recorded about this program and architecture |
| `complete` | every module loads with the effect the file gives it |
| `verdict` | one line |
| `modules` | `total`, `loads`, `changed`, `ignored`, `rejected`, `unknown` (nothing is recorded) |
| `refusals` | why the program refuses the whole file |
| `failures` | why every forward pass fails after the file is loaded |
| `findings` | the modules that do not simply load: `module`, `status`, `reason`, `text` |
| `unread_keys` | keys of no module that are passed over |
| `notes` | remarks |
| `mend` | the command that makes a file which loads completely, or null where there is none or it cannot be foreseen |

`reason` is `prefix`, `name`, `suffix`, `shape`, `strength`, `dora`, `bias`, `effect`, `twice`, `broken` or `file`. A file
that cannot be read gives `schema`, `input`, `for` and `error`. Exit codes: 0 checked; 1 unreadable, or not complete under
`--strict`; 3 some of a batch unreadable.
"""


def sample(arch: Architecture, layout: tuple[str, str, str, bool, tuple[str, str]]) -> Subject | None:
    """A file of one layout with the matrices of each stack's first block; None where the layout has no names."""
    label, prefix, naming, is_flat, (down, up) = layout
    if label == MIXED and set(arch.namings[DIFFUSERS]) == set(arch.namings[ORIGINAL]):
        return None
    if label == "OneTrainer" and arch.onetrainer == "dotted":
        prefix, is_flat = "{denoiser}.", False
    roots = arch.diffusers_roots if label == "Diffusers" else ()
    raw: dict[str, Tensor] = {}
    for name, spans in arch.namings[naming].items():
        shape = arch.module_shape(spans)
        numbers = [part for part in spans[0].weight.split(".") if part.isdigit()]
        if len(shape) != 2 or not numbers or (arch.denoiser != "unet" and numbers[0] != "0") or "." not in spans[0].weight:
            continue
        if not any(word in spans[0].weight for word in ("block", "layers.", "refiner.")):
            continue
        stem = prefix.format(denoiser=arch.denoiser) + (flat(name) if is_flat else name)
        for root, component in roots:
            stem = f"{component}.{name[len(root) :]}" if name.startswith(root) else stem
        raw[stem + down], raw[stem + up] = Tensor("F32", (RANK, shape[1])), Tensor("F32", (shape[0], RANK))
        if down == KOHYA[0]:
            raw[f"{stem}.alpha"] = scalar(RANK / 2)
    if not raw:
        return None
    configs = {"": PeftConfig("adapter_config.json", RANK, RANK)} if label == "PEFT folder" else None
    return subject_of(RawFile(Path("sample.safetensors"), raw, {}), among=(arch,), configs=configs)


def cell(result: Result) -> str:
    """A result in one word."""
    total, loads = len(result.findings), result.counts[LOADS]
    if not result.known:
        return "?"
    if result.refusals:
        return "-" if "has no loader" in result.refusals[0] else "refused"
    if result.complete:
        return "all"
    changed = f" ({result.counts[CHANGED]} altered)" if result.counts[CHANGED] else ""
    return f"{loads}/{total}{changed}" if loads or changed else "none"


def page() -> str:
    """The whole page."""
    first: dict[str, Architecture] = {}
    for arch in architectures().values():
        first.setdefault(arch.id, arch)
    names = [c.name for c in CONSUMERS.values()]
    lines = [f"| model | layout | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for arch_id in sorted(first):
        arch = first[arch_id]
        for layout in LAYOUTS:
            subject = sample(arch, layout)
            if subject is None:
                continue
            cells = [cell(check(subject, c)) for c in CONSUMERS.values()]
            lines.append(f"| {arch_id} | {layout[0]} | {' | '.join(cells)} |")
    versions = ["", "| program | version | read in |", "|---|---|---|"]
    versions += [f"| {c.name} | {c.version} | {c.source} |" for c in CONSUMERS.values()]
    return HEAD + "\n".join([*lines, *versions]) + "\n" + TAIL


def main(*, compare: bool) -> int:
    """Write the page, or compare it."""
    text = page()
    if compare:
        current = OUT.is_file() and OUT.read_text(encoding="utf-8") == text
        print(f"{OUT.name} is {'current' if current else 'not current; run scripts/docs'}")
        return 0 if current else 1
    OUT.write_text(text, encoding="utf-8")
    print(f"wrote {OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main(compare="--check" in sys.argv[1:]))
