"""The loop around a step: log, evaluate, save, stop on a signal or when no step can be taken.

A step whose loss or gradient is not finite changes nothing and says so in its metrics. The loop
counts such steps and stops at `max_skipped` in a row: one is bad luck, several are a fault.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxreward.core import metrics as m
from jaxreward.core.types import TrainState
from jaxreward.parallel import hosts
from jaxreward.train import plan, writers
from jaxreward.train.checkpoint import Checkpoints

log = logging.getLogger(__name__)
PyTree = Any
# Steps whose flags may wait on the device for the next log.
_FLAGS = 1000


class Stopped(Exception):
    """The run was asked to stop (SIGTERM); what it could save is saved."""


class _Flag:
    """Set by SIGTERM while the loop runs; the previous handler is put back afterwards.

    With several processes the signal is JAX's to take, and `at` is what they have agreed on.
    """

    def __init__(self):
        self.raised = False

    def __enter__(self):
        self._alone = jax.process_count() == 1
        self._main = self._alone and threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._set)
        return self

    def _set(self, *_):
        self.raised = True

    def at(self, step: int) -> bool:
        """Whether the run stops after this step; to be asked after every step."""
        return self.raised if self._alone else hosts.stopping(step)

    def __exit__(self, *_):
        if self._main:
            signal.signal(signal.SIGTERM, self._before)


class _Skipped:
    """The steps that changed nothing: which, and why.

    Attributes:
      window: {step: quantities} since the last log. row: the same, of the unbroken row of skipped
        steps that ends at the last step seen, or of the first row that reached `limit`.
    """

    def __init__(self, limit: int, row: dict[str, list[str]]):
        self.limit = limit
        self.window: dict[int, list[str]] = {}
        self.row = {int(step): names for step, names in row.items()}
        self._waiting: list[tuple[int, dict]] = []

    def take(self, step: int, metrics: dict) -> dict:
        """Keeps what a step says of itself, on the device; returns its other metrics."""
        flags = {k: v for k, v in metrics.items() if k == "skipped" or k.startswith("nonfinite/")}
        if flags:
            self._waiting.append((step, flags))
        return {k: v for k, v in metrics.items() if k not in flags}

    def over(self) -> bool:
        """True once `limit` steps in a row were skipped."""
        return len(self.row) >= self.limit

    def full(self) -> bool:
        """True when it is time to read, log or no log."""
        return len(self._waiting) >= _FLAGS

    def read(self, pending: PyTree = None) -> PyTree:
        """Reads what waits, and `pending`, in one transfer; returns `pending` on the host."""
        waiting, pending = jax.device_get((self._waiting, pending))
        self._waiting = []
        for step, flags in waiting:
            if not flags["skipped"].result():
                self.row = self.row if self.over() else {}
                continue
            names = [k.partition("/")[2] for k, v in flags.items() if "/" in k and v.result()]
            self.window[step] = sorted(names)
            if not self.over():
                self.row[step] = sorted(names)
        return pending


def _told(skipped: dict[int, list[str]]) -> str:
    """ "grad_norm, loss at steps 3, 4 and 7; grad_norm at step 9"."""
    steps: dict[str, list[int]] = {}
    for step, names in skipped.items():
        steps.setdefault(", ".join(names) or "the update", []).append(step)
    return "; ".join(
        f"{names} at step{'s' * (len(at) > 1)} {', '.join(map(str, at))}"
        for names, at in steps.items()
    )


class _Speed:
    """How fast steps are taken, since the last line; the first one after a start compiles, too."""

    def __init__(self, total: Callable[[int], int], peak: float | None):
        """Args: total: sums over processes. peak: FLOPs a second of the devices, or None."""
        self._total, self._peak = total, peak
        self._flops: dict[Any, int | None] = {}  # of a step on all devices, by the batch's shapes
        self.restart()

    def restart(self):
        self._tokens = self._work = 0
        self._known = True
        self._clock = time.monotonic()

    def take(self, raw: dict, step: Callable, state, frozen, batch):
        """A step that is about to be taken, with these arguments."""
        self._tokens += int(raw["mask"].sum())
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in self._flops:
            # The call that follows takes the same trace.
            self._flops[shapes] = _count(step, state, frozen, batch)
        work = self._flops[shapes]
        self._known &= work is not None
        self._work += work or 0

    def values(self) -> dict[str, float]:
        """Tokens and (where known) FLOPs a second, and the latter as a share of the peak."""
        seconds = max(time.monotonic() - self._clock, 1e-9)
        out = {"tokens_per_second": self._total(self._tokens) / seconds}
        if self._known:
            out["flops_per_second"] = self._work / seconds
            if self._peak:
                out["mfu"] = out["flops_per_second"] / self._peak
        return out


def _count(step, *args) -> int | None:
    try:
        return plan.flops(step.trace(*args), recomputed=False)
    except (AttributeError, ValueError) as error:  # not jitted, or with a loop or a kernel
        log.info("the FLOPs of a step are not counted: %s", error)
        return None


def run(
    step: Callable,
    state: TrainState,
    frozen: PyTree,
    batches,
    *,
    to_device: Callable[[dict], Any],
    steps: int,
    metrics_file: Any,
    checkpoints: Checkpoints | None = None,
    meta: dict | None = None,
    schedule: Callable[[int], Any] | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    log_every: int = 10,
    eval_every: int = 0,
    save_every: int = 0,
    max_skipped: int = 3,
    skipped: dict[str, list[str]] | None = None,
    total: Callable[[int], int] = int,
    peak: float | None = None,
    profile: Any = None,
    before: Callable[[TrainState], None] | None = None,
    whole: Callable[[], bool] | None = None,
    label: str = "train",
) -> TrainState:
    """Runs `step` until `state.step == steps`.

    Args:
      step: From `make_train_step`; the state is donated.
      state: Where to start; `batches` must stand at the same step.
      frozen: Passed to the step.
      batches: Iterator of dicts of NumPy arrays, with `get_state()`.
      to_device: Dict of arrays -> batch of the step.
      steps: Total, counted from step 0.
      metrics_file: Where lines go, by `write(step, values)`.
      checkpoints: Where states go, or None to save nothing.
      meta: Facts stored with every checkpoint.
      schedule: Step -> learning rate, logged as "train/lr".
      evaluate: State -> {metric: value}, logged under "eval/"; also run after the last step.
      log_every, eval_every, save_every: In steps; 0 = only at the end.
      max_skipped: Steps in a row that may be skipped because their numbers are not finite.
      skipped: The row that the run stood in when it was saved, from `data` of its checkpoint.
      total: Sums what each process has counted in its rows (`hosts.total`).
      peak: FLOPs a second of all devices (`plan.peak`), for "train/mfu"; None where not known.
      profile: `tracking.Profile`, or None.
      before: Called with the state before each batch is taken, for batches that depend on it.
      whole: Whether the position of `batches` can be saved now; what is due waits until it can.
        None = always.
      label: Shown in front of the progress.

    Returns:
      The final state.

    Raises:
      FloatingPointError: after `max_skipped` skipped steps in a row, naming the quantities, the
        steps, and where the last checkpoint stands.
      OSError: if the last checkpoint of the run could not be written. An earlier one that fails is
        logged, and training goes on.
      Stopped: after SIGTERM, once the state is saved (if there are checkpoints).
    """
    if max_skipped < 1:
        raise ValueError(f"train.max_skipped must be 1 or more; received {max_skipped}")
    at = int(state.step)
    progress = writers.Progress(steps, start=at, label=label, shows=hosts.is_writer())
    pending, pending_from = None, at
    skipped, speed = _Skipped(max_skipped, skipped or {}), _Speed(total, peak)
    due = lambda every: at == steps or (every and at % every == 0)
    saved = at if checkpoints and checkpoints.latest() == at else -1

    def save():
        nonlocal saved
        if checkpoints is not None and saved != at:
            data = {"iterator": batches.get_state(), "skipped": skipped.row}
            checkpoints.save(state, data=data, meta=meta or {})
            saved = at

    def check():
        # The state is as it was before the first of them, so whatever is saved may stay.
        if not skipped.over():
            return
        progress.close()
        last = None
        if checkpoints is not None:
            checkpoints.wait()
            last = checkpoints.latest()
        where = "nothing is saved" if last is None else f"the last checkpoint is of step {last}"
        raise FloatingPointError(
            f"{max_skipped} steps in a row were skipped (train.max_skipped), not finite: "
            f"{_told(skipped.row)}. Lower optim.lr, look at the data of these steps, or raise "
            f"train.max_skipped; {where}"
        )

    def write():
        nonlocal pending, pending_from
        values = m.results(skipped.read(pending))
        if skipped.window:
            # An average over no step, or the last value of a step that did not count.
            values = {k: v for k, v in values.items() if math.isfinite(v)}
            told = _told(skipped.window)
            log.warning(
                "skipped %d of %d steps, not finite: %s",
                len(skipped.window),
                at - pending_from,
                told,
            )
        line = {f"train/{k}": v for k, v in values.items()}
        line["train/skipped"] = len(skipped.window)
        fast = speed.values()
        line |= {f"train/{k}": v for k, v in fast.items()}
        if schedule is not None:
            line["train/lr"] = float(schedule(at - 1))
        metrics_file.write(at, line)
        shown = {k: values[k] for k in ("loss", "accuracy") if k in values}
        share = f"MFU {fast['mfu']:.1%}" if "mfu" in fast else "MFU n/a"
        progress.update(at, shown, f"{fast['tokens_per_second']:,.0f} tokens/s", share)
        pending, pending_from = None, at
        skipped.window = {}
        speed.restart()

    stop = owed = False  # asked to stop; a save was due and could not be taken
    with _Flag() as flag:
        while at < steps:
            if profile is not None:
                profile.before(at + 1, state)
            if before is not None:
                before(state)
            raw = next(batches)
            batch = to_device(raw)
            speed.take(raw, step, state, frozen, batch)
            state, metrics = step(state, frozen, batch)
            at += 1
            if profile is not None and (told := profile.after(at, state)):
                writers.say(told)
            metrics = skipped.take(at, metrics)
            pending = metrics if pending is None else m.add(pending, metrics)
            stop = flag.at(at) or stop
            owed = owed or bool(due(save_every))
            saving = (owed or stop) and (whole is None or whole())
            evaluating = evaluate is not None and due(eval_every)
            # Nothing is saved or evaluated before its numbers are known.
            if due(log_every) or evaluating or saving:
                write()
                check()
            elif skipped.full():
                skipped.read()
                check()
            if evaluating:
                values = evaluate(state)
                metrics_file.write(at, {f"eval/{k}": v for k, v in values.items()})
                speed.restart()
            if saving:
                save()
                owed = False
            if stop and saving and at < steps:
                progress.close()
                if checkpoints is not None:
                    checkpoints.wait(required=True)
                kept = "the state is saved, and the same command goes on from here"
                raise Stopped(
                    f"stopped by SIGTERM at step {at} of {steps}; "
                    + (kept if checkpoints is not None else "nothing is saved")
                )
    progress.close()
    if checkpoints is not None:
        checkpoints.wait(required=True)
    return state
