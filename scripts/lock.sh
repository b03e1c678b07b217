#!/usr/bin/env bash
# Resolve the dependency groups of pyproject.toml into requirements/*.txt.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/lock.sh [--upgrade]

Writes requirements/{uv,pipeline,training,serving,ui,dev}.txt with exact versions and hashes, wheels only, no index
addresses. Keeps the versions that stand there unless --upgrade is given.
TEXT
}

upgrade=()
case "${1:-}" in
    "") ;;
    --upgrade) upgrade=(--upgrade) ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac

cd "$(dirname "$0")/.."
compile() {
    .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --only-binary :all: \
        --generate-hashes --custom-compile-command "make lock" \
        ${upgrade[@]+"${upgrade[@]}"} "$@"
}

compile --group pyproject.toml:dev --output-file requirements/dev.txt
# The smaller files take the versions of the largest, so that all fit into one environment.
for group in pipeline training serving ui; do
    compile --group "pyproject.toml:$group" --constraint requirements/dev.txt \
        --output-file "requirements/$group.txt"
done
echo uv | compile - --constraint requirements/dev.txt --output-file requirements/uv.txt
