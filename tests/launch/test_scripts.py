"""What the launch scripts would run, in words: every value arrives as it was typed."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
# What quoting gets wrong: spaces, both quotes, variables, globs, backslashes, an empty word.
WORDS = [
    "train",
    '--config.data.path=it\'s "my" $HOME/a  b.jsonl',
    "--workdir",
    "a*b\\n;`id`$(HOME) & c",
    "",
]
GKE = [
    *("--name", "bt-1", "--image", "eu.gcr.io/p/jaxreward:1", "--hosts", "2"),
    *("--accelerator", "tpu-v5-lite-podslice", "--topology", "2x4", "--claim", "runs"),
]


def launcher(name, *args, env, words=WORDS):
    """Runs a script of launch/; `words` stand after --."""
    path = REPO / "launch" / name
    how = [sys.executable, path] if name.endswith(".py") else ["bash", path]
    return subprocess.run(
        [*how, *args, *(["--", *words] if words is not None else [])],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def after(words, mark="--"):
    return words[words.index(mark) + 1 :]


def test_local_dry_run(cluster):
    """Catches a dry run that starts something or leaves out what would be set."""
    out = launcher("local.sh", "2", "--cpu_devices", "3", "--dry_run", env=cluster.env)
    assert out.returncode == 0, out.stderr
    first, second = map(shlex.split, out.stdout.splitlines())
    at = first.index(sys.executable)
    assert first[at:] == second[at:] == [sys.executable, "-m", "jaxreward", *WORDS]
    env = dict(word.split("=", 1) for word in second[:at])
    port = env["JAXREWARD_COORDINATOR"].rpartition(":")[2]
    assert env == {
        "JAXREWARD_DISTRIBUTED": "1",
        "JAXREWARD_COORDINATOR": f"127.0.0.1:{port}",
        "JAXREWARD_NUM_PROCESSES": "2",
        "JAXREWARD_PROCESS_ID": "1",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "3",
    }


def test_slurm_dry_run_and_submission_are_the_same(cluster):
    """Catches a dry run that shows something else than what is submitted, and lost quotes."""
    args = ("--nodes", "2", "--gpus_per_node", "4", "--time", "1:00:00", "--lead", "90")
    args += ("--sbatch", "--comment=a b", "--logs", str(cluster.folder / "my logs"))
    out = launcher("slurm.sh", *args, "--dry_run", env=cluster.env)
    assert out.returncode == 0, out.stderr
    assert cluster.calls() == []
    tool, *told = shlex.split(out.stdout)
    assert tool == "sbatch" and told[-len(WORDS) :] == WORDS
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--requeue"} <= set(told)
    assert {"--signal=B:USR1@90", "--open-mode=append", "--comment=a b"} <= set(told)
    # The stub runs the job: a program that fails ends it, and srun got every word.
    out = launcher("slurm.sh", *args, env={**cluster.env, "PYTHON": "/bin/false"})
    assert out.returncode == 1
    submitted = cluster.calls("sbatch")[0]["argv"]
    assert [x.replace("/bin/false", sys.executable) for x in submitted] == told
    (ran,) = cluster.calls("srun")
    assert ran["argv"][:4] == ["--kill-on-bad-exit=1", "/bin/false", "-m", "jaxreward.launch"]
    assert after(ran["argv"]) == WORDS
    assert cluster.calls("scontrol") == []


def test_slurm_refuses_what_it_does_not_know(cluster):
    """Catches a misspelt option that is passed on or ignored."""
    for args, text in (
        (("--node", "2"), "unknown option --node"),
        (("--nodes", "two"), "--nodes: expected a number, got 'two'"),
        (("--nodes",), "--nodes needs a value"),
    ):
        out = launcher("slurm.sh", *args, env=cluster.env)
        assert out.returncode == 2 and text in out.stderr, out.stderr
    assert "nothing to run" in launcher("slurm.sh", env=cluster.env, words=None).stderr
    assert cluster.calls() == []


def test_tpu_pod_dry_run(cluster):
    """Catches a command that the remote shell takes apart, and a pod on which every host may get
    another commit."""
    args = ("run", "pod-1", "--zone", "us-central2-b", "--project", "p", "--dry_run")
    sha = "0123456789" * 4
    out = launcher(
        "tpu_pod.sh",
        *(*args, "--repo", "https://example.org/r.git", "--commit", sha),
        env=cluster.env,
    )
    assert out.returncode == 0, out.stderr
    assert cluster.calls() == []
    setup, start = map(shlex.split, out.stdout.splitlines())
    common = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod-1", "--zone=us-central2-b"]
    for words in (setup, start):
        assert words[:9] == [*common, "--project=p", "--worker=all"] and len(words) == 10
    assert f"checkout -q --detach {sha}" in setup[-1]
    assert "source launch/env.sh tpu" in setup[-1]
    command = start[-1].removeprefix("--command=")
    assert after(shlex.split(command)) == WORDS
    short = launcher(
        "tpu_pod.sh", *args, "--repo", "https://x", "--commit", "main", env=cluster.env
    )
    assert short.returncode == 2 and "must be a full SHA, got main" in short.stderr


@pytest.mark.parametrize("detach", [(), ("--detach",)])
def test_tpu_pod_words_reach_the_program(cluster, detach):
    """Catches quotes lost on the way through gcloud, two shells and nohup."""
    if not (REPO / ".git").exists():
        pytest.skip("not a git checkout: there is no commit to copy")
    fake = cluster.folder / "python"
    seen = cluster.folder / "seen"
    fake.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >"{seen}".$JAXREWARD_PROCESS_ID\n')
    fake.chmod(0o755)
    args = ("run", "pod-1", "--zone", "z", "--python", str(fake), *detach)
    out = launcher("tpu_pod.sh", *args, env=cluster.env)
    assert out.returncode == 0, out.stderr
    assert [x["argv"][3] for x in cluster.calls("gcloud")] == ["scp", "ssh", "ssh"]
    for rank in "01":
        path = Path(f"{seen}.{rank}")
        for _ in range(100):
            if path.exists():
                break
            subprocess.run(["sleep", "0.1"], check=True)
        assert after(path.read_text().split("\0")[:-1]) == WORDS
        (home,) = (cluster.folder / f"worker{rank}").glob("jaxreward-*/launch")
        assert (home / "env.sh").is_file()


def test_tpu_pod_logs_and_stop(cluster):
    """Catches a detached run that can be neither seen nor saved and ended."""
    for action, text in (("logs", "tail -n 20"), ("stop", "xargs -r kill -TERM")):
        out = launcher(
            "tpu_pod.sh", action, "pod-1", "--zone", "z", "--dry_run", env=cluster.env, words=None
        )
        assert out.returncode == 0 and text in shlex.split(out.stdout)[-1]


def test_gke_dry_run_and_submission_are_the_same(cluster):
    """Catches a manifest that is not YAML, lost quotes, and a dry run that differs."""
    out = launcher("gke.py", *GKE, "--dry_run", env=cluster.env)
    assert out.returncode == 0, out.stderr
    assert cluster.calls() == []
    assert out.stdout.endswith("# kubectl apply --filename -\n")
    made = yaml.safe_load(out.stdout)
    (job,) = made["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = [word.replace("$$(", "$(") for word in container["command"]]
    assert after(words) == WORDS and made["metadata"]["name"] == "bt-1"
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 2
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    env = {**cluster.env, "PATH": f"{cluster.bin}:{cluster.env['PATH']}"}
    gke = (*GKE, "--python", "/bin/true")
    assert launcher("gke.py", *gke, env=env).returncode == 0
    (call,) = cluster.calls("kubectl")
    sent = yaml.safe_load(call["stdin"].replace("/bin/true", "python3"))
    assert call["argv"] == ["apply", "--filename", "-"] and sent == made


def test_gke_refuses_what_kubernetes_would(cluster):
    """Catches a name that fails after minutes in the cluster, and a slice that does not add up."""
    bad = [*GKE, "--namespace", "My_Space", "--mount", "runs"]
    out = launcher("gke.py", *bad, "--dry_run", env=cluster.env)
    assert out.returncode == 2 and out.stdout == ""
    assert "--namespace: expected 1 to 63 of a-z, 0-9 and -, got 'My_Space'" in out.stderr
    assert "--mount: expected an absolute path, got 'runs'" in out.stderr
    out = launcher("gke.py", *GKE, "--chips_per_host", "8", "--dry_run", env=cluster.env)
    assert "--topology 2x4 has 8 chips, but --hosts 2 x --chips_per_host 8 are 16" in out.stderr


@pytest.mark.parametrize("name", ["local.sh", "slurm.sh", "tpu_pod.sh", "gke.py"])
def test_help(name, cluster):
    """Catches a script whose help starts something or shows nothing."""
    out = launcher(name, "--help", env=cluster.env, words=None)
    assert out.returncode == 0 and "--dry_run" in out.stdout and cluster.calls() == []
