"""The loop: what is written when, stopping and going on, and the whole thing as a process."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward import presets
from jaxreward.core import metrics as m
from jaxreward.core import trees
from jaxreward.data import pipeline
from jaxreward.data.tokenize import Tree
from jaxreward.train import checkpoint, loop, optim, tracking, writers
from jaxreward.train import state as states
from jaxreward.train import step as steps

OPTIM = SimpleNamespace(
    **presets.adamw(lr=0.05, schedule="cosine", warmup=0.0, decay=0.1, decay_mask=".*")
)
STEPS, VOCAB = 6, 11
TX = optim.make(OPTIM, STEPS)


def _loss(params, frozen, rows, keys, extra):
    """Gives every token a number; the noise makes the result depend on the step's key."""
    noise = jax.vmap(lambda key: jax.random.normal(key, rows["tokens"].shape[1:]))(keys)
    noise = 1 + 0.1 * noise
    square = jnp.square(params["table"][rows["tokens"]] * noise - frozen["target"])
    square = square * rows["scale"][:, None]
    total = jnp.sum(jnp.where(rows["mask"], square, 0.0))
    return {"square": total}, {"error": m.Mean.of(square, rows["mask"])}, extra


# One compiled step for the whole file.
STEP = steps.make_train_step(
    _loss, lambda rows: {"square": jnp.sum(rows["mask"])}, {"square": 1.0}, TX, clip=1.0
)


def make_trees():
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(0, VOCAB, rng.integers(1, 5)).astype(np.int32)
    made = []
    for i in range(10):
        answers = [draw(), draw()]
        loss = [np.ones(len(answer), bool) for answer in answers]
        made.append(Tree(str(i), draw(), answers, loss, [(0, 1)], [0.0], [1.0]))
    return made


class Run:
    """A run in a folder that can be started, cut short and started again."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, *, before=lambda number: None, poison=(), keep=2, target=0.5, **kw):
        """Trains to step 6. `before(n)` is called before batch n, from 1 on in the whole run;
        the batches of the steps in `poison` hold a NaN."""
        batches = pipeline.batches(make_trees(), row_len=16, batch=2, seed=3)
        state = states.create({"table": jnp.linspace(-1, 1, VOCAB)}, TX, jax.random.key(4))
        skipped = None
        with checkpoint.Checkpoints(self.folder, keep=keep) as checkpoints:
            if checkpoints.latest() is not None:
                state, data, _ = checkpoints.restore(state)
                batches.set_state(data["iterator"])
                skipped = data["skipped"]
            number = int(state.step)

            def to_device(raw):
                nonlocal number
                number += 1
                before(number)
                scale = jnp.full(len(raw["tokens"]), jnp.nan if number in poison else 1.0)
                return {"scale": scale, **{k: jnp.asarray(raw[k]) for k in ("tokens", "mask")}}

            file = writers.MetricsFile(self.folder, step=number)
            kw = {"log_every": 1, "save_every": 2, "checkpoints": checkpoints, **kw}
            kw["skipped"] = skipped
            with contextlib.closing(file):
                return loop.run(
                    STEP,
                    state,
                    {"target": jnp.float32(target)},
                    batches,
                    to_device=to_device,
                    steps=STEPS,
                    metrics_file=file,
                    **kw,
                )

    def lines(self):
        return [json.loads(x) for x in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def saved(self):
        names = [path.name for path in (self.folder / "checkpoints").iterdir()]
        return sorted(int(name) for name in names if name.isdigit())  # finished ones


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(final state, lines) of a run that nothing disturbed."""
    run = Run(tmp_path_factory.mktemp("uninterrupted"))
    state = run()
    return jax.tree.map(np.asarray, (state.params, state.opt_state)), run.lines()


def same(state, lines, uninterrupted):
    """Bit-equal arrays, and every step logged once with the same numbers."""
    want, want_lines = uninterrupted
    got = trees.flatten((state.params, state.opt_state))
    for path, leaf in trees.flatten(want).items():
        assert np.asarray(got[path]).tobytes() == leaf.tobytes(), path
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, want_lines, strict=True):
        line, other = ({k: v for k, v in x.items() if "second" not in k} for x in (line, other))
        assert line == other


class Killed(Exception):
    """Stands for what ends a process without a word."""


@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_killed_run_goes_on_bit_equal(run, uninterrupted, at):
    """Catches data, keys, moments or the schedule that start over on resume."""

    def kill(number):
        if number == at:
            raise Killed

    with pytest.raises(Killed):
        run(before=kill)
    assert [line["step"] for line in run.lines()] == list(range(1, at))
    # Saved every 2 steps: at 5 the fourth is there, at 4 the third is logged and lost.
    same(run(), run.lines(), uninterrupted)


