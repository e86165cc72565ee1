"""HelpSteer2: people's ratings of answers on five attributes, and their preferences.

Data: nvidia/HelpSteer2 (JSON Lines, .gz); CC-BY-4.0. Wang et al. 2024, "HelpSteer2: Open-source
dataset for training top-performing reward models" (arXiv:2406.08673); the preferences: Wang et al.
2024, "HelpSteer2-Preference" (arXiv:2410.01257).

Fields of train.jsonl and validation.jsonl, from the data card: `prompt`, `response` (str) and
`helpfulness`, `correctness`, `coherence`, `complexity`, `verbosity` (int, 0 to 4, more is better).
Consecutive rows, the first and the second and so on, share a prompt (card). In prompts of several
turns the later ones begin with a line "<extra_id_1>Assistant" or "<extra_id_1>User" (card, and
`decision_tree/get_embeddings.py` of RLHFlow/RLHF-Reward-Modeling).

Fields of preference/preference.jsonl, from `preprocess_helpsteer2_data.py` of NVIDIA/NeMo-Aligner:
`prompt`, `response_1`, `response_2` (str), `preference_strength` (-3 to 3) and `split` ("train" or
another word for validation). That a strength below 0 prefers response_1 is from the scale that the
card of its successor HelpSteer3 prints, and from `scripts/preprocess_helpsteer2_preferences.py` of
tianjianl/OpenRLHF.

*Unverified: not yet run on the real file.*
"""

import re

from jaxreward.data import formats, sources
from jaxreward.data.formats import Bad

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_ROLES = {"User": "user", "Assistant": "assistant"}


def pairs(rows, *, split=None):
    """Brings numbered rows into the form of `sources.read_pairs`.

    Of ratings, two consecutive rows with one prompt are a pair: chosen is the more helpful answer,
    `margin` the difference of helpfulness, and the scores are the helpfulness of both. Of
    preferences, `margin` is the strength without its sign. Ties are `Bad`, and so is a row whose
    neighbour has another prompt.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.
      split: Of preferences, take only rows whose `split` is this word; None takes all.

    Yields:
      (number of the first row, dict or Bad).
    """
    held = None  # (number, row) that waits for its second half
    for number, row in rows:
        if isinstance(row, Bad):
            yield number, row
            continue
        if split is not None and row.get("split") != split:
            continue
        try:
            if "preference_strength" in row:
                yield number, _preferred(row)
                continue
            row = {**_rated(row), "helpfulness": sources.number_of(row, "helpfulness")}
        except Bad as bad:
            yield number, bad
            continue
        if held is None or held[1]["prompt"] != row["prompt"]:
            if held is not None:
                yield held[0], _alone()
            held = number, row
            continue
        (first, one), held = held, None
        yield first, _compared(one, row)
    if held is not None:
        yield held[0], _alone()


def points(rows):
    """Brings numbered rows of ratings into the form of labelled answers.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.

    Returns:
      Iterator of the same, with fields prompt, completion and scores, {attribute: number or None}.
    """
    return formats.mapped(rows, _point)


def _point(row):
    scores = {name: sources.number_of(row, name, needed=False) for name in ATTRIBUTES}
    if all(value is None for value in scores.values()):
        raise Bad("missing, and so are the other attributes", field="helpfulness")
    return {**_rated(row), "scores": scores}


def _rated(row):
    return {
        "id": row.get("id"),
        "prompt": _turns(sources.text_of(row, "prompt")),
        "completion": sources.text_of(row, "response"),
    }


def _alone():
    return Bad("no second row beside it has this prompt", field="prompt")


def _compared(one, two):
    margin = one["helpfulness"] - two["helpfulness"]
    if not margin:
        return Bad("tie", field="helpfulness")
    chosen, rejected = (one, two) if margin > 0 else (two, one)
    return {
        "id": one["id"],
        "prompt": one["prompt"],
        "chosen": chosen["completion"],
        "rejected": rejected["completion"],
        "margin": abs(margin),
        "chosen_score": chosen["helpfulness"],
        "rejected_score": rejected["helpfulness"],
    }


def _preferred(row):
    chosen, rejected, margin = sources.preferred(
        row, "preference_strength", "response_1", "response_2"
    )
    return {
        "id": row.get("id"),
        "prompt": _turns(sources.text_of(row, "prompt")),
        "chosen": chosen,
        "rejected": rejected,
        "margin": margin,
    }


def _turns(prompt):
    """The prompt as messages, if it has several turns."""
    if not isinstance(prompt, str) or not _TURN.search(prompt):
        return prompt
    parts = ["User", *_TURN.split(prompt)]
    messages = [
        {"role": _ROLES[name], "content": content.strip("\n")}
        for name, content in zip(parts[::2], parts[1::2])
    ]
    if messages[-1]["role"] != "user":
        raise Bad("last turn must be the user's", field="prompt")
    return messages
