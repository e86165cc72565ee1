"""The loop around a step: log, evaluate, save, stop on a signal or a number that is not finite."""

import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxreward.core import metrics as m
from jaxreward.core.types import TrainState
from jaxreward.train import writers
from jaxreward.train.checkpoint import Checkpoints

PyTree = Any


class Stopped(Exception):
    """The run was asked to stop (SIGTERM); what it could save is saved."""


class _Flag:
    """Set by SIGTERM while the loop runs; the previous handler is put back afterwards."""

    def __init__(self):
        self.raised = False

    def __enter__(self):
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._set)
        return self

    def _set(self, *_):
        self.raised = True

    def __exit__(self, *_):
        if self._main:
            signal.signal(signal.SIGTERM, self._before)


def run(
    step: Callable,
    state: TrainState,
    frozen: PyTree,
    batches,
    *,
    to_device: Callable[[dict], Any],
    steps: int,
    metrics_file: writers.MetricsFile,
    checkpoints: Checkpoints | None = None,
    meta: dict | None = None,
    schedule: Callable[[int], Any] | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    log_every: int = 10,
    eval_every: int = 0,
    save_every: int = 0,
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
      metrics_file: Where lines go.
      checkpoints: Where states go, or None to save nothing.
      meta: Facts stored with every checkpoint.
      schedule: Step -> learning rate, logged as "train/lr".
      evaluate: State -> {metric: value}, logged under "eval/"; also run after the last step.
      log_every, eval_every, save_every: In steps; 0 = only at the end.
      label: Shown in front of the progress.

    Returns:
      The final state.

    Raises:
      FloatingPointError: naming the quantities that are not finite and the steps they cover. The
        last checkpoint is from before them.
      Stopped: after SIGTERM, once the state is saved (if there are checkpoints).
    """
    at = int(state.step)
    progress = writers.Progress(steps, start=at, label=label)
    pending, pending_from, tokens = None, at, 0
    clock = time.monotonic()
    due = lambda every: at == steps or (every and at % every == 0)
    saved = at if checkpoints and checkpoints.latest() == at else -1

    def save():
        nonlocal saved
        if checkpoints is not None and saved != at:
            checkpoints.save(state, data={"iterator": batches.get_state()}, meta=meta or {})
            saved = at

    def log():
        nonlocal pending, tokens, clock, pending_from
        values = m.results(pending)
        bad = [k for k, v in values.items() if k in ("loss", "grad_norm") and not math.isfinite(v)]
        line = {f"train/{k}": v for k, v in values.items()}
        now = time.monotonic()
        line["train/tokens_per_second"] = tokens / max(now - clock, 1e-9)
        if schedule is not None:
            line["train/lr"] = float(schedule(at - 1))
        metrics_file.write(at, line)
        if bad:
            progress.close()
            raise FloatingPointError(
                f"{' and '.join(bad)} not finite between steps {pending_from + 1} and {at}; lower "
                "optim.lr or look at the data of these steps. The last checkpoint is older"
            )
        shown = {k: values[k] for k in ("loss", "accuracy") if k in values}
        progress.update(at, shown)
        pending, tokens, clock, pending_from = None, 0, now, at

    with _Flag() as flag:
        while at < steps:
            raw = next(batches)
            tokens += int(raw["mask"].sum())
            state, metrics = step(state, frozen, to_device(raw))
            pending = metrics if pending is None else m.add(pending, metrics)
            at += 1
            stop = flag.raised
            evaluating = evaluate is not None and due(eval_every)
            # Nothing is saved or evaluated before its numbers are known to be finite.
            if due(log_every) or evaluating or due(save_every) or stop:
                log()
            if evaluating:
                values = evaluate(state)
                metrics_file.write(at, {f"eval/{k}": v for k, v in values.items()})
                clock = time.monotonic()
            if due(save_every) or stop:
                save()
            if stop and at < steps:
                if checkpoints is not None:
                    checkpoints.wait()
                progress.close()
                kept = "the state is saved, and the same command goes on from here"
                raise Stopped(
                    f"stopped by SIGTERM at step {at} of {steps}; "
                    + (kept if checkpoints is not None else "nothing is saved")
                )
    progress.close()
    if checkpoints is not None:
        checkpoints.wait()
    return state
