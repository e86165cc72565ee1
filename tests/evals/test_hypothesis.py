"""Agreement of scores with a proxy: by hand, against SciPy, and what must not change it."""

import numpy as np
import pytest

from jaxreward.evals import hypothesis

MEASURES = {
    "ranking_accuracy": hypothesis.ranking_accuracy,
    "tau_b": hypothesis.kendall_tau_b,
    "spearman": hypothesis.spearman,
    "pearson": hypothesis.pearson,
    "top1": hypothesis.top1,
    "ndcg": hypothesis.ndcg,
    "entropy": lambda s, r, valid: hypothesis.space_mass(s, r, valid)[::2],
    "top_mass": lambda s, r, valid: hypothesis.space_mass(s, r, valid)[1:],
    "given": lambda s, r, valid: hypothesis.partial_correlation(s, r, s**2 + r, valid),
}
ORDINAL = ("ranking_accuracy", "tau_b", "spearman", "top1", "ndcg")
every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


def draw(seed=0, instructions=7, n=6, *, ties=False):
    """Correlated scores of sets of different sizes, from 2 to n."""
    rng = np.random.default_rng(seed)
    r = rng.normal(size=(instructions, n))
    s = r + rng.normal(size=(instructions, n))
    if ties:
        s, r = np.round(s), np.round(r)
    size = rng.integers(2, n + 1, instructions)
    size[:2] = 2, n
    return s, r, np.arange(n) < size[:, None]


def one(*rows):
    """Arrays of one instruction, all valid."""
    arrays = [np.array([row], float) for row in rows]
    return *arrays, np.ones(arrays[0].shape, bool)


# Scores of hypotheses


def test_scores_by_hand():
    """Catches a mean over another length, a forgotten beta, and a reference with a wrong sign."""
    lp, ref, length = np.array([[-6.0, -2]]), np.array([[-4.0, -3]]), np.array([[3, 2]])
    want = {
        "sum": [[-6, -2]],
        "mean": [[-2, -1]],
        "implicit": [[-0.2, 0.1]],
        "implicit_mean": [[-0.2 / 3, 0.05]],
    }
    assert tuple(want) == hypothesis.KINDS
    for kind, values in want.items():
        np.testing.assert_allclose(hypothesis.scores(lp, ref, length, kind), values)
        absent = hypothesis.scores(lp * 0, ref * 0, length * 0, kind)
        np.testing.assert_array_equal(absent, [[0, 0]])
    assert not hypothesis.scores(lp, lp, length, "implicit").any()  # the model is its reference


@pytest.mark.parametrize(
    ("kind", "message"), [("likelihood", "one of sum, mean"), ("implicit", "give a reference")]
)
def test_scores_that_cannot_be(kind, message):
    """Catches a misspelt kind, and an implicit reward without a reference, that count as a sum."""
    with pytest.raises(ValueError, match=message):
        hypothesis.scores(np.ones((1, 2)), None, np.ones((1, 2)), kind)


# Measures by hand and against SciPy


def test_ranking_accuracy_by_hand():
    """Catches ties that count as right or wrong, a delta that is ignored, equal r that count."""
    s, r, valid = one([1, 1, 3, 0], [0, 1, 2, 2])
    # pairs 01 tie, 02 right, 03 wrong, 12 right, 13 wrong; 23 is tied in r
    value, has = hypothesis.ranking_accuracy(s, r, valid)
    assert (value[0], has[0]) == (0.5, True)
    value, _ = hypothesis.ranking_accuracy(s, r, valid, delta=1.0)  # 02 and 03 are left
    assert value[0] == 0.5
    s[0, 3] = 2
    assert hypothesis.ranking_accuracy(s, r, valid, delta=1.0)[0][0] == 1
    assert not hypothesis.ranking_accuracy(s, r, valid, delta=2.0)[1].any()


