#!/usr/bin/env bash
# Keep a run going until it is over: create the slice where there is none, set it up, run, look every minute, and after
# a preemption do it all again. The run resumes from its checkpoints, which have to lie on what outlives the slice.
#
#   watch.sh --name my-slice --zone us-west4-a … --spot --mount 10.0.0.2:/share --copy simpo.py simpo.py --steps 2000
#
# Options are those of create.sh and setup.sh, and:
# --every 60   or EVERY: seconds between two looks
# --delete     give the slice back when the run is over, well or not
# Ends with the run's exit status.
source "$(dirname "$0")/common.sh"
parse "$@"
[ ${#REST[@]} -gt 0 ] || fail "name the experiment file: ${0##*/} [options] FILE [--field value …]"
need PACKAGE '--package dist/rljax_lm-0.1.0-py3-none-any.whl'
[[ $EVERY =~ ^[1-9][0-9]*$ ]] || fail "EVERY=$EVERY is not a number of seconds: say --every 60"
run=("$here/run.sh" "${OPTIONS[@]}" -- "${REST[@]}") begun='' tries=0
attempt() { "$@" || { tries=$((tries + 1)) && [ "$tries" -lt 3 ] || fail "this failed three times in a row: ${1##*/}"; }; }
setup_and_run() { "$here/setup.sh" "${OPTIONS[@]}" && "${run[@]}" && begun=yes; }

state() { # of the request; absent where there is none
  local said
  said=$(ask describe "$NAME" --format='value(state.state)' 2>&1) || [[ $said != *NOT_FOUND* ]] || said=absent
  echo "${said##*$'\n'}"
}

look() { # at the workers of an active slice
  local said
  # Where one cannot be reached, the state of the slice will tell.
  said=$("$here/status.sh" "${OPTIONS[@]}" 2> /dev/null) || said="rljax:running? $said"
  echo "$NAME: ${said//$'\n'/ }" >&2
  case $begun,$said in
    *rljax:running*) begun=yes && tries=0 ;;
    ,* | *rljax:absent* | *rljax:lost* | *rljax:ended:143*) attempt setup_and_run ;;
    *) over "$(grep -o '[1-9][0-9]*$' <<< "$said" | sort -n | head -n 1)" ;;
  esac
}

over() { # with this exit status, none for 0
  [ -z "$1" ] || "$here/logs.sh" "${OPTIONS[@]}" --all --last 20 || true
  [ -z "$DELETE" ] || "$here/delete.sh" "${OPTIONS[@]}"
  exit "${1:-0}"
}

if [ -n "$DRY_RUN" ]; then
  tpu describe "$NAME" --format='value(state.state)'
  for step in delete create setup; do "$here/$step.sh" "${OPTIONS[@]}"; done
  "${run[@]}" && "$here/status.sh" "${OPTIONS[@]}" && exit
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
