"""Online RL: rewards rise, numbers are those of the answers, runs resume, faults are named."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_rl import GROUPS, lines, small

from jaxreward.data import rollouts as rollout_data
from jaxreward.evals import sampled
from jaxreward.models import trainable
from jaxreward.recipes import credit, online_rl
from jaxreward.train import step as train_step


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """(config, workdir) of 10 rounds, two updates each."""
    made = small(tiny_folder, "train.steps=10", "rollouts.updates=2", "rollouts.answers=8")
    return made, online_rl.run(made, tmp_path_factory.mktemp("online") / "run")


def test_the_reward_rises(finished):
    """Catches advantages of another sign, or that belong to other answers."""
    reward = [line["train/rollouts/reward"] for line in lines(finished[1])]
    assert len(reward) == 20 and np.mean(reward[-6:]) > 1.5 * np.mean(reward[:6])


def test_what_is_logged(finished):
    """Catches outcome and shaping mixed up, a sampler that is not the trainer, lost numbers."""
    for line in lines(finished[1]):
        assert line["train/sampler_gap_max"] < 1e-4
        assert 0 <= line["train/rollouts/outcome"] <= 1
        assert line["train/rollouts/part/vowels/share"] == line["train/rollouts/reward"]
        assert 0.5 < line["train/rollouts/useful"] <= 1
        for name in ("clipped_high", "clipped_low", "policy_kl", "entropy", "ratio_max"):
            assert math.isfinite(line[f"train/{name}"])
    first, second = lines(finished[1])[:2]
    assert (
        first["train/policy_kl"] < 1e-9 < second["train/policy_kl"]
    )  # the second has old log-probs
    judged = lines(finished[1], "eval/heldout/outcome")[-1]
    assert judged["eval/heldout/prompts"] == 16 and "eval/heldout/part/vowels/share" in judged
    shown = (finished[1] / "answers" / "000009.jsonl").read_text().splitlines()
    assert len(shown) == 16 and json.loads(shown[0])["parts"].keys() == {
        "vowels/share",
        "vowels/some",
    }


@pytest.mark.slow
def test_a_resumed_run_is_the_same(finished, tiny_folder, tmp_path):
    """Catches a saved position in the middle of a round, and a key that depends on the process."""
    short = small(tiny_folder, "train.steps=4", "rollouts.updates=2", "rollouts.answers=8")
    short.train.save_every = 3  # falls between the updates of a round, so it waits
    online_rl.run(short, tmp_path / "run")
    saved = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()}
    assert saved == {6, 8}
    whole, _ = finished
    online_rl.run(whole, tmp_path / "run")
    timed = ("per_second", "seconds/sample", "seconds/reward", "seconds/prepare")
    drop = lambda line: {k: v for k, v in line.items() if not k.endswith(timed)}
    want = [drop(line) for line in lines(finished[1])]
    # The learning rate is constant, so the shorter run took the same steps.
    assert [drop(line) for line in lines(tmp_path / "run")] == want


@pytest.fixture(scope="module")
def built(tiny_folder, tmp_path_factory):
    """A run with a reference, ready to be stepped by hand, and its first minibatch."""
    losses = dict(
        policy=dict(fn="policy.clipped", coef=1.0, clip_low=0.2, clip_high=0.28, dual=3.0),
        kl=dict(fn="policy.kl", coef=0.1, kind="k3"),
        entropy=dict(fn="policy.entropy_bonus", coef=0.01),
    )
    made = small(tiny_folder, "rollouts.max_new=6", "rollouts.importance=token", losses=losses)
    out = online_rl.build(made, tmp_path_factory.mktemp("built"))
    out.before(out.state)
    return made, out, next(out.batches)


def test_a_minibatch_is_what_its_types_say(built):
    """Catches rows that point nowhere, and groups or advantages without their answers."""
    _, out, batch = built
    rows = out.to_device(batch).validate()
    assert rows.old_logps is None and rows.ref_logps is not None
    # Group-relative advantages sum to 0 over the answers of a prompt.
    answers = {}
    for r, s in np.argwhere(batch["answer"] >= 0):
        k = batch["answer"][r, s]
        answers[batch["group"][r, k], batch["member"][r, k]] = batch["advantages"][r, s]
    assert len(answers) == 16
    sums = [sum(v for (g, _), v in answers.items() if g == group) for group in range(4)]
    np.testing.assert_allclose(sums, 0, atol=1e-5)
    assert batch["weight"].sum() == (batch["answer"] >= 0).sum()


def test_log_probs_are_those_of_the_sampler_and_of_teacher_forcing(built):
    """Catches a state off by one, another temperature, and an answer that sees its neighbours."""
    made, out, batch = built
    measure = credit.make_measure(out.plan, made)
    logps, _, _ = measure(out.state.params, out.frozen, out.to_device(batch))
    live = batch["answer"] >= 0
    np.testing.assert_allclose(np.asarray(logps)[live], batch["sampler_logps"][live], atol=1e-5)
    np.testing.assert_allclose(np.asarray(logps)[live], batch["ref_logps"][live], atol=1e-6)


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_cut(built):
    """Catches a mean over a microbatch, or a row, where one over the minibatch is meant, and an
    answer that sees its neighbours when rows are packed otherwise."""
    made, out, _ = built
    parts = online_rl.make_loss(out.plan, made)
    found = []
    for row_len, microbatches in ((64, 1), (64, 2), (128, 1)):
        give = credit.Credit(made, reference=True, **settings(out))
        batches, _ = rollout_data.minibatches(
            GROUPS, count=1, row_len=row_len, answers_per_row=4, multiple=4
        )
        reward = np.float32([[1, 0], [0.5, 0], [3, 1]])
        grades = sampled.Grades(reward, reward, {}, reward > 9, {})
        (batch,), _ = give(out.state.params, batches, grades, reward, GROUPS)
        gradient = jax.jit(train_step.make_gradient(*parts, microbatches))
        rows = out.to_device(batch)
        found.append(gradient(out.state.params, out.frozen, rows, jax.random.key(0), {})[:3])
    for grads, value, terms in found[1:]:
        assert float(value) == pytest.approx(float(found[0][1]), abs=1e-6)
        assert set(terms) == {"policy", "kl", "entropy"} and abs(float(terms["kl"])) < 1e-6
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads, found[0][0])


def settings(out):
    """Of `Credit`, from a run that was built."""
    return dict(plan=out.plan, frozen=out.frozen, start=out.state.params, where=out.rules)


def with_advantages(built, reward, outcome, groups, *overrides, losses=None, advantage=None):
    """What a round of given rewards becomes, with the losses' own settings."""
    _, out, _ = built
    sizes = [f"rollouts.prompts={len(groups)}", f"rollouts.answers={len(groups[0])}"]
    made = small(out.folder, *sizes, *overrides, losses=losses, advantage=advantage)
    reference = online_rl.needs(made, "ref_logps")
    give = credit.Credit(made, reference=reference, **settings(out))
    batches, _ = rollout_data.minibatches(
        groups, count=1, row_len=32, answers_per_row=8, multiple=4
    )
    reward, outcome = np.float32(reward), np.float32(outcome)
    none = np.zeros(reward.shape, bool)
    grades = sampled.Grades(reward, outcome, {}, none, {})
    shaped, _ = give.shaped(grades, groups)
    (batch,), kept = give(out.state.params, batches, grades, shaped, groups)
    if losses is not None:
        return made, batch
    found = {}
    for r, s in np.argwhere(batch["answer"] >= 0):
        k = batch["answer"][r, s]
        found.setdefault((batch["group"][r, k], batch["member"][r, k]), []).append(
            (batch["advantages"][r, s], batch["weight"][r, s])
        )
    return found, kept