def test_top1_and_ndcg_by_hand():
    """Catches the worst taken for the best, gains from r itself, and ties broken by order."""
    s, r, valid = one([1, 3, 2], [10, 20, -5])  # order by s: 1, 2, 0; gains 1, 2, 0
    d = 1 / np.log2([2, 3, 4])
    assert hypothesis.top1(s, r, valid)[0][0] == 1
    np.testing.assert_allclose(
        hypothesis.ndcg(s, r, valid)[0], (2 * d[0] + d[2]) / (2 * d[0] + d[1])
    )
    s, r, valid = one([1, 1, 0], [1, 2, 0])  # two share the first two places
    assert hypothesis.top1(s, r, valid)[0][0] == 0.5
    np.testing.assert_allclose(
        hypothesis.ndcg(s, r, valid)[0], 3 * (d[0] + d[1]) / 2 / (2 * d[0] + d[1])
    )
    flat = hypothesis.ndcg(*one([1, 2], [3, 3])), hypothesis.top1(*one([1, 2], [3, 3]))
    assert [(value[0], has[0]) for value, has in flat] == [(0, False)] * 2


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(require, ties):
    """Catches a tie correction or a rank that differs from the usual, under a mask."""
    require("scipy")
    from scipy import stats

    s, r, valid = draw(1, instructions=40, ties=ties)
    for ours, theirs in (
        (hypothesis.kendall_tau_b, stats.kendalltau),
        (hypothesis.spearman, stats.spearmanr),
        (hypothesis.pearson, stats.pearsonr),
    ):
        value, has = ours(s, r, valid)
        both = [np.ptp(a[v]) > 0 and np.ptp(b[v]) > 0 for a, b, v in zip(s, r, valid)]
        np.testing.assert_array_equal(has, both)
        for i in np.flatnonzero(has):
            want = theirs(s[i, valid[i]], r[i, valid[i]])[0]
            np.testing.assert_allclose(value[i], want, atol=1e-12)
    for x, row, v in zip(r, hypothesis.ranks(r, valid), valid):
        np.testing.assert_allclose(row[v], stats.rankdata(x[v]))


def test_partial_correlation_is_that_of_residuals():
    """Catches a slope of the wrong regression, and rounding that is taken for a correlation."""
    s, r, valid = draw(2)
    z = np.random.default_rng(3).normal(size=s.shape)
    value, has = hypothesis.partial_correlation(s, r, z, valid)
    np.testing.assert_array_equal(has, valid.sum(1) > 2)  # a line goes through any two points
    for i in np.flatnonzero(has):
        a, b, c = (x[i, valid[i]] for x in (s, r, z))
        design = np.stack([np.ones_like(c), c], axis=1)
        rest = [x - design @ np.linalg.lstsq(design, x, rcond=None)[0] for x in (a, b)]
        np.testing.assert_allclose(value[i], np.corrcoef(*rest)[0, 1], atol=1e-9)
    assert not hypothesis.partial_correlation(3 * z + 1, r, z, valid)[1].any()
    same = hypothesis.partial_correlation(s, r, np.ones_like(s), valid)
    np.testing.assert_allclose(same, hypothesis.pearson(s, r, valid))


def test_mass_of_the_softmax_by_hand():
    """Catches padding in the normaliser, an overflow, and ties of r that are counted twice."""
    s, r, valid = np.log([[1.0, 2, 5, 9]]) + 1000, np.array([[1.0, 1, 0, 7]]), np.ones((1, 4), bool)
    valid[0, 3] = False
    entropy, mass, has = hypothesis.space_mass(s, r, valid)
    p = np.array([1, 2, 5]) / 8
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum())
    np.testing.assert_allclose(mass, (p[0] + p[1]) / 2)
    np.testing.assert_allclose(hypothesis.space_mass(s, r, valid, top=2)[1], p[0] + p[1])
    np.testing.assert_allclose(hypothesis.space_mass(s, r, valid, top=9)[1], 1)
    assert has.all()


# What must hold whatever the numbers


def test_a_score_that_is_the_proxy_agrees_fully_and_its_negative_not_at_all():
    """Catches a sign, and a bound that is not reached."""
    _, r, valid = draw(4)
    for s, want in ((r, [1, 1, 1, 1]), (-r, [0, -1, -1, -1])):
        for name, value in zip(("ranking_accuracy", "tau_b", "spearman", "pearson"), want):
            found, has = MEASURES[name](s, r, valid)
            assert has.all()
            np.testing.assert_allclose(found, value)
        for how in hypothesis.HOW:
            strength = hypothesis.strength_correlation(s, r, valid, how=how)
            assert strength == pytest.approx(want[3], abs=1e-6), how
    assert (hypothesis.top1(r, r, valid)[0] == 1).all()
    np.testing.assert_allclose(hypothesis.ndcg(r, r, valid)[0], 1)
    assert (hypothesis.top1(-r, r, valid)[0] == 0).all()


