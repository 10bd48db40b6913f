#!/usr/bin/env bash
# setup.sh PYTHON VENV: what `make setup` does: environment, pinned install. Says each step and its time.
set -euo pipefail
python=$1 venv=$2
start=$SECONDS
command -v "$python" >/dev/null || { echo "setup: $python not found; install Python 3.11 with venv and headers, or: make PYTHON=python3.12 ..." >&2; exit 2; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "setup: installing the pinned packages into $venv (about 1.5 minutes the first time)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt 2> >(grep -v '^WARNING: Location' >&2)
seconds=$((SECONDS - start))
echo "$seconds" > .cache/setup-seconds
echo "setup: done in $seconds s"
