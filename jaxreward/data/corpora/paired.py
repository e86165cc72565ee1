"""Paired tokens: the smallest task on which filling in two tokens at once goes wrong.

An answer is n pairs, each "aa" or "bb", equally likely. Each token alone is a or b with probability
1/2, whatever the prompt says. So a model that has learnt this exactly, and fills both tokens of a
pair in one step, each from its own marginal, makes a pair that agrees half of the time, and n of
them with probability 2^-n; one that fills them in one after the other is always right.

    prompt          2:\\n
    right answers   aaaa aabb bbaa bbbb

Byte for byte: one token a letter for models that read bytes. Checked by `rewards.puzzles.paired`.
Ours.
"""

import random


def problems(count, *, seed, pairs=1):
    """Draws answers, as rows to learn from and to sample for.

    All rows have the same prompt, so there is nothing to hold out: what is measured is whether
    what a model samples is right, and how often.

    Args:
      count: How many.
      seed: Of the draw.
      pairs: Pairs of an answer, n.

    Returns:
      list of dict(id, prompt, answer, pairs, key): answer is one right answer, str of 2n letters;
      pairs int; key the number of pairs, str, the same in all.

    Raises:
      ValueError: if count or pairs is below 1.
    """
    if count < 1 or pairs < 1:
        raise ValueError(
            f"problems needs count >= 1 and pairs >= 1; received count {count} and pairs {pairs}"
        )
    rng = random.Random(seed)
    return [
        {
            "id": f"paired-{i}",
            "prompt": f"{pairs}:\n",
            "answer": "".join(rng.choice(("aa", "bb")) for _ in range(pairs)),
            "pairs": pairs,
            "key": str(pairs),
        }
        for i in range(count)
    ]
