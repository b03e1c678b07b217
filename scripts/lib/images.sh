# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # shared with cluster.sh and deploy.sh
# Our images and their tags. To be sourced after cluster.sh.

IMAGES=(mlflow airflow api ui)

# image_inputs NAME: the files that decide what is in the image: those that its Dockerfile copies,
# and the Dockerfile itself, separated by NUL.
image_inputs() {
    local dockerfile=infra/docker/Dockerfile.$1 sources source
    mapfile -t sources < <(
        awk '$1 == "COPY" && !/--from=/ { for (i = 2; i < NF; i++) if ($i !~ /^--/) print $i }' \
            "$dockerfile"
    )
    for source in "${sources[@]}"; do
        [ -e "$source" ] || fail "$dockerfile copies $source, which is not there"
    done
    sources+=("$dockerfile" .dockerignore)
    if git ls-files -z --cached --others --exclude-standard -- "${sources[@]}" \
        >"$work/inputs" 2>"$work/git" && [ -s "$work/inputs" ]; then
        # What is deleted but not committed is still listed.
        while IFS= read -r -d '' source; do
            [ ! -f "$source" ] || printf '%s\0' "$source"
        done <"$work/inputs"
    else
        find "${sources[@]}" -type d \( -name __pycache__ -o -path dbt_diabetes/target \
            -o -path dbt_diabetes/logs -o -path dbt_diabetes/dbt_packages \) -prune \
            -o -type f ! -name '*.py[co]' ! -name .user.yml -print0
    fi
}

# image_tag NAME: 12 hex digits that change when what the image is made of does.
image_tag() {
    image_inputs "$1" >"$work/files" || exit
    {
        printf 'BASE_IMAGE=%s\n' "${BASE_IMAGE:-}"
        LC_ALL=C sort -zu "$work/files" | xargs -0 sha256sum --
    } | sha256sum | cut -c 1-12
}

# in_registry IMAGE: a registry on this machine speaks plain HTTP.
in_registry() {
    local insecure=()
    case "$1" in
        localhost[:/]* | 127.0.0.1[:/]*) insecure=(--insecure) ;;
    esac
    docker manifest inspect ${insecure[@]+"${insecure[@]}"} "$1" >"$work/manifest" 2>&1
}

# build_image NAME IMAGE: build and push.
build_image() {
    local options=()
    [ -z "${BASE_IMAGE:-}" ] || options+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
    [ ! -f "${PIP_CONFIG_FILE:-}" ] || options+=(--secret "id=pip,src=$PIP_CONFIG_FILE")
    run_long env DOCKER_BUILDKIT=1 docker build ${options[@]+"${options[@]}"} \
        --file "infra/docker/Dockerfile.$1" --tag "$2" . ||
        fail "docker build of $2 failed, for the reason above; mend it, then run this again"
    run_long docker push "$2" ||
        fail "docker push of $2 failed, for the reason above; is the registry up, and are you" \
            "logged in (docker login)? Then run this again"
}
