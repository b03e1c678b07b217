#!/usr/bin/env bash
# Ask the prediction API: the risk of one encounter with its reasons, or of a whole CSV.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/predict.sh [ENCOUNTER.json | FILE.csv]

Asks the prediction API that `make run` left running (or the one at DIABETES_API_URL; a key, if it
wants one, from DIABETES_API_KEY).
  without an argument   the risk of an example encounter and its reasons
  ENCOUNTER.json        the same for the encounter in the file
  FILE.csv              the risk of every row, as CSV on standard output
TEXT
}

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
esac
if [ $# -gt 1 ]; then
    usage >&2
    exit 2
fi

cd_back=$PWD
cd "$(dirname "$0")/.."
if [ -z "${DIABETES_API_URL:-}" ] && [ -f "${DIABETES_STATE_DIR:-.run}/env.sh" ]; then
    # shellcheck source=/dev/null
    source "${DIABETES_STATE_DIR:-.run}/env.sh"
fi
url=${DIABETES_API_URL:-http://127.0.0.1:8000}
cd "$cd_back"

file=${1:-}
if [ -n "$file" ] && [ ! -f "$file" ]; then
    echo "error: $file: no such file" >&2
    exit 1
fi

ask() {
    local status=0
    # The key comes on standard input: on a command line everyone could read it.
    printf 'header = "X-API-Key: %s"\n' "${DIABETES_API_KEY:-}" |
        curl --silent --show-error --fail-with-body --noproxy '*' --config - "$@" || status=$?
    case "$status" in
        0) ;;
        22) printf '\nerror: %s refused it, for the reason above\n' "$url" >&2; exit 1 ;;
        *) echo "error: no answer from $url (curl $status); is it up? make up" >&2; exit 1 ;;
    esac
}

example='{
    "race": "Caucasian", "gender": "Female", "age": "[70-80)",
    "admission_type_id": 1, "discharge_disposition_id": 3, "admission_source_id": 7,
    "time_in_hospital": 6, "num_lab_procedures": 52, "num_medications": 19,
    "number_inpatient": 2, "number_emergency": 1, "number_diagnoses": 9,
    "diag_1": "428", "diag_2": "250.02", "diag_3": "403",
    "A1Cresult": ">8", "insulin": "Up", "change": "Ch", "diabetesMed": "Yes"
}'

case "$file" in
    *.csv)
        ask --header 'Content-Type: text/csv' --request POST --upload-file "$file" \
            "$url/v1/predict/batch"
        ;;
    *)
        # An encounter of somebody's own goes by its file: a command line everyone can read.
        body=${file:+@$file}
        ask --header 'Content-Type: application/json' --data "${body:-$example}" \
            "$url/v1/explain?top=5"
        echo
        ;;
esac
