# Sourced by the scripts beside it. `ensure_env LEVEL` makes .venv in the repository root and installs what LEVEL needs:
#   run   the program
#   dev   the program, its tests and the linters
# A stamp in .venv holds a hash of everything the installation depends on, so a second call installs nothing.
# PYTHON names the interpreter for a new environment (default: python3, 3.10 or newer).
# shellcheck shell=bash

set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="$root/.venv"
python="$venv/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1

step() { printf '\n== %s\n' "$*" >&2; }

install() { "$python" -m pip install -qq --constraint constraints.txt "$@"; }

# A hash of the requirements, the interpreter and the place of the repository (the editable install points there).
env_key() {
    "$python" - "$root" pyproject.toml constraints.txt scripts/_env.sh <<'PY'
import hashlib, pathlib, sys
root, *files = sys.argv[1:]
parts = [sys.version, sys.base_prefix, root, *(pathlib.Path(f).read_text(encoding="utf-8") for f in files)]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
}

has_stamp() { [[ -f "$venv/.installed-$1" && "$(<"$venv/.installed-$1")" == "$2" ]]; }

ensure_venv() {
    if "$python" -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null; then return; fi
    local base="${PYTHON:-python3}"
    if ! "$base" -c "import sys; sys.exit(sys.version_info < (3, 10))"; then
        printf '%s is not Python 3.10 or newer. Try: PYTHON=python3.12 %s\n' "$base" "$0" >&2
        exit 1
    fi
    step "making .venv with $("$base" -V)"
    "$base" -m venv --clear "$venv"
}

ensure_env() {
    local level="$1" key extra=""
    ensure_venv
    key="$(env_key)"
    if has_stamp "$level" "$key" || has_stamp dev "$key"; then return; fi
    step "installing what '$level' needs into .venv (a few minutes, once)"
    [[ "$level" == run ]] || extra="[$level]"
    rm -f "$venv"/.installed-*
    # torch by itself first: left to another package's requirement, pip takes whichever build is newest.
    # hatchling next to it, pinned, in place of a build environment of its own.
    install torch hatchling
    install --no-build-isolation --editable ".$extra"
    printf '%s\n' "$key" >"$venv/.installed-$level"
}
