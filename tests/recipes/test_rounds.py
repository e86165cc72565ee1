"""Rounds: replayed prompts, sampling one round ahead, and a sampler on devices of its own."""

import json

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
