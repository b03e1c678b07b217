#!/usr/bin/env bash
# Resolve the dependency groups of pyproject.toml into requirements/*.txt.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/lock.sh [--upgrade]

Writes requirements/{uv,pipeline,training,monitoring,loadtest,airflow,serving,serving-image,mlflow,ui,dev,policy}.txt with exact
versions and hashes, no index addresses, wheels only (but for checkov, which has none). Keeps the
versions that stand there unless --upgrade is given.
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
    .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --custom-compile-command "make lock" ${upgrade[@]+"${upgrade[@]}"} "$@"
}

lock() {
    compile --only-binary :all: "$@"
}

lock --group pyproject.toml:dev --output-file requirements/dev.txt
# The smaller files take the versions of the largest, so that all fit into one environment.
for group in pipeline training monitoring loadtest airflow serving mlflow ui; do
    lock --group "pyproject.toml:$group" --constraint requirements/dev.txt \
        --output-file "requirements/$group.txt"
done
# The API's image leaves out what CatBoost only draws with (120 MB); installed with --no-deps.
printf '%s; python_version < "3"\n' graphviz matplotlib plotly |
    lock --group pyproject.toml:serving --constraint requirements/dev.txt --override - \
        --output-file requirements/serving-image.txt
echo uv | lock - --constraint requirements/dev.txt --output-file requirements/uv.txt
# Its pins fit nobody else's environment: scripts/setup.sh policy makes one of its own.
echo checkov | compile - --output-file requirements/policy.txt
