#!/usr/bin/env bash
# Bring databases back from a backup that the CronJob postgres-backup has made.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/restore.sh [--backup STAMP|latest] [--database NAME]... [--overlay NAME]
                          [--context NAME] [--yes]
       scripts/restore.sh --list [--overlay NAME] [--context NAME]

Stops what writes to the databases (MLflow, the API, Airflow), replaces each database in one
transaction with what the backup holds, and starts the writers again. If anything fails, each
database is either as it was or as in the backup, and the writers come back.

  --list           show the backups and change nothing
  --backup STAMP   which one, such as 20260131T031700Z; latest (default) is the newest
  --database NAME  mlflow, diabetes or airflow, several times for several; without it all
  --overlay NAME   microk8s (default), seaweedfs or production: which cluster is expected
  --context NAME   context of kubectl; without it the current one, which for microk8s and
                   seaweedfs has to be 'microk8s'
  --yes            don't ask
  -h, --help       this text

Environment: DEPLOY_TIMEOUT, seconds given to each wait (1800); DEPLOY_REQUEST_TIMEOUT, seconds
given to each request to the cluster (30).
TEXT
}

refuse() {
    echo "error: $1" >&2
    usage >&2
    exit 2
}

overlay=microk8s
wanted_context=""
backup=latest
databases=()
only_list=false
sure=false
while [ $# -gt 0 ]; do
    case "$1" in
        --overlay | --context | --backup | --database)
            if [ $# -lt 2 ] || [ -z "$2" ]; then
                refuse "$1 needs a value"
            fi
            case "$1" in
                --overlay) overlay=$2 ;;
                --context) wanted_context=$2 ;;
                --backup) backup=$2 ;;
                *) databases+=("$2") ;;
            esac
            shift
            ;;
        --list) only_list=true ;;
        --yes) sure=true ;;
        -h | --help) usage; exit 0 ;;
        *) refuse "unknown argument '$1'" ;;
    esac
    shift
done
[[ $backup =~ ^(latest|[0-9]{8}T[0-9]{6}Z)$ ]] ||
    refuse "--backup '$backup': expected latest or a stamp such as 20260131T031700Z"
for database in ${databases[@]+"${databases[@]}"}; do
    [[ $database =~ ^(mlflow|diabetes|airflow)$ ]] ||
        refuse "--database '$database': expected mlflow, diabetes or airflow"
done

cd "$(dirname "$0")/.."
DEPLOY_TIMEOUT=${DEPLOY_TIMEOUT:-1800}
# shellcheck source=scripts/lib/cluster.sh
source scripts/lib/cluster.sh

interrupted="a database that was being restored stays as it was"
require_seconds DEPLOY_TIMEOUT "$LIMIT"
require_seconds DEPLOY_REQUEST_TIMEOUT "$REQUEST_LIMIT"
require_overlay "$overlay"
job=""

# Image and settings of the backups are those of the restore, whatever lies in infra/k8s by now.
of_backups() {
    attempt "look at cronjob postgres-backup" ask get cronjob postgres-backup -o \
        "jsonpath={.spec.jobTemplate.spec.template.spec.$1}"
}

# render PATCH: the Job of infra/k8s/tasks/postgres-restore with lines of JSON patch added.
render() {
    local folder=.run/deploy/$overlay/postgres-restore image dump_image platform
    image=$(of_backups 'containers[?(@.name=="upload")].image') || exit
    # pg_restore reads no dump of a newer pg_dump.
    dump_image=$(of_backups 'initContainers[?(@.name=="dump")].image') || exit
    platform=$(of_backups 'containers[?(@.name=="upload")].envFrom[*].configMapRef.name') || exit
    mkdir -p "$folder"
    cat >"$work/kustomization.yaml" <<YAML
# Written by scripts/restore.sh; it is written anew at every run.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: $NAMESPACE
resources:
  - ../../../../infra/k8s/tasks/postgres-restore
images:
  - {name: diabetes-mlflow, newName: "${image%:*}", newTag: "${image##*:}"}
  - {name: postgres, newName: "${dump_image%:*}", newTag: "${dump_image##*:}"}
patches:
  - target: {kind: Job, name: postgres-restore}
    patch: |-
$1
YAML
    mv "$work/kustomization.yaml" "$folder/kustomization.yaml"
    attempt "render $folder" "${KUBECTL[@]}" kustomize "$folder" |
        sed -E "s/^( +name: )platform\$/\1$platform/" >"$work/job.yaml"
}

