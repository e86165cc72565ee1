"""UltraFeedback Binarized: GPT-4's scores of four answers a prompt, cut down to pairs.

Data: HuggingFaceH4/ultrafeedback_binarized, splits `train_prefs` and `test_prefs` (Parquet); MIT
licence. Made for Zephyr (Tunstall et al. 2023, arXiv:2310.16944) from UltraFeedback (Cui et al.
2023, arXiv:2310.01377). Chosen is the answer with the highest score, rejected one of the others.

Fields, all from the data card's `dataset_info`: `prompt` and `prompt_id` (str), `chosen` and
`rejected` (lists of {"content", "role"}, the whole dialogue), `score_chosen` and `score_rejected`
(float). `messages`, which repeats `chosen`, is left out.

*Unverified: not yet run on the real file.*
"""

from jaxreward.data import formats, sources


def pairs(rows):
    """Brings numbered rows into the form of `sources.read_pairs`, with the scores of both answers.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.

    Returns:
      Iterator of the same, with fields id, prompt, chosen, rejected, chosen_score, rejected_score.
    """
    return formats.mapped(rows, _pair)


def _pair(row):
    return {
        "id": sources.label_of(row, "prompt_id"),
        "prompt": row.get("prompt"),
        "chosen": row.get("chosen"),
        "rejected": row.get("rejected"),
        "chosen_score": sources.number_of(row, "score_chosen"),
        "rejected_score": sources.number_of(row, "score_rejected"),
    }
