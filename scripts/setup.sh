#!/usr/bin/env bash
# Brings .venv to what the locks say; every Makefile target calls it. Costs milliseconds when nothing changed: a stamp in
# .venv holds the digest of the locks (with this checkout's path) and that of pyproject.toml. Changed locks rebuild the
# environment from nothing, a changed pyproject.toml only installs drover again. An interrupted set-up starts over.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/drover.stamp
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
say() { printf 'setup: %s\n' "$*"; }
digest() { sha256sum | cut -c1-16; }

locks=$( (pwd; cat requirements/cpu.lock requirements/dev.lock) | digest)
project=$(digest <pyproject.toml)
stamp=$(cat "$STAMP" 2>/dev/null || true)
if [[ $stamp == "$locks $project" ]]; then exit 0; fi

export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
install=("$VENV/bin/python" -m pip install -qq --progress-bar off --no-compile --no-deps)

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3 python; do
        if "$candidate" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    say "no usable Python: 3.11 or 3.12 with venv is needed; python3 is $(python3 --version 2>&1 || true)" >&2
    say "install one (Debian: apt install python3.11-venv), or name it: make setup PYTHON=/path/to/python3.11" >&2
    return 1
}

build() {
    local python torch refusal
    python=$(find_python)
    say "$("$python" --version) ($python) → $VENV"
    "$python" -m venv --clear "$VENV"
    torch=$(grep '^torch==' requirements/cpu.lock)
    say "$torch"
    if ! refusal=$("${install[@]}" "$torch" 2>&1); then
        say "the index of this machine has no such build ($(grep -m1 ERROR <<<"$refusal" | cut -c8-120)…)"
        say "trying PyTorch's own index, $TORCH_CPU_INDEX"
        "${install[@]}" "$torch" --index-url "$TORCH_CPU_INDEX"
    fi
    say "$(cat requirements/*.lock | grep -c '==') pinned packages; with torch about 1 GB to fetch"
    "${install[@]}" -r requirements/cpu.lock -r requirements/dev.lock
    # In parallel and once: where PYTHONDONTWRITEBYTECODE is set, or the sandbox may not write, every process that
    # imports torch or vLLM would compile it again (tens of seconds). Packages carry templates that are not Python.
    "$VENV/bin/python" -m compileall -q -j 0 "$VENV"/lib/python3.*/site-packages >/dev/null || true
}

SECONDS=0
if [[ ${stamp%% *} != "$locks" ]]; then build; fi
"${install[@]}" --no-build-isolation -e .
echo "$locks $project" >"$STAMP"
say "done in ${SECONDS} s, $(du -sm "$VENV" | cut -f1) MB in $VENV"