def test_transforms_keep_order_or_strength():
    """Catches a rank measure that sees sizes, and a strength that sees scale or offset."""
    s, r, valid = draw(5)
    bent, moved = np.exp(2 * s), 7 * s - np.arange(len(s))[:, None]  # an offset a prompt
    for name in ORDINAL:
        want, _ = MEASURES[name](s, r, valid)
        np.testing.assert_allclose(MEASURES[name](bent, r, valid)[0], want, err_msg=name)
        np.testing.assert_allclose(MEASURES[name](moved, r, valid)[0], want, err_msg=name)
    rho, _ = hypothesis.pearson(s, r, valid)
    np.testing.assert_allclose(hypothesis.pearson(moved, r, valid)[0], rho)
    assert np.abs(hypothesis.pearson(bent, r, valid)[0] - rho).max() > 0.05
    for how in hypothesis.HOW:
        f = lambda x: hypothesis.strength_correlation(x, r, valid, how=how)
        assert f(moved) == pytest.approx(f(s)), how
        assert f(bent) != pytest.approx(f(s), abs=1e-3), how


@every_measure
def test_order_and_padding_change_nothing(measure):
    """Catches a measure that reads positions, or what lies under the mask."""
    s, r, valid = draw(6, ties=True)
    want, has = measure(s, r, valid)
    order = np.random.default_rng(7).permuted(np.tile(np.arange(6), (7, 1)), axis=1)
    take = lambda x: np.take_along_axis(x, order, axis=1)
    wide = lambda x, fill: np.pad(x, ((0, 0), (2, 1)), constant_values=fill)
    for changed in (
        (take(s), take(r), take(valid)),
        (wide(s, np.nan), wide(r, np.inf), wide(valid, False)),
    ):
        with np.errstate(invalid="ignore"):
            got, there = measure(*changed)
        np.testing.assert_allclose(got, want, atol=1e-12)
        np.testing.assert_array_equal(there, has)


@every_measure
@pytest.mark.parametrize("count", [0, 1])
def test_sets_too_small_to_compare_have_no_value(measure, count):
    """Catches a NaN, and a 0 that would enter the mean."""
    s, r, _ = draw(8)
    value, has = measure(s, r, np.arange(6) < np.full((7, 1), count))
    assert np.isfinite(value).all()
    assert not has.any() or (count and measure in (MEASURES["entropy"], MEASURES["top_mass"]))


def test_accuracy_is_tau_without_ties():
    """Catches pairs counted in another way than Kendall's: accuracy = (tau + 1) / 2."""
    s, r, valid = draw(9)
    tau, _ = hypothesis.kendall_tau_b(s, r, valid)
    np.testing.assert_allclose(hypothesis.ranking_accuracy(s, r, valid)[0], (tau + 1) / 2)


def test_equal_scores_are_a_coin_and_have_no_strength():
    """Catches ties that count for nothing, and rounding that makes a strength of equal scores."""
    _, r, valid = draw(10)
    s = np.full_like(r, 0.1)
    value, has = hypothesis.ranking_accuracy(s, r, valid)
    assert has.all() and (value == 0.5).all()
    for measure in (hypothesis.pearson, hypothesis.spearman, hypothesis.kendall_tau_b):
        assert not measure(s, r, valid)[1].any()
    np.testing.assert_allclose(hypothesis.top1(s, r, valid)[0], 1 / valid.sum(1))
    assert hypothesis.strength_correlation(s, r, valid) == 0
    names = dict(hypothesis.measures(s, r, valid, samples=0))
    assert "strength" not in names and names["ranking_accuracy"] == 0.5


def test_random_scores_are_at_chance():
    """Catches a bias: accuracy within three standard errors of one half, top-1 of 1/n."""
    rng = np.random.default_rng(11)
    s, r = rng.normal(size=(2, 2000, 5))
    valid = np.ones(s.shape, bool)
    for measure, chance in ((hypothesis.ranking_accuracy, 0.5), (hypothesis.top1, 0.2)):
        value, _ = measure(s, r, valid)
        assert abs(value.mean() - chance) < 3 * value.std() / np.sqrt(2000)


# Strength


