"""What else follows a run, where it is asked for: TensorBoard, Weights & Biases, a profile.

    train.tensorboard     event files in <workdir>/tensorboard
    train.wandb           the name of a project of Weights & Biases
    train.profile_steps   that many steps, traced into <workdir>/profile

`metrics.jsonl` is the record of a run, and a run that cannot write it stops. A tracker only
follows: whatever it raises is said once, by name, and the run goes on without it. All of it happens
on the process that writes, and none of it changes what is computed.
"""

import json
import logging
import os
import re
import secrets
import time
from pathlib import Path
from types import TracebackType

import jax

from jaxreward.core import provenance
from jaxreward.train import writers
from jaxreward.train.loop import Stopped

log = logging.getLogger(__name__)


def check(train) -> None:
    """Makes sure, before anything is read or compiled, that what is asked for can be had.

    Args:
      train: The config's section `train`.

    Raises:
      ImportError: a package is missing; the text says how to install it.
      ValueError: `profile_from` and `profile_steps` do not fit together.
    """
    if train.tensorboard:
        _tensorboardx()
    if train.wandb:
        _wandb()
    Profile("", train.profile_from, train.profile_steps)


def _tensorboardx():
    try:
        from tensorboardX import event_file_writer
    except ImportError as error:
        raise ImportError(
            "train.tensorboard needs the package tensorboardX: pip install 'jaxreward[logging]'"
        ) from error
    return event_file_writer


def _wandb():
    try:
        import wandb

        # Its own folder of runs, in the current folder, is an empty package to Python.
        if not hasattr(wandb, "init"):
            raise ImportError("a folder called wandb is not the package")
    except ImportError as error:
        raise ImportError(
            "train.wandb needs the package wandb: pip install 'jaxreward[logging]'"
        ) from error
    return wandb


# Trackers


