# shellcheck shell=bash
# shellcheck disable=SC2034,SC2016  # used by who sources it; Go templates have $ too
# What deploy.sh, cleanup.sh and restore.sh share: messages, the cluster and its context, waiting
# with reasons, names. To be sourced; the caller has `set -euo pipefail` and stands in the
# project's root.

NAMESPACE=diabetes-mlops
PART_OF=app.kubernetes.io/part-of=diabetes-readmission
MANAGER=deploy.sh
HELM_RELEASE=airflow
LIMIT=${DEPLOY_TIMEOUT:-300}
REQUEST_LIMIT=${DEPLOY_REQUEST_TIMEOUT:-30}

program=${0##*/}
phase=""       # "[3/9] images: " while deploy.sh is there
interrupted="" # what a script wants said when it is interrupted
child=""
context=""
KUBECTL=()
HELM=()
work=$(mktemp -d)
exec 3>&2 # a signal may come while a command's errors go to a file

# --- messages ------------------------------------------------------------------------------------

say() {
    printf '%s\n' "$*"
}

fail() {
    printf 'error: %s%s\n' "$phase" "$*" >&2
    exit 1
}

refuse_usage() {
    printf 'error: %s; see scripts/%s --help\n' "$*" "$program" >&2
    exit 2
}

require_seconds() {
    local name=$1 value=$2
    [[ $value =~ ^[1-9][0-9]{0,5}$ ]] ||
        refuse_usage "$name is '$value'; expected a whole number of seconds above 0"
}

# --- ends ----------------------------------------------------------------------------------------

at_end() {
    local status=$?
    # Ctrl-C ends a command too, and bash may hear of that first.
    [ "$status" -ne 130 ] || tell_interrupted
    rm -rf "$work"
    exit "$status"
}

tell_interrupted() {
    [ -z "$interrupted" ] || printf '\ninterrupted: %s%s\n' "$phase" "$interrupted" >&3
    interrupted=""
}

at_signal() {
    trap '' INT TERM
    set +e
    if [ -n "$child" ]; then
        # A command in the background does not hear Ctrl-C; it is told, and may tidy up.
        kill "$child" 2>"$work/kill" && wait "$child" 2>"$work/kill"
    fi
    tell_interrupted
    exit 130
}

trap at_end EXIT
trap at_signal INT TERM

# bash hears a signal only between commands: what may take minutes runs beside it.
run_long() {
    local status=0
    "$@" &
    child=$!
    wait "$child" || status=$?
    child=""
    return "$status"
}

# --- the cluster ---------------------------------------------------------------------------------

require_overlay() {
    local overlay=$1 known
    known=$(find infra/k8s/overlays -mindepth 2 -maxdepth 2 -name kustomization.yaml |
        sed -E 's|.*/([^/]+)/kustomization.yaml|\1|' | LC_ALL=C sort | paste -sd ' ')
    [[ " $known " == *" $overlay "* ]] ||
        refuse_usage "there is no overlay '$overlay'; expected one of: $known"
}

find_kubectl() {
    if command -v kubectl >/dev/null; then
        KUBECTL=(kubectl)
    elif command -v microk8s >/dev/null; then
        KUBECTL=(microk8s kubectl)
    else
        fail "neither kubectl nor microk8s is installed; install one of them, then run this again"
    fi
}

find_helm() {
    if command -v helm >/dev/null; then
        HELM=(helm)
        if [ "${KUBECTL[0]}" = microk8s ]; then
            # MicroK8s' own kubectl knows its cluster; Helm has to be told.
            microk8s config >"$work/kubeconfig" 2>"$work/stderr" ||
                fail "microk8s config failed: $(reason)"
            HELM=(env "KUBECONFIG=$work/kubeconfig" helm)
        fi
    elif command -v microk8s >/dev/null; then
        HELM=(microk8s helm3)
    else
        return 1
    fi
    [ -z "$context" ] || HELM+=(--kube-context "$context")
    HELM+=(--namespace "$NAMESPACE")
}

# Nobody means to deploy a laptop's overlay to the cluster that happens to be the current one.
choose_context() {
    local overlay=$1 wanted=$2
    context=$wanted
    if [ -z "$context" ]; then
        context=$("${KUBECTL[@]}" config current-context 2>"$work/stderr") ||
            fail "kubectl has no current context ($(head -n 1 "$work/stderr")); name one with --context" \
                "(kubectl config get-contexts)"
        case "$overlay" in
            microk8s | seaweedfs)
                [ "$context" = microk8s ] || fail "the current context is '$context', and overlay" \
                    "$overlay is for 'microk8s'; if you mean that cluster, say --context $context"
                ;;
        esac
    elif ! "${KUBECTL[@]}" config get-contexts "$context" >"$work/contexts" 2>&1; then
        fail "there is no context '$context'; see kubectl config get-contexts"
    fi
    KUBECTL+=(--context "$context")
}

