#!/usr/bin/env bash
# Runs a command of jaxreward on all hosts of a TPU pod slice, through gcloud.
#
#   bash launch/tpu_pod.sh run NAME --zone ZONE [--project P] [--commit SHA] [--repo URL] \
#       [--python PATH] [--detach] [--dry_run] -- train --config ... --workdir /mnt/shared/bt
#   bash launch/tpu_pod.sh logs NAME --zone ZONE       the last lines of every host's log
#   bash launch/tpu_pod.sh stop NAME --zone ZONE       SIGTERM: the run is saved and ends
#
# Without --repo the commit of this checkout (default HEAD; nothing that is not committed) is copied
# to every host; with --repo every host clones it. It is installed there once, with the versions of
# constraints.txt, by launch/env.sh; --python names an interpreter that has everything instead.
# In the foreground all logs stream to this terminal. With --detach the run goes on when the
# connection ends; see it with `logs`. Hosts need Python 3.11 and a shared --workdir. No secrets are
# sent: gcloud's own login is used. See docs/launch.md.
set -euo pipefail

fail() { echo "tpu_pod.sh: $1" >&2; exit 2; }
quote() { printf '%q ' "$@"; }

[ $# -gt 0 ] || fail "expected run, logs or stop; --help says more"
case "$1" in
  -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  run | logs | stop) action="$1"; shift ;;
  *) fail "expected run, logs or stop, got $1" ;;
esac
[ $# -gt 0 ] || fail "name the TPU; 'gcloud compute tpus tpu-vm list' lists them"
name="$1"
shift
zone="" project="" commit=HEAD repo="" python="" detach="" dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --) break ;;
    --dry_run) dry=1; shift; continue ;;
    --detach) detach=1; shift; continue ;;
  esac
  [ $# -ge 2 ] && [ "$2" != -- ] || fail "$1 needs a value; --help lists the options"
  case "$1" in
    --zone) zone="$2" ;;
    --project) project="$2" ;;
    --commit) commit="$2" ;;
    --repo) repo="$2" ;;
    --python) python="$2" ;;
    *) fail "unknown option $1; --help lists them" ;;
  esac
  shift 2
done
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || fail "'$name' is no name of a TPU"
[ -n "$zone" ] || fail "--zone is missing, for example --zone us-central2-b"
place=("$name" "--zone=$zone")
[ -z "$project" ] || place+=("--project=$project")

run() {
  if [ -n "$dry" ]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}
everywhere() { run gcloud compute tpus tpu-vm ssh "${place[@]}" --worker=all "--command=$1"; }
logs='$HOME/jaxreward_logs'

if [ "$action" = logs ]; then
  everywhere "tail -n 20 $logs/*.log"
  exit
elif [ "$action" = stop ]; then
  everywhere "cat $logs/*.pid | xargs -r kill -TERM"
  exit
fi

[ "${1:-}" = -- ] && shift || fail "nothing to run; write: -- train --config NAME --workdir DIR"
[ $# -gt 0 ] || fail "nothing to run; write: -- train --config NAME --workdir DIR"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "$repo" ]; then
  sha="$(git -C "$root" rev-parse --verify "$commit^{commit}")" || fail "no commit $commit here"
else
  # Said by the one who starts the run: a branch could be another commit on every host.
  [[ "$commit" =~ ^[0-9a-f]{40}$ ]] || fail "with --repo, --commit must be a full SHA, got $commit"
  sha="$commit"
fi
code="\$HOME/jaxreward-${sha:0:12}"
archive="jaxreward-${sha:0:12}.tar.gz"

if [ -z "$repo" ]; then
  if [ -n "$dry" ]; then
    quote git -C "$root" archive --format=tar.gz -o "/tmp/$archive" "$sha"
    echo
    packed="/tmp"
  else
    packed="$(mktemp -d)"
    trap 'rm -rf "$packed"' EXIT
    git -C "$root" archive --format=tar.gz -o "$packed/$archive" "$sha"
  fi
  run gcloud compute tpus tpu-vm scp "$packed/$archive" "$name:$archive" "${place[@]:1}" --worker=all
  fetch="mkdir -p $code; tar -xzf \$HOME/$archive -C $code"
else
  fetch="[ -d $code ] || git clone $(quote "$repo")$code; git -C $code checkout -q --detach $sha"
fi
install="bash -c 'set -euo pipefail; cd $code; source launch/env.sh tpu'"
[ -z "$python" ] || install=true
everywhere "set -e; $fetch; $install"

interpreter="$code/.venv/bin/python"
[ -z "$python" ] || interpreter="$(quote "$python")"
start="mkdir -p $logs; cd \$HOME; PYTHONPATH=$code"
start+=" $interpreter -m jaxreward.launch worker --logs $logs -- $(quote "$@")"
if [ -n "$detach" ]; then
  # The logs of the worker are what counts; this file has only what the launcher itself says.
  start="mkdir -p $logs; nohup setsid bash -c $(quote "$start")</dev/null >$logs/launcher.out 2>&1 &"
fi
everywhere "$start"
