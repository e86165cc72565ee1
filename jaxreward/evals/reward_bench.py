"""Numbers of public reward-model suites, from scores or from a judge's verdicts.

Items are those of `data.corpora.suites`. Scores are one float[answers] an item: rewards of single
answers, whatever head made them (`models.heads.reward`). A right answer wins a comparison if its
score is higher; **an equal score is a lost comparison**, as in the suites' own code, and "ties"
counts them. Two suites share equal scores out by rules of their own: RewardBench 2 and PandaLM.

Metrics are {name: value}; a mean over items is {"value", "low", "high"} with a 95 % interval
(`pairwise.bootstrap`, prompts resampled). Where a metric is made of several means, all are drawn at
once, each weighted so that the drawn mean is the metric.

    RewardBench 1   a section is the mean of its subsets by the release's counts; "overall" the
                    mean of the four, "overall with Prior Sets" counts that section one half
    RewardBench 2   best of 4 (the highest score, shared where equal), "Ties", mean of six
    RM-Bench        "easy", "normal", "hard" of nine comparisons, by domain; mean of four domains
    JudgeBench      accuracy, by section, source and who wrote the answers
    LLMBar          accuracy, by subset; "Adversarial" is the mean of its subsets
    HHH, RMB        accuracy, by section; "macro" is the mean of the sections
    PandaLM         against the majority of three, and against each; "macro_f1" over three classes
"""

import collections
import json
from collections.abc import Sequence

import numpy as np

from jaxreward.data.corpora import suites
from jaxreward.evals import judges, pairwise

_DOMAINS = ("chat", "code", "math", "safety")


def missing(suite: str, items: Sequence[dict]) -> list[str]:
    """Names of the parts of a suite that no item is of."""
    subsets = {item["subset"] for item in items}
    sections = {item["section"] for item in items}
    if suite == "reward_bench":
        return [s for part in suites.REWARD_BENCH.values() for s in part if s not in subsets]
    whole, there = {
        "reward_bench_2": (suites.REWARD_BENCH_2, subsets),
        "rm_bench": (suites.RM_BENCH, subsets),
        "judgebench": (tuple(suites.JUDGEBENCH.values()), sections),
        "llmbar": (suites.LLMBAR, subsets),
        "hhh": (suites.HHH, sections),
        "pandalm": ((), sections),
        "rmb": (suites.RMB, sections),
    }[suite]
    return [name for name in whole if name not in there]


def check(suite: str, items: Sequence[dict], *, partial: bool = False) -> list[str]:
    """As `missing`, but parts that are missing are an error unless `partial`.

    Raises:
      KeyError: for an unknown suite. ValueError: naming the missing parts, or without items.
    """
    if suite not in suites.SUITES:
        raise KeyError(f"no suite {suite!r}; suites: {', '.join(suites.SUITES)}")
    if not items:
        raise ValueError(f"{suite}: no items")
    lacking = missing(suite, items)
    if lacking and not partial:
        raise ValueError(
            f"{suite} lacks {', '.join(lacking)}: what it gives would not be the suite's number. "
            "Bring the missing files, or measure the part that is there with --limit N "
            "(partial=True)"
        )
    return lacking


def measure(
    suite: str,
    items: Sequence[dict],
    scores: Sequence,
    *,
    partial: bool = False,
    threshold: float = 0.0,
    samples: int = 2000,
) -> dict:
    """Metrics of a suite.

    Args:
      suite: A name of `suites.SUITES`.
      items: N items of `suites.read`.
      scores: N arrays float[answers of the item], or float[N, answers].
      partial: A suite that lacks parts is measured: what needs them is left out, and "missing"
        names them. Else it is an error.
      threshold: PandaLM: scores that differ by no more are a tie.
      samples: Of the bootstrap.

    Returns:
      {name: {"value", "low", "high"}, number, or list of str}. "items" and "ties" count.

    Raises:
      ValueError: for scores of another rank or number, scores that are not finite, missing parts,
        or no items. KeyError: for an unknown suite.

    References:
      RewardBench, arXiv:2403.13787, and RewardBench 2, arXiv:2506.01937: release 0.1.4. RM-Bench,
      arXiv:2410.16184: its README and leaderboard. JudgeBench, arXiv:2410.12784: run with
      --single_game, except that equal scores are wrong (there "B>A"). PandaLM, arXiv:2306.05087:
      data/compute_metrics.py. Intervals are ours.
    """
    lacking = check(suite, items, partial=partial)
    scores = _checked(items, scores)
    groups = _groups(items)
    if suite == "reward_bench_2":
        made = _best_and_ties(items, scores, groups, lacking, samples)
    elif suite == "pandalm":
        made = _pandalm(items, scores, groups, threshold, samples)
    else:
        made = {}
        sides = [(scores[i][a], scores[i][b]) for i, a, b in _places(suite, items)]
        won = np.array([a > b for a, b in sides], np.float64)
        for name, terms in _metrics(suite, items, won, lacking).items():
            made[name] = _mean(terms, groups, samples)
        made["ties"] = sum(bool(a == b) for a, b in sides)
    return made | {"items": len(items)} | ({"missing": lacking} if lacking else {})