def test_sigterm_saves_and_the_run_goes_on_bit_equal(run, uninterrupted):
    """Catches preemption that loses the steps since the last save, or ends the process at once."""

    def ask(number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Stopped, match=r"at step 3 of 6; the state is saved, and the same"):
        run(before=ask, save_every=0)
    assert signal.getsignal(signal.SIGTERM) is before
    assert run.saved() == [3]
    same(run(save_every=0), run.lines(), uninterrupted)


def test_sigterm_in_the_last_step_is_a_finished_run(run, uninterrupted):
    """Catches a run that is done but says that it has to go on."""

    def ask(number):
        if number == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    same(run(before=ask), run.lines(), uninterrupted)
    assert run.saved()[-1] == STEPS


def test_sigterm_without_checkpoints_does_not_claim_a_save(run):
    """Catches a message that promises what is not on the disk."""
    ask = lambda number: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(loop.Stopped, match="at step 1 of 6; nothing is saved"):
        run(before=ask, checkpoints=None)


def test_a_finished_run_has_nothing_to_do(run, uninterrupted):
    """Catches one step too many, and lines or checkpoints written anew."""
    run()
    written = run.lines()
    refuse = lambda number: pytest.fail("a finished run took a batch")
    same(run(before=refuse), run.lines(), uninterrupted)
    assert run.lines() == written and run.saved() == [4, 6]


@pytest.mark.parametrize("target", [math.nan, math.inf])
def test_not_finite_stops_and_keeps_the_older_checkpoint(run, target, uninterrupted):
    """Catches hours of training on NaN, and a good checkpoint replaced by a bad one."""

    def kill(number):
        if number == 4:
            raise Killed

    with pytest.raises(Killed):
        run(before=kill)
    assert run.saved() == [2]
    message = (
        r"^2 steps in a row were skipped \(train.max_skipped\), not finite: grad_norm, loss at "
        r"steps 3, 4\. Lower optim.lr, .*; the last checkpoint is of step 2$"
    )
    with pytest.raises(FloatingPointError, match=message):
        run(target=target, log_every=0, save_every=4, max_skipped=2)
    assert run.saved() == [2]
    last = run.lines()[-1]
    assert (last["step"], last["train/skipped"]) == (4, 2)
    assert not {"train/loss", "train/error", "train/grad_norm"} & set(last)
    same(run(), run.lines(), uninterrupted)  # the cause removed, the same command goes on


def test_a_skipped_step_is_named_and_not_averaged(run, uninterrupted, caplog):
    """Catches a NaN that spoils the line of the steps around it, and a skip that nobody sees."""
    run(poison={3, 5, 6}, log_every=3, save_every=0)
    first, second = run.lines()
    assert (first["train/skipped"], second["train/skipped"]) == (1, 2)
    alone = [line["train/loss"] for line in uninterrupted[1]]
    assert first["train/loss"] == pytest.approx(np.mean(alone[:2]), rel=1e-6)
    assert math.isfinite(second["train/loss"]) and not any("nonfinite" in k for k in first)
    assert [r.getMessage() for r in caplog.records if r.name == loop.__name__] == [
        "skipped 1 of 3 steps, not finite: grad_norm, loss at step 3",
        "skipped 2 of 3 steps, not finite: grad_norm, loss at steps 5, 6",
    ]


@pytest.mark.parametrize("log_every", [1, 2, 0])
@pytest.mark.parametrize("full", [1000, 2])
def test_skipped_in_a_row_is_counted_across_logs(run, log_every, full, monkeypatch):
    """Catches a row that a log, or a good step after it, cuts in two; and flags never read."""
    monkeypatch.setattr(loop, "_FLAGS", full)
    message = "^3 steps in a row .*: grad_norm, loss at steps 3, 4, 5. .*; nothing is saved$"
    with pytest.raises(FloatingPointError, match=message):
        run(poison={3, 4, 5}, log_every=log_every, save_every=0)


def test_skipped_but_not_in_a_row(run):
    """Catches a count that a good step does not set back."""
    run(poison={1, 2, 4, 5}, log_every=2)
    assert [line["train/skipped"] for line in run.lines()] == [2, 1, 1]
    assert "train/loss" not in run.lines()[0]
    with pytest.raises(ValueError, match="max_skipped must be 1 or more; received 0"):
        run(max_skipped=0)


def test_skipped_in_a_row_is_counted_across_a_resume(run):
    """Catches a run that diverges, is restarted by its scheduler, and diverges for ever."""

    def kill(number):
        if number == 5:
            raise Killed

    with pytest.raises(Killed):
        run(before=kill, poison={3, 4}, keep=9)
    message = "^3 steps in a row .*: grad_norm, loss at steps 3, 4, 5. .* is of step 4$"
    with pytest.raises(FloatingPointError, match=message):
        run(poison={5})
    assert int(run().step) == STEPS  # a good step ends the row


