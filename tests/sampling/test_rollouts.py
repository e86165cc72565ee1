"""Sources of answers: what a round depends on, and an engine that runs in another process."""

import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward import presets
from jaxreward.core.types import Trajectory
from jaxreward.models import decoder
from jaxreward.parallel import specs as sp
from jaxreward.parallel.mesh import make_mesh
from jaxreward.parallel.rules import Rules
from jaxreward.recipes import online_rl
from jaxreward.sampling import autoregressive, rollouts
from jaxreward.sampling.choose import Temperature
from jaxreward.testing import tiny_config
from jaxreward.train import plan

CFG = tiny_config(vocab=64)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CFG.vocab, n).astype(np.int32) for n in (5, 3, 7)]
KEY = jax.random.key(7)


def weights(seed):
    """Large enough that the prompt decides the answer."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(
            np.ones(p.shape) if p.init == "ones" else rng.normal(0, 0.2, p.shape), jnp.float32
        ),
        decoder.specs(CFG),
        is_leaf=lambda x: isinstance(x, sp.Param),
    )


@pytest.fixture(scope="module")
def params():
    return weights(1)


def make(**settings):
    # A fifth of all tokens end an answer, so that lengths differ.
    made = dict(max_prompt=8, max_new=6, choose=Temperature(1.5), stop=range(12))
    return rollouts.Engine(CFG, **{**made, **settings})


def asked(engine, prompts=PROMPTS, answers=3, key=KEY):
    engine.submit(prompts, answers, key)
    return engine.collect()


def said(groups):
    return [[answer.tokens.tolist() for answer in group] for group in groups]


@pytest.fixture(scope="module")
def engine():
    return make()


@pytest.fixture(scope="module")
def groups(engine, params):
    engine.publish(params, 4)
    return asked(engine)


def test_a_round_is_what_its_types_say(groups):
    """Catches answers of another prompt, padding that stays, and a version that is lost."""
    assert [len(group) for group in groups] == [3, 3, 3]
    lengths = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for answer in group:
            n = len(answer.tokens)
            lengths.add(n)
            np.testing.assert_array_equal(answer.prompt, prompt)
            assert answer.logps.shape == answer.written.shape == answer.version.shape == (n,)
            assert answer.written.all() and (answer.version == 4).all()
            assert (answer.logps < 0).all() and np.isfinite(answer.logps).all()
            assert answer.finished == (answer.tokens[-1] < 12)
            assert answer.finished or n == 6
    assert len(lengths) > 1


def test_a_round_depends_on_weights_prompts_and_key_alone(engine, params, groups):
    """Catches state that is left from an earlier round, and a key that is not used."""
    engine.publish(params, 9)
    again = asked(engine)
    assert said(again) == said(groups)
    np.testing.assert_array_equal(again[0][0].logps, groups[0][0].logps)
    assert {int(v) for group in again for a in group for v in a.version} == {9}
    assert said(asked(engine, key=jax.random.key(8))) != said(groups)
    others = [PROMPTS[0], PROMPTS[1][::-1].copy(), PROMPTS[0]]
    changed = said(asked(engine, others))
    assert changed[0] == said(groups)[0] and changed[2] != said(groups)[2]
    engine.publish(weights(2), 10)
    assert said(asked(engine)) != said(groups)


@pytest.mark.slow
def test_slots_change_nothing(params, groups):
    """Catches answers that depend on which slot they are decoded in, or on who was there before."""
    engine = make(slots=2)
    engine.publish(params, 4)
    few = asked(engine)
    assert said(few) == said(groups)
    for got, want in zip(itertools.chain(*few), itertools.chain(*groups), strict=True):
        np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)


def test_no_row_is_decoded_that_holds_no_prompt(engine, params, groups):
    """Catches rows that fill up a round: they change no token and take no turn of the loop, but
    would be computed in each. And a program that is compiled again for the same number of prompts.
    """
    given = dict(max_new=6, choose=Temperature(1.5), stop=jnp.arange(12), samples=3)
    tokens, mask = autoregressive.padded(PROMPTS, length=16)
    assert len(tokens) == 4
    filled = autoregressive.sample(params, CFG, tokens, mask, jax.random.split(KEY, 12), **given)
    length = np.asarray(filled.length)
    want = [row[:n].tolist() for row, n in zip(np.asarray(filled.tokens), length)]
    assert [t for group in said(groups) for t in group] == want[:9]
    assert int(filled.steps) == length.max() and not length[9:].any()
    engine.publish(params, 4)
    with plan.compilations() as found:
        asked(engine, PROMPTS[::-1])
        asked(engine)
    assert not found["jit(sample)"]
    assert engine.utilisation == pytest.approx(length.sum() / (9 * length.max()))
    assert engine.utilisation == pytest.approx(12 / 9 * float(filled.utilisation))


def test_rows_divide_over_the_devices(params, monkeypatch):
    """Catches rows that a mesh cannot split, so that every device decodes all of them."""
    shapes = []
    noted = lambda params, cfg, tokens, mask, keys, **_: shapes.append(
        (*tokens.shape, int(mask.any(axis=1).sum()), len(keys))
    )
    monkeypatch.setattr(autoregressive, "sample", noted)
    for sizes, prompts in (({"data": 2, "fsdp": 2}, 3), ({"data": 2, "fsdp": 2}, 5), (None, 5)):
        engine = make(rules=sizes and Rules(make_mesh(sizes)))
        engine.publish(params, 0)
        engine.submit((PROMPTS * 2)[:prompts], 2, KEY)
    assert shapes == [(4, 16, 3, 8), (8, 16, 5, 16), (5, 16, 5, 10)]


def test_published_weights_are_a_copy(engine, params, groups):
    """Catches an engine that holds on to buffers which the step gives away."""
    given = jax.tree.map(jnp.copy, params)
    engine.publish(given, 4)
    jax.block_until_ready(given)
    jax.tree.map(lambda x: x.delete(), given)
    assert said(asked(engine)) == said(groups)


def test_rounds_are_collected_in_order_each_with_its_own_weights(engine, params, groups):
    """Catches a queue that is a stack, and weights that reach a round which is on its way."""
    engine.publish(params, 1)
    engine.submit(PROMPTS, 3, KEY)
    engine.publish(weights(2), 2)
    engine.submit(PROMPTS[::-1], 3, KEY)
    first, second = engine.collect(), engine.collect()
    assert said(first) == said(groups) and (first[0][0].version == 1).all()
    np.testing.assert_array_equal(second[0][0].prompt, PROMPTS[2])
    assert said(second) != said(groups) and (second[0][0].version == 2).all()


def test_what_is_out_of_order_is_refused(engine):
    """Told by what has to come first."""
    with pytest.raises(ValueError, match="publish them first"):
        make().submit(PROMPTS, 1, KEY)
    with pytest.raises(ValueError, match="nothing to wait for; submit prompts first"):
        engine.collect()
    with pytest.raises(ValueError, match="17"):
        asked(engine, [np.zeros(17, np.int32)])


def test_texts_are_those_of_the_tokens(groups):
    found = rollouts.texts(groups, lambda tokens: " ".join(map(str, tokens)))
    assert found[1][2] == " ".join(map(str, groups[1][2].tokens)) and len(found) == 3


# An engine elsewhere

# Lines of JSON in, lines of JSON out; it knows nothing of jax, and weights come as a file.
CHILD = """
import json, sys
import numpy as np

