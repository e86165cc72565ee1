"""Two processes are one run: the same losses as one process, a stop that all agree on, and the
same end after it, under every launcher."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxreward.launch import free_port

REPO = Path(__file__).resolve().parents[2]
STEPS = 100
LONG = (
    "train",
    "--config",
    "reward_model/bradley_terry:smoke",
    f"--config.train.steps={STEPS}",
    "--config.train.save_every=50",
    "--config.train.eval_every=50",
)


def lines(workdir):
    """{(step, whether evaluation): values}, without what depends on the clock."""
    made = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        (line["step"], any(k.startswith("eval") for k in line)): {
            k: v for k, v in line.items() if "second" not in k and k != "train/mfu"
        }
        for line in made
    }


def run(*command, env, timeout=280):
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


def local(*args, env, logs):
    """launch/local.sh with two processes."""
    return run("bash", REPO / "launch/local.sh", "2", "--logs", logs, "--", *args, env=env)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder for compiled programs, so that a second start is quick."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def long_env(clean_env, shared):
    return {**clean_env, "JAXREWARD_COMPILE_CACHE": "1", "XDG_CACHE_HOME": str(shared)}


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(long_env, tmp_path):
    """Catches rows read twice or by the wrong devices, sums over one process only, and files
    written by two."""
    words = ("train", "--config", "reward_model/bradley_terry:smoke")
    two = local(*words, "--workdir", tmp_path / "two", env=long_env, logs=tmp_path / "logs")
    assert two.returncode == 0, two.stdout + two.stderr
    one = run(
        *(sys.executable, "-m", "jaxreward", *words, "--workdir", tmp_path / "one"),
        env={**long_env, "JAX_NUM_CPU_DEVICES": "4"},
    )
    assert one.returncode == 0, one.stderr
    got, want = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert list(got) == list(want) and len(got) == 6
    for at, values in want.items():
        assert set(got[at]) == set(values)
        for name, value in values.items():
            np.testing.assert_allclose(got[at][name], value, atol=1e-5, err_msg=f"{at} {name}")
    facts = json.loads((tmp_path / "two/environment.json").read_text())
    assert facts["processes"] == 2 and "4 cpu devices of 2 processes" in facts["mesh"]
    # Progress is said once, and every line says by whom.
    assert two.stdout.count("] train 4/4") == 1 and ":0] train 4/4" in two.stdout
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"rank0.log", "rank1.log"}
    # The evaluation of two processes is that of one, too, and is written once.
    evals = tmp_path / "pairs.jsonl"
    evals.write_text(
        "".join(
            json.dumps({"prompt": f"What is {i}?", "chosen": f"thanks: {i}", "rejected": "no"})
            + "\n"
            for i in range(20)
        )
    )
    words = ("evaluate", "--model", tmp_path / "two", "--data", evals, "--output")
    done = local(*words, tmp_path / "two.json", env=long_env, logs=tmp_path / "logs_evaluate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('"protocol"') == 1
    found = json.loads((tmp_path / "two.json").read_text())["metrics"]
    assert found["pairs"] == 20 and 0 < found["loss"]["value"] < 2


_WHOLE: dict[str, Path] = {}


@pytest.fixture
def whole(long_env, tmp_path_factory):
    """The workdir of a run of two processes that nobody disturbed."""
    if "run" not in _WHOLE:
        folder = tmp_path_factory.mktemp("whole")
        done = local(*LONG, "--workdir", folder / "run", env=long_env, logs=folder / "logs")
        assert done.returncode == 0, done.stdout + done.stderr
        _WHOLE["run"] = folder / "run"
    return _WHOLE["run"]


def check_same_end(workdir, whole, text):
    """The run was stopped on the way, and came to the same end, number by number."""
    stops = {int(x) for x in re.findall(rf"stopped by SIGTERM at step (\d+) of {STEPS}", text)}
    assert len(stops) == 1 and 0 < min(stops) < STEPS, (stops, text[-3000:])
    assert f"resumed     step {min(stops)} of {STEPS}" in text
    assert lines(workdir) == lines(whole)
    assert (workdir / "checkpoints" / str(STEPS)).is_dir()


@pytest.mark.slow
def test_slurm_preempted_and_requeued(cluster, long_env, whole, tmp_path):
    """Catches a SLURM job that dies of its preemption, is not requeued, is requeued for ever, or
    ends elsewhere; JAX finds the processes by SLURM's variables alone."""
    env = {**cluster.env, **long_env, "PATH": cluster.env["PATH"]}
    env["STUB_PREEMPT"] = str(tmp_path / "run/metrics.jsonl")
    command = ("bash", REPO / "launch/slurm.sh", "--logs", tmp_path / "logs", "--")
    done = run(*command, *LONG, "--workdir", tmp_path / "run", env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [x["tool"] for x in cluster.calls()] == ["sbatch", "srun", "scontrol", "srun"]
    assert "stopped and saved; requeued" in done.stdout
    check_same_end(tmp_path / "run", whole, done.stdout)


@pytest.mark.slow
def test_tpu_pod_preempted_and_started_again(cluster, long_env, whole, tmp_path):
    """Catches hosts that stop at different steps when one of them is preempted, and a second
    start that begins anew."""
    if not (REPO / ".git").exists():
        pytest.skip("not a git checkout: there is no commit to copy")
    env = {**cluster.env, **long_env, "PATH": cluster.env["PATH"]}
    env["STUB_PREEMPT"] = str(tmp_path / "run/metrics.jsonl")
    command = ("bash", REPO / "launch/tpu_pod.sh", "run", "pod", "--zone", "z")
    command += ("--python", sys.executable, "--", *LONG, "--workdir", tmp_path / "run")
    first = run(*command, env=env)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    again = run(*command, env=env)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    check_same_end(tmp_path / "run", whole, first.stdout + again.stdout)


@pytest.mark.slow
def test_gke_preempted_and_restarted(cluster, long_env, whole, tmp_path):
    """Catches a JobSet that takes a preempted run for a finished one."""
    env = {**cluster.env, **long_env, "PATH": cluster.env["PATH"]}
    env["STUB_PREEMPT"] = str(tmp_path / "run/metrics.jsonl")
    command = (sys.executable, REPO / "launch/gke.py", "--name", "bt", "--image", "x/y:1")
    command += ("--hosts", "2", "--accelerator", "tpu-v5-lite-podslice", "--topology", "2x4")
    command += ("--claim", "c", "--mount", tmp_path, "--python", sys.executable)
    done = run(*command, "--", *LONG, "--workdir", tmp_path / "run", env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(cluster.calls("kubectl")) == 1
    check_same_end(tmp_path / "run", whole, done.stdout)


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(clean_env, tmp_path):
    """Catches hosts that each write half a checkpoint onto their own disk, which shows only when
    the run is to be resumed."""
    port = free_port()
    env = {**clean_env, "JAXREWARD_DISTRIBUTED": "1", "JAXREWARD_NUM_PROCESSES": "2"}
    env["JAXREWARD_COORDINATOR"] = f"127.0.0.1:{port}"
    words = (sys.executable, "-m", "jaxreward", *LONG[:3], "--workdir")
    both = [
        subprocess.Popen(
            [*words, tmp_path / f"disk{i}"],
            env={**env, "JAXREWARD_PROCESS_ID": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    told = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1], told
    for i, text in enumerate(told):
        assert f"disk{i} must be a folder that all 2 processes share" in text
    assert "process 1 of 2 does not see it" in told[1]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_all(long_env, tmp_path):
    """Catches two processes that resume from different checkpoints, or wait for each other, when
    one of them finds a damaged file."""
    words = (*LONG[:3], "--config.train.save_every=2", "--workdir", tmp_path / "run")
    first = local(*words, env=long_env, logs=tmp_path / "logs")
    assert first.returncode == 0, first.stdout
    before = lines(tmp_path / "run")
    parts = [x for x in (tmp_path / "run/checkpoints/4/params").rglob("*") if x.is_file()]
    largest = max(parts, key=lambda x: x.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:20])
    again = local(*words, env=long_env, logs=tmp_path / "logs")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "checkpoints/4 is damaged and not used" in again.stdout
    assert "resumed     step 2 of 4" in again.stdout
    assert lines(tmp_path / "run") == before
    assert {"2", "4", "4.damaged"} <= {x.name for x in (tmp_path / "run/checkpoints").iterdir()}


def children(pid):
    """Processes started by `pid`."""
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_dead_worker_ends_the_run(long_env, tmp_path):
    """Catches a run in which the living wait for the dead: kill -9 of one rank must end all of it
    within a minute, with host, rank and last lines, and leave no process."""
    command = ("bash", REPO / "launch/local.sh", "2", "--logs", tmp_path / "logs", "--", *LONG)
    launcher = subprocess.Popen(
        [*command, "--workdir", tmp_path / "run", "--config.train.steps=100000"],
        env=long_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    both = children(launcher.pid)
    environ = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in both}
    (victim,) = (pid for pid in both if b"JAXREWARD_PROCESS_ID=1" in environ[pid])
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    _, err = launcher.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert launcher.returncode == 128 + signal.SIGKILL
    assert re.search(r"launch: rank 1 on host \S+ failed: killed by SIGKILL", err), err
    assert "the last lines of its log" in err and str(tmp_path / "logs/rank1.log") in err
    assert len(both) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in both)
