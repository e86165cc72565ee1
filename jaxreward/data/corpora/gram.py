"""GRAM and GRAM-R²: preference pairs in the form of finished judge prompts.

Data: NiuTrans/GRAM-fine-tuning-65k, made of Skywork-Reward-Preference-80K-v0.2, and
wangclnlp/GRAM-RR-TrainingData, with rationales; both Apache-2.0 by their cards. Wang et al. 2025,
"GRAM" (arXiv:2506.14175) and "GRAM-R²" (arXiv:2509.02492).

Fields, from the two data cards and from `extensions/GRAM-RR/call_vllm_with_multi_port.py` of
NiuTrans/GRAM: `instruction` (str: instructions, then a line "[User Question]" and the question,
then each response between "[The Start of Assistant A's Answer]" and "[The End of Assistant A's
Answer]"; GRAM-R² has "Response" in place of "Answer"), `input` (empty) and `output` (str: "A" or
"B"; in GRAM-R², of which we could not read the whole card, probably a rationale in <think> and the
letter in <answer>). GRAM-pre-training-566k has the responses in `output` and no preference.

*Unverified: not yet run on the real file.*
"""

import re

from jaxreward.data import formats, sources
from jaxreward.rewards import verdict

_QUESTION = "[User Question]"
_MARK = re.compile(r"\[The (Start|End) of Assistant ([AB])'s (?:Answer|Response)\]")
_ORDER = [("Start", "A"), ("End", "A"), ("Start", "B"), ("End", "B")]


def pairs(rows):
    """Brings numbered rows into the form of `sources.read_pairs`.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.

    Returns:
      Iterator of the same, with fields prompt, chosen and rejected; where there is a rationale,
      also `rationale` and `first`, which answer it calls A, as `judges.completions` reads them.
      A row without a preference, or whose marks do not stand once each and in order, is `Bad`.
    """
    return formats.mapped(rows, _pair)


def _pair(row):
    text = sources.text_of(row, "instruction")
    if not isinstance(text, str):
        raise formats.Bad("must be str", field="instruction", came=formats.show(text))
    _, mark, body = text.partition(_QUESTION)
    marks = list(_MARK.finditer(body))
    if not mark or _QUESTION in body or [m.groups() for m in marks] != _ORDER:
        raise formats.Bad(
            "must hold \"[User Question]\" and the marks of Assistant A's and B's answers, each "
            "once and in order",
            field="instruction",
            came=formats.show(text[:200]),
        )
    starts = {m[2]: m.end() for m in marks if m[1] == "Start"}
    ends = {m[2]: m.start() for m in marks if m[1] == "End"}
    answers = {letter: body[starts[letter] : ends[letter]].strip() for letter in "AB"}
    output = sources.text_of(row, "output")
    judgement = verdict.parse(output, mode="released") if isinstance(output, str) else None
    if judgement is None or judgement.verdict is None:
        raise formats.Bad("names neither A nor B", field="output", came=formats.show(output))
    letter = judgement.verdict
    made = {
        "id": row.get("id"),
        "prompt": body[: marks[0].start()].strip(),
        "chosen": answers[letter],
        "rejected": answers[verdict.swapped(letter)],
    }
    if judgement.blocks.get("think"):
        made["rationale"] = judgement.blocks["think"]
        made["first"] = "chosen" if letter == "A" else "rejected"
    return made
