#!/usr/bin/env bash
# Makes .venv, installs jaxreward and runs the main job: from a model's answers to a reward model.
#
#   bash launch/quickstart.sh [--workdir DIR]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" real
exec python launch/quickstart.py "$@"
