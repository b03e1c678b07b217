# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # shared with cluster.sh and deploy.sh
# The platform's Secrets: made once, never changed. To be sourced after cluster.sh. Values go to
# kubectl by standard input: a command line everyone could read.

# In the order in which they are made: what a Secret derives from another comes after it.
SECRETS=(
    postgres-credentials
    storage-credentials
    mlflow-credentials
    ui-credentials
    api-credentials
    grafana-credentials
    monitoring-credentials
    airflow-credentials
    airflow-monitoring
)
declare -A SECRET_KEYS=(
    [postgres-credentials]="superuser-password mlflow-password diabetes-password airflow-password"
    [storage-credentials]="access-key secret-key"
    [mlflow-credentials]="admin-password flask-secret-key backend-store-uri basic_auth.ini serving-password pipeline-password metrics-password"
    [ui-credentials]="api-key"
    [api-credentials]="key-hashes operator-key prediction-log-key"
    [grafana-credentials]="admin-user admin-password"
    [monitoring-credentials]="monitoring-password reader-password"
    [airflow-credentials]="connection fernet-key api-secret-key jwt-secret postgres-default passwords.json admin-password"
    [airflow-monitoring]="url user password passwords.json"
)

# 32 of [A-Za-z0-9]: 190 bits, and nothing that a URL would have to quote.
password() {
    head -c 1024 /dev/urandom | LC_ALL=C tr -dc 'A-Za-z0-9' | cut -c 1-32
}

digest() {
    printf '%s' "$1" | sha256sum | cut -d ' ' -f 1
}

# missing_keys NAME: its keys that are not there; all of them if the Secret is not.
missing_keys() {
    local present key missing=()
    # shellcheck disable=SC2016  # the template's variables
    present=$(attempt "look for secret $1" ask get secret "$1" --ignore-not-found \
        -o 'go-template={{range $k, $v := .data}}{{$k}} {{end}}') || exit
    for key in ${SECRET_KEYS[$1]}; do
        [[ " $present " == *" $key "* ]] || missing+=("$key")
    done
    printf '%s' "${missing[*]}"
}

secret_value() {
    local encoded
    encoded=$(attempt "read secret $1" ask get secret "$1" -o "jsonpath={.data.$2}") || exit
    printf '%s' "$encoded" | base64 --decode
}

# secret_data NAME: its keys and values, as YAML. Every value fits between double quotes.
secret_data() {
    local one two three
    case "$1" in
        postgres-credentials)
            printf '  %s: "%s"\n' superuser-password "$(password)" mlflow-password "$(password)" \
                diabetes-password "$(password)" airflow-password "$(password)"
            ;;
        storage-credentials)
            printf '  %s: "%s"\n' access-key adminuser secret-key "$(password)"
            ;;
        mlflow-credentials)
            one=$(secret_value postgres-credentials mlflow-password) || exit
            one=postgresql+psycopg2://mlflow:$one@postgres:5432/mlflow
            printf '  %s: "%s"\n' admin-password "$(password)" flask-secret-key "$(password)" \
                serving-password "$(password)" pipeline-password "$(password)" \
                metrics-password "$(password)" backend-store-uri "$one"
            cat <<YAML
  basic_auth.ini: |
    [mlflow]
    default_permission = READ
    database_uri = $one
    admin_username = admin
    authorization_function = mlflow.server.auth:authenticate_request_basic_auth
    auth_cache_ttl_seconds = 60
YAML
            ;;
        ui-credentials)
            printf '  %s: "%s"\n' api-key "$(password)"
            ;;
        api-credentials)
            one=$(secret_value ui-credentials api-key) || exit
            two=$(password)
            printf '  %s: "%s"\n' operator-key "$two" prediction-log-key "$(password)" \
                key-hashes "page:$(digest "$one"),operator:$(digest "$two")"
            ;;
        grafana-credentials)
            printf '  %s: "%s"\n' admin-user adminuser admin-password "$(password)"
            ;;
        monitoring-credentials)
            printf '  %s: "%s"\n' monitoring-password "$(password)" reader-password "$(password)"
            ;;
        airflow-credentials)
            one=$(secret_value postgres-credentials airflow-password) || exit
            two=$(secret_value postgres-credentials diabetes-password) || exit
            three=$(password)
            printf '  %s: "%s"\n' connection "postgresql+psycopg2://airflow:$one@postgres:5432/airflow" \
                postgres-default "postgres://diabetes:$two@postgres:5432/diabetes" \
                fernet-key "$(head -c 32 /dev/urandom | base64 | tr '+/' '-_')" \
                api-secret-key "$(password)" jwt-secret "$(password)$(password)" \
                admin-password "$three"
            printf "  passwords.json: '%s'\n" "{\"admin\": \"$three\"}"
            ;;
        airflow-monitoring)
            one=$(password)
            printf '  %s: "%s"\n' url http://airflow-api-server:8080 user metrics password "$one"
            printf "  passwords.json: '%s'\n" "{\"metrics\": \"$one\"}"
            ;;
    esac
}

# make_secret NAME
make_secret() {
    local data
    data=$(secret_data "$1") || exit
    # create, not apply: it fails where the Secret is there, and keeps no copy in an annotation.
    attempt "create secret $1" ask create --field-manager="$MANAGER" -f - \
        >"$work/created" <<YAML
apiVersion: v1
kind: Secret
metadata:
  name: $1
  namespace: $NAMESPACE
  labels:
    app.kubernetes.io/name: $1
    ${PART_OF%%=*}: ${PART_OF#*=}
type: Opaque
stringData:
$data
YAML
}

# What is there must fit together: a Secret that was lost can't always be made anew.
check_lost_secrets() {
    local lost=" $* " claim
    if [[ $lost == *" ui-credentials "* && $lost != *" api-credentials "* ]]; then
        fail "secret ui-credentials is gone, and api-credentials knows only the hash of its key;" \
            "bring it back, or delete api-credentials too (kubectl --namespace $NAMESPACE delete" \
            "secret api-credentials), then run this again"
    fi
    if [[ $lost == *" postgres-credentials "* ]]; then
        claim=$(attempt "look for the database's claim" ask get persistentvolumeclaims \
            -l app.kubernetes.io/name=postgres -o name) || exit
        [ -z "$claim" ] || fail "secret postgres-credentials is gone, but the database that its" \
            "passwords open is there ($claim); bring the Secret back, or give up the data with" \
            "scripts/cleanup.sh --purge, then run this again"
    fi
}
