#!/usr/bin/env bash
# Create .venv from the locked requirements; nothing to do where it is up to date.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/setup.sh [GROUP]

Installs requirements/GROUP.txt (pipeline or dev; default: pipeline) into .venv.
PYTHON names the interpreter to use; it has to be Python 3.11.
TEXT
}

case "${1:-pipeline}" in
    pipeline | dev) group=${1:-pipeline} ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac

cd "$(dirname "$0")/.."
lock=requirements/$group.txt
mark=.venv/.installed-$group
digest=$(cksum <"$lock")
if [ -f "$mark" ] && [ "$(cat "$mark")" = "$digest" ]; then
    exit 0
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 not found; install it, or set PYTHON to its path" >&2
    return 1
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Creating .venv with $("$python" --version)"
    if ! "$python" -m venv --clear .venv; then
        echo "error: '$python -m venv' failed; on Debian and Ubuntu install python3.11-venv" >&2
        exit 1
    fi
fi

echo "Installing $lock (about 200 packages, 1 GB)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
    -r requirements/uv.txt
# uv installs ten times faster; pip knows mirrors that are set up for pip alone.
.venv/bin/uv pip install --quiet --python .venv/bin/python --compile-bytecode \
    --require-hashes -r "$lock" ||
    .venv/bin/python -m pip install --disable-pip-version-check --require-hashes -r "$lock"
printf '%s\n' "$digest" >"$mark"
