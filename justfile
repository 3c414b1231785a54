# `just` lists these. Each recipe is one command, so nothing needs just itself.

_default:
    @just --list

# ruff, mypy and pytest; with arguments only pytest: just test -k lokr
test *args:
    ./scripts/test {{args}}

# Mend what ruff can mend, then check style and types
lint:
    .venv/bin/python -m ruff check --fix
    .venv/bin/python -m ruff format
    .venv/bin/python -m mypy

# Convert a bundled LoKr to ComfyUI and back, and compare every byte
demo:
    ./scripts/demo

# Measure speed and memory
bench *args:
    ./scripts/bench {{args}}

# Write the generated pages of docs/ anew
docs:
    ./scripts/docs
