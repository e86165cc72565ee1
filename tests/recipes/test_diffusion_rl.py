"""RL of denoisers at toy size: rows are the steps that were taken, credit is what they earned."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from jaxreward import presets
from jaxreward.data import rollouts as rollout_data
from jaxreward.diffusion import trajectory
from jaxreward.objectives import steps as step_advantages
from jaxreward.recipes import credit, diffusion_rl

SMALL = [
    "intra.fluency=0",
    "rollouts.workers=0",
    "rollouts.temperature=1.0",
    "rollouts.groups=0",
    "rollouts.answers=3",
    "data.batch=8",
]


def config(name="mro/rl:smoke", *more):
    made = presets.load(name, [*SMALL, *more])
    made.unlock()
    made.rewards = dict(quality=dict(fn="small_denoiser:count_digits", weights=dict(reward=1.0)))
    return made.lock()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(run, its first minibatch, the canvas that it was made of)."""
    seen = {}
    made = diffusion_rl.build(config(), tmp_path_factory.mktemp("mro"))
    canvases = made.batches._canvases
    fill = canvases.fill
    canvases.fill = lambda *a, **kw: seen.setdefault("canvas", fill(*a, **kw))
    made.batches.before(made.state)
    batch = next(made.batches)
    canvases.fill = fill
    with contextlib.closing(made.batches):
        yield made, batch, seen["canvas"]


def test_rows_are_the_steps_that_were_taken(built):
    """What the trainer says of a row's tokens is what the sampler said when it committed them."""
    made, batch, canvas = built
    rows = credit.to_rows(batch, None)
    logps = credit.make_measure(made.plan, config())(made.state.params, made.frozen, rows).logps
    there = batch["answer"] >= 0
    # 4 prompts x 3 answers x 4 steps, each of which commits 2 of the 8 positions.
    assert there.sum() == 4 * 3 * 4 * 2
    np.testing.assert_allclose(np.asarray(logps)[there], batch["sampler_logps"][there], atol=1e-5)
    state = trajectory.state_at(canvas, 2, made.plan.cfg.mask_id)
    np.testing.assert_array_equal(batch["tokens"][2], state[0])


def test_credit_is_that_of_the_step_groups(built):
    """Verification at the end of each group, quality in the last; steps of a group share it."""
    made, batch, canvas = built
    canvases = made.batches._canvases
    joined = made.batches._join(made.state.params, made.frozen)
    key = jax.random.fold_in(made.batches._key, 0)
    worth = [canvases.measure(joined, canvas, g, 2, key)["verification"] for g in range(2)]
    said = canvases.texts(canvas.tokens)
    digits = np.array([sum(c.isdigit() for c in text) for text in said])
    each = batch["advantages"][:, 0].reshape(12, 4)
    np.testing.assert_allclose(each[:, 0], worth[0], atol=1e-6)
    np.testing.assert_allclose(each[:, 3], worth[1] + digits, atol=1e-6)
    np.testing.assert_array_equal(each[:, ::2], each[:, 1::2])
    assert all(w.min() >= 0 and w.max() <= 1 for w in worth)
    canvases._config, kept = config("mro/rl:smoke", "intra.confidence=1"), canvases._config
    sure = canvases.measure(joined, canvas, 0, 2, key)["confidence"]
    canvases._config = kept
    first = (np.asarray(canvas.reveal) >= 0) & (np.asarray(canvas.reveal) < 2)
    want = [np.exp(row[at]).mean() for row, at in zip(np.asarray(canvas.full_logps), first)]
    np.testing.assert_allclose(sure, want, rtol=1e-5)


def test_a_round_again_is_the_same_round(built):
    """Catches a resume that samples other answers, or picks other groups."""
    made, batch, _ = built
    made.batches.set_state({"round": 0})
    made.batches.before(made.state)
    again = next(made.batches)
    for name, values in batch.items():
        np.testing.assert_array_equal(values, again[name], err_msg=name)


@pytest.mark.slow
def test_evaluation_searches_where_it_is_asked_to(built):
    """A search by the number of digits finds more of them than no search, from the same keys."""
    made, _, _ = built
    canvases = made.batches._canvases
    how = config("mro/rl:smoke", "search.labels=gold", "intra.verification=0")
    canvases._config, kept = how, canvases._config
    predict = diffusion_rl.make_predict(
        made.plan, how, canvases, made.batches._grader, jax.random.key(0)
    )
    some = made.heldout[:4]
    plain, searched = (
        predict(made.state.params, made.frozen, some, 2, 1.0, width=width) for width in (0, 4)
    )
    canvases._config = kept
    assert plain.reward.shape == searched.reward.shape == (4, 2)
    assert searched.reward.mean() > plain.reward.mean()
    assert (searched.parts["passes"] == 4).all()


