"""HelpSteer3-Preference: people's preferences on general, STEM, code and multilingual tasks.

Data: nvidia/HelpSteer3, subset `preference` (JSON Lines, .gz); CC-BY-4.0. Wang et al. 2025,
"HelpSteer3-Preference" (arXiv:2505.11475).

Fields, from `nemo_rl/data/datasets/preference_datasets/helpsteer3.py` of NVIDIA-NeMo/RL and from
the data card: `context` (list of {"role", "content"}, or a str), `response1`, `response2` (str),
`overall_preference` (-3 to 3), `domain` and `language` (str). Below 0 response1 is better, 0 is a
tie (both sources). `individual_preference` is what up to three annotators said: a list of `score`
(int, on the same scale), `reasoning`, `feedback1` and `feedback2` (str), by the features that the
card of a copy lists (davidanugraha/HelpSteer3). `reasoning` calls the answers "@Response 1" and
"@Response 2", as modelscope/RM-Gallery expects of it.

*Unverified: not yet run on the real file.*
"""

import re

from jaxreward.data import formats, sources

_TEXTS = ("feedback1", "feedback2", "reasoning")
_NAMED = re.compile(r"@?\bResponse ?([12])\b", re.IGNORECASE)


def pairs(rows):
    """Brings numbered rows into the form of `sources.read_pairs`.

    `margin` is the preference without its sign, `subset` the domain. A tie is `Bad`. The rationale
    is that of the first annotator who prefers the same answer: the feedback on each answer and the
    reasoning as the comparison, with {chosen} and {rejected} for "@Response 1" and "@Response 2".

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.

    Returns:
      Iterator of the same, with fields prompt, chosen, rejected, margin, subset and language; and
      `rationale`, as `judges.completions` reads it, where there is one.
    """
    return formats.mapped(rows, _pair)


def _pair(row):
    chosen, rejected, margin = sources.preferred(
        row, "overall_preference", "response1", "response2"
    )
    made = {
        "id": row.get("id"),
        "prompt": sources.text_of(row, "context"),
        "chosen": chosen,
        "rejected": rejected,
        "margin": margin,
        "subset": sources.label_of(row, "domain"),
        "language": sources.label_of(row, "language"),
    }
    rationale = _rationale(row, first=row["overall_preference"] < 0)
    return {**made, "rationale": rationale} if rationale else made


def _rationale(row, *, first):
    """Texts about the chosen answer, which is response1 if `first`, the rejected one, and both."""
    field = "individual_preference"
    opinions = row.get(field) or []
    if not isinstance(opinions, list) or not all(isinstance(one, dict) for one in opinions):
        raise formats.Bad("must be a list of objects", field=field, came=formats.show(opinions))
    sides = ("chosen", "rejected") if first else ("rejected", "chosen")
    renamed = lambda text: _NAMED.sub(lambda match: f"{{{sides[int(match[1]) - 1]}}}", text)
    for place, said in enumerate(opinions):
        said = {f"{field}[{place}].{name}": value for name, value in said.items()}
        score = sources.number_of(said, f"{field}[{place}].score", needed=False)
        if not score or (score < 0) != first:
            continue
        texts = [sources.label_of(said, f"{field}[{place}].{name}") for name in _TEXTS]
        return {key: renamed(text) for key, text in zip((*sides, "comparison"), texts) if text}
    return {}
