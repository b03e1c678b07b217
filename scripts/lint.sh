#!/usr/bin/env bash
# All static checks; the first that fails ends it.
set -euo pipefail

case "${1:-}" in
    "") ;;
    -h | --help) echo "Usage: scripts/lint.sh   (ruff, mypy, sqlfluff, shellcheck, hadolint, yamllint; promtool, amtool if there)"; exit 0 ;;
    *) echo "Usage: scripts/lint.sh" >&2; exit 2 ;;
esac

cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
ruff check .
ruff format --check .
mypy
(cd dbt_diabetes && sqlfluff lint --disable-progress-bar models tests analyses)
shellcheck -x scripts/*.sh scripts/lib/*.sh infra/docker/*.sh .ci/run .ci/programs
hadolint infra/docker/Dockerfile.*
yamllint --strict .
# Of Debian's prometheus and prometheus-alertmanager, not every machine has them.
if command -v promtool > /dev/null; then promtool check rules monitoring/prometheus/rules/*.yaml; fi
if command -v amtool > /dev/null; then amtool check-config monitoring/prometheus/alertmanager.yaml; fi
