"""What a judge's answer says: the verdict, whether it keeps its form, and rewards for both.

A judge reads a request and two responses, A and B, reasons, and names the better one. The form is
a sequence of tags, by stage of training:

    text      <think> … </think> <answer> A </answer>
    caption   <type> … </type> <think> … </think> <answer> A </answer>
    media     <type> … </type> <caption> … </caption> <think> … </think> <answer> A </answer>

In "media" the caption may be missing. Judges of other houses write "[[A>B]]" (`brackets`), begin
with the verdict (`first_line`) or give numbers (`scores`). All reading takes time linear in the
text. Whatever cannot be read is no verdict, and no verdict is a wrong one.

References:
  MSRL, arXiv:2603.25108. The forms and the accuracy and format rewards are those of the released
  code, the task reward also of the paper. Not from either: what `mode="strict"` asks for beyond
  the released code, and that ties can be allowed.
"""

import dataclasses
import re
from collections.abc import Mapping

STAGES = {
    "text": ("think", "answer"),
    "caption": ("type", "think", "answer"),
    "media": ("type", "caption", "think", "answer"),
}
TASKS = ("image understanding", "image generation", "video understanding", "video generation")
CHOICES = ("A", "B")
# Of the parts of `agreement`. The paper's weight of the format is not known; 0.2 is that of the
# released scripts. There the task's 0.2 is multiplied by 0.2 once more, which "released" repeats.
WEIGHTS = {
    "paper": {"accuracy": 1.0, "format": 0.2, "task": 0.2},
    "released": {"accuracy": 1.0, "format": 0.2, "task": 0.04},
}

