"""Packing and batching: nothing lost, nothing shared that should not be, resumable."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreward.data import pipeline
from jaxreward.data.tokenize import Tree


def tree(id, prompt, answers, *, pairs=None, width=None, base=0):
    """Tokens count up from base, so that every slot can be told from every other."""
    count = iter(range(base + 1, 10_000))
    sizes = [prompt, *answers]
    parts = [np.asarray([next(count) for _ in range(size)], np.int32) for size in sizes]
    features = None
    if width:
        features = [np.repeat(part[:, None], width, 1).astype(np.float16) for part in parts]
    pairs = [(0, 1)] if pairs is None else pairs
    return Tree(
        id=id,
        prompt=parts[0],
        answers=parts[1:],
        loss=[np.arange(size) < size - 1 for size in answers],
        pairs=pairs,
        margin=[0.5] * len(pairs),
        weight=[2.0] * len(pairs),
        features=features,
    )


def many(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        tree(f"t{i}", int(rng.integers(0, 9)), rng.integers(1, 6, 2).tolist(), base=100 * i)
        for i in range(count)
    ]


def test_two_trees_by_hand():
    """Every slot of a row with two trees, against values worked out on paper."""
    trees = [
        tree("b", 2, [2, 1], base=10),  # prompt 11 12, answers 13 14 | 15
        tree("a", 3, [1, 1, 2], pairs=[(0, 1), (2, 1)], base=20),  # 21 22 23 | 24 | 25 | 26 27
    ]
    row = pipeline.materialise(trees, [1, 0], row_len=14, answers_per_row=6, pairs_per_row=4)
    want = {
        "tokens": [21, 22, 23, 24, 25, 26, 27, 11, 12, 13, 14, 15, 0, 0],
        "mask": [1] * 12 + [0, 0],
        "loss_mask": [0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0],
        "segments": [1, 1, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 0, 0],
        "trunk": [0, 0, 0, 1, 1, 1, 1, 0, 0, 5, 5, 5, 0, 0],
        "ends": [3, 4, 6, 10, 11, -1],
        "pairs": [[0, 1], [2, 1], [3, 4], [-1, -1]],
        "margin": [0.5, 0.5, 0.5, 0],
        "weight": [2, 2, 2, 0],
        "index": [[1, 0], [1, 1], [1, 2], [0, 0], [0, 1], [-1, -1]],
    }
    for name, values in want.items():
        np.testing.assert_array_equal(row[name], values, err_msg=name)
    positions = [0, 1, 2, 3, 3, 3, 4, 0, 1, 2, 3, 2, 0, 0]
    np.testing.assert_array_equal(row["positions"], np.asarray(positions)[:, None])
    kinds = {name: value.dtype for name, value in row.items()}
    assert {kinds.pop(name) for name in ("mask", "loss_mask")} == {np.dtype(bool)}
    assert {kinds.pop(n) for n in ("margin", "weight", "scores")} == {np.dtype(np.float32)}
    assert set(kinds.values()) == {np.dtype(np.int32)}


def test_alone_equals_packed():
    """A tree must have the same tokens, positions and relations alone as beside others."""
    trees = many(4)
    shape = {"row_len": 80, "answers_per_row": 8, "pairs_per_row": 4}
    packed = pipeline.materialise(trees, [2, 0, 3, 1], **shape)
    offset = pipeline.materialise(trees, [2, 0], **shape)
    begin = trees[2].size + trees[0].size
    alone = pipeline.materialise(trees, [3], **shape)
    here, there = slice(begin, begin + trees[3].size), slice(0, trees[3].size)
    for name in ("tokens", "mask", "loss_mask", "positions"):
        np.testing.assert_array_equal(packed[name][here], alone[name][there], err_msg=name)
    shift = offset["segments"].max()
    np.testing.assert_array_equal(packed["segments"][here] - shift, alone["segments"][there])
    leaf = alone["trunk"][there] > 0
    np.testing.assert_array_equal(packed["trunk"][here] - shift * leaf, alone["trunk"][there])
    np.testing.assert_array_equal(packed["ends"][4:6] - begin, alone["ends"][:2])


def test_tree_without_a_prompt():
    """With no shared token there is no prompt segment: answers start at 0 and see themselves."""
    row = pipeline.materialise(
        [tree("a", 0, [2, 1])], [0], row_len=4, answers_per_row=2, pairs_per_row=1
    )
    np.testing.assert_array_equal(row["segments"], [1, 1, 2, 0])
    np.testing.assert_array_equal(row["trunk"], [0, 0, 0, 0])
    np.testing.assert_array_equal(row["positions"][:, 0], [0, 1, 0, 0])


def test_features_follow_their_tokens():
    """Cached features must sit at their token's slot, keep their dtype, and be zero on padding."""
    trees = [tree("a", 2, [1, 2], width=3), tree("b", 1, [1, 1], width=3, base=50)]
    shape = {"row_len": 10, "answers_per_row": 4, "pairs_per_row": 2}
    row = pipeline.materialise(trees, [1, 0], **shape)
    assert row["features"].shape == (10, 3) and row["features"].dtype == np.float16
    np.testing.assert_array_equal(row["features"], np.repeat(row["tokens"][:, None], 3, 1))
    assert pipeline.materialise(trees, [], **shape)["features"].shape == (10, 3)
    with pytest.raises(ValueError, match="'c' carries no features and tree 'a' does"):
        pipeline.materialise([*trees, tree("c", 1, [1, 1])], [2], **shape)