def test_forms_of_strength_by_their_definitions():
    """Catches a pooled form of raw scores, or one not standardised by instruction; differences
    that are not Pearson's for one instruction; a Fisher mean of the wrong scale."""
    s, r, valid = draw(12)
    strength = lambda how, *a: hypothesis.strength_correlation(*(a or (s, r, valid)), how=how)
    rho = [np.corrcoef(a[v], b[v])[0, 1] for a, b, v in zip(s, r, valid)]
    assert strength("per_prompt") == pytest.approx(np.mean(rho))
    fisher = np.tanh(np.arctanh(np.clip(rho, -1 + 1e-7, 1 - 1e-7)).mean())
    assert strength("fisher") == pytest.approx(fisher)
    named = dict(hypothesis.measures(s, r, valid, samples=0))
    for how in hypothesis.HOW[1:]:
        assert named[f"strength_{how}"] == pytest.approx(strength(how)), how
    z = [[(a[v] - a[v].mean()) / a[v].std() for a, v in zip(x, valid)] for x in (s, r)]
    assert strength("pooled") == pytest.approx(np.corrcoef(*map(np.concatenate, z))[0, 1])
    pairs = lambda x: np.concatenate([(a[v][:, None] - a[v]).ravel() for a, v in zip(x, valid)])
    a, b = pairs(s), pairs(r)
    assert strength("differences") == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))
    for i in range(len(s)):
        alone = s[i : i + 1], r[i : i + 1], valid[i : i + 1]
        assert strength("differences", *alone) == pytest.approx(rho[i])
    with pytest.raises(ValueError, match="per_prompt, fisher, pooled, differences"):
        strength("global")


def test_strength_of_large_and_tiny_numbers():
    """Catches squares that overflow, and a difference in the last digits that becomes 0 / 0."""
    for scale in (1e-300, 1e-160, 1.0, 1e160, 1e300):
        value, has = hypothesis.pearson(*one(np.array([1, 2, 4]) * scale, [1, 2, 4]))
        assert has[0] and value[0] == pytest.approx(1)


# What training changed


def test_profile_by_rank_by_hand():
    """Catches bins by position or by value, a sum in place of a token's mean, and split ties."""
    lp_ref, length = np.zeros((3, 6)), np.full((3, 6), 2)
    length[0, 5] = 0  # no token: in no bin
    r = np.array([[5.0, 3, 1, 4, 2, 0], [2, 1, 1, 1, 0, 9], [1] * 6])
    lp = np.array([[10.0, 2, -8, 4, -4, 99], [6, 2, 2, 2, -4, 99], [5] * 6])
    valid = np.ones((3, 6), bool)
    valid[1, 5] = False
    value, has = hypothesis.rank_bin_delta(lp, lp_ref, length, r, valid)
    # ranks of row 0: 5 3 1 4 2 of five, bins 2 1 0 2 0 by (2 rank - 1) 3 // 10
    np.testing.assert_allclose(value, [[-3, 1, 3.5], [-2, 1, 3], [0, 0, 0]])
    np.testing.assert_array_equal(has, [[1, 1, 1], [1, 1, 1], [0, 0, 0]])
    two = hypothesis.rank_bin_delta(lp[:, :2], lp_ref[:, :2], length[:, :2], r[:, :2], valid[:, :2])
    np.testing.assert_array_equal(two[1][0], [1, 0, 1])
    with pytest.raises(ValueError, match="at least 2"):
        hypothesis.rank_bin_delta(lp, lp_ref, length, r, valid, bins=1)


def test_displacement_by_hand():
    """Catches a best bin that rose, or a worst that rose, or a bin that is not there."""
    delta = np.array([[-2.0, 0, -1], [-2, 0, 1], [1, 0, -1], [-1, -1, -1]])
    has = np.ones((4, 3), bool)
    has[3, 2] = False
    value, both = hypothesis.displacement(delta, has)
    np.testing.assert_array_equal(value, [1, 0, 0, 0])
    np.testing.assert_array_equal(both, [1, 1, 1, 0])


def test_flips_by_hand_and_rows_sum_to_pairs():
    """Catches a transposed matrix, a dropped tie, and pairs that r does not order."""
    before, after, r, valid = one([2, 1, 3], [1, 2, 0], [1, 2, 3])
    # 01: wrong, right; 02: right, wrong; 12: right, wrong
    np.testing.assert_array_equal(
        hypothesis.flip_matrix(before, after, r, valid)[0], [[0, 1], [2, 0]]
    )
    s, r, valid = draw(13, ties=True)
    after = draw(14, ties=True)[0]
    pairs = hypothesis.flip_matrix(s, after, r, valid)
    counted = (hypothesis._upper(valid) & (hypothesis._gaps(r) != 0)).sum((1, 2))
    right = [hypothesis.ranking_accuracy(x, r, valid)[0] * counted for x in (s, after)]
    np.testing.assert_allclose(pairs.sum(2), np.stack([counted - right[0], right[0]], 1))
    np.testing.assert_allclose(pairs.sum(1), np.stack([counted - right[1], right[1]], 1))
    stayed = hypothesis.flip_matrix(r, r, r, valid)
    np.testing.assert_array_equal(stayed[:, 1, 1], counted)


