"""Starts the processes of a run and watches them; what the scripts in `launch/` call.

    python -m jaxreward.launch local 4 -- train --config ... --workdir ...
    python -m jaxreward.launch worker -- train --config ... --workdir ...

`local` starts all processes of a run on this machine. `worker` starts one process of a run that
SLURM, a TPU pod or Kubernetes spreads over machines. Both keep a log a process, show its lines
with host and rank in front, pass SIGTERM on so that the run is saved, and when a process dies they
end the others and say which one it was, where, and what it said last.

Standard library only, and no JAX: a launcher must not claim the devices.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STOPPED = "JAXREWARD_STOPPED_EXIT"
# Who tells a process its number, in the order asked. A TPU VM's name ends in it.
RANKS = ("JAXREWARD_PROCESS_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID")
_POLL = 0.1
# Seconds in which processes that fail together are reaped before the first is blamed.
_TOGETHER = 0.5
# Seconds between SIGTERM and SIGKILL for what is left of a run that failed.
_LAST_WORDS = 5.0
_TAIL = 20
# Linux: PR_SET_PDEATHSIG, so that a launcher killed with SIGKILL leaves no process behind. Then it
# becomes the command itself.
_GUARD = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"
)


class Worker:
    """One process of a run: its log on the disk, its lines on the screen."""

    def __init__(self, command: list[str], env: dict[str, str], *, rank: str, host: str, log: Path):
        """Starts it. Args: command, env: what to run. rank, host: for the reader. log: appended
        to, so that a run which starts again keeps what it said before."""
        self.rank, self.host, self.log = rank, host, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._file = log.open("ab")
        self._read, self._rest = self._file.tell(), b""
        guard = [sys.executable, "-c", _GUARD] if sys.platform == "linux" else []
        self.process = subprocess.Popen(
            [*guard, *command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches the launcher alone, which passes it on
        )

    @property
    def name(self) -> str:
        """host:rank"""
        return f"{self.host}:{self.rank}"

    def poll(self) -> int | None:
        """The exit code, or None while it runs; negative for a signal."""
        return self.process.poll()

    def send(self, number: int) -> None:
        """Sends a signal to the process and to what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def show(self, *, all: bool = False) -> None:
        """Writes the lines that are new in the log, with host and rank in front."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *lines, self._rest = (self._rest + new).replace(b"\r", b"\n").split(b"\n")
        if all and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            _say(f"[{self.name}] {line.decode(errors='replace')}", sys.stdout)

    def tail(self, count: int = _TAIL) -> list[str]:
        """The last lines of the log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - (1 << 16)))
            text = file.read().decode(errors="replace")
        return text.replace("\r", "\n").rstrip().split("\n")[-count:]

    def close(self) -> None:
        """Closes the log."""
        self._file.close()


def _say(line, stream=None):
    # Whoever read this may be gone (a closed ssh connection): the logs have it all the same.
    stream = sys.stderr if stream is None else stream
    with contextlib.suppress(OSError):
        stream.write(line + "\n")
        stream.flush()


def supervise(workers: list[Worker], *, grace: float = 600.0) -> int:
    """Watches processes until they have ended, and ends all when one fails.

    SIGTERM, SIGINT and SIGHUP are passed on as SIGTERM, which saves the run; what has not ended
    `grace` seconds later is killed.

    Returns:
      0 if all exited with 0; the exit code of a stopped run (`JAXREWARD_STOPPED_EXIT`) if that is
      what they ended with; else the exit code of the process that failed first, 128 + signal.
    """
    stopped = int(os.environ.get(STOPPED) or 0)
    asked: list[float] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {n: signal.signal(n, lambda *_: asked.append(time.monotonic())) for n in numbers}
    passed = False
    try:
        while True:
            running = [w for w in workers if w.poll() is None]
            failed = [w for w in workers if w.poll() not in (None, 0, stopped)]
            for worker in workers:
                worker.show()
            if failed:
                return _fail(workers, stopped)
            if not running:
                return max(w.poll() for w in workers)
            if asked and not passed:
                passed = True
                _say("launch: stopping; the run is saved first")
                for worker in running:
                    # The process alone: what it has started is its own to end.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker.process.pid, signal.SIGTERM)
            if passed and time.monotonic() - asked[0] > grace:
                _say(f"launch: not ended {grace:g} s after SIGTERM; killed")
                _end(running, wait=0)
            time.sleep(_POLL)
    finally:
        _end([w for w in workers if w.poll() is None], wait=_LAST_WORDS)
        for worker in workers:
            worker.show(all=True)
            worker.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(workers, stopped):
    """Ends the others, says who failed first and why, and gives its exit code."""
    time.sleep(_TOGETHER)
    failed = [w for w in workers if w.poll() not in (None, 0, stopped)]
    # A process that was killed takes others down with it, which then report a lost connection.
    first = min(failed, key=lambda w: w.poll() not in (-signal.SIGKILL, -signal.SIGSEGV))
    others = [w for w in workers if w.poll() is None]
    _end(others, wait=_LAST_WORDS)
    for worker in workers:
        worker.show(all=True)
    code = first.poll()
    how = f"exit code {code}"
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (out of memory, or by hand)"
    _say(f"launch: rank {first.rank} on host {first.host} failed: {how}")
    _say(f"launch: the last lines of its log, {first.log}:")
    for line in first.tail():
        _say(f"  {line}")
    if others:
        _say(f"launch: ended the others: rank {', '.join(w.rank for w in others)}")
    return 128 - code if code < 0 else code


def _end(workers, *, wait):
    """SIGTERM, a moment, SIGKILL, to these processes and what they have started."""
    if wait and workers:
        for worker in workers:
            worker.send(signal.SIGTERM)
        until = time.monotonic() + wait
        while time.monotonic() < until and any(w.poll() is None for w in workers):
            time.sleep(_POLL)
    for worker in workers:
        worker.send(signal.SIGKILL)
        worker.process.wait()


