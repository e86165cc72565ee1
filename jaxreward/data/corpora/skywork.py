"""Skywork-Reward-Preference-80K: public preference pairs, chosen for quality.

Data: Skywork/Skywork-Reward-Preference-80K-v0.2 (Parquet; v0.1 holds prompts of RewardBench). Liu
et al. 2024, "Skywork-Reward: Bag of Tricks for Reward Modeling in LLMs" (arXiv:2410.18451). The
card names no licence; the parts, HelpSteer2, OffsetBias, WildGuard and Magpie, have their own.

Fields, all from the data card's `dataset_info`: `chosen` and `rejected` (lists of {"content",
"role"}, the whole dialogue, which share all but the last turn) and `source` (str).

*Unverified: not yet run on the real file.*
"""

from jaxreward.data import formats, sources


def pairs(rows):
    """Brings numbered rows into the form of `sources.read_pairs`; `subset` is the source.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.

    Returns:
      Iterator of the same, with fields chosen, rejected and subset.
    """
    return formats.mapped(rows, _pair)


def _pair(row):
    return {
        "id": row.get("id"),
        "chosen": row.get("chosen"),
        "rejected": row.get("rejected"),
        "subset": sources.label_of(row, "source"),
    }
