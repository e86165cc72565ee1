"""Sampled answers to rows: what was sampled stands at the slots of its tokens, prompts once."""

import numpy as np
import pytest

from jaxreward.core.types import RolloutRows, Trajectory
from jaxreward.data import rollouts
from jaxreward.objectives import supervised


def group(number, lengths, prompt=5, version=3):
    """Answers whose tokens say which they are: 1000 g + 100 i + t."""
    made = []
    for i, length in enumerate(lengths):
        tokens = 1000 * number + 100 * i + np.arange(length, dtype=np.int32)
        made.append(
            Trajectory(
                prompt=np.arange(prompt, dtype=np.int32) + 10 * number,
                tokens=tokens,
                logps=-tokens.astype(np.float32),
                written=np.arange(length) != 1,  # the second token came from a tool
                version=np.full(length, version, np.int32),
                finished=True,
            )
        )
    return made


GROUPS = [group(0, [4, 2, 6]), group(1, [3, 3, 3]), group(2, [9, 1, 2]), group(3, [2, 2, 2])]


NAMES = ("tokens", "mask", "loss_mask", "positions", "segments", "trunk")
SCORED = ("source", "target", "answer", "group", "sampler_logps")


def rows_of(batch):
    zeros = np.zeros(batch["answer"].shape, np.float32)
    named = {name: batch[name] for name in NAMES + SCORED}
    return RolloutRows(**named, advantages=zeros, weight=zeros).validate()


def test_every_token_stands_with_its_own_numbers():
    """Catches numbers of another answer, states that are off by one, tool output that counts."""
    batches, efficiency = rollouts.minibatches(
        GROUPS, count=2, row_len=32, answers_per_row=8, multiple=1
    )
    assert len(batches) == 2 and len({b["answer"].shape for b in batches}) == 1
    seen = {}
    for b, batch in enumerate(batches):
        rows_of(batch)
        for r, s in np.argwhere(batch["answer"] >= 0):
            token, k = int(batch["target"][r, s]), int(batch["answer"][r, s])
            g, i = batch["group"][r, k], batch["member"][r, k]
            assert g % 2 == b and (token // 1000, token // 100 % 10) == (g, i)
            assert batch["version"][r, s] == 3 and batch["sampler_logps"][r, s] == -token
            before = batch["tokens"][r, batch["source"][r, s]]
            assert before == (token - 1 if token % 100 else GROUPS[g][0].prompt[-1])
            seen[token] = seen.get(token, 0) + 1
    want = {int(x) for g in GROUPS for a in g for x in a.tokens[a.written]}
    assert seen == dict.fromkeys(want, 1)
    used = sum(len(g[0].prompt) + sum(len(a.tokens) for a in g) for g in GROUPS)
    slots = sum(batch["mask"].size for batch in batches)
    assert efficiency == pytest.approx(used / slots)


def test_scored_tokens_are_what_the_objectives_find():
    """Catches a second opinion about which state predicts a token."""
    (batch,), _ = rollouts.minibatches(GROUPS, count=1, row_len=32, answers_per_row=8, multiple=1)
    names = ("tokens", "loss_mask", "segments", "trunk")
    at = supervised.scored(*(batch[name] for name in names), size=batch["answer"].shape[1])
    live = batch["answer"] >= 0
    np.testing.assert_array_equal(at.mask, live)
    np.testing.assert_array_equal(np.asarray(at.source)[live], batch["source"][live])
    np.testing.assert_array_equal(np.asarray(at.target)[live], batch["target"][live])


def test_the_prompt_is_there_once_a_group():
    """Catches a prompt repeated for every answer, which is most of a step's FLOPs."""
    (batch,), _ = rollouts.minibatches(GROUPS, count=1, row_len=64, answers_per_row=12, multiple=1)
    assert int(batch["mask"].sum()) == sum(5 + sum(len(a.tokens) for a in g) for g in GROUPS)


def test_a_group_longer_than_a_row_is_cut():
    """Catches answers that are lost or doubled at the cut."""
    ours, where = rollouts.trees([GROUPS[0], GROUPS[2]], row_len=14)
    assert where == [[(0, 0), (0, 1)], [(0, 2)], [(1, 0)], [(1, 1), (1, 2)]]
    assert [tree.size for tree in ours] == [11, 11, 14, 8]
    with pytest.raises(
        ValueError, match=r"answer 0 of group 1 take 14 tokens, more than a row of 13"
    ):
        rollouts.trees([GROUPS[0], GROUPS[2]], row_len=13)


@pytest.mark.parametrize(("multiple", "rows"), [(1, 2), (4, 4), (3, 3)])
def test_rows_come_in_few_numbers(multiple, rows):
    """Catches a new shape, hence a compilation, for every round."""
    (batch,), _ = rollouts.minibatches(
        GROUPS, count=1, row_len=32, answers_per_row=8, multiple=multiple
    )
    assert len(batch["tokens"]) == rows
    empty = batch["mask"].sum(axis=1) == 0
    assert (batch["answer"][empty] == -1).all() and (batch["group"][empty] == -1).all()


def test_groups_must_divide():
    """Catches groups that are left out of every update."""
    with pytest.raises(ValueError, match="4 prompts of a round do not split into 3 minibatches"):
        rollouts.minibatches(GROUPS, count=3, row_len=32, answers_per_row=8, multiple=1)


def test_row_len():
    """Catches rows that cannot hold one answer, and ones that hold all of a large group."""
    length = lambda **kw: rollouts.row_len(max_prompt=100, answers=8, **kw)
    assert length(max_new=28) == 384 and length(max_new=1000) == 3136
    assert length(max_new=9000) == 9152
