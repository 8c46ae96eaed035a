#!/usr/bin/env bash
# Follow what the run says on the first worker, or on all of them. Ctrl-C ends the following, not the run.
#
#   logs.sh --name my-slice --zone us-west4-a
#
# --all       of all workers, each line with the worker's name
# --last 40   only the last lines so far
# --name, --zone, --project, --dry-run   as for run.sh
source "$(dirname "$0")/common.sh"
parse "$@"
[[ $LAST =~ ^[0-9]*$ ]] || fail "--last $LAST is not a number of lines"
if [ -n "$LAST" ]; then show="tail -n $LAST"; else show='tail -n 40 -F'; fi
show+=' ~/rljax-job/log'
# shellcheck disable=SC2016  # expanded by the worker
if [ -n "$ALL" ]; then show+=' | sed -u "s/^/$(hostname): /"' where=all; else where=0; fi
tpu ssh "$NAME" --node="$where" --worker="$where" --command "$show"
