"""Stub clusters on PATH, and the environment in which launchers run in tests."""

import json
import os
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def clean_env():
    """The environment without what this test process was told about JAX and clusters."""
    drop = ("JAX", "XLA_", "SLURM_", "TPU_", "STUB_", "CUDA_VISIBLE")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    return {
        **env,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPO),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAXREWARD_COMPILE_CACHE": "0",
        "HF_HUB_OFFLINE": "1",
    }


class Cluster:
    """Stub executables and what they were told."""

    def __init__(self, folder: Path, env: dict):
        """Args: folder: empty. env: of the launcher; PATH gets the stubs in front."""
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in ("gcloud", "sbatch", "srun", "scontrol", "kubectl"):
            path = self.bin / tool
            stub = Path(__file__).with_name("stub_cluster.py")
            path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stub}" {tool} "$@"\n')
            path.chmod(0o755)
        path = f"{self.bin}{os.pathsep}{env['PATH']}"
        self.env = {**env, "PATH": path, "STUB_HOME": str(folder)}

    def calls(self, tool=None):
        """What was recorded, of one tool or of all."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [x for x in map(json.loads, lines) if tool in (None, x["tool"])]


@pytest.fixture
def cluster(tmp_path, clean_env):
    """A stub cluster of two hosts."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    return Cluster(folder, clean_env)