class TensorBoard:
    """Event files for TensorBoard, written without TensorFlow; a new file at every start.

    A file begins by telling the reader to forget what earlier files hold of later steps, so that a
    resumed run shows every step once.
    """

    def __init__(self, folder: Path, *, step: int):
        """Args: folder: is made. step: the one the run stands at; readers forget what is beyond."""
        writer = _tensorboardx()
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2, summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        # Names hold seconds, which two starts may share, and readers take files in their order.
        suffix = f".{time.time_ns()}"
        # Not its SummaryWriter: that one writes from a thread, which a full disk stops for ever.
        self._writer = writer.EventsWriter(str(folder / "events"), suffix)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step + 1, session_log=start)

    def _add(self, step, **what):
        self._writer.write_event(self._event.Event(wall_time=time.time(), step=step, **what))
        self._writer.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds one point to each curve."""
        value = self._summary.Summary.Value
        points = [value(tag=name, simple_value=number) for name, number in values.items()]
        self._add(step, summary=self._summary.Summary(value=points))

    def close(self, *, failed: bool) -> None:
        """Closes the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, which a resumed run goes on with.

    Its id is kept in `<workdir>/wandb_id`. Uploaded are the metrics, the config, and the facts of
    environment.json; what wandb would collect by itself of the command line, the repository and the
    terminal is switched off, since nothing there is masked. It asks for no key: log in before
    (`wandb login`), or set WANDB_MODE=offline.
    """

    def __init__(self, workdir: Path, project: str, *, facts: dict):
        """Args: workdir: the run's folder. project: its name there. facts: to upload."""
        # With this variable it never waits at a terminal for somebody to type a key.
        os.environ.setdefault("WANDB_SILENT", "true")
        config = workdir / "config.json"
        made = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        self._run = _wandb().init(
            project=project,
            id=_run_id(workdir / "wandb_id"),
            resume="allow",
            dir=str(workdir),
            config={**made, "environment": json.loads(json.dumps(facts, default=str))},
            allow_val_change=True,
            settings={
                "x_disable_meta": True,
                "disable_git": True,
                "console": "off",
                "finish_timeout": 60.0,
            },
        )
        # Steps that are there already: it takes none twice, and a resumed run repeats their values.
        self._from = self._run.starting_step
        if self._run.url:
            writers.say(f"wandb       {self._run.url}")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the values at this step."""
        if step >= self._from:
            self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """Ends the run, as failed or not, and waits a minute at most for what is not uploaded."""
        self._run.finish(exit_code=int(failed))


def _run_id(path):
    known = path.read_text().strip() if path.is_file() else ""
    if re.fullmatch(r"[0-9a-f]{8}", known):
        return known
    made = secrets.token_hex(4)
    partial = path.with_suffix(".partial")
    partial.write_text(made + "\n")
    os.replace(partial, path)
    return made


class Metrics:
    """Where the loop's lines go: `metrics.jsonl` first, then the trackers.

    Use as a context manager: leaving it by an error tells the trackers that the run failed.
    """

    def __init__(self, workdir: Path, train, *, step: int, facts: dict, writes: bool = True):
        """Opens what `train` asks for.

        Args:
          workdir: The run's folder.
          train: The config's section `train`.
          step: The one the run stands at; lines beyond it are dropped.
          facts: Those of environment.json.
          writes: False on all processes but one, which then write nothing.

        Raises:
          ImportError, ValueError: as `check`.
        """
        check(train)
        self._file = writers.MetricsFile(workdir, step=step, writes=writes)
        self._trackers, self._failed = {}, set()
        if not writes:
            return
        wanted = {}
        if train.tensorboard:
            wanted["TensorBoard"] = lambda: TensorBoard(workdir / "tensorboard", step=step)
        if train.wandb:
            wanted["Weights & Biases"] = lambda: WandB(workdir, train.wandb, facts=facts)
        for name, start in wanted.items():
            try:
                self._trackers[name] = start()
            except Exception as error:  # whatever a tracker raises: the run is worth more
                self._fail(name, error)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of `metrics.jsonl`, and the same to each tracker that still works."""
        self._file.write(step, values)
        for name, tracker in self._trackers.items():
            if values and name not in self._failed:
                try:
                    tracker.write(step, values)
                except Exception as error:  # as above
                    self._fail(name, error)

    def _fail(self, name, error):
        if name in self._failed:
            return
        self._failed.add(name)
        text = " ".join(provenance.mask(str(error)).split())[:300].rstrip(".")
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        log.warning("%s: %s; the run goes on without it", name, text)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._file.close()
        # A run that was asked to stop has not failed.
        failed = kind is not None and not issubclass(kind, Stopped)
        for name, tracker in self._trackers.items():
            try:
                tracker.close(failed=failed)
            except Exception as error:  # as above
                self._fail(name, error)


# Profile


class Profile:
    """Traces some steps with `jax.profiler`, on the device and in Python.

    Without a first step the second one is the first: a step that compiles is traced only if step 1
    is asked for. For the same reason a run that is resumed among these steps begins one step later.
    """

    def __init__(self, folder: str | Path = "", first: int = 0, count: int = 0, *, start: int = 0):
        """Args: folder: where the traces go. first: first step to trace, counted from 1; 0 takes
        the second. count: steps to trace; 0 traces none. start: steps already done.

        Raises:
          ValueError: a number is negative, or there is a first step but no count.
        """
        if first < 0 or count < 0 or (first and not count):
            raise ValueError(
                "train.profile_steps says how many steps are traced, from step train.profile_from "
                f"on; received profile_steps={count}, profile_from={first}"
            )
        self._folder = Path(folder)
        first = first or 2
        self._last = first + count - 1 if count else 0
        self._first = first if first == 1 else max(first, start + 2)
        self._on = False

    def before(self, step: int, state) -> None:
        """To be called before each step; `state` is waited for where the trace starts."""
        if step == self._first <= self._last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, step: int, state) -> str:
        """To be called after each step; where the trace ends, what was made and how to open it."""
        if not self._on or step < self._last:
            return ""
        jax.block_until_ready(state)
        self.close()
        steps = f"step {self._first}"
        if self._first < self._last:
            steps = f"steps {self._first} to {self._last}"
        return (
            f"profile     {steps} in {self._folder}; to open it: pip install xprof, then "
            f"xprof --port 8791 {self._folder}"
        )

    def close(self) -> None:
        """Ends the trace where the run ends within it."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
