#!/usr/bin/env bash
# Bring the platform up on a Kubernetes cluster, or bring what runs there up to date.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/deploy.sh [--overlay NAME] [--context NAME] [--skip-build] [--without-airflow]
                         [--dry-run]

Builds and pushes the images, makes the Secrets that are missing, applies infra/k8s step by step,
installs Airflow with its official Helm chart, and logs a run to MLflow to see that all works. Run
it again after a change or a failure: it continues, and changes nothing that is up to date.

  --overlay NAME     microk8s (default), seaweedfs or production
  --context NAME     context of kubectl; without it the current one, which for microk8s and
                     seaweedfs has to be 'microk8s'
  --skip-build       the registry has the images already
  --without-airflow  leave Airflow as it is
  --dry-run          check, render and show what would change; change nothing. Without a cluster
                     it only renders
  -h, --help         this text

Environment:
  REGISTRY                where images are pushed (localhost:32000; production has to say)
  IMAGE_TAG               tag of all images, instead of a hash of what each is made of
  BASE_IMAGE              base image of our images, from a mirror of yours
  PIP_CONFIG_FILE         pip.conf that names a mirror of yours, for the build only
  DEPLOY_TIMEOUT          seconds given to each wait (300)
  DEPLOY_REQUEST_TIMEOUT  seconds given to each request to the cluster (30)

Passwords are generated once and stay in the cluster's Secrets; production brings its own. Earlier
versions of ConfigMaps stay, so that a roll-out can be undone: scripts/cleanup.sh removes them.
TEXT
}

CHART_REPOSITORY=https://airflow.apache.org
CHART_VERSION=1.22.0
ADDONS=(dns hostpath-storage registry ingress metrics-server)

overlay=microk8s
wanted_context=""
build=true
airflow=true
dry_run=false
while [ $# -gt 0 ]; do
    case "$1" in
        --overlay | --context)
            if [ $# -lt 2 ] || [ -z "$2" ]; then
                echo "error: $1 needs a name" >&2
                usage >&2
                exit 2
            fi
            if [ "$1" = --overlay ]; then overlay=$2; else wanted_context=$2; fi
            shift
            ;;
        --skip-build) build=false ;;
        --without-airflow) airflow=false ;;
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
# shellcheck source=scripts/lib/images.sh
source scripts/lib/images.sh
# shellcheck source=scripts/lib/secrets.sh
source scripts/lib/secrets.sh

interrupted="what is done stays; run the same command again, it continues from there"
require_seconds DEPLOY_TIMEOUT "$LIMIT"
require_seconds DEPLOY_REQUEST_TIMEOUT "$REQUEST_LIMIT"
require_overlay "$overlay"
on_microk8s=false
case "$overlay" in
    microk8s | seaweedfs) on_microk8s=true ;;
esac
registry=${REGISTRY:-}
if [ -z "$registry" ]; then
    $on_microk8s || refuse_usage "REGISTRY is not set; overlay $overlay needs the registry's name"
    registry=localhost:32000
fi
declare -A tags=()
generated=.run/deploy/$overlay
rendered=$work/rendered.yaml
online=true

begin() {
    phase="[$1/9] $2: "
    say "[$1/9] $2"
}

# --- 1 -------------------------------------------------------------------------------------------

check_tools() {
    local tool
    for tool in awk base64 cut find grep head paste sed sha256sum sort tail tr xargs; do
        command -v "$tool" >/dev/null || fail "$tool is not installed; install it, then run this again"
    done
    find_kubectl
    if $build && ! $dry_run; then
        command -v docker >/dev/null ||
            fail "docker is not installed; install it, or say --skip-build if the registry has the images"
        docker info >"$work/docker" 2>&1 || fail "the Docker engine does not answer" \
            "($(tail -n 1 "$work/docker")); start it, or say --skip-build"
    fi
}

check_cluster() {
    local verb resource allowed
    while read -r verb resource; do
        # `no` is an answer, not a failure.
        allowed=$(ask auth can-i "$verb" "$resource" 2>"$work/stderr") || [[ $allowed == no* ]] ||
            fail "could not ask for the right to $verb $resource: $(reason)"
        [[ $allowed != no* ]] || fail "context '$context' may not $verb $resource in namespace" \
            "$NAMESPACE; get that right, then run this again"
    done <<'RIGHTS'
create secrets
patch deployments.apps
patch statefulsets.apps
create jobs.batch
delete jobs.batch
RIGHTS
    own_namespace || say "      namespace $NAMESPACE is new"
}

# Enabled does not mean up, and the next step pushes to it.
wait_for_registry() {
    local ready started=$SECONDS
    while [ $((SECONDS - started)) -lt "$LIMIT" ]; do
        ready=$(ask --namespace container-registry get deployment registry \
            -o 'jsonpath={.status.readyReplicas}' 2>"$work/stderr") || break
        [ "${ready:-0}" = 0 ] || return 0
        sleep 1
    done
    say "      the registry is not up yet; pushing may fail"
}

