#!/usr/bin/env bash
# Makes .venv, installs the test tools and runs the default tier of tests.
#
#   bash launch/test.sh              the default tier (at most 15 minutes on two cores)
#   bash launch/test.sh -m slow      the slow tier; further arguments go to pytest
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" test,parity,real,plan
# One file stays in one process, so that its fixtures are made once; a process grows to 5 GiB.
exec python -m pytest -n auto --maxprocesses 3 --dist loadfile "$@"
