"""Where metrics go: a JSON Lines file that survives kills, and a live line with the time left."""

import json
import math
import os
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
        shows: False on all processes but one, which then say nothing."""
        self._total, self._start, self._label = total, start, label
        self._shows = shows
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._began = time.monotonic()
        self._width = 0

    def update(self, step: int, values: dict[str, float] | None = None) -> None:
        """Shows the step, the given values and the time left."""
        if not self._shows:
            return
        done = step - self._start
        left = ""
        if done > 0 and step < self._total:
            rate = (time.monotonic() - self._began) / done
            left = f"  {duration(rate * (self._total - step))} left"
        shown = "  ".join(f"{k} {v:.4g}" for k, v in (values or {}).items())
        line = f"{self._label} {step}/{self._total}  {shown}{left}".strip()
        if self._live:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the live line."""
        if self._live and self._width:
            self._stream.write("\n")
            self._stream.flush()