def test_advantages_by_hand(built):
    """Catches rewards that reach another answer, and a scale that is not asked for."""
    plain = dict(fn="advantage.group_relative", scale="none")
    found, _ = with_advantages(
        built, [[1, 0], [0.5, 0.5], [3, 1]], [[1, 0], [0, 0], [1, 1]], GROUPS, advantage=plain
    )
    first = {at: values[0][0] for at, values in found.items()}
    assert first == {(0, 0): 0.5, (0, 1): -0.5, (1, 0): 0, (1, 1): 0, (2, 0): 1, (2, 1): -1}
    assert {at: len(values) for at, values in found.items()} == {
        (g, i): len(a.tokens) for g, group in enumerate(GROUPS) for i, a in enumerate(group)
    }
    assert all(weight == 1 for values in found.values() for _, weight in values)


def test_groups_and_answers_are_taken_out(built):
    """Catches a filter on shaped rewards, and what is taken out but still counted."""
    reward, outcome = [[1, 0], [0.5, 0.2], [3, 1]], [[1, 0], [0, 0], [1, 1]]
    args = (built, reward, outcome, GROUPS)
    found, kept = with_advantages(*args, "rollouts.filter=outcome", "rollouts.reduction=sequence")
    assert set(found) == {(0, 0), (0, 1)} and kept["groups_kept"] == pytest.approx(1 / 3)
    assert found[0, 1][0][1] == pytest.approx(1 / 3)
    found, kept = with_advantages(*args, "rollouts.filter=shaped")
    assert {g for g, _ in found} == {0, 2} and kept["groups_kept"] == pytest.approx(2 / 3)
    found, _ = with_advantages(*args, "rollouts.mask_truncated=true")
    assert set(found) == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)}
    assert found[2, 0][0][0] == 0  # alone in its group now


