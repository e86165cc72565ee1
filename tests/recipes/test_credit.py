"""What becomes of rewards: shaping by groups, terms on single tokens, values, reward models."""

import math

import numpy as np
import pytest
from small_rl import GROUPS, answer, lines, small

from jaxreward.data import rollouts as rollout_data
from jaxreward.evals import sampled
from jaxreward.models import trainable
from jaxreward.objectives import advantage
from jaxreward.recipes import credit, evaluate, online_rl, preference

PARTS = {
    "apr/accuracy": np.float32([[1, 1], [1, 0], [1, 1]]),
    "apr/think": np.float32([[2, 3], [4, 1], [2, 2]]),
    "apr/tau": np.float32([[1, 2], [1, 0], [2, 0]]),
    "apr/charged": np.float32([[1, 1], [3, 0], [0, 2]]),
    "apr/anchor": np.float32([[1, 1], [1, 0], [1, 1]]),
}


def grades(reward=PARTS["apr/accuracy"]):
    none = np.zeros(reward.shape, bool)
    return sampled.Grades(reward, PARTS["apr/accuracy"], PARTS, none, {})


@pytest.fixture(scope="module")
def built(tiny_folder, tmp_path_factory):
    made = small(tiny_folder, "rollouts.max_new=6")
    out = online_rl.build(made, tmp_path_factory.mktemp("credit"))
    yield out
    out.batches.close()


def give(built, *, overrides=(), **sections):
    """(Credit, config) with the sections put in place."""
    sizes = ["rollouts.prompts=3", "rollouts.answers=2", "rollouts.max_new=6"]
    made = small(built.folder, *sizes, *overrides)
    made.unlock()
    for name, section in sections.items():
        made[name] = section
    made.lock()
    made_by = dict(
        plan=built.plan, frozen=built.frozen, start=built.state.params, where=built.rules
    )
    return credit.Credit(made, reference=False, **made_by)