def test_empty_row_is_valid_and_weightless():
    """A row that fills up the last batch must count for nothing."""
    row = pipeline.materialise([], [], row_len=3, answers_per_row=2, pairs_per_row=1)
    assert not any(row[name].any() for name in ("tokens", "mask", "segments", "trunk", "weight"))
    assert (row["ends"] == -1).all() and (row["pairs"] == -1).all()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(1, 9)), max_size=40
    ),
    answers=st.sampled_from([None, 2, 6]),
    window=st.sampled_from([3, 1000]),
)
def test_pack_is_a_partition_within_limits(sizes, answers, window):
    """No tree lost or doubled, no row over its limits, the same plan every time."""
    trees = [tree(str(i), p, [a, b]) for i, (p, a, b) in enumerate(sizes)]
    plan = pipeline.pack(trees, row_len=40, answers_per_row=answers, window=window)
    assert sorted(i for row in plan for i in row) == list(range(len(trees)))
    for row in plan:
        assert row and sum(trees[i].size for i in row) <= 40
        assert answers is None or 2 * len(row) <= answers
    assert plan == pipeline.pack(trees, row_len=40, answers_per_row=answers, window=window)


def test_first_fit_decreasing_by_hand():
    """Sizes 6 5 4 3 2 into rows of 10: {6, 4} and {5, 3, 2}, full both."""
    trees = [tree(str(size), size - 2, [1, 1]) for size in (2, 3, 4, 5, 6)]
    plan = pipeline.pack(trees, row_len=10)
    assert plan == [[4, 2], [3, 1, 0]]
    assert pipeline.efficiency(trees, plan, row_len=10) == 1.0
    assert pipeline.efficiency(trees, pipeline.pack(trees, row_len=20), row_len=20) == 1.0
    assert pipeline.widths(trees, plan) == (6, 3)
    assert pipeline.efficiency([], [], row_len=10) == 0.0