def test_long_answers_lose(built):
    """Catches a penalty that reaches the outcome, or another answer."""
    plain = dict(fn="advantage.group_relative", scale="none")
    found, _ = with_advantages(
        built,
        [[0, 0], [0, 0], [0, 0]],
        [[0, 0], [0, 0], [0, 0]],
        GROUPS,
        "rollouts.max_new=4",
        "rollouts.overlong=2",
        advantage=plain,
    )
    assert found[1, 0][0][0] == pytest.approx(-0.5) and found[0, 1][0][0] == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("losses", "advantage", "overrides"),
    [
        (
            dict(policy=dict(fn="policy.clipped_sequence", coef=1.0)),
            None,
            ["rollouts.reduction=sequence"],
        ),
        (
            dict(policy=dict(fn="policy.reinforce", coef=1.0)),
            dict(fn="advantage.leave_one_out"),
            ["rollouts.reduction=sequence_sum", "rollouts.reward_kl=0.1"],
        ),
        (
            dict(
                policy=dict(fn="policy.clipped", coef=1.0),
                kl=dict(fn="policy.kl", coef=0.1, kind="k2"),
            ),
            dict(fn="advantage.reinforce_pp", group=None),
            ["rollouts.reward_kl=0.1", "rollouts.epochs=2"],
        ),
        (
            dict(policy=dict(fn="policy.clipped", coef=1.0)),
            None,
            ["rollouts.whiten=true", "rollouts.reduction=group"],
        ),
    ],
    ids=["gspo", "rloo", "reinforce++", "dler"],
)
def test_other_algorithms_make_batches(built, losses, advantage, overrides):
    """Catches an argument that a loss or an advantage asks for and does not get."""
    _, out, _ = built
    reward = [[1, 0], [0.5, 0.2], [3, 1]]
    made, batch = with_advantages(
        built, reward, reward, GROUPS, *overrides, losses=losses, advantage=advantage
    )
    assert np.isfinite(batch["advantages"]).all() and np.abs(batch["advantages"]).max() > 0
    loss, weights, coef = online_rl.make_loss(out.plan, made)
    rows = out.to_device(batch).validate()
    assert (rows.old_logps is None) == (made.rollouts.epochs == 1 and not made.rollouts.reward_kl)
    totals, metrics, _ = jax.eval_shape(loss, out.state.params, out.frozen, rows, None, {})
    assert set(totals) == set(weights(rows)) == set(coef)
    assert ("reference_kl" in metrics) == ("ref_logps" in batch)


