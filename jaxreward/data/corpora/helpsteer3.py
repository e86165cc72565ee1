"""HelpSteer3-Preference: people's preferences on general, STEM, code and multilingual tasks.

Data: nvidia/HelpSteer3, subset `preference` (JSON Lines, .gz); CC-BY-4.0. Wang et al. 2025,
"HelpSteer3-Preference" (arXiv:2505.11475).

Fields, from `nemo_rl/data/datasets/preference_datasets/helpsteer3.py` of NVIDIA-NeMo/RL and from
the data card: `context` (list of {"role", "content"}, or a str), `response1`, `response2` (str),
`overall_preference` (-3 to 3), `domain` and `language` (str). Below 0 response1 is better, 0 is a
tie (both sources). `individual_preference`, what single annotators said, is left out.

*Unverified: not yet run on the real file.*
"""

from jaxreward.data import formats, sources


def pairs(rows):
    """Brings numbered rows into the form of `sources.read_pairs`.

    `margin` is the preference without its sign, `subset` the domain. A tie is `Bad`.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.

    Returns:
      Iterator of the same, with fields prompt, chosen, rejected, margin, subset and language.
    """
    return formats.mapped(rows, _pair)


def _pair(row):
    chosen, rejected, margin = sources.preferred(
        row, "overall_preference", "response1", "response2"
    )
    return {
        "id": row.get("id"),
        "prompt": sources.text_of(row, "context"),
        "chosen": chosen,
        "rejected": rejected,
        "margin": margin,
        "subset": sources.label_of(row, "domain"),
        "language": sources.label_of(row, "language"),
    }