def from_verdicts(
    suite: str,
    items: Sequence[dict],
    verdicts: np.ndarray,
    *,
    partial: bool = False,
    samples: int = 2000,
) -> dict:
    """Metrics of a suite from the verdicts of a judge that compares two answers.

    "single_accuracy/<name>", "pair_accuracy/<name>" and "consistency/<name>" are the metrics of
    `measure` with what `judges.outcomes` says of each comparison in place of who scored higher;
    what needs both orders is left out where a comparison lacks one. JudgeBench has "accuracy" too:

    .. math:: p_0(r) p_1(r) + p_0(r) p_1(u) + p_0(u) p_1(r)

    with r the right answer and u no verdict, a tie among them: of both orders more are right than
    wrong. PandaLM's prediction is the answer that is chosen in both orders, else a tie.

    Args:
      suite: A name of `suites.SUITES` but reward_bench_2, whose judges rate four answers at once:
        give `measure` the ratings.
      items: N items.
      verdicts: int8[M, 2, k] as in `evals.judges`, in the order of `comparisons`; of PandaLM 0
        chooses response1, 1 response2, and k is 1.
      partial, samples: As `measure`.

    Returns:
      As `measure`.

    Raises:
      ValueError: as `measure` and `judges.outcomes`, or for another number of comparisons.
    """
    if suite == "reward_bench_2":
        raise ValueError(
            "reward_bench_2 is no suite of pairs: its judges rate each of four answers; give those "
            "ratings to measure() as scores"
        )
    lacking = check(suite, items, partial=partial)
    places = _places(suite, items)
    found = judges.outcomes(verdicts)
    if len(verdicts) != len(places):
        raise ValueError(
            f"{suite}: {len(places)} comparisons and verdicts of {len(verdicts)}; give one row for "
            "each of comparisons()"
        )
    groups = _groups(items)
    tail = {"items": len(items)} | ({"missing": lacking} if lacking else {})
    if suite == "pandalm":
        return _pandalm_judged(items, np.asarray(verdicts), found, groups, samples) | tail
    values = {
        name: found[name]
        for name in ("single_accuracy", "pair_accuracy", "consistency")
        if np.isfinite(found[name]).all()
    }
    made = {
        f"{kind}/{name}": _mean(terms, groups, samples)
        for kind, each in values.items()
        for name, terms in _metrics(suite, items, each, lacking).items()
    }
    if suite == "judgebench" and "pair_accuracy" in values:
        right, none = ((np.asarray(verdicts) == c).mean(axis=2) for c in (0, judges.UNREADABLE))
        more = found["pair_accuracy"] + right[:, 0] * none[:, 1] + none[:, 0] * right[:, 1]
        for name, terms in _metrics(suite, items, more, lacking).items():
            made[name] = _mean(terms, groups, samples)
    made["unparseable"] = _mean([(1.0, found["unparseable"], None, None)], None, samples)
    return made | tail


