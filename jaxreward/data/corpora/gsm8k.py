r"""GSM8K: grade-school word problems with a number for an answer.

Data: openai/gsm8k, configuration `main` (Parquet), or `train.jsonl` and `test.jsonl` of
openai/grade-school-math. Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems"
(arXiv:2110.14168). MIT by its card.

Fields, from the data card: `question` (str) and `answer` (str: a worked solution, which holds marks
such as <<48/2=24>>, and a last line "#### 72").

*Unverified: not yet run on the real file.*
"""

from jaxreward.data import formats, sources
from jaxreward.rewards import puzzles

_MARK = "####"


def prompts(rows, *, form="plain", think="think", tag="answer"):
    """Brings numbered rows into the form of `sources.read_prompts`.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.
      form: "plain" asks the question alone, "tags" also for reasoning and answer between tags.
      think, tag: Names of the tags.

    Returns:
      Iterator of the same, with fields prompt, answer (what follows "####", as it is written) and
      solution (what stands before it).

    Raises:
      ValueError: for another form.
    """
    if form not in puzzles.FORMS:
        raise ValueError(f"form must be 'plain' or 'tags'; received {form!r}")

    def convert(row):
        question, worked = (sources.text_of(row, field) for field in ("question", "answer"))
        if not isinstance(question, str):
            raise formats.Bad("must be str", field="question", came=formats.show(question))
        solution, _, answer = worked.rpartition(_MARK) if isinstance(worked, str) else ("", "", "")
        if not answer.strip() or not solution:
            raise formats.Bad(
                'must be a worked solution that ends in "#### 72"',
                field="answer",
                came=formats.show(worked),
            )
        asked = question if form == "plain" else f"{question}\n{puzzles.request(think, tag)}"
        return {
            "id": row.get("id"),
            "prompt": asked,
            "answer": answer.strip(),
            "solution": solution.strip(),
        }

    return formats.mapped(rows, convert)
