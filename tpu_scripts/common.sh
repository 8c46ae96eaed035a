# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is read there
# Sourced by the scripts beside it: their options, and gcloud. bash 4.4 or newer.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NAME=${NAME:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-} NODE_COUNT=${NODE_COUNT:-1}
RUNTIME_VERSION=${RUNTIME_VERSION:-} PACKAGE=${PACKAGE:-} MOUNT=${MOUNT:-} EVERY=${EVERY:-60}
SPOT='' RESERVED='' ALL='' LAST='' DELETE='' DRY_RUN='' COPY=() OPTIONS=() REST=()

fail() { echo "${0##*/}: $*" >&2 && exit 2; }

need() { [ -n "${!1}" ] || fail "$1 is missing: say ${2%% *} ${2#* } or set $1"; } # VARIABLE '--option EXAMPLE'

parse() { # options, up to the first word that is none: it and all that follow are REST
  local name
  while [ $# -gt 0 ]; do
    [ "$1" != --type ] || set -- --accelerator-type "${@:2}"
    name=${1#--} name=${name//-/_}
    case $1 in
      --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
      --spot | --reserved | --all | --delete | --dry-run) printf -v "${name^^}" yes && OPTIONS+=("$1") && shift ;;
      --name | --zone | --project | --accelerator-type | --runtime-version | --node-count | --package | --mount | \
        --every | --last | --copy)
        [ $# -ge 2 ] || fail "$1 needs a value"
        if [ "$1" = --copy ]; then COPY+=("$2"); else printf -v "${name^^}" %s "$2"; fi
        OPTIONS+=("$1" "$2") && shift 2 ;;
      --) shift && break ;;
      -*) fail "there is no option $1; ${0##*/} --help lists them" ;;
      *) break ;;
    esac
  done
  REST=("$@")
  need NAME '--name my-slice' && need ZONE '--zone us-west4-a'
}

ask() { gcloud compute tpus queued-resources "$@" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --quiet; }

quoted() { # words as any shell reads them, here or at the other end of an ssh connection
  local word quote="'" inside="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@+,-]*) printf " '%s'" "${word//"$quote"/"$inside"}" ;;
      *) printf ' %s' "$word" ;;
    esac
  done
}

tpu() { # ask, and say so; with --dry-run say it only
  local line
  line="+ gcloud compute tpus queued-resources$(quoted "$@" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --quiet)"
  if [ -n "$DRY_RUN" ]; then echo "$line"; else echo "$line" >&2 && ask "$@"; fi
}

workers() { tpu ssh "$NAME" --node=all --worker=all --command "bash -c$(quoted "$@")"; } # a bash text and its words