_TAG = re.compile(r"<(/?)(think|answer|type|caption)>", re.IGNORECASE | re.ASCII)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A judge's answer, read.

    Attributes:
      verdict: One of the choices, or None.
      blocks: {tag: its text, stripped} of the tags that are there; of a tag that is there more than
        once, the first.
      fault: None if the answer keeps its form, else the first way in which it does not.
    """

    verdict: str | None
    blocks: Mapping[str, str]
    fault: str | None


def parse(text, *, stage="text", mode="strict", choices=CHOICES):
    """Reads a judge's answer.

    "strict": tags are plain, in any case, and not nested; what stands inside a block is that
    block's, so a verdict in the thinking is none, nor is one after thinking that never ends. There
    is a verdict if there is exactly one answer block outside of other blocks and it holds a choice
    and nothing else, in either case. The form is kept if the blocks are those of the stage, in
    order, each once, none of them empty, with only white space around them, and there is a verdict.

    "released" reads as the released code does: the verdict is the text of the first answer block,
    or of the whole answer if there is none or it is empty; the form is kept if there are a thinking
    and an answer block anywhere. So a bare "A" is a verdict, and of two verdicts the first counts.

    Args:
      text: The whole answer.
      stage: "text", "caption" or "media".
      mode: "strict" or "released".
      choices: What a verdict can be; ("A", "B", "tie") allows ties.

    Returns:
      Judgement.

    Raises:
      ValueError: for an unknown stage or mode.
    """
    _check(stage, mode)
    if mode == "released":
        blocks = {tag: _first(text, tag) for tag in ("type", "caption", "think", "answer")}
        blocks = {tag: block for tag, block in blocks.items() if block is not None}
        missing = [tag for tag in ("think", "answer") if tag not in blocks]
        fault = f"no <{missing[0]}> block" if missing else None
        return Judgement(_choice(blocks.get("answer") or text, choices), blocks, fault)
    found, fault = _blocks(text)
    answers = [block for tag, block in found if tag == "answer"]
    verdict = _choice(answers[0], choices) if len(answers) == 1 else None
    order, expected = tuple(tag for tag, _ in found), STAGES[stage]
    if fault is None and order not in (expected, tuple(t for t in expected if t != "caption")):
        fault = f"has the blocks {', '.join(order) or 'none'} in place of {', '.join(expected)}"
    empty = [tag for tag, block in found if not block]
    if fault is None and empty:
        fault = f"<{empty[0]}> is empty"
    if fault is None and verdict is None:
        fault = f"the answer is not one of {', '.join(choices)}"
    return Judgement(verdict, dict(reversed(found)), fault)


def agreement(prompt, answer, record, *, stage="text", mode="strict", choices=CHOICES):
    """Rewards of a judge's answer: r = Σ_k w_k r_k, with w in `WEIGHTS` and every r_k in {0, 1}.

    Args:
      prompt: Not read.
      answer: The judge's whole answer.
      record: `label`, the right choice in the order that was shown; `task_type` (stages "caption"
        and "media"), which replayed text samples lack: their form is that of "text" and their task
        reward 0.
      stage, mode, choices: As `parse`.

    Returns:
      dict: `accuracy`, 1 if the verdict is the label; `format`, 1 if the form is kept; `read`, 1 if
      there is a verdict at all, right or wrong, also in a broken form, which `WEIGHTS` do not pay
      for; in the stages with a type also `task`, 1 if that is named, where "_" and "-" count as
      spaces. Right verdicts are read, and in mode "strict" so are those in form.

    Raises:
      ValueError: if the label is missing or no choice, or the task, stage or mode is unknown.

    References:
      MSRL: released code for accuracy and format, paper and code for the task. The released code
      compares the whole answer with the task where there is no type; so does mode "released".
      `read` is ours, for measuring.
    """
    del prompt
    _check(stage, mode)  # a sample without a task is read as "text", whatever the stage
    label, task = _choice(str(record.get("label")), choices), record.get("task_type")
    if label is None:
        raise ValueError(
            f"record['label'] must be one of {', '.join(choices)}; received {record.get('label')!r}"
        )
    if task is not None and task_name(str(task)) not in TASKS:
        raise ValueError(
            f"record['task_type'] must be one of {', '.join(TASKS)}; received {task!r}"
        )
    judgement = parse(answer, stage="text" if task is None else stage, mode=mode, choices=choices)
    parts = {
        "accuracy": float(judgement.verdict == label),
        "format": float(judgement.fault is None),
        "read": float(judgement.verdict is not None),
    }
    if stage != "text":
        named = judgement.blocks.get("type") or (answer if mode == "released" else "")
        parts["task"] = float(task is not None and task_name(named) == task_name(task))
    return parts


def render(verdict, think, *, task=None, caption=None):
    """Writes an answer in the form that `parse` reads, for supervised training.

    Args:
      verdict: "A", "B" or another choice.
      think: The rationale.
      task: One of `TASKS` for a type block, or None.
      caption: Text of a caption block, or None.

    Returns:
      The text.

    Raises:
      ValueError: if a block is empty or holds a tag of the form, which could not be read back.
    """
    blocks = {"type": task, "caption": caption, "think": think, "answer": verdict}
    blocks = {tag: block.strip() for tag, block in blocks.items() if block is not None}
    for tag, block in blocks.items():
        inside = _TAG.search(block)
        if inside or not block:
            held = f"holds {inside[0]}" if inside else "is empty"
            raise ValueError(f"the text of <{tag}> {held}; leave this sample out or clean it")
    return "\n".join(f"<{tag}>\n{block}\n</{tag}>" for tag, block in blocks.items())


def task_name(text):
    """A task's name in lower case with single spaces: "Image_Generation" -> "image generation"."""
    return " ".join(text.lower().replace("_", " ").replace("-", " ").split())


def swapped(verdict):
    """The same verdict with A and B in the other order; a tie and None stay as they are."""
    return {"A": "B", "B": "A"}.get(verdict, verdict)


def brackets(text):
    """Reads verdicts such as "[[A>>B]]", "[[B]]" or "[[A=B]]", anywhere in the text.

    Args:
      text: The whole answer. Verdicts that differ in anything are none, as JudgeBench has it.

    Returns:
      "A", "B", "tie" or None. Ties are also "[[C]]", of MT-Bench, and "[[A=B=Good]]" and
      "[[A=B=Bad]]", of GenAI-Bench.
    """
    found = {match[1] for match in re.finditer(r"\[\[([ABC<>=]{1,4}|A=B=(?:Good|Bad))\]\]", text)}
    mark = found.pop() if len(found) == 1 else ""
    if re.fullmatch("A>{1,2}B|B<{1,2}A|A", mark):
        return "A"
    if re.fullmatch("B>{1,2}A|A<{1,2}B|B", mark):
        return "B"
    return "tie" if mark == "C" or mark.startswith(("A=B", "B=A")) else None