list_backups() {
    render '      - {op: replace, path: /metadata/name, value: postgres-backups}
      - {op: copy, from: /spec/template/spec/initContainers/0, path: /spec/template/spec/containers/0}
      - {op: remove, path: /spec/template/spec/containers/1}
      - {op: remove, path: /spec/template/spec/initContainers}
      - {op: replace, path: /spec/template/spec/containers/0/command, value: [python, -m, infra.jobs.backup]}
      - {op: replace, path: /spec/template/spec/containers/0/args, value: [list]}'
    job=postgres-backups
    remove job "$job"
    run_job "$work/job.yaml" "$job" postgres-restore
    attempt "read the list" ask logs "job/$job"
}

stop_writers() {
    local all workload replicas
    all=$(attempt "look for what writes" ask get deployments,statefulsets \
        -l 'app.kubernetes.io/name in (mlflow,api)' -o "$REPLICAS") || exit
    all+=$'\n'$(attempt "look for Airflow" ask get deployments,statefulsets \
        -l "release=$HELM_RELEASE" -o "$REPLICAS") || exit
    while read -r workload replicas; do
        # One that is at nothing already is noted, or was never up.
        [ "${replicas:-0}" != 0 ] || continue
        say "      ${workload,,}: from $replicas to 0"
        attempt "annotate $workload" ask annotate --overwrite "${workload,,}" "$WAS=$replicas" >"$work/scaled"
        attempt "scale $workload" ask scale "${workload,,}" --replicas=0 >"$work/scaled"
    done <<<"$all"
    wait_until_gone pods -l 'app.kubernetes.io/name in (mlflow,api)'
    # The pods of tasks are nobody's replicas; the scheduler may start one until it is gone.
    wait_until_gone pods -l "release=$HELM_RELEASE,component=scheduler"
    remove pods -l "release=$HELM_RELEASE"
}
# shellcheck disable=SC2016  # the template's variables
REPLICAS='go-template={{range .items}}{{.kind}}/{{.metadata.name}} {{.spec.replicas}}{{"\n"}}{{end}}'

# Also after a failure and after Ctrl-C.
put_in_order() {
    local status=$?
    trap '' INT TERM
    trap at_end EXIT
    [ "$status" -ne 130 ] || tell_interrupted
    if [ -n "$job" ]; then
        remove job "$job"
    fi
    if $writers_stopped; then
        say "Starting the writers again"
        bring_back
    fi
    exit "$status"
}

find_kubectl
choose_context "$overlay" "$wanted_context"
require_cluster
if ! own_namespace || ! exists cronjob postgres-backup; then
    fail "the platform is not deployed in context '$context'; run scripts/deploy.sh first"
fi
writers_stopped=false
trap put_in_order EXIT
if $only_list; then
    list_backups
    exit 0
fi

what=${databases[*]:-mlflow diabetes airflow}
if ! $sure; then
    say "This replaces the databases ($what) of context $context with backup $backup; what was" \
        "written since is lost. MLflow, the API and Airflow are away meanwhile."
    read -r -p "Type yes to go on: " answer || answer=""
    [ "$answer" = yes ] || fail "not confirmed; nothing was changed"
fi

patch="      - {op: add, path: /spec/template/spec/initContainers/0/args/-, value: --backup=$backup}"
for database in ${databases[@]+"${databases[@]}"}; do
    patch+=$'\n'"      - {op: add, path: /spec/template/spec/initContainers/0/args/-, value: --database=$database}"
done
render "$patch"
writers_stopped=true
say "Stopping what writes to the databases"
stop_writers
say "Restoring"
job=postgres-restore
remove job "$job"
run_job "$work/job.yaml" "$job" postgres-restore
for container in fetch restore; do
    attempt "read the log" ask logs "job/$job" -c "$container" --tail=20
done
remove job "$job"
job=""
mapfile -t writers < <(stopped | awk '{ print tolower($1) }')
say "Starting the writers again"
bring_back
writers_stopped=false
[ ${#writers[@]} -eq 0 ] || wait_for "${writers[@]}"
say "Done: $what restored from backup $backup."
if [[ " $what " == *" mlflow "* ]]; then
    # Complete Jobs are not run again; what they have done is undone.
    remove job mlflow-migrate
    remove job mlflow-users
    say "If an earlier version has made the backup: scripts/deploy.sh brings MLflow's tables up to date."
fi
