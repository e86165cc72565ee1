"""Which items of a test set stand in training data: whole prompts, and runs of words.

An item counts as seen if its prompt, `repeats.normalised`, is a training prompt (`exact`), or if at
least `threshold` of its runs of n words stand anywhere in the training texts (`ngram`). Prompts of
fewer than n words have no such run, and can be found whole only.

Runs are compared exactly, all with all, by 64-bit numbers: ten million of them take 80 MB, and a
look-up is a binary search. An estimate by MinHash would save memory where there is none to save.
"""

import functools
import hashlib

import numpy as np

from jaxreward.data import repeats

WORDS = 13  # of a run: what GPT-3's authors called an overlap (arXiv:2005.14165, appendix C)
THRESHOLD = 0.5  # ours
_BASE = np.uint64(0x9E3779B97F4A7C15)
_ANSWERS = ("chosen", "rejected", "completion", "answer")


@functools.lru_cache(maxsize=1 << 20)
def _number(word):
    # Not hash(), which differs from process to process.
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def runs(text: str, n: int = WORDS) -> np.ndarray:
    """The runs of n consecutive words of a text, as numbers: uint64[words - n + 1], or [0].

    .. math:: h(w_1 \\dots w_n) = \\sum_k h(w_k) b^{n-k} \\bmod 2^{64}

    Words are those of `repeats.normalised`. Equal runs have equal numbers; two different ones have
    the same by chance once in 2^64.
    """
    words = repeats.normalised(text).split()
    if len(words) < n:
        return np.zeros(0, np.uint64)
    each = np.asarray([_number(word) for word in words], np.uint64)
    found = np.zeros(len(words) - n + 1, np.uint64)
    for k in range(n):
        found = found * _BASE + each[k : k + len(found)]
    return found


def index(texts, n: int = WORDS) -> np.ndarray:
    """All different runs of some texts, sorted uint64[R]."""
    made = [runs(text, n) for text in texts]
    return np.unique(np.concatenate(made)) if made else np.zeros(0, np.uint64)


def share(text: str, known: np.ndarray, n: int = WORDS) -> float:
    """The share of a text's runs that are in an `index`; NaN where it has fewer than n words."""
    mine = runs(text, n)
    if not len(mine):
        return float("nan")
    at = np.minimum(np.searchsorted(known, mine), max(len(known) - 1, 0))
    return float(np.mean(known[at] == mine)) if len(known) else 0.0


class Training:
    """Training data, to be asked which items stand in it.

    Args:
      records: As the readers of `data.sources` make them: dicts with prompt, and answers under
        chosen, rejected, completion or answer.
      n: Words of a run.

    Raises:
      ValueError: for an n below 1.
    """

    def __init__(self, records, *, n: int = WORDS):
        if n < 1:
            raise ValueError(f"a run has at least one word; received n = {n}")
        self.n, self._prompts, texts = n, set(), []
        for record in records:
            parts = [record["prompt"], *(record[side] for side in _ANSWERS if side in record)]
            said = [repeats.said(part) for part in parts if isinstance(part, str | list)]
            self._prompts.add(repeats.normalised(said[0]))
            texts += said
        self._prompts.discard("")  # nothing but punctuation says nothing
        self._runs = index(texts, n)

    def seen(self, items, *, threshold: float = THRESHOLD) -> dict[str, np.ndarray]:
        """Which items stand in the data.

        Args:
          items: dicts with prompt, a str or messages.
          threshold: Least share of an item's runs, in (0, 1].

        Returns:
          dict of exact bool[N], ngram bool[N], share float64[N] (NaN where a prompt is too short)
          and any bool[N].

        Raises:
          ValueError: for another threshold.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be a share in (0, 1]; received {threshold}")
        asked = [repeats.said(item["prompt"]) for item in items]
        exact = np.array([repeats.normalised(text) in self._prompts for text in asked], bool)
        shares = np.array([share(text, self._runs, self.n) for text in asked], np.float64)
        ngram = np.nan_to_num(shares, nan=0.0) >= threshold
        return {"exact": exact, "ngram": ngram, "share": shares, "any": exact | ngram}


def report(found: dict[str, np.ndarray], subsets) -> dict[str, dict[str, int]]:
    """Counts by subset: {subset: {items, exact, ngram, any, short}}, and under "" for all.

    Args:
      found: From `Training.seen`.
      subsets: Of each item, str[N].
    """
    subsets = np.asarray(list(subsets), np.str_)
    if len(subsets) != len(found["any"]):
        raise ValueError(f"{len(found['any'])} items and {len(subsets)} subsets; give one an item")

    def counts(where):
        made = {name: int(found[name][where].sum()) for name in ("exact", "ngram", "any")}
        return {
            "items": int(where.sum()),
            **made,
            "short": int(np.isnan(found["share"][where]).sum()),
        }

    parts = {s: counts(subsets == s) for s in sorted(set(subsets.tolist()) - {""})}
    return {"": counts(np.ones(len(subsets), bool)), **parts}
