#!/usr/bin/env bash
# Install rljax on every worker, in ~/rljax-env, and copy files there. Again is harmless.
#
#   setup.sh --name my-slice --zone us-west4-a --package dist/rljax_lm-0.1.0-py3-none-any.whl --copy simpo.py --copy pairs.jsonl
#
# --name, --zone   or NAME and ZONE
# --package        or PACKAGE: a revision ('rljax-lm[tpu] @ git+https://HOST/rljax@REVISION'), a wheel here
#                  (dist/rljax_lm-0.1.0-py3-none-any.whl, made by `pip wheel --no-deps -w dist .`), or a version of an
#                  index of your own (rljax-lm[tpu]==0.1.0), so that all workers have the same, also later
# --copy PATH      a file or folder that every worker gets in its home, as often as wanted
# --mount H:/S     or MOUNT: an NFS share (Filestore) for ~/runs, which a slice that is created again finds again
# --project        or PROJECT, else gcloud's own
# --dry-run        print the commands only
source "$(dirname "$0")/common.sh"
parse "$@"
need PACKAGE '--package dist/rljax_lm-0.1.0-py3-none-any.whl'
case $PACKAGE in rljax[\[\ @=]*) fail "$PACKAGE: \`rljax\` on PyPI is another project, ours is called rljax-lm" ;; esac
case ${PACKAGE##*/} in
  *.whl) COPY+=("$PACKAGE") && PACKAGE="rljax-lm[tpu] @ file://HOME/${PACKAGE##*/}" ;;
  rljax-lm*==?* | *@?*) ;;
  *) fail "$PACKAGE may be another program tomorrow: say a revision (…/rljax@REVISION) or a wheel" ;;
esac
for path in "${COPY[@]}"; do [ -e "$path" ] || [ -n "$DRY_RUN" ] || fail "there is no $path to copy"; done
# shellcheck disable=SC2016  # expanded by the worker
install='set -e; cd
if [ -n "$2" ] && ! mountpoint -q runs; then
  command -v mount.nfs > /dev/null || sudo apt-get install -qq nfs-common
  mkdir -p runs && sudo mount -t nfs "$2" runs
fi
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python ">=3.11" rljax-env
python3 -m uv pip install --quiet --python rljax-env/bin/python "${1/file:\/\/HOME/file://$HOME}"'
[ ${#COPY[@]} = 0 ] || tpu scp "${COPY[@]}" "$NAME:" --recurse --node=all --worker=all
workers "$install" rljax "$PACKAGE" "$MOUNT"
