#!/bin/bash
# Trains on the GPUs of one node: in one process, or in one process for each GPU.
#
#     VENV=~/venv WORKDIR=~/runs/ldm docs/cluster/node_gpus.sh [CONFIG --field value ...]
#
# VENV       environment with ldm_jax and jax[cuda12]
# WORKDIR    the run: a folder, or s3://... or gs://...
# PROCESSES  1 (default): one process has all GPUs. Another number: so many processes, each with
#            the GPU of its number; for data that keep one Python process from feeding all of them.
#
# Ctrl-C and SIGTERM save and end with code 75; the same command goes on. A process that fails is
# started again from the last checkpoint.
set -uo pipefail
: "${VENV:?set VENV to the environment that has ldm_jax, as VENV=~/venv}"
: "${WORKDIR:?set WORKDIR to the folder of the run, as WORKDIR=~/runs/ldm}"
PROCESSES=${PROCESSES:-1}
PORT=${PORT:-62831}
[ -x "$VENV/bin/ldm-train" ] || { echo "$VENV/bin/ldm-train: not there; VENV=$VENV has no ldm_jax" >&2; exit 1; }
case "$PROCESSES" in
    '' | 0 | *[!0-9]*) echo "PROCESSES=$PROCESSES is not a number from 1 on" >&2; exit 1 ;;
esac
[ $# -gt 0 ] || set -- tiny:first_stage --batch-size 64  # to see that all works
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${WORKDIR%/*}/xla_cache}"
command=("$VENV/bin/ldm-train" "$@" --workdir "$WORKDIR" --restart on-failure)

if [ "$PROCESSES" -eq 1 ]; then
    exec "${command[@]}"
fi
children=()
for ((i = 0; i < PROCESSES; i++)); do
    CUDA_VISIBLE_DEVICES=$i "${command[@]}" --distributed "127.0.0.1:$PORT,$PROCESSES,$i" &
    children+=($!)
done
trap 'kill -TERM "${children[@]}" 2>/dev/null' TERM INT
code=0
for child in "${children[@]}"; do
    while true; do
        wait "$child"
        ended=$?
        kill -0 "$child" 2>/dev/null || break  # a signal ends the waiting, not the child
    done
    if [ "$ended" -ne 0 ] && { [ "$code" -eq 0 ] || [ "$code" -eq 75 ]; }; then
        code=$ended
    fi
done
exit "$code"
