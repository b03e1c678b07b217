#!/usr/bin/env bash
# Create .venv (or .venv-policy) from the locked requirements; nothing to do where it is up to date.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/setup.sh [GROUP...]

Installs requirements/GROUP.txt of each group (pipeline, training, monitoring, loadtest, serving, ui or dev; without any:
all but dev, what `make run` needs) into .venv; policy, alone, into .venv-policy. PYTHON names the
interpreter to use; it has to be Python 3.11.
TEXT
}

[ $# -gt 0 ] || set -- pipeline training monitoring serving ui
venv=.venv
[ "$*" != policy ] || venv=.venv-policy
locks=()
for group in "$@"; do
    case "$group" in
        policy)
            # checkov's pins fit nobody else's environment.
            [ "$venv" = .venv-policy ] || { usage >&2; exit 2; }
            locks+=(requirements/policy.txt)
            ;;
        pipeline | training | monitoring | loadtest | serving | ui | dev) locks+=("requirements/$group.txt") ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done

cd "$(dirname "$0")/.."
mark=$venv/.installed-$(IFS=-; echo "$*")
digest=$(cat "${locks[@]}" | cksum)
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

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Creating $venv with $("$python" --version)"
    if ! "$python" -m venv --clear "$venv"; then
        echo "error: '$python -m venv' failed; on Debian and Ubuntu install python3.11-venv" >&2
        exit 1
    fi
fi

size="about 240 packages, 2 GB"
[ "$venv" = .venv ] || size="about 100 packages, 300 MB"
echo "Installing ${locks[*]} ($size)"
requirements=()
for lock in "${locks[@]}"; do
    requirements+=(-r "$lock")
done
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes \
    -r requirements/uv.txt
# uv installs ten times faster; pip knows mirrors that are set up for pip alone.
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --compile-bytecode \
    --require-hashes "${requirements[@]}" ||
    "$venv/bin/python" -m pip install --disable-pip-version-check --require-hashes "${requirements[@]}"
printf '%s\n' "$digest" >"$mark"