def test_shaping_by_groups(built):
    """Catches a term of another group or answer, one that reaches wrong answers, and an outcome
    that shaping has changed."""
    term = dict(
        fn="anchor.apr_reward",
        coef=2.0,
        kind="group",
        lam=0.5,
        correct="apr/accuracy",
        think="apr/think",
        tail="apr/charged",
        found="apr/anchor",
    )
    shorter = dict(fn="length.group_length", coef=1.0)
    made = give(built, shaping=dict(tail=term, shorter=shorter, off=dict(fn="no.such", coef=0.0)))
    got, terms = made.shaped(grades(np.zeros((3, 2), np.float32)), GROUPS)
    # 2 (1 - tail / longest tail of the right answers / 2); 1 - length / longest right one.
    np.testing.assert_allclose(terms["tail"], [[1, 1], [1, 0], [2, 1]])
    np.testing.assert_allclose(terms["shorter"], [[1 / 3, 0], [0, 0], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(got, terms["tail"] + terms["shorter"])


def test_a_process_term_reaches_the_tail_alone(built):
    """Catches a tail that is off by a token, or lands on another answer of the packed row."""
    term = dict(
        fn="anchor.process",
        coef=1.0,
        penalty=0.25,
        bonus=0.5,
        correct="apr/accuracy",
        tau="apr/tau",
        think="apr/think",
        found="apr/anchor",
    )
    plain = dict(fn="advantage.group_relative", scale="none")
    made = give(
        built, overrides=["rollouts.offsets=true"], process=dict(tail=term), advantages=plain
    )
    # The third answer pair has an end token beyond its thinking.
    groups = [*GROUPS[:2], [answer(3), answer(3)]]
    batches, _ = rollout_data.minibatches(
        groups, count=1, row_len=32, answers_per_row=8, multiple=4
    )
    (batch,), _ = made(built.state.params, batches, grades(), PARTS["apr/accuracy"], groups)
    found = {}
    for r, s in np.argwhere(batch["answer"] >= 0):
        k = batch["answer"][r, s]
        at = int(batch["group"][r, k]), int(batch["member"][r, k])
        found.setdefault(at, []).append(float(batch["advantages"][r, s]))
    assert found == {
        (0, 0): [0, -0.25],
        (0, 1): [0, 0, -0.25],
        (1, 0): [0.5, 0.25, 0.25, 0.25],
        (1, 1): [-0.5],
        (2, 0): [0, 0, 0.5],  # stopped in time
        (2, 1): [-0.25, -0.25, 0],
    }


@pytest.mark.parametrize(
    ("sections", "overrides", "text"),
    [
        (
            dict(process=dict(t=dict(fn="anchor.process", coef=1.0))),
            [],
            r"takes tau, think, found, penalty",
        ),
        (
            dict(process=dict(t=dict(fn="length.truncation", coef=1.0, target=4))),
            [],
            r"set rollouts\.offsets=true",
        ),
        (dict(advantages=dict(fn="advantage.ppo")), [], r"advantage\.ppo and models\.policy\.val"),
    ],
)
def test_sections_that_do_not_fit(built, sections, overrides, text):
    """Told before anything is sampled."""
    with pytest.raises(ValueError, match=text):
        give(built, overrides=overrides, **sections)


def test_a_part_that_is_not_there(built):
    """Catches a misspelt part that is taken for a number or for nothing."""
    term = dict(fn="length.truncation", coef=1.0, target=4, correct="apr/acuracy")
    made = give(built, shaping=dict(t=term))
    with pytest.raises(ValueError, match=r"shaping\.t\.correct names 'apr/acuracy'; the rewards g"):
        made.shaped(grades(), GROUPS)


@pytest.fixture(scope="module")
def critic(tiny_folder, tmp_path_factory):
    """(config, workdir) of PPO with a value head, 6 rounds of 4 updates."""
    made = small(
        tiny_folder,
        "models.policy.value=true",
        "rollouts.updates=2",
        "rollouts.epochs=2",
        "rollouts.whiten=true",
        "rollouts.reward_kl=0.01",
        "train.steps=6",
        "optim.lr=3e-3",
        losses=dict(
            policy=dict(fn="policy.clipped", coef=1.0),
            value=dict(fn="policy.value_loss", coef=0.5, clip=None),
        ),
        advantage=dict(fn="advantage.ppo", lam=0.9),
    )
    return made, online_rl.run(made, tmp_path_factory.mktemp("ppo") / "run")


@pytest.mark.slow
def test_a_value_head_learns(critic):
    """Catches returns of another answer, values of another token, and a head without gradient."""
    rows = lines(critic[1])
    errors = [line["train/value_error"] for line in rows]
    assert len(rows) == 24 and np.mean(errors[-4:]) < 0.5 * errors[0]
    assert all(math.isfinite(line["train/loss/value"]) for line in rows)


@pytest.mark.slow
def test_values_belong_to_the_state_before_the_token(critic, tmp_path):
    """Catches values read at the token itself, and advantages that are not those of GAE."""
    made, _ = critic
    out = online_rl.build(made, tmp_path)
    out.before(out.state)
    batch = next(out.batches)
    out.batches.close()
    rows = out.to_device(batch).validate()
    states = trainable.states(out.plan, out.state.params, out.frozen, rows)
    kernel = np.asarray(out.state.params["value"]["kernel"])[:, 0]
    r, s = np.argwhere(batch["answer"] >= 0)[5]
    want = np.asarray(states[r, batch["source"][r, s]]) @ kernel
    assert batch["old_values"][r, s] == pytest.approx(want, abs=1e-5)
    assert "value" not in trainable.join(out.plan, out.state.params, out.frozen)[0]
    # Returns are advantages plus values, before the advantages are whitened over the round.
    raw, returns = advantage.ppo(
        np.zeros(batch["group"].shape, np.float32),
        batch["old_values"],
        batch["answer"],
        lam=0.9,
    )
    live = batch["answer"] >= 0
    np.testing.assert_allclose(
        (raw + batch["old_values"])[live], np.asarray(returns)[live], atol=1e-6
    )


@pytest.mark.slow
def test_the_value_head_is_not_exported(critic, tmp_path):
    """Catches a folder that transformers cannot read for a tensor that it does not know."""
    from safetensors import safe_open

    out = evaluate.export(critic[1], tmp_path / "out")
    with safe_open(out / "model.safetensors", framework="np") as file:
        names = sorted(file.offset_keys())
    assert names and not [name for name in names if "value" in name or "score" in name]


def test_an_answer_without_a_score_costs_itself(built):
    """Catches a NaN of a reward model that reaches the advantages of the whole round."""
    made = small(built.folder, "rollouts.outcome=rm/score")
    made.unlock()
    made.rewards = dict(rm=dict(model="unused", weights=dict(score=2.0)))
    scores = lambda prompts, answers: np.float32([[1.0, np.nan]])
    grader = sampled.Grader(made.lock(), built.tokenizer, scorers={"rm": scores})
    with pytest.warns(UserWarning, match=r"'rm' gave no finite score to 1 of 2"):
        found, _ = grader([{"id": "a", "prompt": "P", "record": {}}], GROUPS[:1])
    assert found.reward.tolist() == [[2, 0]] and found.failed.tolist() == [[False, True]]
    assert list(found.failures.values()) == [1]
    grader.close()


@pytest.mark.slow
def test_a_reward_model_as_reward(tiny_folder, tmp_path, built):
    """Catches scores of another answer, a template that is not the model's, and an answer that
    cannot be encoded and stops the round."""
    from jaxreward import presets

    rm = presets.load(
        "reward_model/bradley_terry:smoke",
        [f"models.policy.init=hf:{tiny_folder}", "train.steps=1", "train.eval_every=0"],
    )
    workdir = preference.run(rm, tmp_path / "rm")
    made = small(tiny_folder, "rollouts.outcome=rm/score")
    made.unlock()
    made.rewards = dict(rm=dict(model=str(workdir), weights=dict(score=2.0)))
    made.lock()
    scorers = online_rl._scorers(made)
    grader = sampled.Grader(made, built.tokenizer, scorers=scorers)
    records = [{"id": str(i), "prompt": f"P{i}", "record": {}} for i in range(2)]
    groups = [[words(built, "abc"), words(built, "de")], [words(built, "f"), words(built, "")]]
    found, said = grader(records, groups)
    assert said == [["abc", "de"], ["f", ""]]
    loaded = evaluate.load_model(workdir)
    for p, i in ((0, 0), (0, 1), (1, 0)):
        alone = evaluate.tokenize.encode_tree(
            loaded.tokenizer, records[p]["prompt"], [said[p][i]], template=loaded.template
        )
        assert found.outcome[p, i] == pytest.approx(float(loaded.predict([alone])[0][0]), abs=1e-5)
    np.testing.assert_allclose(found.reward, 2 * found.outcome)
    grader.close()


def words(built, text):
    """`text` as an answer of the byte tokenizer, with its end."""
    return answer([*built.tokenizer.ids(text), *sorted(built.tokenizer.eos_ids)[:1]])


def test_a_loss_of_values_needs_the_head(built):
    """Told by name, and not as a missing key under jit."""
    losses = dict(value=dict(fn="policy.value_loss", coef=1.0))
    made = small(built.folder, losses=losses)
    with pytest.raises(ValueError, match=r"set models\.policy\.value=true"):
        online_rl.make_loss(built.plan, made)
    with pytest.raises(ValueError, match=r"set value=false"):
        trainable.Plan(built.plan.cfg, value=True)