def test_changes_of_a_model_that_learnt_and_one_that_is_its_reference():
    """Catches flags of the wrong side, and a change where nothing changed."""
    _, r, valid = draw(15, n=8)
    length = np.full(r.shape, 4)
    ref = np.random.default_rng(16).normal(size=r.shape) - 20
    rank = hypothesis.ranks(r, valid) / valid.sum(1)[:, None]
    run = lambda lp: dict(hypothesis.changes(lp, ref, length, r, valid, samples=0))
    learnt = run(ref + 40 * (rank - 0.5))
    assert (learnt["captures"], learnt["displaced"], learnt["broken"]) == (1, 0, 0)
    assert learnt["suppression"] == learnt["bin/1"] < 0 < learnt["promotion"] == learnt["bin/3"]
    assert learnt["repaired"] > 0.2 and learnt["kept_wrong"] < 0.1
    fallen = run(ref + 40 * (rank - 2))
    assert (fallen["captures"], fallen["displaced"], fallen["displacement"]) == (1, 1, 1)
    risen = run(ref + 40 * (rank + 1))
    assert (risen["captures"], risen["displaced"], risen["displacement"]) == (0, 0, 0)
    same = run(ref)
    assert same["promotion"] == same["suppression"] == same["captures"] == same["displaced"] == 0
    assert same["repaired"] == same["broken"] == 0
    assert same["kept_right"] + same["kept_wrong"] == pytest.approx(1)


# Intervals and metrics


def test_intervals_cover_and_pairing_narrows_them():
    """Catches resampled pairs in place of instructions, undefined ones that count as 0, and a
    paired interval that is as wide as two."""
    rng = np.random.default_rng(17)
    hard = rng.normal(size=200)
    a, b = hard + 0.2 + 0.1 * rng.normal(size=200), hard
    has = np.arange(200) % 2 == 0
    mean, low, high = hypothesis.bootstrap(a, has)
    assert mean == pytest.approx(a[has].mean())
    error = a[has].std() / np.sqrt(has.sum())
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert low < mean < high
    there = np.arange(200) % 3 == 0
    gain, below, above = hypothesis.paired_bootstrap((a, has), (b, there))
    assert gain == pytest.approx((a - b)[has & there].mean())
    assert above - below < 0.2 * (high - low) and below > 0
    assert hypothesis.bootstrap(a, has, seed=1) != hypothesis.bootstrap(a, has, seed=2)


def test_metrics_are_means_over_instructions():
    """Catches a mean over pairs, which would let the largest set decide; names and intervals."""
    r = np.tile(np.arange(6.0), (2, 1))
    s, valid = np.stack([r[0], -r[1]]), np.arange(6) < np.array([[6], [2]])
    length = np.ones_like(r)
    plain = dict(hypothesis.measures(s, r, valid, length=length, domains=["math", ""], samples=0))
    assert plain["ranking_accuracy"] == 0.5 and plain["strength"] == 0
    assert plain["strength_pooled"] == pytest.approx((6 - 2) / 8)
    assert plain["ranking_accuracy/math"] == 1 and "ranking_accuracy/" not in plain
    assert plain["instructions"] == 2
    found = dict(hypothesis.measures(s, r, valid, length=length, samples=50))
    assert set(found) == set(plain) - {"ranking_accuracy/math"}
    alone = {name for name, value in found.items() if not isinstance(value, tuple)}
    assert alone == {"strength_pooled", "strength_differences", "instructions"}
    for name in set(found) - alone:
        value, low, high = found[name]
        assert value == pytest.approx(plain[name], abs=1e-9) and low <= value <= high, name
    empty = dict(hypothesis.measures(s, r, np.zeros_like(valid), samples=50))
    assert empty == {"instructions": 0}


@pytest.mark.parametrize(
    ("s", "message"),
    [
        (np.zeros((2, 3)), r"s and valid of one shape .*\[2, 3\] and \[1, 3\]"),
        (np.array([[0, np.nan, 0]]), r"s\[0, 1\] is nan; make valid False"),
    ],
)
def test_arrays_that_do_not_fit(s, message):
    """Catches a broadcast of one instruction to all, and a NaN that ends in every mean."""
    with pytest.raises(ValueError, match=message):
        hypothesis.ranking_accuracy(s, np.zeros((1, 3)), np.ones((1, 3), bool))