def test_too_large_is_named():
    """A tree that fits nowhere must be named with what to change."""
    for options, words in (
        ({"row_len": 11}, "'big' needs 12 slots and a row has 11; raise row_len or lower max_len"),
        ({"row_len": 20, "answers_per_row": 1}, "'big' needs 2 answers"),
        ({"row_len": 20, "pairs_per_row": 0}, "'big' needs 1 pairs"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline.pack([tree("big", 10, [1, 1])], **options)
    with pytest.raises(ValueError, match="needs 3 slots, not 2"):
        pipeline.materialise(
            [tree("a", 1, [1, 1])], [0], row_len=2, answers_per_row=2, pairs_per_row=1
        )


def test_any_further_cost_limits_a_row():
    """Catches a packer that counts tokens only: three images do not fit where two do."""
    trees = [tree(str(i), 2, [1, 1]) for i in range(4)]
    costs = {"patches": ([4, 4, 0, 4], 8)}
    plan = pipeline.pack(trees, row_len=64, costs=costs)
    assert sorted(map(sorted, plan)) == [[0, 1, 2], [3]]
    with pytest.raises(ValueError, match="tree '1' needs 9 patches and a row has 8; raise the"):
        pipeline.pack(trees, row_len=64, costs={"patches": ([0, 9, 0, 0], 8)})
    with pytest.raises(ValueError, match="names 3 trees; there are 4"):
        pipeline.pack(trees, row_len=64, costs={"patches": ([0, 9, 0], 8)})


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_pairs_of_many_lengths_are_nearly_full(seed):
    """Catches a packer that wastes slots: chat-like lengths must fill at least 93 % of them."""
    rng = np.random.default_rng(seed)
    draw = lambda mean: int(np.clip(rng.lognormal(np.log(mean), 0.9), 4, 20 * mean))
    trees = [tree(str(i), draw(90), [draw(50), draw(50)]) for i in range(600)]
    length = pipeline.suggest_row_len([t.size for t in trees])
    plan = pipeline.pack(trees, row_len=length, order=rng.permutation(600))
    assert pipeline.efficiency(trees, plan, row_len=length) >= 0.93


def test_suggest_row_len():
    """Rounded up, and exact multiples stay."""
    assert pipeline.suggest_row_len([1, 64, 3]) == 64
    assert pipeline.suggest_row_len([65]) == 128
    with pytest.raises(ValueError, match="at least one"):
        pipeline.suggest_row_len([])


OPTIONS = {"row_len": 40, "batch": 2, "seed": 3, "answers_per_row": 4, "pairs_per_row": 2}


def seen(made):
    """Every (tree, answer) in a list of batches."""
    return [tuple(pair) for batch in made for pair in batch["index"].reshape(-1, 2) if pair[0] >= 0]


def test_epoch_covers_all_once_and_shuffles_anew():
    """An epoch must show every answer exactly once, and the next one in another order."""
    trees = many(21)
    made = list(pipeline.batches(trees, epochs=2, **OPTIONS))
    rows = len(
        pipeline.pack(
            trees,
            row_len=40,
            answers_per_row=4,
            pairs_per_row=2,
            order=np.random.default_rng(3).permutation(21),
        )
    )
    steps = pipeline.steps_per_epoch(rows, batch=2)
    assert len(made) == 2 * steps
    every = sorted((i, j) for i in range(21) for j in range(2))
    for epoch in (made[:steps], made[steps:]):
        assert sorted(seen(epoch)) == every
    assert seen(made[:steps]) != seen(made[steps:])
    assert made[0]["tokens"].shape == (2, 40) and made[0]["positions"].shape == (2, 40, 1)


def test_short_batch_is_filled_or_left_out():
    """Shapes never change: empty rows fill the last batch, or drop_remainder leaves it out."""
    trees = many(5)
    plan = [[i] for i in range(5)]
    made = list(pipeline.batches(trees, plan=plan, epochs=1, shuffle=False, **OPTIONS))
    assert [batch["tokens"].shape for batch in made] == [(2, 40)] * 3
    assert not made[-1]["mask"][1].any() and not made[-1]["weight"][1].any()
    assert seen(made) == [(i, j) for i in range(5) for j in range(2)]
    fewer = list(
        pipeline.batches(trees, plan=plan, epochs=1, shuffle=False, drop_remainder=True, **OPTIONS)
    )
    assert seen(fewer) == [(i, j) for i in range(4) for j in range(2)]
    with pytest.raises(ValueError, match="1 rows do not fill one global batch of 2"):
        pipeline.batches(trees, plan=plan[:1], drop_remainder=True, **OPTIONS)


@pytest.mark.parametrize("rows", [7, 8, 9, 12])
def test_shards_cover_all_once_in_equal_steps(rows):
    """Hosts must together see each row once, take equally many steps, and agree with one host."""
    trees = many(rows)
    plan = [[i] for i in range(rows)]
    shards = [
        list(pipeline.batches(trees, plan=plan, epochs=2, shard=(i, 2), **OPTIONS))
        for i in range(2)
    ]
    steps = pipeline.steps_per_epoch(rows, batch=2, shards=2)
    assert len(shards[0]) == len(shards[1]) == 2 * steps
    every = sorted((i, j) for i in range(rows) for j in range(2))
    assert sorted(seen(shards[0][:steps] + shards[1][:steps])) == every
    single = pipeline.batches(trees, plan=plan, epochs=2, **{**OPTIONS, "batch": 4})
    for whole, one, two in zip(single, *shards, strict=True):
        for name in whole:
            np.testing.assert_array_equal(whole[name], np.concatenate([one[name], two[name]]))


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_state_continues_exactly(taken):
    """A restored iterator must go on with the very next batch, across an epoch's end."""
    trees = many(9)
    first = pipeline.batches(trees, **OPTIONS)
    for _ in range(taken):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    rest = [next(first) for _ in range(8)]
    second = pipeline.batches(trees, **OPTIONS)
    next(second)
    second.set_state(state)
    for one, two in zip(rest, [next(second) for _ in range(8)]):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


def test_wrong_arguments_are_named():
    """Mistakes in sharding and sizes must not show up as an empty or partial epoch."""
    trees = many(2)
    with pytest.raises(ValueError, match=r"shard must be .* received \(2, 2\)"):
        pipeline.batches(trees, shard=(2, 2), **OPTIONS)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        pipeline.batches(trees, **{**OPTIONS, "batch": 0})
    with pytest.raises(ValueError, match="at least one tree"):
        pipeline.batches([], **OPTIONS)


def test_rows_pass_the_batch_type_check():
    """What the pipeline makes must be what PairRows accepts, empty rows included."""
    from jaxreward.core.types import PairRows

    for batch in pipeline.batches(many(7), epochs=1, **OPTIONS):
        batch.pop("index")
        PairRows(**batch).validate()


def test_scores_follow_their_pairs():
    """Catches scores of another tree's pairs, and a missing score that reads as 0."""
    import dataclasses

    one, two = (tree(name, 1, [1, 1]) for name in "ab")
    two = dataclasses.replace(two, scores=[(4.0, 2.5)])
    row = pipeline.materialise([one, two], [0, 1], row_len=8, answers_per_row=4, pairs_per_row=3)
    np.testing.assert_array_equal(row["scores"], [[np.nan, np.nan], [4.0, 2.5], [0, 0]])