# kubectl, with an end to every request.
ask() {
    "${KUBECTL[@]}" --request-timeout "${REQUEST_LIMIT}s" --namespace "$NAMESPACE" "$@"
}

reachable() {
    ask get --raw /readyz >"$work/readyz" 2>"$work/stderr"
}

require_cluster() {
    reachable || fail "the cluster of context '$context' does not answer: $(reason)"
}

# What kubectl complained of last, in one line, with what to do about it.
reason() {
    local said
    said=$(grep -v '^Warning' "$work/stderr" | sed -E '/^[EWI][0-9]{4} /d' | head -n 1 | cut -c 1-600)
    printf '%s' "${said:-$(tail -n 1 "$work/stderr" | cut -c 1-600)}"
    case "$said" in
        *"is being terminated"*) printf '%s' "; wait until it is gone, then run this again" ;;
        *"(Forbidden)"* | *" is forbidden"*)
            printf '%s' "; get that right (kubectl auth can-i --list), then run this again"
            ;;
        *"updates to statefulset spec"*)
            printf '%s' "; kubectl --namespace $NAMESPACE delete statefulset NAME --cascade=orphan keeps its data, then run this again"
            ;;
        *"onnect"* | *"EOF"* | *"deadline exceeded"* | *"imeout"*)
            printf '%s' "; is the cluster up, and the network to it? Then run this again"
            ;;
        *) printf '%s' "; run this again when that is mended" ;;
    esac
}

# Run a request; if it fails, end with one message: attempt "do something" COMMAND...
attempt() {
    local what=$1
    shift
    "$@" 2>"$work/stderr" || fail "could not $what: $(reason)"
    sed -n '/^Warning: deleting cluster-scoped/d; /^Warning/p' "$work/stderr" >&2
}

# exists KIND NAME: whether it is there; ends the script if the cluster won't say.
exists() {
    local found
    found=$(attempt "look for $1 $2" ask get "$1" "$2" --ignore-not-found -o name) || exit
    [ -n "$found" ]
}

# Whether our namespace is there; ends the script if it is somebody else's, or on its way out.
own_namespace() {
    local found
    found=$(attempt "look for namespace $NAMESPACE" ask get namespace "$NAMESPACE" \
        --ignore-not-found --show-labels --no-headers) || exit
    [ -n "$found" ] || return 1
    [[ $found != *" Terminating "* ]] ||
        fail "namespace $NAMESPACE is being deleted; wait until it is gone, then run this again"
    [[ $found == *"$PART_OF"* ]] || fail "there is a namespace $NAMESPACE that this project did not" \
        "make (it lacks the label $PART_OF); if it is for this project:" \
        "kubectl label namespace $NAMESPACE $PART_OF"
}

# --- waiting -------------------------------------------------------------------------------------