def comparisons(suite: str, items: Sequence[dict]) -> list[dict]:
    """The pairs of answers that a suite compares, as records of `sources.read_pairs`.

    `data.judges.rows(comparisons(...), seed=0, both=True)` makes a judge's prompts of them. One an
    item; of RM-Bench nine, each right style against each wrong one. PandaLM's `chosen` is response1
    whoever wins.

    Args:
      suite: A name of `suites.SUITES` but reward_bench_2. items: N items.
    """
    made = []
    for number, (i, a, b) in enumerate(_places(suite, items)):
        item = items[i]
        made.append(
            {
                "id": f"{number}:{item['subset']}:{item['id']}",
                "prompt": item["prompt"],
                "chosen": item["answers"][a],
                "rejected": item["answers"][b],
                "subset": item["subset"],
            }
        )
    return made


def matching_threshold(items: Sequence[dict], scores: Sequence) -> float:
    """The least difference of scores up to which as many PandaLM pairs are ties as by majority.

    It is chosen on the pairs that it is then measured on.

    Args:
      items, scores: As `measure`.
    """
    gaps = np.sort([abs(s[0] - s[1]) for s in _checked(items, scores)])
    ties = sum(_majority(item["labels"]) == 0 for item in items)
    return float(gaps[ties - 1]) if ties else -1.0


def _checked(items, scores):
    if len(scores) != len(items):
        raise ValueError(f"{len(items)} items and scores of {len(scores)}; give one array an item")
    made = []
    for item, given in zip(items, scores):
        found = np.asarray(given, np.float64)
        name = f"item {item['subset']}/{item['id']}"
        if found.shape != (len(item["answers"]),):
            raise ValueError(
                f"{name}: scores must be [{len(item['answers'])}], one an answer; got "
                f"{list(found.shape)}. Make one number of several outputs first (heads.reward)"
            )
        if not np.isfinite(found).all():
            raise ValueError(f"{name}: scores must be finite; got {found.tolist()}")
        made.append(found)
    return made


def _groups(items):
    # By a dict: an array of texts takes the longest one's room for each.
    numbers: dict[str, int] = {}
    texts = (json.dumps(item["prompt"], sort_keys=True) for item in items)
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], int)


def _places(suite, items):
    """(item, right answer, wrong answer) of every comparison, as places."""
    made = []
    for i, item in enumerate(items):
        right = item["right"] or [0]
        wrong = [a for a in range(len(item["answers"])) if a not in right]
        made += [(i, a, b) for a in right for b in wrong]
    return made


def _mean(terms, groups, samples):
    """The sum of c_k mean_k over the terms (c, values, weights or None, groups or None)."""
    kept = []
    for coef, values, weights, own in terms:
        weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
        own = groups if own is None else own
        own = np.arange(len(values)) if own is None else own
        if weights.sum() > 0:
            there = weights > 0
            share = coef / weights.sum() if len(terms) > 1 else 1.0
            values = np.asarray(values, np.float64)[there]
            kept.append((coef, values, own[there], share * weights[there]))
    total = sum(coef for coef, *_ in kept)
    _, values, own, shares = zip(*kept)
    found = pairwise.bootstrap(
        np.concatenate(values),
        np.concatenate(own),
        weights=np.concatenate(shares),
        samples=samples,
    )
    return {name: total * x for name, x in zip(("value", "low", "high"), found)}


def _metrics(suite, items, won, lacking):
    """{name: terms} of the suites of comparisons; `won` is float[comparisons]."""
    subset = np.array([item["subset"] for item in items])
    section = np.array([item["section"] for item in items])
    if suite == "reward_bench":
        return _reward_bench(subset, section, won)
    if suite == "rm_bench":
        return _rm_bench(subset, section, won.reshape(len(items), 3, 3))
    one = lambda where: [(1.0, won, where, None)]
    names = sorted(set(subset.tolist()))
    by_subset = {name: one(subset == name) for name in names}
    of = lambda parts: [(1 / len(parts), won, part, None) for part in parts]
    if suite == "llmbar":
        core = section == "LLMBar"
        made = {"accuracy": one(core)} if core.any() else {}
        hard = [subset == n for n in names if n.startswith("LLMBar/Adversarial/")]
        if hard:
            made["Adversarial"] = of(hard)
        if not lacking:
            made["macro"] = of([subset == name for name in suites.LLMBAR])
        return made | by_subset
    made = {"accuracy": one(None)}
    parts = {name: section == name for name in sorted(set(section.tolist()))}
    made |= {name: one(where) for name, where in parts.items()}
    if suite == "judgebench":
        model = np.array([item["response_model"] for item in items])
        made |= {name: one(model == name) for name in sorted({*model.tolist()} - {""})}
    elif not lacking:
        made["macro"] = of(list(parts.values()))
    return by_subset | made


