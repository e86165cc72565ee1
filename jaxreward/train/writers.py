"""Where metrics go: a JSON Lines file that survives kills, and a live line with the time left.

And what else a command prints while it works, which `log_level` decides.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TextIO


class MetricsFile:
    """`metrics.jsonl` of a workdir: one object a line, flushed as it is written.

    On resume, lines after the restored step (and a line cut short by a kill) are dropped, so that
    every step stands once.
    """

    def __init__(self, workdir: str | Path, *, step: int = 0, writes: bool = True):
        """Args: workdir: the run's folder. step: lines beyond this step are dropped. writes: False
        on all processes but one, which then write nothing."""
        self._file = None
        if not writes:
            return
        self.path = Path(workdir) / "metrics.jsonl"
        kept = [line for line in self._lines() if line["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self.path)
        self._file = self.path.open("a")

    def _lines(self):
        if not self.path.is_file():
            return
        for line in self.path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line. NaN and infinities are written as null, which is valid JSON."""
        if self._file is None:
            return
        clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def duration(seconds: float) -> str:
    """ "42 s", "3 min 20 s" or "2 h 05 min"."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


# Standard error

LEVELS = ("debug", "info", "warning", "error")
_OURS = "jaxreward"
_live: "Progress | None" = None  # whose line is not ended yet


def says() -> bool:
    """Whether facts and progress are shown: at the levels info and debug, and where none is set."""
    return logging.getLogger(_OURS).level <= logging.INFO


def say(text: str) -> None:
    """A line on standard error, at the level info; for the process that writes."""
    if says():
        _end_live_line()
        print(text, file=sys.stderr)


def _end_live_line():
    if _live is not None:
        _live.close()


class _Handler(logging.StreamHandler):
    """To what standard error is now; a bare line for information, its level before others."""

    def emit(self, record):
        _end_live_line()
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record):
        text = super().format(record)
        if record.name.partition(".")[0] != _OURS:
            text = f"{record.name}: {text}"
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


@contextlib.contextmanager
def log_level(name: str):
    """What is printed on standard error, as long as it is open; afterwards all is as before.

        debug     everything, and what libraries (jax, orbax, absl) say of their own work
        info      facts of the run, progress, warnings
        warning   warnings alone
        error     errors alone, also of libraries

    Libraries are heard from warnings on, but for debug and error.

    Args:
      name: One of `LEVELS`.
    """
    level = getattr(logging, name.upper())
    ours, root, handler = logging.getLogger(_OURS), logging.getLogger(), _Handler()
    before = ours.level, ours.propagate, root.level, root.manager.disable
    ours.setLevel(level)
    ours.addHandler(handler)
    # A library may give the root logger a handler, which would print every line again.
    ours.propagate = False
    if level == logging.DEBUG:
        root.setLevel(level)
        if not root.handlers:
            root.addHandler(handler)
    if level > logging.WARNING:
        logging.disable(level - 1)
    try:
        yield
    finally:
        _end_live_line()
        ours.removeHandler(handler)
        root.removeHandler(handler)
        ours.setLevel(before[0])
        ours.propagate = before[1]
        root.setLevel(before[2])
        logging.disable(before[3])


class Progress:
    """A live line on a terminal, plain lines elsewhere. Writes to standard error."""

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        label: str = "",
        stream: TextIO | None = None,
        shows: bool = True,
    ):
        """Args: total: steps of the run. start: steps already done. label: what is running.
        shows: False on all processes but one, which then say nothing. Nothing is said either
        where `says()` is False."""
        self._total, self._start, self._label = total, start, label
        self._shows = shows and says()
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._began = time.monotonic()
        self._width = 0

    def update(self, step: int, values: dict[str, float] | None = None, *notes: str) -> None:
        """Shows the step, the given values, the time left, and the notes as they are."""
        global _live
        if not self._shows:
            return
        done = step - self._start
        shown = [f"{self._label} {step}/{self._total}".strip()]
        shown += [f"{k} {v:.4g}" for k, v in (values or {}).items()]
        if done > 0 and step < self._total:
            rate = (time.monotonic() - self._began) / done
            shown.append(f"{duration(rate * (self._total - step))} left")
        line = "  ".join([*shown, *notes])
        if self._live:
            # A line that wraps could not be taken back.
            line = line[: shutil.get_terminal_size().columns - 1]
            self._stream.write("\r" + line.ljust(self._width))
            self._width, _live = len(line), self
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the live line; another update begins a new one."""
        global _live
        if self._live and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0
        if _live is self:
            _live = None