# state KIND/NAME: ready, failed, started (only of the API), or how far it is.
state() {
    local known generation observed wanted updated ready total pods
    case "$1" in
        job/*)
            known=$(ask get "$1" -o \
                'jsonpath={range .status.conditions[?(@.status=="True")]}{.type} {end}') || return
            case " $known" in
                *" Complete "*) echo ready ;;
                *" Failed "*) echo failed ;;
                *) echo "runs" ;;
            esac
            ;;
        *)
            known=$(ask get "$1" -o 'jsonpath={.metadata.generation}|{.status.observedGeneration}|{.spec.replicas}|{.status.updatedReplicas}|{.status.readyReplicas}|{.status.replicas}|') || return
            IFS='|' read -r generation observed wanted updated ready total _ <<<"$known"
            if [ "${observed:-0}" -ge "$generation" ] && [ "${updated:-0}" -ge "${wanted:-1}" ] &&
                [ "${ready:-0}" -ge "${wanted:-1}" ] && [ "${total:-0}" -le "${updated:-0}" ]; then
                echo ready
            elif [ "$1" = statefulset/api ] && [ "${ready:-0}" -eq 0 ] && [ "${updated:-0}" -gt 0 ]; then
                # Without a model it is not ready, and it is Airflow, installed later, that trains one.
                pods=$(ask get pods -l app.kubernetes.io/name=api -o \
                    'jsonpath={range .items[*]}{.status.containerStatuses[0].started} {end}') || return
                case " $pods" in
                    *" false "* | *"  "* | " ") echo "has not started" ;;
                    *) echo started ;;
                esac
            else
                echo "${ready:-0} of ${wanted:-1} ready, ${updated:-0} of them new"
            fi
            ;;
    esac
}

# wait_for KIND/NAME...: until all are ready; otherwise says why they are not, and ends the script.
wait_for() {
    local workload now up started=$SECONDS told=$SECONDS
    for workload in "$@"; do
        up=0 # since when the API has been started
        while true; do
            # An API server that is away for a moment is no reason to give up.
            now=$(state "$workload" 2>"$work/stderr") || now="no answer: $(head -n 1 "$work/stderr")"
            case "$now" in
                ready) break ;;
                started)
                    # Loading a model takes a few seconds.
                    [ "$up" -gt 0 ] || up=$SECONDS
                    if [ $((SECONDS - up)) -ge $((LIMIT < 30 ? LIMIT / 2 : 15)) ]; then
                        say "      the API runs and waits for its first model: it answers predictions as" \
                            "soon as Airflow has trained one (docs/operations.md)"
                        break
                    fi
                    ;;
                failed)
                    explain "$workload"
                    fail "$workload has failed, for the reason above; mend it, then run this again" \
                        "(more: kubectl --namespace $NAMESPACE describe $workload)"
                    ;;
                *"(Forbidden)"*) fail "could not look at $workload: $(reason)" ;;
            esac
            [ $((SECONDS - started)) -lt "$LIMIT" ] || not_ready "$@"
            if [ $((SECONDS - told)) -ge 15 ]; then
                say "      waiting for $workload: $now ($((SECONDS - started)) of $LIMIT s)"
                told=$SECONDS
            fi
            sleep 0.5
        done
    done
}

not_ready() {
    local workload late=()
    for workload in "$@"; do
        if [[ $(state "$workload" 2>"$work/stderr") != @(ready|started) ]]; then
            late+=("$workload")
            explain "$workload"
        fi
    done
    # What was late may have made it meanwhile.
    [ ${#late[@]} -gt 0 ] || return 0
    fail "not ready after $LIMIT s: ${late[*]}; the reasons stand above. Mend them, or give more" \
        "time with DEPLOY_TIMEOUT, then run this again (more: kubectl --namespace $NAMESPACE" \
        "describe ${late[0]})"
}

# Of each pod: its phase, and why it has no node; of each container: why it waits, how it ended, how it
# ended before, or that it runs without being ready.
POD_REASONS='{{define "container"}}{{$c := .name}}
{{- with .state.waiting}}  container {{$c}} waits: {{.reason}} {{with .message}}{{.}}{{end}}{{"\n"}}{{end}}
{{- with .state.terminated}}{{if .exitCode}}  container {{$c}} ended: {{.reason}}, exit code {{.exitCode}} {{with .message}}{{.}}{{end}}{{"\n"}}{{end}}{{end}}
{{- with .lastState}}{{with .terminated}}  container {{$c}} ended before: {{.reason}}, exit code {{.exitCode}}{{"\n"}}{{end}}{{end}}
{{- if and .state.running (not .ready)}}  container {{$c}} runs, but is not ready{{"\n"}}{{end}}
{{- end -}}
{{range .items}}pod {{.metadata.name}}: {{.status.phase}}{{"\n"}}
{{- range .status.conditions}}{{if and (eq .type "PodScheduled") (eq .status "False")}}  has no node: {{.message}}{{"\n"}}{{end}}{{end}}
{{- range .status.initContainerStatuses}}{{template "container" .}}{{end}}
{{- range .status.containerStatuses}}{{template "container" .}}{{end}}
{{- end}}'

# explain KIND/NAME: its pods, why their containers wait or ended, events, last lines of logs.
explain() {
    local workload=$1 selector pod container log
    {
        printf -- '--- %s\n' "$workload"
        selector=$(ask get "$workload" -o \
            'go-template={{range $k, $v := .spec.selector.matchLabels}}{{$k}}={{$v}},{{end}}') || return 0
        ask get pods -l "${selector%,}" -o "go-template=$POD_REASONS" || return 0
        ask get events --sort-by=.metadata.creationTimestamp --no-headers -o \
            'custom-columns=OBJECT:.involvedObject.name,REASON:.reason,MESSAGE:.message' |
            awk -v name="${workload#*/}" 'index($1, name)' | tail -n 5 | sed 's/^/event /'
        ask get pods -l "${selector%,}" -o 'go-template={{range .items}}{{$p := .metadata.name}}{{range .spec.initContainers}}{{$p}} {{.name}}{{"\n"}}{{end}}{{range .spec.containers}}{{$p}} {{.name}}{{"\n"}}{{end}}{{end}}' |
            while read -r pod container; do
                # What ended says more than what has just begun.
                log=$(ask logs "$pod" -c "$container" --tail=20 --previous 2>"$work/no-log" </dev/null) ||
                    log=$(ask logs "$pod" -c "$container" --tail=20 2>"$work/no-log" </dev/null) || continue
                [ -z "$log" ] || printf 'log of %s, container %s:\n%s\n' "$pod" "$container" "$log"
            done
    } >&2 2>"$work/explain"
}

