#!/usr/bin/env bash
# Submits a run to SLURM: one task a GPU (or a node, without GPUs), requeued until it is done.
#
#   bash launch/slurm.sh --nodes 2 --gpus_per_node 8 --time 24:00:00 [--partition P] \
#       [--account A] [--name NAME] [--lead 120] [--logs DIR] [--dry_run] \
#       [--sbatch OPTION]... -- train --config reward_model/bradley_terry --workdir /shared/bt
#
# LEAD seconds before the time limit, or when the job is preempted, all tasks get SIGTERM, save,
# and the job is requeued under the same number; it then goes on from its checkpoint. A task that
# dies ends the job. --workdir and --logs must lie on a file system that all nodes share.
# Python is $PYTHON, else .venv of this checkout; the checkout must be shared too. See docs/launch.md.
set -euo pipefail

fail() { echo "slurm.sh: $1" >&2; exit 2; }

# Inside the job: sbatch copies this file away, so everything it needs comes as an argument.
if [ "${1:-}" = job ]; then
  python="$2" root="$3" logs="$4"
  shift 4
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  # A stopped run ends with this code, which tells it from one that is done.
  export JAXREWARD_STOPPED_EXIT=75
  srun --kill-on-bad-exit=1 "$python" -m jaxreward.launch worker --logs "$logs" -- "$@" &
  step=$!
  # SIGTERM to srun goes to its tasks; with several processes they agree on when to save.
  trap 'kill -TERM "$step" 2>/dev/null || true' USR1 TERM
  code=0
  while :; do
    # `wait` returns early when a signal arrives; 127 would be a child that is gone.
    wait "$step" && code=0 || code=$?
    kill -0 "$step" 2>/dev/null || break
  done
  if [ "$code" = 75 ]; then
    echo "slurm.sh: stopped and saved; requeued as job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  exit "$code"
fi

nodes=1 gpus=0 lead=120 name=jaxreward logs="$PWD/launch_logs" dry="" extra=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --) break ;;
    --dry_run) dry=1; shift; continue ;;
  esac
  [ $# -ge 2 ] && [ "$2" != -- ] || fail "$1 needs a value; --help lists the options"
  case "$1" in
    --nodes) nodes="$2" ;;
    --gpus_per_node) gpus="$2" ;;
    --lead) lead="$2" ;;
    --name) name="$2" ;;
    --logs) logs="$(realpath -m "$2")" ;;
    --time | --partition | --account) extra+=("$1=$2") ;;
    --sbatch) extra+=("$2") ;;
    *) fail "unknown option $1; --help lists them" ;;
  esac
  shift 2
done
[ "${1:-}" = -- ] && shift || fail "nothing to run; write: -- train --config NAME --workdir DIR"
[ $# -gt 0 ] || fail "nothing to run; write: -- train --config NAME --workdir DIR"
for pair in "nodes=$nodes" "gpus_per_node=$gpus" "lead=$lead"; do
  [[ "${pair#*=}" =~ ^[0-9]+$ ]] || fail "--${pair%%=*}: expected a number, got '${pair#*=}'"
done
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$(command -v "$python")" ] || fail "no Python at $python; install with launch/env.sh or set PYTHON"

tasks=$((gpus > 0 ? gpus : 1))
# Tasks of a node see all its GPUs, and JAX gives each the one of its local number: hence GPUs by
# node, and not by task, which would show each task one GPU under the number 0.
command=(sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$tasks")
[ "$gpus" = 0 ] || command+=("--gpus-per-node=$gpus")
command+=(--requeue --open-mode=append "--signal=B:USR1@$lead" "--output=$logs/slurm-%j.out")
command+=("${extra[@]}" "$root/launch/slurm.sh" job "$python" "$root" "$logs" "$@")
if [ -n "$dry" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
mkdir -p "$logs"
exec "${command[@]}"