def first_line(text, *, choices=("1", "2", "tie")):
    """Reads a verdict that stands alone in the first line, with the reasons after it.

    Args:
      text: The whole answer. choices: What a verdict can be, in either case.

    Returns:
      (one of the choices or None, the rest stripped).

    References:
      SageLM: "1", "2" or "Tie", a line end, and the rationale.
    """
    head, _, rest = text.strip().partition("\n")
    return _choice(head, choices), rest.strip()


_NAME = re.compile(
    r"(?:assistant|response|answer|model)[ \t]{0,4}(?:[0-9]\b|[AB]\b)", re.IGNORECASE
)
_NUMBER = re.compile(r"(?<![0-9.])-?[0-9]{1,6}(?:\.[0-9]{1,6})?(?![0-9])")
_OUT_OF = re.compile(r"[ \t]{0,4}(?:/|out of)[ \t]{0,4}[0-9]{1,6}", re.IGNORECASE)


def scores(text, count, *, low=1.0, high=10.0):
    """Reads the numbers that a judge gives to `count` responses, in order.

    The first line with a number must hold exactly `count` of them. Names such as "Assistant 1" are
    no numbers, nor is the 10 of "8/10".

    Args:
      text: The whole answer. count: How many responses there were. low, high: The scale.

    Returns:
      tuple of `count` floats; None if they are not there or off the scale.

    References:
      RM-Distiller, arXiv:2601.14032, released code, which takes any first numbers, also those of
      names, clamps to the scale, and puts (0, 0) or 8 where it reads none.
    """
    for line in text.splitlines():
        found = _NUMBER.findall(_OUT_OF.sub(" ", _NAME.sub(" ", line)))
        if found:
            values = tuple(map(float, found))
            fits = len(values) == count and all(low <= value <= high for value in values)
            return values if fits else None
    return None


def _check(stage, mode):
    if stage not in STAGES or mode not in ("strict", "released"):
        raise ValueError(
            f"expected stage {', '.join(STAGES)} and mode strict or released; received "
            f"{stage!r} and {mode!r}"
        )


def _choice(text, choices):
    # Only ASCII: "ı".upper() is "I", and a Cyrillic A is no A.
    text = text.strip()
    named = {choice.upper(): choice for choice in choices}
    return named.get(text.upper()) if text.isascii() else None


def _blocks(text):
    """([(tag, text)] in order, the first fault or None), outermost blocks only, in one pass."""
    blocks, fault, inside, end = [], None, None, 0
    for match in _TAG.finditer(text):
        closes, tag = bool(match[1]), match[2].lower()
        if inside is None:
            if text[end : match.start()].strip():
                fault = fault or "text outside the tags"
            if closes:
                fault = fault or f"{match[0]} closes nothing"
            else:
                inside = tag
            end = match.end()
        elif closes and tag == inside:
            blocks.append((tag, text[end : match.start()].strip()))
            inside, end = None, match.end()
        else:
            fault = fault or f"{match[0]} inside <{inside}>"
    if inside is not None:
        fault = fault or f"<{inside}> is not closed"
    elif text[end:].strip():
        fault = fault or "text outside the tags"
    return blocks, fault


def _first(text, tag):
    """The first block of a tag wherever it stands, or None: what re.search with `<tag>(.*?)</tag>`
    over lines gives, without its quadratic time on tags that are never closed."""
    opens = re.search(f"<{tag}>", text, re.IGNORECASE)
    if opens is None:
        return None
    closes = re.compile(f"</{tag}>", re.IGNORECASE).search(text, opens.end())
    return None if closes is None else text[opens.end() : closes.start()].strip()
