#!/bin/bash
# Trains on several Cloud TPU slices at once, asked for together as a queued resource.
#
#     PROJECT=my-project WORKDIR=gs://BUCKET/runs/ldm \
#         docs/cluster/multislice.sh [CONFIG --field value ...]
#
# PROJECT   of Google Cloud, with quota for SLICES times TYPE in ZONE
# WORKDIR   the run, gs://...; the service account of the TPU VMs may write there
# SLICES    2 (default) or more. The TPU VMs of a queued resource know MEGASCALE_NUM_SLICES,
#           MEGASCALE_SLICE_ID and MEGASCALE_COORDINATOR_ADDRESS; JAX and ldm-train find them there
# TPU, ZONE, TYPE, VERSION  name, place, size and software of a slice; the slices are TPU-0, TPU-1, ...
# SPOT      1: cheaper machines, which may be taken away
# PACKAGE   what pip installs there; default: a wheel of this checkout, copied to every host
#
# The batch is split over the slices (--mesh.dcn-data SLICES): only gradients cross the slow network
# between them, once a step. Split the parameters inside a slice, with --mesh.fsdp 16. Runs here
# until training ends (use tmux on a machine that stays); a slice that is lost asks for all anew.
set -euo pipefail
: "${PROJECT:?set PROJECT to a project of Google Cloud, as PROJECT=my-project}"
: "${WORKDIR:?set WORKDIR to a folder in a bucket, as WORKDIR=gs://BUCKET/runs/ldm}"
SLICES=${SLICES:-2}
TPU=${TPU:-ldm}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
PACKAGE=${PACKAGE:-}
POLL=${POLL:-60}  # seconds
[ $# -gt 0 ] || set -- tiny:first_stage --batch-size $((8 * SLICES * ${TYPE##*-}))  # to see that all works

here=(--project "$PROJECT" --zone "$ZONE")
queued() { gcloud compute tpus queued-resources "$1" "$TPU" "${here[@]}" "${@:2}"; }
state() { queued describe --format='value(state.state)' 2>/dev/null || true; }
on() { gcloud compute tpus tpu-vm ssh "$TPU-$1" "${here[@]}" --worker="$2" --command "$3"; }

everywhere() {  # on all hosts of all slices at once; fails if one does
    local waiting=() failed=0 i
    for ((i = 0; i < SLICES; i++)); do on "$i" all "$1" & waiting+=($!); done
    for i in "${waiting[@]}"; do wait "$i" || failed=1; done
    return "$failed"
}

install() {
    if [ -z "$PACKAGE" ]; then
        local wheels root i
        wheels=$(mktemp -d)
        root=$(cd "$(dirname "$0")/../.." && pwd)
        python3 -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$root"
        for ((i = 0; i < SLICES; i++)); do
            gcloud compute tpus tpu-vm scp "$wheels"/ldm_jax-*.whl "$TPU-$i:" "${here[@]}" --worker=all
        done
        rm -r "$wheels"
    fi
    # uv brings a Python; that of the machines may be older than 3.11
    everywhere "python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --python 3.12 ~/venv &&
        ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python 'jax[tpu]' gcsfs ${PACKAGE:-~/ldm_jax-*.whl}"
}

# On every host, unless it runs: the training, which goes on without this shell, and its exit code.
command=$(printf '%q ' "$@" --mesh.dcn-data "$SLICES" --workdir "$WORKDIR" --restart on-failure)
cache=$(printf '%q' "${WORKDIR%/*}/xla_cache")
start="pgrep -x ldm-train > /dev/null || { rm -f ~/exit_code;
    JAX_COMPILATION_CACHE_DIR=$cache setsid nohup sh -c '\"\$@\"; echo \$? > ~/exit_code' sh \
    ~/venv/bin/ldm-train $command > ~/train.log 2>&1 < /dev/null & }"

while true; do
    case "$(state)" in
        ACTIVE) ;;
        WAITING_FOR_RESOURCES | ACCEPTED | PROVISIONING | CREATING | SUSPENDING | DELETING)
            sleep "$POLL"
            continue
            ;;
        "") queued create --node-count "$SLICES" --node-prefix "$TPU" \
            --accelerator-type "$TYPE" --runtime-version "$VERSION" ${SPOT:+--spot}
            continue ;;
        *) queued delete --quiet --force; continue ;;  # SUSPENDED, FAILED
    esac
    everywhere '[ -x ~/venv/bin/ldm-train ]' 2>/dev/null || install
    everywhere "$start"
    echo "training; see it: gcloud compute tpus tpu-vm ssh $TPU-0 ${here[*]} --command 'tail -f train.log'"
    code=
    while [ -z "$code" ] && [ "$(state)" = ACTIVE ]; do
        sleep "$POLL"
        code=$(on 0 0 'cat ~/exit_code 2>/dev/null || true' 2>/dev/null || true)
    done
    case "$code" in
        "" | 75) sleep "$POLL" ;;  # taken away; or stopped and saved, as ahead of maintenance
        *) break ;;
    esac
done
echo "ended with code $code; delete the slices: gcloud compute tpus queued-resources delete $TPU ${here[*]} --force"
exit "$code"
