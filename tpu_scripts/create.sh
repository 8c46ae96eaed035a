#!/usr/bin/env bash
# Ask for a TPU slice, or several of one kind, as a queued resource. It is there once its state is ACTIVE.
#
#   create.sh --name my-slice --zone us-west4-a --type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite --spot
#
# --name, --zone        or NAME and ZONE
# --type                or ACCELERATOR_TYPE; gcloud compute tpus accelerator-types list --zone ZONE
# --runtime-version     or RUNTIME_VERSION; gcloud compute tpus tpu-vm versions list --zone ZONE
# --spot | --reserved   on demand where neither is said
# --node-count 2        or NODE_COUNT; so many slices, joined by the data-center network (rljax: the data axis)
# --project             or PROJECT, else gcloud's own
# --dry-run             print the command only
source "$(dirname "$0")/common.sh"
parse "$@"
need ACCELERATOR_TYPE '--type v5litepod-16'
need RUNTIME_VERSION '--runtime-version v2-alpha-tpuv5-lite'
[ -z "$SPOT" ] || [ -z "$RESERVED" ] || fail "a slice is either --spot or --reserved: leave one of them out"
[[ $NODE_COUNT =~ ^[1-9][0-9]*$ ]] || fail "NODE_COUNT=$NODE_COUNT is not a number of slices: say --node-count 2"
if [ "$NODE_COUNT" = 1 ]; then nodes=(--node-id "$NAME"); else nodes=(--node-prefix "$NAME" --node-count "$NODE_COUNT"); fi
tpu create "$NAME" "${nodes[@]}" --accelerator-type "$ACCELERATOR_TYPE" --runtime-version "$RUNTIME_VERSION" \
  ${SPOT:+--spot} ${RESERVED:+--reserved}