# What is started


def free_port() -> int:
    """A port of this machine that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gpus(env: dict[str, str], devices: Path = Path("/dev")) -> int:
    """How many GPUs of this machine a process would see; 0 when it is told to use none."""
    if env.get("JAX_PLATFORMS") and not re.search("cuda|gpu|rocm", env["JAX_PLATFORMS"]):
        return 0
    if "CUDA_VISIBLE_DEVICES" in env:
        return len(
            [x for x in env["CUDA_VISIBLE_DEVICES"].split(",") if x.strip() not in ("", "-1")]
        )
    return len([x for x in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", x.name)])


def local_env(count: int, *, port: int, cpu_devices: int | None, have: int) -> list[dict[str, str]]:
    """The variables of each of `count` processes on this machine.

    Args:
      count: Processes. port: Of the coordinator, on this machine only.
      cpu_devices: Simulated CPU devices of each, or None to use what is there.
      have: GPUs, split evenly.

    Raises:
      ValueError: if the GPUs do not divide.
    """
    if not cpu_devices and have % count:
        raise ValueError(
            f"{have} GPUs do not divide over {count} processes; start a divisor of {have}, or hide "
            "some with CUDA_VISIBLE_DEVICES, or use --cpu_devices"
        )
    made = []
    for rank in range(count):
        env = {
            "JAXREWARD_DISTRIBUTED": "1",
            "JAXREWARD_COORDINATOR": f"127.0.0.1:{port}",
            "JAXREWARD_NUM_PROCESSES": str(count),
            "JAXREWARD_PROCESS_ID": str(rank),
            # Whoever reaches the coordinator could join the run: not from other machines.
            "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        }
        if cpu_devices:
            env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(cpu_devices)}
        elif have:
            each = have // count
            ids = range(rank * each, (rank + 1) * each)
            env["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, ids))
        made.append(env)
    return made


def _command(args):
    return [sys.executable, "-m", "jaxreward", *args]


def _shown(env, command):
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in env.items()), shlex.join(command)])


def local(args) -> int:
    """All processes of a run on this machine."""
    envs = local_env(
        args.processes,
        port=args.port or free_port(),
        cpu_devices=args.cpu_devices,
        have=0 if args.cpu_devices else gpus(dict(os.environ)),
    )
    command, host = _command(args.command), socket.gethostname()
    if args.dry_run:
        for env in envs:
            print(_shown(env, command))
        return 0
    _say(f"launch: {args.processes} processes on {host}, logs in {args.logs}")
    workers: list[Worker] = []
    for rank, env in enumerate(envs):
        log = args.logs / f"rank{rank}.log"
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **env}
        workers.append(Worker(command, env, rank=str(rank), host=host, log=log))
    return supervise(workers, grace=args.grace)


def worker(args) -> int:
    """One process of a run that is spread over machines."""
    env = {"JAXREWARD_DISTRIBUTED": "1"}
    given = (args.coordinator, args.num_processes, args.process_id)
    names = ("JAXREWARD_COORDINATOR", "JAXREWARD_NUM_PROCESSES", "JAXREWARD_PROCESS_ID")
    env |= {name: str(value) for name, value in zip(names, given) if value is not None}
    command, host = _command(args.command), socket.gethostname()
    if args.dry_run:
        print(_shown(env, command))
        return 0
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **env}
    named = re.search(r"-w-(\d+)$", host)
    rank = next((env[k] for k in RANKS if env.get(k)), named[1] if named else "0")
    # Host and rank: the folder of logs may be shared.
    one = Worker(command, env, rank=rank, host=host, log=args.logs / f"{host}.rank{rank}.log")
    pid = args.logs / f"{host}.rank{rank}.pid"
    pid.write_text(f"{os.getpid()}\n")
    try:
        return supervise([one], grace=args.grace)
    finally:
        pid.unlink(missing_ok=True)


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def _parse(argv):
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    top = argparse.ArgumentParser(
        prog="jaxreward.launch",
        description="Starts the processes of a run and watches them.",
        epilog="After -- stands a command of jaxreward: -- train --config NAME --workdir DIR",
        allow_abbrev=False,
    )
    kinds = top.add_subparsers(dest="kind", required=True)
    for kind, run in (("local", local), ("worker", worker)):
        parser = kinds.add_parser(
            kind,
            help=run.__doc__,
            description=run.__doc__,
            epilog="After -- stands a command of jaxreward: -- train --config NAME --workdir DIR",
            allow_abbrev=False,
        )
        parser.set_defaults(run=run)
        add = parser.add_argument
        if kind == "local":
            add("processes", type=_positive, metavar="N", help="how many processes")
            add("--cpu_devices", type=_positive, metavar="D", help="simulated CPU devices of each")
            add("--port", type=_positive, help="of the coordinator (default: a free one)")
        else:
            add("--coordinator", metavar="HOST:PORT", help="where the scheduler does not say")
            add("--num_processes", type=_positive, help="with --coordinator")
            add("--process_id", type=int, help="with --coordinator; from 0")
        add("--logs", type=Path, default=Path("launch_logs"), help="default: %(default)s")
        add("--grace", type=float, default=600.0, help="seconds to save in (default: %(default)s)")
        add("--dry_run", action="store_true", help="print what would run, and stop")
    args = top.parse_args(argv[:cut])
    args.command = argv[cut + 1 :]
    if not args.command:
        top.error("nothing to run; write: -- train --config NAME --workdir DIR")
    return args


def main(argv=None) -> int:
    """Runs the launcher; returns the exit code."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"launch: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