def test_a_save_that_fails_is_not_the_end(run, uninterrupted, monkeypatch, caplog):
    """Catches a full disk that ends a run in its middle, and a last save that fails in silence."""
    import orbax.checkpoint as ocp

    write, full = ocp.CheckpointManager.save, {4, 6}

    def save(self, step, **kw):
        if step in full:
            raise OSError(28, "No space left on device")
        return write(self, step, **kw)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    message = r"checkpoint 6 was not saved in .*No space left.*; the last good one is of step 2$"
    with pytest.raises(OSError, match=message):
        run()
    assert run.saved() == [2]
    said = [r.getMessage() for r in caplog.records if r.name == checkpoint.__name__]
    assert len(said) == 1 and said[0].startswith("checkpoint 4 was not saved in")
    assert said[0].endswith("the last good one is of step 2. The next save tries again")
    full.clear()
    same(run(), run.lines(), uninterrupted)


def test_who_writes_when(run):
    """Catches cadences that are mixed up, and an evaluation of numbers not yet checked."""
    seen = []

    def evaluate(state):
        seen.append((int(state.step), run.saved()))
        return {"heldout/accuracy": 0.5 + int(state.step)}

    final = run(log_every=4, eval_every=3, save_every=5, evaluate=evaluate, keep=9)
    assert int(final.step) == STEPS
    # 3: evaluate, so log first. 4: log. 5: save, so log first. 6: the end.
    train = [line for line in run.lines() if "train/loss" in line]
    evals = [line for line in run.lines() if "eval/heldout/accuracy" in line]
    assert [line["step"] for line in train] == [3, 4, 5, 6]
    assert [(line["step"], line["eval/heldout/accuracy"]) for line in evals] == [(3, 3.5), (6, 6.5)]
    assert len(run.lines()) == 6
    assert [step for step, _ in seen] == [3, 6] and seen[0][1] == []
    assert run.saved() == [5, 6]


def test_the_last_step_logs_evaluates_and_saves(run):
    """Catches a run whose last steps, with every cadence off, leave nothing behind."""
    run(log_every=0, eval_every=0, save_every=0, evaluate=lambda state: {"x": 1.0})
    train, evaluated = run.lines()
    assert train["step"] == evaluated["step"] == STEPS and evaluated["eval/x"] == 1.0
    assert run.saved() == [STEPS]


def test_a_line_is_the_mean_over_its_steps(run, uninterrupted):
    """Catches a logged loss of the last step only, and a rate of the wrong step."""
    run(log_every=3, schedule=optim.schedule(OPTIM, STEPS), save_every=0)
    first, second = run.lines()
    alone = [line["train/loss"] for line in uninterrupted[1]]
    assert first["train/loss"] == pytest.approx(np.mean(alone[:3]), rel=1e-6)
    assert second["train/loss"] == pytest.approx(np.mean(alone[3:]), rel=1e-6)
    # The rate that step 3 was taken with: 2 of 6 steps were behind it.
    assert first["train/lr"] == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 2 / 6)))
    assert first["train/tokens_per_second"] > 0
    assert set(first) - {"step"} == {
        f"train/{k}"
        for k in (
            *("loss", "error", "grad_norm", "lr", "skipped"),
            *("tokens_per_second", "flops_per_second"),
        )
    }


class Product:
    """A step of one known product, 2 * rows * 8 * 16 FLOPs, in one second of a made-up clock."""

    def __init__(self, now, loops=False):
        self.traces, self._now = 0, now

        def step(state, frozen, batch):
            self.traces += 1
            body = lambda x: jnp.tanh(x @ frozen @ frozen.T) if loops else x @ frozen
            x = batch["x"]
            x = jax.lax.while_loop(lambda x: x[0, 0] > 1, body, x) if loops else body(x)
            metrics = {"loss": m.Mean.of(x, jnp.ones_like(x))}
            return state.replace(step=state.step + 1), metrics

        self._step = jax.jit(step)
        self.trace = self._step.trace

    def __call__(self, *args):
        self._now[0] += 1.0
        return self._step(*args)


