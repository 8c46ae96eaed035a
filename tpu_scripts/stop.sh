#!/usr/bin/env bash
# Tell the run to save and leave, on every worker. run.sh with the same words resumes it.
#
#   stop.sh --name my-slice --zone us-west4-a
#
# --name, --zone, --project, --dry-run   as for run.sh
source "$(dirname "$0")/common.sh"
parse "$@"
# shellcheck disable=SC2016  # expanded by the worker
workers 'kill "$(cat ~/rljax-job/pid)"'