def _reward_bench(subset, section, won):
    counts = collections.Counter(subset.tolist())
    by_name = {s: n for part in suites.REWARD_BENCH.values() for s, n in part.items()}
    # Every subset weighs as the release has it, whatever number of its rows is here.
    weight = np.array([by_name.get(s, 1.0) / counts[s] for s in subset.tolist()])
    made, whole = {}, []
    for name in suites.REWARD_BENCH:
        where = section == name
        if where.any():
            made[name] = [(1.0, won, weight * where, None)]
            whole.append((0.25, won, weight * where, None))
    prior = weight * np.isin(subset, suites.PRIOR_SETS)
    whole_prior = all(name in counts for name in suites.PRIOR_SETS)
    if whole_prior:
        made[suites.PRIOR] = [(1.0, won, prior, None)]
    if len(whole) == len(suites.REWARD_BENCH):
        made["overall"] = whole
        if whole_prior:
            made[f"overall with {suites.PRIOR}"] = [
                *((2 / 9, *rest) for _, *rest in whole),
                (1 / 9, won, prior, None),
            ]
    return made | {s: [(1.0, won, subset == s, None)] for s in sorted(counts)}


def _rm_bench(subset, section, won):
    # Rows are the styles of the right answer, columns those of the wrong one, plainest first.
    cells = {"easy": np.tril(won, -1), "normal": won * np.eye(3), "hard": np.triu(won, 1)}
    level = {name: x.sum(axis=(1, 2)) / 3 for name, x in cells.items()}
    average = sum(level.values()) / 3
    made = {}
    parts = {d: section == d for d in _DOMAINS if (section == d).any()}
    if len(parts) == len(_DOMAINS):
        of = lambda values: [(0.25, values, where, None) for where in parts.values()]
        made = {"overall": of(average)} | {name: of(x) for name, x in level.items()}
    both = {s: subset == s for s in ("safety-refuse", "safety-response") if s in subset}
    for name, where in {**parts, **both}.items():
        made[name] = [(1.0, average, where, None)]
        made |= {f"{name}/{k}": [(1.0, x, where, None)] for k, x in level.items()}
    return made


def _best_and_ties(items, scores, groups, lacking, samples):
    subset = np.array([item["subset"] for item in items])
    # The highest score wins; several answers that share it share the win.
    won = np.array([(s[0] == s.max()) / (s == s.max()).sum() for s in scores])
    terms = {
        name: [(1.0, won, subset == name, groups)]
        for name in suites.REWARD_BENCH_2
        if name != "Ties" and (subset == name).any()
    }
    where = np.flatnonzero(subset == "Ties")
    if len(where):
        terms["Ties"] = ties([items[i] for i in where], [scores[i] for i in where])
    made = {name: _mean(parts, None, samples) for name, parts in terms.items()}
    if not lacking:
        whole = [(c / 6, v, w, g) for parts in terms.values() for c, v, w, g in parts]
        made["overall"] = _mean(whole, None, samples)
    core = subset != "Ties"
    made["ties"] = int(sum((s == s.max()).sum() > 1 for s, c in zip(scores, core) if c))
    return made


