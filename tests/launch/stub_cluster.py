"""Stands in for gcloud, sbatch, srun, scontrol and kubectl: records what it is told, and does it
on this machine with two processes. Written for the tests beside it.

    stub_cluster.py TOOL ARGUMENTS...

Environment: STUB_HOME holds the record (`calls.jsonl`) and a home folder for each host. With
STUB_PREEMPT=FILE the second process gets SIGTERM, once, when FILE (a metrics.jsonl) has a line.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ["STUB_HOME"])


def record(tool, argv, **more):
    """One line of the record."""
    with (HOME / "calls.jsonl").open("a") as file:
        file.write(json.dumps({"tool": tool, "argv": argv, **more}) + "\n")


def free_port(low=1024):
    """A free port, at least `low`."""
    for _ in range(10000):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            if probe.getsockname()[1] >= low:
                return probe.getsockname()[1]
            port = low + probe.getsockname()[1] % (65536 - low)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")


def place(rank, port):
    """What a cluster tells a process of where it stands."""
    return {
        "JAXREWARD_COORDINATOR": f"127.0.0.1:{port}",
        "JAXREWARD_NUM_PROCESSES": "2",
        "JAXREWARD_PROCESS_ID": str(rank),
    }


def together(commands, *, kill_on_bad_exit=False):
    """Runs [(argv, env)] side by side; preempts the second if asked to; gives the exit codes."""
    running = [subprocess.Popen(argv, env={**os.environ, **env}) for argv, env in commands]

    def forward(number, _):
        for process in running:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    metrics, done = os.environ.get("STUB_PREEMPT"), HOME / "preempted"
    while any(p.poll() is None for p in running):
        time.sleep(0.05)
        if metrics and not done.exists() and Path(metrics).exists() and Path(metrics).read_text():
            done.touch()
            running[1].terminate()
        if kill_on_bad_exit and any(p.poll() not in (None, 0) for p in running):
            # As srun does, after a moment; what has saved leaves by itself.
            time.sleep(2)
            for process in running:
                process.kill()
    return [p.wait() for p in running]


def gcloud(argv):
    """scp and ssh of TPU VMs, with --worker=all."""
    record("gcloud", argv)
    homes = [HOME / "worker0", HOME / "worker1"]
    words = [x for x in argv if not x.startswith("--")]
    assert words[:3] == ["compute", "tpus", "tpu-vm"] and "--worker=all" in argv
    for home in homes:
        home.mkdir(exist_ok=True)
    if words[3] == "scp":
        source, target = words[4], words[5].partition(":")[2]
        for home in homes:
            shutil.copyfile(source, home / target)
        return 0
    (command,) = (x.partition("=")[2] for x in argv if x.startswith("--command="))
    port = free_port()
    codes = together(
        [
            (["bash", "-c", command], {"HOME": str(home), **place(rank, port)})
            for rank, home in enumerate(homes)
        ]
    )
    return max(codes, key=abs)


def sbatch(argv):
    """Runs the script at once, from a copy, and again for as long as it is requeued."""
    options = argv[: argv.index("job") - 1]
    assert all(x.startswith("--") for x in options), options
    script, *words = argv[len(options) :]
    record("sbatch", argv)
    spool = HOME / "spool"
    spool.mkdir()
    shutil.copyfile(script, spool / "slurm_script")
    # JAX takes the coordinator's port from the number of the job.
    job = str(free_port(65536 - 4096) - (65536 - 4096))
    while True:
        (HOME / "requeued").unlink(missing_ok=True)
        env = {**os.environ, "SLURM_JOB_ID": job}
        code = subprocess.run(["bash", spool / "slurm_script", *words], env=env).returncode
        if not (HOME / "requeued").exists():
            return code


def srun(argv):
    """Two tasks, told where they stand by the variables of SLURM alone."""
    record("srun", argv)
    assert argv[0] == "--kill-on-bad-exit=1"
    env = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    codes = together(
        [(argv[1:], {**env, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)],
        kill_on_bad_exit=True,
    )
    return max(codes, key=abs)


def scontrol(argv):
    """requeue"""
    record("scontrol", argv)
    (HOME / "requeued").touch()
    return 0


def kubectl(argv):
    """apply of a JobSet: its pods as processes, started again after a failure."""
    import yaml

    text = sys.stdin.read()
    record("kubectl", argv, stdin=text)
    made = yaml.safe_load(text)
    (job,) = made["spec"]["replicatedJobs"]
    inner = job["template"]["spec"]
    (container,) = inner["template"]["spec"]["containers"]
    env = {x["name"]: x["value"] for x in container["env"]}
    command = [word.replace("$$", "$") for word in container["command"]]
    for _ in range(made["spec"]["failurePolicy"]["maxRestarts"] + 1):
        port = free_port()
        pods = [(command, {**env, **place(i, port)}) for i in range(inner["parallelism"])]
        codes = together(pods)
        if not any(codes):
            return 0
    return 1


if __name__ == "__main__":
    tools = (gcloud, sbatch, srun, scontrol, kubectl)
    sys.exit({f.__name__: f for f in tools}[sys.argv[1]](sys.argv[2:]))
