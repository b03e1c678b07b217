#!/usr/bin/env bash
# Remove what deploy.sh made; the data stay unless --purge is confirmed.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/cleanup.sh [--overlay NAME] [--context NAME] [--namespace diabetes-mlops]
                          [--purge] [--yes] [--dry-run]

Removes from the cluster what scripts/deploy.sh made: Airflow's Helm release, workloads, services,
ingress, network policies and ConfigMaps. Keeps the data (persistent volume claims), the Secrets
that open them, and the namespace: deploy.sh continues with them.

  --overlay NAME    microk8s (default), seaweedfs or production: which cluster is expected
  --context NAME    context of kubectl; without it the current one, which for microk8s and
                    seaweedfs has to be 'microk8s'
  --namespace NAME  only diabetes-mlops is accepted: no other namespace is ever touched
  --purge           also delete the data, the Secrets and the namespace, for good; asks first
  --yes             don't ask
  --dry-run         only show what would be removed
  -h, --help        this text

Environment: DEPLOY_TIMEOUT, seconds given to each wait (300); DEPLOY_REQUEST_TIMEOUT, seconds given
to each request to the cluster (30).
TEXT
}

overlay=microk8s
wanted_context=""
wanted_namespace=""
purge=false
sure=false
dry_run=false
while [ $# -gt 0 ]; do
    case "$1" in
        --overlay | --context | --namespace)
            if [ $# -lt 2 ] || [ -z "$2" ]; then
                echo "error: $1 needs a name" >&2
                usage >&2
                exit 2
            fi
            case "$1" in
                --overlay) overlay=$2 ;;
                --context) wanted_context=$2 ;;
                *) wanted_namespace=$2 ;;
            esac
            shift
            ;;
        --purge) purge=true ;;
        --yes) sure=true ;;
        --dry-run) dry_run=true ;;
        -h | --help) usage; exit 0 ;;
        *)
            echo "error: unknown argument '$1'" >&2
            usage >&2
            exit 2
            ;;
    esac
    shift
done

cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/cluster.sh
source scripts/lib/cluster.sh

interrupted="what is removed is gone, the rest stays; run the same command again to go on"
require_seconds DEPLOY_TIMEOUT "$LIMIT"
require_seconds DEPLOY_REQUEST_TIMEOUT "$REQUEST_LIMIT"
require_overlay "$overlay"
[ "${wanted_namespace:-$NAMESPACE}" = "$NAMESPACE" ] ||
    refuse_usage "namespace '$wanted_namespace' is not this project's; only $NAMESPACE is ever cleaned"

# What comes and goes with a deployment. Claims, Secrets and the namespace do not.
KINDS=deployments,statefulsets,cronjobs,jobs,services,ingresses,horizontalpodautoscalers,poddisruptionbudgets,networkpolicies,configmaps

confirm_purge() {
    local answer
    ! $sure || return 0
    say "This deletes the databases, the artifacts, the backups and the passwords in namespace" \
        "$NAMESPACE of context $context, for good."
    read -r -p "Type the name of the namespace to go on: " answer || answer=""
    [ "$answer" = "$NAMESPACE" ] || fail "not confirmed; nothing was removed"
}

uninstall_airflow() {
    find_helm || fail "release $HELM_RELEASE is there, and neither helm nor microk8s is installed to" \
        "remove it; install Helm, then run this again"
    say "Removing the Helm release $HELM_RELEASE"
    run_long "${HELM[@]}" uninstall "$HELM_RELEASE" --wait --timeout "${LIMIT}s" ||
        fail "helm could not remove release $HELM_RELEASE, for the reason above; mend it, then run" \
            "this again"
}

show() {
    local line
    while read -r line; do
        say "  $line"
    done <<<"${1:-(nothing)}"
}

find_kubectl
choose_context "$overlay" "$wanted_context"
require_cluster
if ! exists namespace "$NAMESPACE"; then
    say "Nothing to remove: context $context has no namespace $NAMESPACE."
    exit 0
fi
own_namespace || exit

objects=$(list "$KINDS" -l "$PART_OF") || exit
release=$(list secrets -l "owner=helm,name=$HELM_RELEASE") || exit
# Of the chart, Helm leaves the Job of its hook and the pods of tasks that still run.
leftover=$(list jobs,pods -l "release=$HELM_RELEASE") || exit
kept=$(list persistentvolumeclaims,secrets -l "owner!=helm") || exit
if $dry_run; then
    say "Would remove from namespace $NAMESPACE of context $context:"
    show "$objects"
    [ -z "$release" ] || say "  Helm release $HELM_RELEASE"
    if $purge; then say "Would delete with the namespace, for good:"; else say "Would keep:"; fi
    show "$kept"
    exit 0
fi

! $purge || confirm_purge
[ -z "$release" ] || uninstall_airflow
[ -z "$leftover" ] || remove jobs,pods -l "release=$HELM_RELEASE"
if [ -n "$objects" ]; then
    say "Removing what deploy.sh made in namespace $NAMESPACE"
    remove "$KINDS,pods" -l "$PART_OF"
fi
if $purge; then
    say "Deleting namespace $NAMESPACE with all data"
    remove namespace "$NAMESPACE"
    say "Done: namespace $NAMESPACE and all data are gone."
    exit 0
fi
[ -n "$objects$release$leftover" ] || say "Nothing to remove in namespace $NAMESPACE."
say "Kept in namespace $NAMESPACE, for the next scripts/deploy.sh:"
show "$kept"
say "To delete that too, for good: scripts/cleanup.sh --overlay $overlay --context $context --purge"
