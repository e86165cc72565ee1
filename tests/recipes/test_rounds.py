"""Rounds: replayed prompts, sampling one round ahead, and a sampler on devices of its own."""

import gzip
import itertools
import json

import jax
import numpy as np
import pytest
from small_rl import lines, small

from jaxreward.recipes import credit, online_rl


def steps(out, count):
    """The batches of `count` steps, with the state as it was before each."""
    state, seen = out.state, []
    for _ in range(count):
        out.before(state)
        batch = next(out.batches)
        live = batch["answer"] >= 0
        seen.append(
            dict(
                gap=np.abs(batch["sampler_logps"] - measured(out, state, batch))[live].max(),
                version=set(batch["version"][live].tolist()),
                tokens=batch["target"][live].tolist(),
                lag=out.batches.metrics["lag"],
            )
        )
        state, _ = out.step(state, out.frozen, out.to_device(batch))
    out.batches.close()
    return seen, state


def measured(out, state, batch):
    rows = out.to_device(batch)
    return np.asarray(
        credit.measure(out.plan, 1.0, out.rules, state.params, out.frozen, rows).logps
    )


AHEAD = ("rollouts.ahead=1", "rollouts.importance=token", "rollouts.devices=2")


@pytest.fixture(scope="module")
def ahead(tiny_folder, tmp_path_factory):
    """(what 4 rounds showed, the end) with a sampler on the last 2 of 4 devices."""
    made = small(tiny_folder, *AHEAD, "train.steps=4", "mesh.data=2")
    out = online_rl.build(made, tmp_path_factory.mktemp("ahead"))
    assert "sampler 2 cpu devices" in out.facts["mesh"]
    return steps(out, 4)


@pytest.mark.slow
def test_a_round_is_sampled_by_the_weights_before(ahead):
    """Catches answers of the newest weights (no overlap is possible then), of ever older ones, and
    a wrong version on the tokens."""
    seen, _ = ahead
    assert [row["version"] for row in seen] == [{0}, {0}, {1}, {2}]
    assert [row["lag"] for row in seen] == [0, 1, 1, 1]
    assert seen[0]["gap"] < 1e-4 < 1e-2 < min(row["gap"] for row in seen[1:])


@pytest.mark.slow
def test_a_resumed_run_ahead_is_the_same(tiny_folder, tmp_path):
    """Catches answers of the saved weights where those of the round before were due."""
    same = lambda line: {k: v for k, v in line.items() if "second" not in k}
    whole = small(tiny_folder, *AHEAD, "train.steps=6", "rollouts.updates=2", "mesh.data=2")
    short = small(tiny_folder, *AHEAD, "train.steps=4", "rollouts.updates=2", "mesh.data=2")
    online_rl.run(whole, tmp_path / "whole")
    online_rl.run(short, tmp_path / "run")
    online_rl.run(whole, tmp_path / "run")
    want, got = (list(map(same, lines(tmp_path / name))) for name in ("whole", "run"))
    assert got == want and len(want) == 12


def intervals(folder):
    """{(program, devices): [(start, end)]} of everything that a trace shows on devices."""
    (path,) = folder.rglob("*.trace.json.gz")
    found = {}
    for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        args = event.get("args") or {}
        if event.get("ph") == "X" and "hlo_module" in args and "device_ordinal" in args:
            end = event["ts"] + event["dur"]
            key = args["hlo_module"], int(args["device_ordinal"])
            found.setdefault(key, []).append((event["ts"], end))
    return found


@pytest.mark.slow
def test_a_trace_shows_both_at_once(tiny_folder, tmp_path):
    """Catches a wait that puts sampling and updates one after the other on devices of their own."""
    made = small(
        tiny_folder,
        *AHEAD,
        "train.steps=9",
        # XLA's CPU client starts programs over several devices one after the other.
        "rollouts.devices=1",
        "mesh.data=3",
        "data.batch=3",
        "rollouts.max_new=48",
        "rollouts.answers=8",
    )
    out = online_rl.build(made, tmp_path / "run")
    state = out.state

    def once(state):
        out.before(state)
        batch = out.to_device(next(out.batches))
        return out.step(state, out.frozen, batch)[0]

    for _ in range(3):  # compiled by then
        state = jax.block_until_ready(once(state))
    with jax.profiler.trace(tmp_path / "trace"):  # which keeps so many events, and no more
        for _ in range(2):
            state = once(state)
        jax.block_until_ready(state.params)
    out.batches.close()
    found = intervals(tmp_path / "trace")
    of = lambda name: {device: spans for (module, device), spans in found.items() if name in module}
    sampled, updated = of("jit_sample"), of("jit_step")
    assert set(sampled) == {3} and set(updated) == {0, 1, 2}, found.keys()
    both = overlap(runs(sampled[3]), runs(updated[0]))
    assert both > 0.2 * sum(end - start for start, end in runs(updated[0]))


def overlap(one, other):
    """How long spans of both kinds last at the same time."""
    pairs = itertools.product(one, other)
    return sum(max(0.0, min(b, d) - max(a, c)) for (a, b), (c, d) in pairs)


def runs(spans, gap=50_000.0):
    """Spans that follow each other within `gap` microseconds, joined."""
    joined = []
    for start, end in sorted(spans):
        if joined and start - joined[-1][1] < gap:
            joined[-1][1] = max(end, joined[-1][1])
        else:
            joined.append([start, end])
    return joined


def test_ahead_says_what_it_does_not_do(tiny_folder, tmp_path):
    """Catches a silent promise of speed on shared devices, or of a correction nobody asked for."""
    made = small(tiny_folder, "rollouts.ahead=1")
    with pytest.warns(UserWarning) as told:
        online_rl.build(made, tmp_path).batches.close()
    texts = [str(w.message) for w in told]
    assert any("rollouts.importance=token" in text for text in texts)
    assert any("the order of the work and not the time" in text for text in texts)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["rollouts.ahead=2"], r"rollouts\.ahead must be 0 or 1"),
        (["rollouts.devices=4"], r"rollouts\.devices=4 sample, and of the 4 devices some must"),
        (["rollouts.replay=5"], r"go together; received '' and 5"),
    ],
)
def test_settings_that_do_not_fit(tiny_folder, tmp_path, overrides, text):
    """Told by the name of the field, before anything is sampled."""
    with pytest.raises(ValueError, match=text):
        online_rl.build(small(tiny_folder, *overrides), tmp_path)


def test_old_prompts_are_mixed_in(tiny_folder, tmp_path):
    """Catches another ratio, old prompts that are always the same, and records that are swapped."""
    old = tmp_path / "old.jsonl"
    rows = [json.dumps({"prompt": f"old {i}", "answer": "1"}) for i in range(4)]
    old.write_text("\n".join(rows) + "\n")
    made = small(
        tiny_folder,
        "rollouts.replay=2",
        f"rollouts.replay_path={old}",
        "rollouts.prompts=6",
        "mesh.data=1",
        "mesh.fsdp=4",
    )
    out = online_rl.build(made, tmp_path / "run")
    out.batches.close()
    assert out.facts["replayed"]["kept"] == 4
    rounds = [[p["prompt"] for p in out.batches.prompts(n)] for n in range(2)]
    for prompts in rounds:
        assert sum(str(p).startswith("old") for p in prompts) == 2
    assert len({p for prompts in rounds for p in prompts if str(p).startswith("old")}) == 4