def test_whole_answers_under_masks(tmp_path):
    """diffu-GRPO: the answer is hidden, prompts in part and anew each epoch; old = current."""
    how = config(
        "diffusion/grpo:smoke",
        "rollouts.epochs=2",
        "rollouts.outcome=quality/accuracy",
        "rollouts.groups=1",
        "rollouts.prompt_mask=0.5",
        "models.policy.lora_rank=2",
    )
    made = diffusion_rl.build(how, tmp_path)
    with contextlib.closing(made.batches):
        made.batches.before(made.state)
        first, second = next(made.batches), next(made.batches)
    mask = made.plan.cfg.mask_id
    start = made.batches._canvases.length
    live = first["group"][:, 0] >= 0
    assert (first["tokens"][live, start:] == mask).all()
    real = first["segments"][live, :start] > 0
    hidden = (first["tokens"][live, :start] == mask) & real
    assert 0.3 < hidden.sum() / real.sum() < 0.7
    assert not np.array_equal(np.sort(first["tokens"], axis=0), np.sort(second["tokens"], axis=0))
    rows = credit.to_rows(second, None)
    now = credit.make_measure(made.plan, how)(made.state.params, made.frozen, rows).logps
    np.testing.assert_allclose(now, second["old_logps"], atol=1e-6)
    np.testing.assert_allclose(second["old_logps"], second["ref_logps"], atol=1e-6)
    answers = first["advantages"][live, 0].reshape(-1)
    by_group = {g: answers[first["group"][live, 0] == g] for g in set(first["group"][live, 0])}
    assert all(abs(a.sum()) < 1e-5 and len(a) == 3 for a in by_group.values())


def test_rows_by_hand():
    """Two positions a step, of a model that predicts the next token; what is missing is padding."""
    canvas = {
        "tokens": np.array([[0, 5, 7, 8, 9, 6]]),
        "segments": np.array([[0, 1, 1, 1, 1, 1]]),
        "given": np.array([[True, True, False, False, False, False]]),
        "reveal": np.array([[-1, -1, 1, 0, 1, 0]]),
        "full_logps": np.array([[0, 0, -0.1, -0.2, -0.3, -0.4]], np.float32),
    }
    rows = rollout_data.step_rows(canvas, [(0, 0), (0, 1)], mask_id=3, predict_offset=1, rows=3)
    assert rows["tokens"][:2].tolist() == [[0, 5, 3, 3, 3, 3], [0, 5, 3, 8, 3, 6]]
    assert rows["source"][:2].tolist() == [[2, 4], [1, 3]]
    assert rows["target"][:2].tolist() == [[8, 6], [7, 9]]
    assert rows["positions"][0, :, 0].tolist() == [0, 0, 1, 2, 3, 4]
    assert rows["answer"].tolist() == [[0, 0], [0, 0], [-1, -1]]
    assert rows["of"].tolist() == [0, 0, -1]
    assert not rows["mask"][2].any()
    with pytest.raises(ValueError, match="do not fit into 1 rows of 2"):
        rollout_data.step_rows(canvas, [(0, 0), (0, 1)], mask_id=3, predict_offset=1, rows=1)
    learnt = np.array([[0, 0, 1, 1, 0, 0]], bool)
    kw = dict(mask_id=3, predict_offset=0, share=0.0, seed=0, rows=1, size=4)
    whole = rollout_data.masked_rows(canvas, [0], learnt, **kw)
    assert whole["tokens"].tolist() == [[0, 5, 3, 3, 3, 3]]
    assert whole["target"].tolist() == [[7, 8, 0, 0]]
    assert whole["source"].tolist() == [[2, 3, 0, 0]]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollouts.estimator=masked"], "do not go together"),
        (["rollouts.every=3"], r"rollouts\.every=3 must divide rollouts\.steps=4"),
        (["intra.mode=half"], r"intra\.mode must be"),
        (["intra.fluency=1", "models.perplexity.init=tiny"], None),
        (["rollouts.steps=3", "rollouts.block=4", "rollouts.every=1"], "do not divide over 2"),
        (["rollouts.updates=3"], r"rollouts\.updates=3 must divide"),
        (["search.width=2"], "finds trajectories to imitate"),
        (["rollouts.threshold=0.9"], "trajectories of any number of steps"),
        (["rollouts.importance=token", "rollouts.logp_temperature=0.5"], "compares with what"),
    ],
)
def test_what_does_not_fit_is_told_before_a_round(overrides, message, tmp_path):
    """Catches a config that fails after minutes of sampling, or one that is refused wrongly."""
    if message is None:
        made = diffusion_rl.build(config("mro/rl:smoke", *overrides), tmp_path)
        nll = made.batches._canvases._perplexity(["abc", "", "abcabc"])
        made.batches.close()
        assert np.isfinite(nll[[0, 2]]).all() and np.isinf(nll[1])
        return
    with pytest.raises(ValueError, match=message):
        made = diffusion_rl.build(config("mro/rl:smoke", *overrides), tmp_path)
        made.batches._canvases.schedule()


def test_imitation_is_of_good_trajectories():
    """The row's advantage is 1 or 0: with the reduction "fixed" the loss is -1/L of the steps'."""
    got = step_advantages.imitation(np.array([1.0, 0.0]), groups=2)
    np.testing.assert_array_equal(got, [[1, 0], [1, 0]])
    assert presets.load("mro/rejection").rollouts.reduction == "fixed"
    assert dataclasses.is_dataclass(trajectory.Canvas)