@pytest.mark.parametrize(
    ("peak", "loops", "shown"),
    [
        (4096.0, False, ["MFU 25.0%", "MFU 50.0%"]),
        (None, False, ["MFU n/a"] * 2),
        (4096.0, True, ["MFU n/a"] * 2),
    ],
)
def test_flops_and_their_share_of_the_peak(tmp_path, monkeypatch, capsys, peak, loops, shown):
    """Catches an invented peak or count, a rate of the wrong window, the count of another batch, a
    trace that the step takes once more."""
    now = [0.0]
    for module in (loop, writers):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    step = Product(now, loops)
    state = states.create({"x": jnp.zeros(())}, TX, jax.random.key(0))
    rows = iter([4, 4, 8, 8])
    with contextlib.closing(writers.MetricsFile(tmp_path)) as file:
        loop.run(
            step,
            state,
            jnp.ones((8, 16)),
            iter([{"mask": np.ones((2, 5), bool)}] * 4),
            to_device=lambda raw: {"x": jnp.zeros((next(rows), 8))},
            steps=4,
            metrics_file=file,
            log_every=2,
            peak=peak,
        )
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/tokens_per_second"] for line in found] == [10.0, 10.0]
    for line, rows in zip(found, (4, 8), strict=True):
        assert line.get("train/flops_per_second") == (None if loops else 2 * rows * 8 * 16)
        assert line.get("train/mfu") == (rows / 16 if peak and not loops else None)
    assert step.traces == 2
    assert capsys.readouterr().err.splitlines() == [
        f"train 2/4  loss 0  2 s left  10 tokens/s  {shown[0]}",
        f"train 4/4  loss 0  10 tokens/s  {shown[1]}",
    ]


def test_a_profile_is_written_and_changes_nothing(run, uninterrupted, capsys):
    """Catches a trace that is not there, that nobody is told of, or that moves a number."""
    with contextlib.closing(tracking.Profile(run.folder / "profile", 0, 2)) as profile:
        same(run(profile=profile), run.lines(), uninterrupted)
    assert [path.name for path in (run.folder / "profile").rglob("*.xplane.pb")]
    told = [line for line in capsys.readouterr().err.splitlines() if "profile" in line]
    (line,) = told
    assert line.startswith("profile     steps 2 to 3 in ") and "xprof --port 8791" in line


def test_the_signal_handler_only_lives_in_the_main_thread(run):
    """Catches a notebook or a server thread that cannot train at all."""
    import threading

    out = []
    thread = threading.Thread(target=lambda: out.append(run(save_every=0)))
    thread.start()
    thread.join()
    assert int(out[0].step) == STEPS


# The command line as a process


def _command(workdir, *more):
    words = "--config reward_model/bradley_terry:smoke --config.train.steps=8"
    words += " --config.train.save_every=1 --config.train.eval_every=0 --config.mesh.data=1"
    argv = [sys.executable, "-m", "jaxreward", "train", "--workdir", str(workdir)]
    return [*argv, *words.split(), *more]


def _environment():
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="")
    env.pop("JAXREWARD_DISTRIBUTED", None)
    return env


def _steps_logged(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def _until_logged(process, workdir, count):
    """Waits until `count` steps are logged; the process must not end before."""
    give_up = time.monotonic() + 300
    while _steps_logged(workdir) < count:
        if process.poll() is not None or time.monotonic() > give_up:
            process.kill()
            pytest.fail(f"no {count} steps: {process.communicate()}")
        time.sleep(0.02)


def _final(workdir):
    """Checkpoint 8 as raw arrays by path, read without any of our own code."""
    import orbax.checkpoint as ocp

    out = {}
    for item in ("params", "opt"):
        with ocp.StandardCheckpointer() as reader:
            tree = reader.metadata(workdir / "checkpoints" / "8" / item).item_metadata
            where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree.tree
            )
            got = reader.restore(workdir / "checkpoints" / "8" / item, like)
        out |= {f"{item}/{path}": np.asarray(x) for path, x in trees.flatten(got).items()}
    return out


@pytest.fixture(scope="module")
def reference_process(tmp_path_factory):
    """The workdir of an uninterrupted process."""
    workdir = tmp_path_factory.mktemp("process") / "whole"
    out = subprocess.run(_command(workdir), env=_environment(), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_process_killed_midway_goes_on_bit_equal(reference_process, tmp_path, how):
    """Catches whatever a real kill breaks: half-written files, caches, data order, randomness."""
    workdir = tmp_path / "cut"
    process = subprocess.Popen(
        _command(workdir), env=_environment(), stdout=-1, stderr=-1, text=True
    )
    _until_logged(process, workdir, 3)
    process.send_signal(how)
    _, err = process.communicate(timeout=120)
    if how == signal.SIGTERM:
        assert process.returncode == 0, err
        assert "jaxreward train: stopped by SIGTERM at step" in err and "Traceback" not in err
    else:
        assert process.returncode == -signal.SIGKILL
    assert not (workdir / "checkpoints" / "8").exists()
    again = subprocess.run(_command(workdir), env=_environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "resumed     step" in again.stderr
    got, want = _final(workdir), _final(reference_process)
    assert set(got) == set(want) and any(path.startswith("opt/") for path in got)
    for path in want:
        assert got[path].dtype == want[path].dtype
        assert got[path].tobytes() == want[path].tobytes(), path
    logged = []
    for folder in (workdir, reference_process):
        rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        logged.append([(r["step"], r["train/loss"]) for r in rows if "train/loss" in r])
    assert logged[0] == logged[1] and [step for step, _ in logged[0]] == list(range(1, 9))