# list KIND...: names of what is there.
list() {
    attempt "list ${1//,*/ and others}" ask get "$@" -o name
}

wait_until_gone() {
    local left started=$SECONDS
    while true; do
        left=$(list "$@" --ignore-not-found) || exit
        [ -n "$left" ] || return 0
        [ $((SECONDS - started)) -lt "$LIMIT" ] || fail "still there after $LIMIT s:" \
            "$(paste -sd ' ' <<<"$left"); run this again (more: kubectl --namespace $NAMESPACE" \
            "describe $(head -n 1 <<<"$left"))"
        sleep 0.5
    done
}

# remove WHAT...: delete it, as `kubectl delete` names it, and wait until it is gone. kubectl's own
# wait would not end where the API server hangs.
remove() {
    local what="$1 $2"
    [[ $2 != -* ]] || what="the ${1//,*/ and others}"
    attempt "delete $what" ask delete "$@" --ignore-not-found --cascade=foreground --wait=false >"$work/deleted"
    wait_until_gone "$@"
}

# --- writers -------------------------------------------------------------------------------------

# restore.sh stops what writes to the databases, and notes on each how many there were: whatever
# happens to restore.sh, it or deploy.sh can bring them back.
WAS=diabetes-readmission/replicas-before-restore

# stopped: KIND/NAME and replicas of what restore.sh has stopped.
stopped() {
    attempt "look for what a restore has stopped" ask get deployments,statefulsets -o \
        "go-template={{range .items}}{{\$o := .}}{{with .metadata.annotations}}{{with index . \"$WAS\"}}{{\$o.kind}}/{{\$o.metadata.name}} {{.}}{{\"\\n\"}}{{end}}{{end}}{{end}}"
}

bring_back() {
    local workload replicas all
    all=$(stopped) || exit
    [ -n "$all" ] || return 0
    # Without its Job the transaction is rolled back; only then may anybody write again.
    remove job postgres-restore
    while read -r workload replicas; do
        say "      ${workload,,}: back to $replicas"
        attempt "scale $workload" ask scale "${workload,,}" --replicas="$replicas" >"$work/scaled"
        attempt "annotate $workload" ask annotate "${workload,,}" "$WAS-" >"$work/scaled"
    done <<<"$all"
}

# --- Jobs ----------------------------------------------------------------------------------------

apply() {
    # What the manifests say counts, whoever changed it by hand.
    ask apply --server-side --field-manager="$MANAGER" --force-conflicts "$@"
}

# run_job FILE NAME [COMPONENT]: apply the Job of that name (and label) from the file and wait for its
# end. A Job can't be changed nor run again: one that has failed, or has changed, is replaced.
run_job() {
    local file=$1 name=$2 selector=app.kubernetes.io/name=${3:-$2}
    if exists job "$name" && [ "$(state "job/$name")" = failed ]; then
        remove job "$name"
    fi
    if ! apply -f "$file" -l "$selector" >"$work/applied" 2>"$work/stderr"; then
        grep -q "field is immutable" "$work/stderr" || fail "could not apply job $name: $(reason)"
        say "      job $name has changed: it is replaced"
        remove job "$name"
        attempt "apply job $name" apply -f "$file" -l "$selector" >"$work/applied"
    fi
    wait_for "job/$name"
}

# names FILE KIND STEP: what is rendered of a kind in a step.
names() {
    awk -v kind="$2" -v step="$3" '
        function flush() { if (k == kind && s == step && n != "") print n; k = s = n = ""; meta = 0 }
        /^---/ { flush(); next }
        /^kind: / { k = $2 }
        /^[a-z]/ { meta = ($1 == "metadata:") }
        meta && /^  name: / { n = $2 }
        meta && /^    deploy-step: / { s = $2 }
        END { flush() }
    ' "$1"
}