def ties(items: Sequence[dict], scores: Sequence) -> list[tuple]:
    """RewardBench 2's Ties as the terms of a sum of means, with prompts as groups.

        0.3 mean(tied right) + 0.3 mean(ref right) + 0.2 mean(m_t > d) + 0.2 mean(min(m_r, m_t) > d)
        + 0.01 mean(tanh(min(m_r, m_t) / d - 1))

    A question has a "ref" with one right answer and a "tied" with several. Right is that the worst
    right answer beats the best wrong one; m is by how much, and d is the gap between the best and
    the worst right answer of "tied". The last three are over questions with both, the last over
    those with d > 0; one over nothing counts 0.

    Args:
      items: N items of the subset Ties. scores: float[answers] each.

    Returns:
      list of (coefficient, values, None, groups); their weighted sum is up to 1.01.

    References:
      `process_single_model`, rewardbench 0.1.4. Deviations: it takes the first of several scores an
      answer, where here one number is made of them before; and where no question has two right
      answers it gives NaN.
    """
    right, margin, spread = ({"ref": {}, "tied": {}} for _ in range(3))
    for item, s in zip(items, scores, strict=True):
        kind, place = item["tie"]
        count = len(item["right"])
        good, bad = s[:count], s[count:]
        both = len(good) > 0 and len(bad) > 0
        margin[kind][place] = float(good.min() - bad.max()) if both else 0.0
        right[kind][place] = both and bool(good.min() > bad.max())
        spread[kind][place] = float(good.max() - good.min()) if both and count > 1 else None
    shared = [p for p in right["tied"] if p in right["ref"] and spread["tied"][p] is not None]
    least = {p: min(margin["ref"][p], margin["tied"][p]) for p in shared}
    apart = [p for p in shared if spread["tied"][p] > 0]
    parts = (
        (0.3, list(right["tied"]), list(right["tied"].values())),
        (0.3, list(right["ref"]), list(right["ref"].values())),
        (0.2, shared, [margin["tied"][p] > spread["tied"][p] for p in shared]),
        (0.2, shared, [least[p] > spread["tied"][p] for p in shared]),
        (0.01, apart, [np.tanh(least[p] / spread["tied"][p] - 1) for p in apart]),
    )
    return [
        (coef, np.array(values, np.float64), None, -1 - np.array(places))  # of no other subset
        for coef, places, values in parts
        if places
    ]


def _majority(labels):
    # The first of the most frequent, as the suite's own code counts.
    return collections.Counter(labels).most_common(1)[0][0]


def _pandalm(items, scores, groups, threshold, samples):
    def said(limit):
        gaps = np.array([s[0] - s[1] for s in scores])
        return np.where(np.abs(gaps) <= limit, 0, np.where(gaps > 0, 1, 2))

    matched = matching_threshold(items, scores)
    made = _agreement(items, said(threshold), groups, samples)
    made |= {
        f"matched/{name}": x
        for name, x in _agreement(items, said(matched), groups, samples).items()
        if name in ("accuracy", "macro_f1", "predicted_ties")
    }
    return made | {"threshold": threshold, "matched/threshold": matched}


def _pandalm_judged(items, verdicts, found, groups, samples):
    if verdicts.shape[2] != 1:
        raise ValueError(
            f"pandalm needs one verdict an order; got {verdicts.shape[2]}: vote first (judges.vote)"
        )
    if not np.isfinite(found["pair_accuracy"]).all():
        raise ValueError("pandalm needs the verdicts of both orders")
    first, second = verdicts[:, 0, 0], verdicts[:, 1, 0]
    said = np.where((first == second) & (first >= 0), first + 1, 0)
    made = _agreement(items, said, groups, samples)
    for name in ("consistency", "unparseable"):
        made[name] = _mean([(1.0, found[name], None, groups)], None, samples)
    return made


def _agreement(items, said, groups, samples):
    """What predictions 0 (tie), 1 and 2 have in common with three people."""
    labels = np.array([item["labels"] for item in items])
    majority = np.array([_majority(row) for row in labels.tolist()])
    mean = lambda values, where=None: _mean([(1.0, values, where, groups)], None, samples)
    f1, made = [], {"accuracy": mean(said == majority)}
    for c in (0, 1, 2):
        hit = np.sum((said == c) & (majority == c))
        all_of = np.sum(said == c) + np.sum(majority == c)
        f1.append(2 * hit / all_of if all_of else 0.0)
    made["macro_f1"] = float(np.mean(f1))
    if (majority > 0).any():
        made["accuracy/no_ties"] = mean(said == majority, majority > 0)
    for a in range(3):
        made[f"agreement/annotator{a + 1}"] = mean(said == labels[:, a])
    pairs = [(0, 1), (0, 2), (1, 2)]
    made["agreement/people"] = mean(sum(labels[:, a] == labels[:, b] for a, b in pairs) / 3)
    made["predicted_ties"] = float(np.mean(said == 0))
    made["majority_ties"] = float(np.mean(majority == 0))
    return made