@pytest.mark.parametrize(
    ("overrides", "changes", "text"),
    [
        (["data.batch=6"], {}, r"data\.batch=6 rows at a time do not divide .* 4 devices"),
        (["rollouts.updates=3"], {}, r"rollouts\.updates=3 must divide rollouts\.prompts=4"),
        (["rollouts.filter=all"], {}, r"rollouts\.filter must be none, outcome or shaped"),
        (["rollouts.reduction=mean"], {}, r"mode must be one of token, sequence"),
        ([], {"losses": {}}, r"names no loss with a coefficient"),
        (
            [],
            {"losses": dict(p=dict(fn="preference.hinge", coef=1.0))},
            r"hinge takes chosen, rejected, which online_rl does not know",
        ),
        (
            [],
            {"advantage": dict(fn="advantage.gae")},
            r"gae and models\.policy\.value=False do",
        ),
        (["models.policy.head=scalar"], {}, r"a language model needs"),
    ],
)
def test_what_a_config_can_get_wrong(tiny_folder, tmp_path, overrides, changes, text):
    """Told by the name of the field, before anything is sampled."""
    made = small(tiny_folder, *overrides, **changes)
    with pytest.raises(ValueError, match=text):
        online_rl.build(made, tmp_path)


def test_rewards_that_are_not_there_are_named(tiny_folder, built):
    """Catches a weight or an outcome that is taken to be 0 for ever."""
    _, out, _ = built
    record = {"id": "a", "prompt": "P", "record": {}}
    other, weighs = small(tiny_folder, "rollouts.outcome=vowels/many"), small(tiny_folder)
    weighs.unlock()
    weighs.rewards.vowels.weights = dict(shares=1.0)
    for made, text in (
        (other, r"outcome is 'vowels/many'; the rewards give vowels/share, vowels/some"),
        (weighs, r"rewards\.vowels\.weights names shares; the reward gives share, some"),
    ):
        grader = sampled.Grader(made, out.tokenizer)
        with pytest.raises(ValueError, match=text):
            grader([record], [GROUPS[0]])
        grader.close()


def test_a_reward_that_fails_costs_its_sample(tiny_folder, built):
    """Catches one bad answer that stops the round, or counts as right."""
    _, out, _ = built
    made = small(tiny_folder, "rollouts.outcome=apr/accuracy")
    made.unlock()
    made.rewards = dict(apr=dict(fn="anchor.apr", weights=dict(reward=2.0)))
    grader = sampled.Grader(made, out.tokenizer)
    records = [
        {"id": name, "prompt": "P", "record": record}
        for name, record in (
            ("a", {"answer": "5"}),
            ("b", {}),
        )
    ]
    with pytest.warns(UserWarning, match=r"reward 'apr' failed on 2 of 4"):
        grades, said = grader(records, GROUPS[:2])
    assert grades.failed.tolist() == [[False, False], [True, True]]
    assert grades.reward.tolist() == [[0, 0], [0, 0]] and list(grades.failures.values()) == [2]
    assert [len(answers) for answers in said] == [2, 2]
    grader.close()


@pytest.mark.slow
def test_lora_has_its_base_as_reference(tiny_folder, tmp_path):
    """Catches a reference that holds a second model, or moves with the adapters."""
    losses = dict(
        policy=dict(fn="policy.clipped", coef=1.0), kl=dict(fn="policy.kl", coef=0.1, kind="k3")
    )
    made = small(
        tiny_folder,
        "rollouts.max_new=6",
        "models.policy.train=lora",
        "models.policy.lora_rank=2",
        losses=losses,
    )
    out = online_rl.build(made, tmp_path)
    moved = jax.tree.map(lambda x: x + 0.3, out.state.params)
    out.before(out.state.replace(params=moved))
    batch = next(out.batches)
    live = batch["answer"] >= 0
    base = credit.make_measure(out.plan, made)(
        out.state.params, out.frozen, out.to_device(batch)
    ).logps
    np.testing.assert_allclose(batch["ref_logps"][live], np.asarray(base)[live], atol=1e-6)
    assert np.abs(batch["ref_logps"] - batch["sampler_logps"])[live].max() > 1e-2
    assert trainable.join(out.plan, moved, out.frozen)[1] is None and jnp.ndim(base) == 2
    out.batches.close()
