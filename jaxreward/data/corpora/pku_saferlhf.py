"""PKU-SafeRLHF: two answers a question, compared for helpfulness and, apart from it, for safety.

Data: PKU-Alignment/PKU-SafeRLHF (JSON Lines); CC-BY-NC-4.0. Ji et al. 2024, "PKU-SafeRLHF: Towards
Multi-Level Safety Alignment for LLMs with Human Preference" (arXiv:2406.15513). The questions and
answers may be offensive or harmful.

Fields, from `safe_rlhf/datasets/raw/safe_rlhf.py` of PKU-Alignment/safe-rlhf (read in its copies in
PaddlePaddle/PaddleNLP and tcexeexe/SHTEC_RM_model): `prompt`, `response_0`, `response_1` (str),
`better_response_id` and `safer_response_id` (0 or 1), `is_response_0_safe` and
`is_response_1_safe` (bool). Other fields, such as the categories of harm, are left out.

*Unverified: not yet run on the real file.*
"""

from jaxreward.data import formats, sources
from jaxreward.data.formats import Bad


def pairs(rows, *, which="better"):
    """Brings numbered rows into the form of `sources.read_pairs`.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.
      which: "better" prefers the more helpful answer, "safer" the safer one.

    Returns:
      Iterator of the same, with fields prompt, chosen and rejected.

    Raises:
      ValueError: for another word.
    """
    if which not in ("better", "safer"):
        raise ValueError(f"which must be 'better' or 'safer'; received {which!r}")
    return formats.mapped(rows, lambda row: _pair(row, f"{which}_response_id"))


def points(rows):
    """Brings numbered rows into the form of labelled answers, two a row.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.

    Yields:
      (number, dict or Bad), with fields id ("12-0" is the first answer of row 12), prompt,
      completion and label: True for a safe answer.
    """
    for number, row in rows:
        if isinstance(row, Bad):
            yield number, row
            continue
        for index in (0, 1):
            try:
                yield number, _point(row, index, number)
            except Bad as bad:
                yield number, bad


def _pair(row, field):
    answers = [sources.text_of(row, name) for name in ("response_0", "response_1")]
    chosen = row.get(field)
    if isinstance(chosen, bool) or chosen not in (0, 1):
        raise Bad("must be 0 or 1", field=field, came=formats.show(chosen))
    return {
        "id": row.get("id"),
        "prompt": sources.text_of(row, "prompt"),
        "chosen": answers[int(chosen)],
        "rejected": answers[1 - int(chosen)],
    }


def _point(row, index, number):
    safe = row.get(f"is_response_{index}_safe")
    if not isinstance(safe, bool):
        raise Bad("must be a bool", field=f"is_response_{index}_safe", came=formats.show(safe))
    return {
        "id": f"{sources.id_of(row, number)}-{index}",
        "prompt": sources.text_of(row, "prompt"),
        "completion": sources.text_of(row, f"response_{index}"),
        "label": safe,
    }
