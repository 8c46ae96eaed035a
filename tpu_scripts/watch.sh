#!/usr/bin/env bash
# Keep a run going until it is over: create the slice where there is none, set it up, run, look every minute, and after
# a preemption do it all again. The run resumes from its checkpoints, which have to lie on what outlives the slice.
#
#   watch.sh --name my-slice --zone us-west4-a … --spot --mount 10.0.0.2:/share --copy dpo.py dpo.py --steps 2000
#
# Options are those of create.sh and setup.sh, and:
# --every 60   or EVERY: seconds between two looks
# --delete     give the slice back when the run is over, well or not
# Ends with the run's exit status.
source "$(dirname "$0")/common.sh"
parse "$@"
[ ${#REST[@]} -gt 0 ] || fail "name the experiment file: ${0##*/} [options] FILE [--field value …]"
need PACKAGE '--package rljax[tpu]==0.1.0'
run=("$here/run.sh" "${OPTIONS[@]}" -- "${REST[@]}") begun='' tries=0

attempt() { "$@" || { tries=$((tries + 1)) && [ $tries -lt 3 ] || fail "this failed three times in a row: $1"; }; }
begin() { begun=yes && attempt "$here/setup.sh" "${OPTIONS[@]}" && attempt "${run[@]}"; }

state() { # of the request; absent where there is none
  local said
  said=$(ask describe "$NAME" --format='value(state.state)' 2>&1) || [[ $said != *NOT_FOUND* ]] || said=absent
  echo "${said##*$'\n'}"
}

# shellcheck disable=SC2016  # expanded by the worker
workers='cd ~/rljax-job 2> /dev/null || { echo rljax:absent && exit; }
for _ in 1 2 3; do
  [ ! -s status ] || { echo "rljax:ended:$(cat status)" && exit; }
  ! kill -0 "$(cat pid)" 2> /dev/null || { echo rljax:running && exit; }
  sleep 1
done
echo rljax:lost'
see=(ssh "$NAME" --node=all --worker=all --command "bash -c $(printf %q "$workers")")

look() { # at the workers of an active slice
  local said
  said=$(ask "${see[@]}") || said="rljax:running? $said" # one that cannot be reached: the slice's state will say more
  echo "$NAME: ${said//$'\n'/ }" >&2
  case $begun,$said in
    *rljax:running*) begun=yes && tries=0 ;;
    ,* | *rljax:absent* | *rljax:lost* | *rljax:ended:143*) begin ;;
    *) over "$(grep -o 'ended:[0-9]*' <<< "$said" | cut -d : -f 2 | sort -n | tail -n 1)" ;;
  esac
}

over() { # with this exit status
  [ "$1" = 0 ] || "$here/logs.sh" "${OPTIONS[@]}" --all --last 20 || true
  [ -z "$DELETE" ] || "$here/delete.sh" "${OPTIONS[@]}"
  exit "$1"
}

if [ -n "$DRY_RUN" ]; then
  tpu describe "$NAME" --format='value(state.state)'
  for step in delete create setup; do "$here/$step.sh" "${OPTIONS[@]}"; done
  "${run[@]}" && tpu "${see[@]}" && exit
fi
while true; do
  now=$(state)
  case $now in
    absent) attempt "$here/create.sh" "${OPTIONS[@]}" ;;
    SUSPENDED) attempt "$here/delete.sh" "${OPTIONS[@]}" ;;
    FAILED) fail "the request was refused: gcloud compute tpus queued-resources describe $NAME says why; then delete.sh" ;;
    ACTIVE) look ;;
    *) echo "$NAME: $now" >&2 ;;
  esac
  sleep "$EVERY"
done
