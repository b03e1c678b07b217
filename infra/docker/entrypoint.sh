#!/bin/sh
# The official Helm chart's probes call /entrypoint by name; nothing has to be prepared here.
set -eu

exec "$@"
