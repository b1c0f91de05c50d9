#!/bin/bash
# Trains on all hosts of a Cloud TPU VM slice, and makes the slice again when it is preempted.
#
#     PROJECT=my-project WORKDIR=gs://BUCKET/runs/ldm docs/cluster/tpu_vm.sh [CONFIG --field value ...]
#
# PROJECT   of Google Cloud, with quota for TYPE in ZONE
# WORKDIR   the run, gs://...; the service account of the TPU VMs may write there
# TPU, ZONE, TYPE, VERSION  name, place, size and software of the slice
# SPOT      1: cheaper machines, which may be taken away
# PACKAGE   what pip installs there; default: a wheel of this checkout, copied to every host
#
# Runs here until training ends (use tmux on a machine that stays); started again, it finds the
# slice and the training that runs on it. The slice is kept: its deletion is printed at the end.
set -euo pipefail
: "${PROJECT:?set PROJECT to a project of Google Cloud, as PROJECT=my-project}"
: "${WORKDIR:?set WORKDIR to a folder in a bucket, as WORKDIR=gs://BUCKET/runs/ldm}"
TPU=${TPU:-ldm}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
PACKAGE=${PACKAGE:-}
POLL=${POLL:-60}  # seconds
[ $# -gt 0 ] || set -- tiny:first_stage --batch-size $((8 * ${TYPE##*-}))  # to see that all works

here=(--project "$PROJECT" --zone "$ZONE")
vm() { gcloud compute tpus tpu-vm "$1" "$TPU" "${here[@]}" "${@:2}"; }
state() { vm describe --format='value(state)' 2>/dev/null || true; }
on() { vm ssh --worker="$1" --command "$2"; }

install() {
    if [ -z "$PACKAGE" ]; then
        local wheels root
        wheels=$(mktemp -d)
        root=$(cd "$(dirname "$0")/../.." && pwd)
        python3 -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$root"
        gcloud compute tpus tpu-vm scp "$wheels"/ldm_jax-*.whl "$TPU:" "${here[@]}" --worker=all
        rm -r "$wheels"
    fi
    # uv brings a Python; that of the machines may be older than 3.11
    on all "python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --python 3.12 ~/venv &&
        ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python 'jax[tpu]' gcsfs ${PACKAGE:-~/ldm_jax-*.whl}"
}

# On every host, unless it runs: the training, which goes on without this shell, and its exit code.
command=$(printf '%q ' "$@" --workdir "$WORKDIR" --restart on-failure)
cache=$(printf '%q' "${WORKDIR%/*}/xla_cache")
start="pgrep -x ldm-train > /dev/null || { rm -f ~/exit_code;
    JAX_COMPILATION_CACHE_DIR=$cache setsid nohup sh -c '\"\$@\"; echo \$? > ~/exit_code' sh \
    ~/venv/bin/ldm-train $command > ~/train.log 2>&1 < /dev/null & }"

while true; do
    case "$(state)" in
        READY) ;;
        CREATING | STARTING | RESTARTING | REPAIRING | DELETING) sleep "$POLL"; continue ;;
        "") vm create --accelerator-type "$TYPE" --version "$VERSION" ${SPOT:+--spot} ;;
        *) vm delete --quiet; continue ;;  # PREEMPTED, TERMINATED
    esac
    on all '[ -x ~/venv/bin/ldm-train ]' 2>/dev/null || install
    on all "$start"
    echo "training; see it: gcloud compute tpus tpu-vm ssh $TPU ${here[*]} --command 'tail -f train.log'"
    code=
    while [ -z "$code" ] && [ "$(state)" = READY ]; do
        sleep "$POLL"
        code=$(on 0 'cat ~/exit_code 2>/dev/null || true' 2>/dev/null || true)
    done
    case "$code" in
        "" | 75) sleep "$POLL" ;;  # taken away; or stopped and saved, as ahead of maintenance
        *) break ;;
    esac
done
echo "ended with code $code; delete the slice: gcloud compute tpus tpu-vm delete $TPU ${here[*]}"
exit "$code"
