#!/usr/bin/env bash
# Start the same `rljax run` on every worker, in its home. It goes on when this terminal is gone; logs.sh shows what it
# says, stop.sh ends it, and the same command again resumes.
#
#   run.sh --name my-slice --zone us-west4-a simpo.py --steps 2000 --learning_rate 5e-7
#
# --name, --zone   or NAME and ZONE
# --project        or PROJECT, else gcloud's own
# --dry-run        print the command only
source "$(dirname "$0")/common.sh"
parse "$@"
[ ${#REST[@]} -gt 0 ] || fail "name the experiment file: ${0##*/} --name NAME --zone ZONE FILE [--field value …]"
# The program has its own number, for signals; the shell around it outlives SIGTERM to write the exit status down.
# shellcheck disable=SC2016  # expanded by the worker
start='cd && mkdir -p rljax-job && cd rljax-job || exit
if kill -0 "$(cat pid 2> /dev/null)" 2> /dev/null; then
  echo "rljax is at work on $(hostname) already: see logs.sh, or end it with stop.sh" >&2
  exit 3
fi
rm -f pid status
(
  trap : TERM
  trap "" HUP
  (echo "$BASHPID" > pid && cd && exec rljax-env/bin/rljax run "$@")
  echo "$?" > status
) >> log 2>&1 < /dev/null &
until [ -s pid ] || [ -e status ]; do sleep 0.1; done'
workers "$start" rljax "${REST[@]}"
