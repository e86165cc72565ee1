#!/usr/bin/env bash
# Starts N processes of one run on this machine, with a log for each, and watches them.
#
#   bash launch/local.sh N [--cpu_devices D] [--logs DIR] [--grace SECONDS] [--dry_run] \
#       -- train --config reward_model/bradley_terry --workdir runs/bt
#
# GPUs are split evenly over the processes; --cpu_devices simulates D devices in each instead.
# Python is $PYTHON, else .venv of this checkout, else python3. See docs/launch.md.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ] || [ $# = 0 ]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit $(($# == 0 ? 2 : 0))
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  if [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; else python=python3; fi
fi
# This checkout's code, whatever is installed.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m jaxreward.launch local "$@"
