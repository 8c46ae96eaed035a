#!/usr/bin/env bash
# Say of every worker whether the run is rljax:running there, rljax:ended:STATUS, rljax:lost (the machine was started
# again) or rljax:absent.
#
#   status.sh --name my-slice --zone us-west4-a
#
# --name, --zone, --project, --dry-run   as for run.sh
source "$(dirname "$0")/common.sh"
parse "$@"
# shellcheck disable=SC2016  # expanded by the worker
workers 'cd ~/rljax-job 2> /dev/null || { echo rljax:absent && exit; }
for _ in 1 2 3; do
  [ ! -s status ] || { echo "rljax:ended:$(cat status)" && exit; }
  ! kill -0 "$(cat pid)" 2> /dev/null || { echo rljax:running && exit; }
  sleep 1
done
echo rljax:lost'
