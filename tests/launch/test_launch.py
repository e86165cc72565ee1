"""The supervisor, with processes that are a line of Python: no JAX, so seconds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxreward import launch


def start(tmp_path, *codes):
    """One worker for each piece of Python."""
    return [
        launch.Worker(
            [sys.executable, "-u", "-c", code],
            dict(os.environ),
            rank=str(rank),
            host="here",
            log=tmp_path / f"rank{rank}.log",
        )
        for rank, code in enumerate(codes)
    ]


SLEEP = "import time; print('at work'); time.sleep(100)"


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(*pids, within=10):
    """Whether none of them runs, at once or soon: a killed process takes a moment to end."""
    until = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_lines_carry_host_and_rank_and_success_is_zero(tmp_path, capsys):
    """Catches output that nobody can attribute, and a last line without its end that is lost."""
    code = launch.supervise(
        start(tmp_path, "print('one\\ntwo')", "import sys; sys.stderr.write('half')")
    )
    out = capsys.readouterr().out.splitlines()
    assert code == 0 and {"[here:0] one", "[here:0] two", "[here:1] half"} == set(out)
    assert (tmp_path / "rank0.log").read_text() == "one\ntwo\n"


def test_a_killed_process_ends_the_others_and_is_named(tmp_path, capsys):
    """Catches a run that hangs on a dead worker, an orphan that keeps the devices, and a message
    that does not say which process it was or what it said last."""
    child = "import subprocess, time; print(subprocess.Popen(['sleep', '99']).pid); time.sleep(99)"
    die = "import os, time; print('the last words'); time.sleep(1); os.kill(os.getpid(), 9)"
    workers = start(tmp_path, child, die)
    began = time.monotonic()
    code = launch.supervise(workers)
    assert time.monotonic() - began < 15 and code == 128 + signal.SIGKILL
    err = capsys.readouterr().err
    assert "rank 1 on host here failed: killed by SIGKILL" in err
    assert "  the last words" in err and "ended the others: rank 0" in err
    grandchild = int((tmp_path / "rank0.log").read_text())
    assert gone(*(w.process.pid for w in workers), grandchild)


def test_the_first_to_die_is_blamed(tmp_path, capsys):
    """Catches the survivor's lost connection reported instead of the death that caused it."""
    die = "import os, time; time.sleep(1); os.kill(os.getpid(), 9)"
    lost = "import time; time.sleep(1.05); raise SystemExit('connection lost')"
    assert launch.supervise(start(tmp_path, lost, die)) == 128 + signal.SIGKILL
    assert "rank 1 on host here failed" in capsys.readouterr().err


def test_the_exit_code_of_a_failure_is_kept(tmp_path, capsys):
    """Catches a wrong config (2) that a scheduler takes for a crash to be repeated."""
    assert launch.supervise(start(tmp_path, "raise SystemExit(2)", SLEEP)) == 2
    assert "rank 0 on host here failed: exit code 2" in capsys.readouterr().err


def test_a_stopped_run_is_no_failure(tmp_path, monkeypatch, capsys):
    """Catches a preempted run whose last process is killed while it saves."""
    monkeypatch.setenv(launch.STOPPED, "75")
    slow = "import time; time.sleep(1); print('saved'); raise SystemExit(75)"
    assert launch.supervise(start(tmp_path, "raise SystemExit(75)", slow)) == 75
    assert "[here:1] saved" in capsys.readouterr().out


def test_sigterm_is_passed_on_and_waited_for(tmp_path, capsys):
    """Catches a launcher that dies of the signal that its processes should save on, or that kills
    them while they do."""
    save = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), print('saved'), sys.exit(0)))\n"
        "time.sleep(100)"
    )
    stop = "import os, signal, time; time.sleep(3); os.kill(os.getppid(), signal.SIGTERM)"
    assert launch.supervise(start(tmp_path, save, save, stop)) == 0
    out = capsys.readouterr().out
    assert "[here:0] saved" in out and "[here:1] saved" in out


def test_what_does_not_end_in_time_is_killed(tmp_path, capsys):
    """Catches a launcher that waits for ever for a process that ignores SIGTERM."""
    ready = f"import os, pathlib, signal, time; ready = pathlib.Path({str(tmp_path / 'ready')!r})\n"
    deaf = f"{ready}signal.signal(signal.SIGTERM, signal.SIG_IGN); ready.touch(); time.sleep(100)"
    # Not before the other is deaf: on a busy machine that takes more than a second.
    wait = f"{ready}while not ready.exists():\n    time.sleep(0.05)\n"
    stop = f"{wait}os.kill(os.getppid(), signal.SIGTERM)"
    assert launch.supervise(start(tmp_path, deaf, stop), grace=1) == 128 + signal.SIGKILL
    assert "not ended 1 s after SIGTERM" in capsys.readouterr().err


def test_a_killed_launcher_leaves_nobody_behind(tmp_path):
    """Catches processes that hold the devices after their launcher was killed."""
    code = (
        "import sys, time; from pathlib import Path; from jaxreward import launch\n"
        f"w = launch.Worker([sys.executable, '-c', {SLEEP!r}], {{}}, rank='0', host='h',"
        f" log=Path({str(tmp_path / 'log')!r}))\n"
        "print(w.process.pid, flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert alive(pid)
    time.sleep(1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid)


def test_gpus_are_split_evenly(tmp_path):
    """Catches two processes on one GPU, and GPUs that nobody uses."""
    for i in range(4):
        (tmp_path / f"nvidia{i}").touch()
    (tmp_path / "nvidiactl").touch()
    assert launch.gpus({}, tmp_path) == 4
    assert launch.gpus({"JAX_PLATFORMS": "cpu"}, tmp_path) == 0
    assert launch.gpus({"CUDA_VISIBLE_DEVICES": "2,3"}, tmp_path) == 2
    assert launch.gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    envs = launch.local_env(2, port=5, cpu_devices=None, have=4)
    assert [env["JAX_LOCAL_DEVICE_IDS"] for env in envs] == ["0,1", "2,3"]
    with pytest.raises(ValueError, match="4 GPUs do not divide over 3 processes"):
        launch.local_env(3, port=5, cpu_devices=None, have=4)
    assert "JAX_LOCAL_DEVICE_IDS" not in launch.local_env(3, port=5, cpu_devices=1, have=4)[0]