begin 1 "tools and context"
check_tools
if $dry_run; then
    # A part of its own: where there is no cluster, the rest still can be shown.
    if unreachable=$( (choose_context "$overlay" "$wanted_context" && require_cluster) 2>&1); then
        choose_context "$overlay" "$wanted_context"
    else
        online=false
        say "      ${unreachable#error: "$phase"}"
        say "      so this run only renders"
    fi
else
    choose_context "$overlay" "$wanted_context"
    require_cluster
fi
if $airflow && $online && ! find_helm; then
    fail "neither helm nor microk8s is installed, and Airflow needs Helm; install it, or say" \
        "--without-airflow"
fi
if $online; then
    check_cluster
    say "      context $context, overlay $overlay"
fi

# --- 2 -------------------------------------------------------------------------------------------

begin 2 "MicroK8s addons"
if ! $on_microk8s || ! command -v microk8s >/dev/null; then
    say "      none of MicroK8s here: nothing to enable"
elif $online; then
    enabled=$(attempt "ask MicroK8s for its addons" microk8s status --format short) || exit
    for addon in "${ADDONS[@]}"; do
        if grep -Eq "^([a-z]+/)?$addon: enabled" <<<"$enabled"; then
            continue
        fi
        if $dry_run; then
            say "      would enable $addon"
            continue
        fi
        say "      enabling $addon"
        run_long microk8s enable "$addon" || fail "microk8s enable $addon failed, for the reason" \
            "above; mend it, then run this again"
        [ "$addon" != registry ] || wait_for_registry
    done
fi

# --- 3 -------------------------------------------------------------------------------------------

begin 3 "images"
for image in "${IMAGES[@]}"; do
    if [ "$image" = airflow ] && ! $airflow; then
        continue
    fi
    tags[$image]=${IMAGE_TAG:-}
    if [ -z "${tags[$image]}" ]; then
        tags[$image]=$(image_tag "$image") || exit
    fi
    name=$registry/diabetes-$image:${tags[$image]}
    if ! $build; then
        say "      $name"
    elif ! command -v docker >/dev/null; then
        say "      $name (no docker here: would be built and pushed where the registry lacks it)"
    elif in_registry "$name"; then
        say "      $name is in the registry"
    elif $dry_run; then
        say "      $name would be built and pushed"
    else
        say "      $name is built and pushed"
        build_image "$image" "$name"
    fi
done

# --- 4 -------------------------------------------------------------------------------------------

# An overlay may have named a registry already, and kustomize matches the name it gave.
write_images() {
    local image name
    printf 'images:\n'
    for image in mlflow api ui; do
        while read -r name; do
            printf '  - {name: "%s", newName: "%s", newTag: "%s"}\n' "$name" \
                "$registry/diabetes-$image" "${tags[$image]}"
        done < <(
            echo "diabetes-$image"
            sed -nE "s/^.* image: ([^ ]*\/diabetes-$image):.*/\1/p" "$work/plain.yaml" | LC_ALL=C sort -u
        )
    done
}