weights, version, waiting = None, -1, []
for line in sys.stdin:
    call = json.loads(line)
    if call["do"] == "publish":
        weights, version = np.load(call["file"], allow_pickle=False), call["version"]
    if call["do"] == "submit":
        seed = int(1e6 * sum(float(np.abs(weights[k]).sum()) for k in weights)) % 2**31
        rng = np.random.default_rng([*call["key"], seed])
        draw = lambda n: rng.integers(5, call["vocab"], n)
        groups = [
            [draw(1 + (p + i) % 4).tolist() for i in range(call["answers"])]
            for p in range(len(call["prompts"]))
        ]
        waiting.append({"version": version, "groups": groups})
    if call["do"] == "collect":
        print(json.dumps(waiting.pop(0)), flush=True)
"""


class Elsewhere:
    """The three methods of `Rollouts`, and a process behind them."""

    utilisation = float("nan")  # it does not say

    def __init__(self, folder, vocab):
        self._folder, self._vocab, self._waiting = folder, vocab, []
        self.published = []
        self._child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _say(self, **call):
        self._child.stdin.write(json.dumps(call) + "\n")
        self._child.stdin.flush()

    def publish(self, params, version):
        path = self._folder / f"{version}.npz"
        leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(params))}
        np.savez(path, **leaves)
        self.published.append(version)
        self._say(do="publish", file=str(path), version=version)

    def submit(self, prompts, answers, key):
        self._waiting.append(list(prompts))
        self._say(
            do="submit",
            prompts=[np.asarray(p).tolist() for p in prompts],
            answers=answers,
            key=np.asarray(jax.random.key_data(key)).tolist(),
            vocab=self._vocab,
        )

    def collect(self):
        self._say(do="collect")
        got = json.loads(self._child.stdout.readline())
        return [
            [
                Trajectory(
                    prompt=np.asarray(prompt, np.int32),
                    tokens=np.asarray(tokens, np.int32),
                    logps=np.full(len(tokens), -np.log(self._vocab - 5), np.float32),
                    written=np.ones(len(tokens), bool),
                    version=np.full(len(tokens), got["version"], np.int32),
                    finished=True,
                )
                for tokens in group
            ]
            for prompt, group in zip(self._waiting.pop(0), got["groups"], strict=True)
        ]

    def close(self):
        self._child.stdin.close()
        self._child.stdout.close()
        assert self._child.wait(timeout=30) == 0


@pytest.mark.slow
def test_an_engine_in_another_process_drives_the_rounds(tiny_folder, tmp_path):
    """Catches whatever in online_rl takes answers to come from this process, or from weights that
    it can compute with: its log-probabilities are not the trainer's, and the run says how far."""
    made = presets.load(
        "online_rl/math:smoke",
        [
            f"models.policy.init=hf:{tiny_folder}",
            "data.batch=4",
            "optim.lr=1e-2",
            "rollouts.filter=none",
            "rollouts.workers=0",
            "rollouts.importance=token",
            "rollouts.outcome=vowels/some",
        ],
    )
    made.unlock()
    made.rewards = dict(vowels=dict(fn="jaxreward.testing:vowels", weights=dict(share=1.0)))
    vocab = tiny_config().vocab
    elsewhere = Elsewhere(tmp_path, vocab)
    built = online_rl.build(made.lock(), tmp_path, engine=elsewhere)
    rounds = built.batches
    state, gaps, versions, seen = built.state, [], [], []
    for _ in range(2):
        rounds.before(state)
        batch = next(rounds)
        live = batch["answer"] >= 0
        seen.append(batch["target"][live].tolist())
        versions.append(set(batch["version"][live].tolist()))
        state, metrics = built.step(state, built.frozen, built.to_device(batch))
        gaps.append(float(metrics["sampler_gap"].result()))
        assert np.isclose(batch["sampler_logps"][live], -np.log(vocab - 5)).all()
    assert elsewhere.published == [0, 1] and versions == [{0}, {1}]
    assert seen[0] != seen[1] and int(state.step) == 2
    assert all(1e-4 < gap < 1 for gap in gaps)
    elsewhere.close()
    rounds.close()
