#!/usr/bin/env bash
# Give the slice back, whatever runs there, and the request for it. Its disks are gone with it.
#
#   delete.sh --name my-slice --zone us-west4-a
#
# --name, --zone, --project, --dry-run   as for run.sh
source "$(dirname "$0")/common.sh"
parse "$@"
tpu delete "$NAME" --force