# generate FOLDER RESOURCE...: a kustomization below .run/deploy, complete or not at all.
generate() {
    local folder=$1 resource up
    shift
    up=$(sed -E 's|[^/]+|..|g' <<<"$folder")
    mkdir -p "$folder"
    {
        printf '# Written by scripts/deploy.sh; it is written anew at every run.\n'
        printf 'apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n'
        printf 'namespace: %s\nresources:\n' "$NAMESPACE"
        for resource in "$@"; do
            printf '  - %s/%s\n' "$up" "$resource"
        done
        write_images
        if [ ${#entries[@]} -gt 0 ]; then
            printf 'configMapGenerator:\n  - name: platform\n    behavior: merge\n    literals:\n'
            printf '      - %s\n' "${entries[@]}"
        fi
    } >"$work/kustomization.yaml"
    mv "$work/kustomization.yaml" "$folder/kustomization.yaml"
}

# MLflow refuses a Host header that it was not told of: the nodes' addresses are known only here.
find_entries() {
    local address hosts origins
    entries=()
    if $on_microk8s && $online; then
        addresses=$(attempt "look for the nodes' addresses" ask get nodes -o \
            'jsonpath={.items[*].status.addresses[?(@.type=="InternalIP")].address}') || exit
        hosts=$(sed -n 's/^  MLFLOW_ENTRY_HOSTS: //p' "$work/plain.yaml")
        origins=$(sed -n 's/^  MLFLOW_ENTRY_ORIGINS: //p' "$work/plain.yaml")
        for address in $addresses; do
            [[ $address != *:* ]] || address="[$address]"
            hosts+=,$address:30500
            origins+=,http://$address:30500
        done
        entries=("MLFLOW_ENTRY_HOSTS=$hosts" "MLFLOW_ENTRY_ORIGINS=$origins")
    fi
}

begin 4 "rendering"
addresses=""
entries=()
attempt "render overlay $overlay" "${KUBECTL[@]}" kustomize "infra/k8s/overlays/$overlay" >"$work/plain.yaml"
find_entries
generate "$generated" "infra/k8s/overlays/$overlay"
attempt "render $generated" "${KUBECTL[@]}" kustomize "$generated" >"$rendered"
generate "$generated/smoke-test" "infra/k8s/overlays/$overlay" infra/k8s/tasks/smoke-test
attempt "render infra/k8s/tasks/smoke-test" "${KUBECTL[@]}" kustomize "$generated/smoke-test" \
    >"$work/smoke-test.yaml"
say "      $(grep -c '^kind: ' "$rendered") objects; see them: kubectl kustomize $generated"

# --- 5 -------------------------------------------------------------------------------------------

begin 5 "Secrets"
if $online; then
    own=true
    own_namespace || own=false
    missing=()
    incomplete=()
    for secret in "${SECRETS[@]}"; do
        if [[ $secret == airflow-* ]] && ! $airflow; then
            continue
        fi
        keys=$(missing_keys "$secret") || exit
        if [ "$keys" = "${SECRET_KEYS[$secret]}" ]; then
            missing+=("$secret")
        elif [ -n "$keys" ]; then
            incomplete+=("$secret")
        fi
        [ -z "$keys" ] || printf '%s: %s\n' "$secret" "$keys" >>"$work/keys"
    done
    if [ ${#incomplete[@]} -gt 0 ] || { ! $on_microk8s && [ ${#missing[@]} -gt 0 ]; }; then
        hint="add them"
        $own || hint="make the namespace (kubectl create namespace $NAMESPACE; kubectl label namespace"
        $own || hint+=" $NAMESPACE $PART_OF), add them"
        fail "overlay $overlay takes these Secrets as they are, and they lack keys (Secret: keys);" \
            "$hint as docs/operations.md says, then run this again"$'\n'"$(sed 's/^/  /' "$work/keys")"
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        check_lost_secrets "${missing[@]}"
    fi
    if $dry_run; then
        say "      would make: ${missing[*]:-none}"
    else
        # They need the namespace.
        attempt "apply namespace $NAMESPACE" apply -f "$rendered" \
            -l "app.kubernetes.io/name=$NAMESPACE" >"$work/applied"
        for secret in ${missing[@]+"${missing[@]}"}; do
            # Roles get their passwords by this Job, which would not run again by itself.
            [ "$secret" != monitoring-credentials ] || remove job init-storage
            make_secret "$secret"
            say "      made $secret"
        done
        [ ${#missing[@]} -gt 0 ] || say "      all are there; none is changed"
    fi
fi

# --- 6 -------------------------------------------------------------------------------------------

step() {
    local name=$1 kind workload workloads=()
    attempt "apply step $name" apply -f "$rendered" -l "deploy-step=$name" >"$work/applied"
    say "      $name: $(grep -c . "$work/applied") objects applied"
    for kind in StatefulSet Deployment; do
        while read -r workload; do
            workloads+=("${kind,,}/$workload")
        done < <(names "$rendered" "$kind" "$name")
    done
    [ ${#workloads[@]} -eq 0 ] || wait_for "${workloads[@]}"
}

jobs_of() {
    local name
    while read -r name; do
        run_job "$rendered" "$name"
        say "      $1: job $name is complete"
    done < <(names "$rendered" Job "$1")
}

# show_diff SELECTOR: what applying the objects with these labels would change.
show_diff() {
    local status=0
    ask diff --server-side --field-manager="$MANAGER" --force-conflicts -f "$rendered" -l "$1" \
        2>"$work/stderr" || status=$?
    if [ "$status" -gt 1 ] || { [ "$status" -eq 1 ] && [ -s "$work/stderr" ]; }; then
        if grep -q "field is immutable" "$work/stderr"; then
            say "      job ${1##*=} has changed and would be replaced"
        else
            fail "could not compare $1 with the cluster: $(reason)"
        fi
    fi
    [ "$status" -eq 0 ] || changes=true
}

show_changes() {
    local name
    if ! $own; then
        say "      all of it would be created"
        return
    fi
    changes=false
    for name in 1-storage 3-mlflow 5-services; do
        show_diff "deploy-step=$name"
    done
    # One by one: kubectl compares nothing where one object can't be changed.
    while read -r name; do
        show_diff "app.kubernetes.io/name=$name"
    done < <(names "$rendered" Job 2-init; names "$rendered" Job 4-users)
    $changes || say "      nothing would change"
}

begin 6 "applying"
if $dry_run; then
    ! $online || show_changes
else
    bring_back
    step 1-storage
    jobs_of 2-init
    step 3-mlflow
    jobs_of 4-users
    step 5-services
fi

# --- 7 -------------------------------------------------------------------------------------------

begin 7 "Airflow"
values=(-f infra/k8s/airflow/values.yaml)
if [ -f "infra/k8s/airflow/values-$overlay.yaml" ]; then
    values+=(-f "infra/k8s/airflow/values-$overlay.yaml")
fi

install_airflow() {
    local image=$registry/diabetes-airflow tag=${tags[airflow]} mark workloads
    # What decides about the release; kept in its description, so that the same is not done twice.
    mark="deploy.sh $(cat "${values[@]:1:1}" "${values[@]:3:1}" - <<<"$CHART_VERSION $image $tag" |
        sha256sum | cut -c 1-12)"
    # Helm that was ended in the middle left a lock behind; what it had made is taken over.
    attempt "unlock release $HELM_RELEASE" ask delete secrets --ignore-not-found \
        -l "owner=helm,name=$HELM_RELEASE,status in (pending-install,pending-upgrade,pending-rollback)" >"$work/deleted"
    if "${HELM[@]}" history "$HELM_RELEASE" --max 1 -o json >"$work/history" 2>"$work/stderr" &&
        grep -Eq '"status": ?"deployed"' "$work/history" && grep -Fq "\"$mark\"" "$work/history" &&
        [ -n "$(list deployments -l "release=$HELM_RELEASE")" ]; then
        say "      release $HELM_RELEASE is up to date"
    else
        run_long "${HELM[@]}" upgrade --install "$HELM_RELEASE" airflow \
            --repo "$CHART_REPOSITORY" --version "$CHART_VERSION" "${values[@]}" \
            --set-string "images.airflow.repository=$image,images.airflow.tag=$tag" \
            --set-string "images.pod_template.repository=$image,images.pod_template.tag=$tag" \
            --description "$mark" --timeout "${LIMIT}s" ||
            fail "helm could not install release $HELM_RELEASE, for the reason above; mend it, then" \
                "run this again (more: kubectl --namespace $NAMESPACE get pods -l release=$HELM_RELEASE)"
    fi
    mapfile -t workloads < <(ask get deployments,statefulsets -l "release=$HELM_RELEASE" -o name)
    [ ${#workloads[@]} -eq 0 ] || wait_for "${workloads[@]//.apps/}"
}

if ! $airflow; then
    say "      left as it is (--without-airflow)"
elif $dry_run; then
    say "      would install chart airflow $CHART_VERSION from $CHART_REPOSITORY with" \
        "${values[*]} unless the release is up to date"
else
    install_airflow
fi

# --- 8 -------------------------------------------------------------------------------------------

begin 8 "smoke test"
if $dry_run; then
    say "      would log a run with an artifact to MLflow and read it back"
else
    remove job smoke-test
    run_job "$work/smoke-test.yaml" smoke-test
    answer=$(attempt "read the smoke test's log" ask logs job/smoke-test --tail=1) || exit
    say "      $answer"
    remove job smoke-test
fi

# --- 9 -------------------------------------------------------------------------------------------

begin 9 "ways in"
kubectl_line="${KUBECTL[*]} --namespace $NAMESPACE"

show_login() {
    printf '      %-22s %-10s %s get secret %s -o jsonpath={.data.%s} | base64 -d\n' \
        "$1" "$2" "$kubectl_line" "$3" "$4"
}

if $dry_run; then
    say "      as above: nothing was changed"
    exit 0
fi
# shellcheck disable=SC2016  # the template's variables
attempt "list the services" ask get services -l "$PART_OF" -o 'go-template={{range .items}}{{$n := .metadata.name}}{{range .spec.ports}}{{if .nodePort}}{{$n}} {{.name}} {{.nodePort}}{{"\n"}}{{end}}{{end}}{{end}}' |
    while read -r service port number; do
        printf '      %-22s http://%s:%s\n' "$service ($port)" "${addresses%% *}" "$number"
    done
# shellcheck disable=SC2016
attempt "list the ingresses" ask get ingresses -o 'go-template={{range .items}}{{$scheme := "http"}}{{if .spec.tls}}{{$scheme = "https"}}{{end}}{{range .spec.rules}}{{$scheme}}://{{.host}}{{"\n"}}{{end}}{{end}}' |
    sed 's/^/      by the ingress: /'
say "      User, and the command that prints the password:"
show_login "storage" adminuser storage-credentials secret-key
show_login "Grafana" adminuser grafana-credentials admin-password
show_login "MLflow" admin mlflow-credentials admin-password
! $airflow || show_login "Airflow" admin airflow-credentials admin-password
show_login "API (X-API-Key)" operator api-credentials operator-key
