#!/bin/bash
# Trains on TPU slices of a GKE cluster as a JobSet: one slice, or several.
#
#     IMAGE=REGION-docker.pkg.dev/PROJECT/ldm/ldm:1 WORKDIR=gs://BUCKET/runs/ldm \
#         docs/cluster/gke_jobset.sh [CONFIG --field value ...]
#
# IMAGE     with ldm_jax, jax[tpu] and gcsfs in it (docs/cluster/Dockerfile)
# WORKDIR   the run, gs://...; the service account of the pods may write there
# SLICES    1 (default), or more: GKE then sets MEGASCALE_* in every pod, and the batch is split
#           over the slices too (--mesh.dcn-data)
# ACCELERATOR, TOPOLOGY, CHIPS_PER_HOST  those of the node pools, one for each slice
#
# Needs kubectl on the cluster, and JobSet in it. A pod that is preempted saves, ends with code 75,
# and all start again, however often; other failures restart at most 10 times.
#     kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=ldm,batch.kubernetes.io/job-completion-index=0
set -euo pipefail
: "${IMAGE:?set IMAGE to a container image with ldm_jax, as IMAGE=REGION-docker.pkg.dev/PROJECT/ldm/ldm:1}"
: "${WORKDIR:?set WORKDIR to a folder in a bucket, as WORKDIR=gs://BUCKET/runs/ldm}"
NAME=${NAME:-ldm}
SLICES=${SLICES:-1}
ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice}
TOPOLOGY=${TOPOLOGY:-4x4}
CHIPS_PER_HOST=${CHIPS_PER_HOST:-4}
chips=$((${TOPOLOGY//x/*}))
if [ $((chips % CHIPS_PER_HOST)) -ne 0 ]; then
    echo "TOPOLOGY=$TOPOLOGY has $chips chips, no multiple of CHIPS_PER_HOST=$CHIPS_PER_HOST" >&2
    exit 1
fi
hosts=$((chips / CHIPS_PER_HOST))
# to see that all works: drawn shapes, no data needed
[ $# -gt 0 ] || set -- tiny:first_stage --batch-size $((8 * chips * SLICES))
set -- "$@" --workdir "$WORKDIR" --restart on-failure
if [ "$SLICES" -gt 1 ]; then
    set -- "$@" --mesh.dcn-data "$SLICES"
fi
quote="'"
arguments=$(printf "'%s', " "${@//$quote/$quote$quote}")  # a YAML list of quoted strings

kubectl apply -f - <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    # every slice has a node pool of its own
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  network:
    # a headless service of the JobSet's name, through which pods find each other before they are ready
    enableDNSHostnames: true
    publishNotReadyAddresses: true
  failurePolicy:
    maxRestarts: 10
    rules:
      - name: preempted
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob  # stopped and saved
                onExitCodes: {containerName: train, operator: In, values: [75]}
              - action: FailJob  # the node went away
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300  # to save in
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
              containers:
                - name: train
                  image: $IMAGE
                  command: [ldm-train]
                  args: [${arguments%, }]
                  env:
                    - {name: JAX_COMPILATION_CACHE_DIR, value: "${WORKDIR%/*}/xla_cache"}
                  ports:
                    - containerPort: 8471  # between the TPUs' runtimes
                    - containerPort: 8482  # of the processes' coordinator
                  resources:
                    requests: {google.com/tpu: $CHIPS_PER_HOST}
                    limits: {google.com/tpu: $CHIPS_PER_HOST}
YAML
