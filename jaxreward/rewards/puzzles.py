"""Rewards of puzzles with exact checkers, and those of d1 and MRO for diffusion language models.

Answers come in one of two forms. "tags": reasoning in one block and the answer in another,

    <think> … </think> <answer> 3*5+7 </answer>

with the names of both tags free (d1 has <reasoning>). "plain": the whole text is the answer, as of
small models that read bytes. Nothing of an answer is ever run as code: expressions are read by a
grammar of their own, in exact fractions. All reading takes time linear in the text.

References:
  MRO, arXiv:2510.21473: the quality reward R_q, by its text. d1, arXiv:2504.12216: the other
  scales, from `diffu-grpo/reward_func.py` of dllm-reasoning/d1; its `boxed_in_answer` from a copy
  of `diffu-grpo/math500_utils.py` (sea-virtue/d1_for_mmada). `mode="released"` does what that code
  does where this is hardly meant.
"""

import functools
import re
from fractions import Fraction

from jaxreward.core import resolve
from jaxreward.rewards import math_answer

FORMS = ("tags", "plain")
MODES = ("strict", "released")
LONGEST = 200  # characters of an expression
DEEPEST = 20  # brackets inside brackets

_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])\s*", re.ASCII)


def request(think="think", tag="answer"):
    """The sentence that asks for the form which `in_form` looks for.

    Args:
      think, tag: Names of the tags around reasoning and answer.

    Returns:
      str.
    """
    return (
        f"Put your reasoning between <{think}> and </{think}>, and after it nothing but the final "
        f"answer between <{tag}> and </{tag}>."
    )


def extract(text, *, form="tags", tag="answer"):
    """The answer in a text.

    Args:
      text: A model's whole answer.
      form: "tags" takes the last block <tag>…</tag>, wherever it stands; "plain" the whole text.
      tag: Name of the tag.

    Returns:
      str, stripped; None if there is no closed block.

    Raises:
      ValueError: for another form.

    References:
      d1, `extract_solution` and `extract_answer_sudoku`. Of "<answer>1<answer>2</answer>" those
      take "1<answer>2", this takes "2".
    """
    _one_of("form", form, FORMS)
    if form == "plain":
        return text.strip()
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end].strip() if start >= 0 else None


def in_form(text, *, think="think", tag="answer"):
    """Whether a text is one block of reasoning and then one answer block, and nothing else.

    Args:
      text: A model's whole answer.
      think, tag: Names of the tags.

    Returns:
      bool: each of the four tags stands there once, in order; neither block is empty; around and
      between them is only white space.
    """
    rest, parts = text, []
    for mark in (f"<{think}>", f"</{think}>", f"<{tag}>", f"</{tag}>"):
        before, found, rest = rest.partition(mark)
        if not found or text.count(mark) != 1:
            return False
        parts.append(before.strip())
    lead, reasoning, between, answer = parts
    return bool(reasoning and answer) and not (lead or between or rest.strip())


class _NotAnExpression(Exception):
    pass


def evaluate(text):
    """Works an arithmetic expression out, exactly.

    The grammar: integers in ASCII digits without leading zeros, + - * /, signs in front, round
    brackets, white space between. No powers, //, decimals, letters or equals signs.

    Args:
      text: The expression, of at most `LONGEST` characters and `DEEPEST` brackets in brackets.

    Returns:
      (value, numbers): Fraction, and the integers in the order they stand, list of int. The value
      is None where something is divided by zero. (None, None) if the text is no such expression.
    """
    tokens, end = [], 0
    while end < len(text) <= LONGEST:
        match = _TOKEN.match(text, end)
        if match is None or (match[1] > "0" and match[1].startswith("0")):
            return None, None
        tokens.append(match[1])
        end = match.end()
    numbers = [int(token) for token in tokens if token.isdigit()]
    tokens.reverse()  # so that the next one is popped from the end
    try:
        value = _sum(tokens, 0)
    except _NotAnExpression:
        return None, None
    return (None, None) if tokens else (value, numbers)


def _sum(tokens, depth):
    value = _product(tokens, depth)
    while tokens and tokens[-1] in "+-":
        value = _apply(tokens.pop(), value, _product(tokens, depth))
    return value


def _product(tokens, depth):
    value = _signed(tokens, depth)
    while tokens and tokens[-1] in "*/":
        value = _apply(tokens.pop(), value, _signed(tokens, depth))
    return value


def _signed(tokens, depth):
    negative = False
    while tokens and tokens[-1] in "+-":
        negative ^= tokens.pop() == "-"
    token = tokens.pop() if tokens else ""
    if token.isdigit():
        value = Fraction(int(token))
    elif token == "(" and depth < DEEPEST:
        value = _sum(tokens, depth + 1)
        if not tokens or tokens.pop() != ")":
            raise _NotAnExpression
    else:
        raise _NotAnExpression
    return -value if negative and value is not None else value


def _apply(sign, a, b):
    if a is None or b is None or (sign == "/" and b == 0):
        return None
    return a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b


def countdown(prompt, answer, record, *, form="tags", tag="answer", mode="strict"):
    """Text reward of Countdown: 1 for the target, 0.1 for an attempt, else 0.

    Args:
      prompt: Not read.
      answer: The model's whole answer.
      record: `numbers` (list of int) and `target` (int), as of `data.corpora.countdown`.
      form, tag: As `extract`.
      mode: What else earns 0.1: "strict" pays an expression that uses exactly the numbers,
        "released" anything in an answer block, wrong numbers and words too.

    Returns:
      dict of accuracy (1.0 if an expression uses each number exactly once and has the target as its
      value), attempt (1.0 if it uses them, whatever its value) and reward.

    Raises:
      KeyError: if the record lacks a field.
      ValueError: for an unknown form or mode, or a record whose fields are of another type.

    References:
      d1, `compute_score`, which is mode "released". It evaluates with Python in floating point, to
      1e-5, and so also takes 7//2, 2**3 and 1.5 (as the numbers 1 and 5), which here are no
      expressions.
    """
    del prompt
    _one_of("mode", mode, MODES)
    numbers, target = _fields(record, "numbers", "target")
    if not isinstance(numbers, list | tuple) or not all(map(_whole, (*numbers, target))):
        raise ValueError(
            f"{_named(record)}: numbers must be a list of int and target an int; received "
            f"{numbers!r} and {target!r}"
        )
    found = extract(answer, form=form, tag=tag)
    value, used = (None, None) if found is None else evaluate(found)
    attempt = used is not None and sorted(used) == sorted(numbers)
    accuracy = attempt and value == target
    paid = attempt or (mode == "released" and found is not None)
    return {
        "accuracy": float(accuracy),
        "attempt": float(attempt),
        "reward": 1.0 if accuracy else 0.1 * paid,
    }


def sudoku(prompt, answer, record, *, form="tags", tag="answer"):
    """Text reward of Sudoku: the share of the blank cells that are right.

    Of the answer only the digits are read, so "12 34 | …" is as good as "1234…". For the reward a
    short answer is wrong where it has ended, and what is beyond the last cell is not looked at. A
    given that was changed costs nothing there, but `givens` and `accuracy` do see it.

    Args:
      prompt: Not read.
      answer: The model's whole answer.
      record: `puzzle` (str of digits, 0 for blank) and `solution` (str of as many digits).
      form, tag: As `extract`.

    Returns:
      dict of accuracy (1.0 if the digits are the solution, no more and no less), givens (1.0 if
      every given stands where it stood) and reward, in [0, 1].

    Raises:
      KeyError: if the record lacks a field.
      ValueError: for an unknown form, or fields that are no puzzle with at least one blank cell.

    References:
      d1, `validate_sudoku_solution`, whose reward this is; accuracy and givens are ours.
    """
    del prompt
    puzzle, solution = _fields(record, "puzzle", "solution")
    texts = isinstance(puzzle, str) and isinstance(solution, str)
    if not texts or len(puzzle) != len(solution) or "0" not in puzzle:
        raise ValueError(
            f"{_named(record)}: puzzle and solution must be digits, as many in both, and 0 in the "
            f"blank cells of the puzzle; received {puzzle!r} and {solution!r}"
        )
    found = extract(answer, form=form, tag=tag) or ""
    digits = "".join(re.findall("[0-9]+", found))
    cells = list(zip(puzzle, solution, digits.ljust(len(puzzle), "0")))
    blanks = [right == cell for given, right, cell in cells if given == "0"]
    return {
        "accuracy": float(digits == solution),
        "givens": float(all(given in ("0", cell) for given, _, cell in cells)),
        "reward": sum(blanks) / len(blanks),
    }


def paired(prompt, answer, record, *, form="plain", tag="answer"):
    """Text reward of the paired tokens: the share of pairs whose two tokens agree.

    Args:
      prompt: Not read.
      answer: The model's whole answer; right are "aa", "bbaa", ….
      record: `pairs` (int), as of `data.corpora.paired`.
      form, tag: As `extract`.

    Returns:
      dict of accuracy (1.0 if the answer has that many pairs of a and b, and no pair disagrees) and
      reward, in [0, 1].

    Raises:
      KeyError: if the record lacks the field.
      ValueError: for an unknown form, or a number of pairs below 1.
    """
    del prompt
    (pairs,) = _fields(record, "pairs")
    if not _whole(pairs) or pairs < 1:
        raise ValueError(f"{_named(record)}: pairs must be an int, at least 1; received {pairs!r}")
    found = extract(answer, form=form, tag=tag) or ""
    agree = sum(found[2 * i : 2 * i + 2] in ("aa", "bb") for i in range(pairs))
    return {
        "accuracy": float(agree == pairs and len(found) == 2 * pairs),
        "reward": agree / pairs,
    }


def final(prompt, answer, record, *, form="tags", tag="answer"):
    r"""Text reward: is the tagged answer the reference, in whatever dress.

    Args:
      prompt: Not read.
      answer: The model's whole answer. Of the tagged text the last \boxed{} counts, if it has one.
      record: `answer`, as `math_answer.reference` reads it: a number, formula, option letter.
      form, tag: As `extract`.

    Returns:
      dict of accuracy: 1.0 if both are one by `math_answer.same`.

    Raises:
      KeyError: if the record has no answer.
      ValueError: for an unknown form.
    """
    del prompt
    gold, found = math_answer.reference(record), extract(answer, form=form, tag=tag)
    return {"accuracy": float(found is not None and math_answer.same(gold, _unboxed(found)))}


def _unboxed(text):
    boxes = math_answer.boxed(text)
    return boxes[-1][2] if boxes else text


def quality(
    prompt,
    answer,
    record,
    *,
    check,
    acc_weight=1.0,
    format_weight=1.0,
    think="think",
    tag="answer",
):
    """MRO's reward of a finished answer: R_q = a 1[correct] + b 1[format].

    Args:
      prompt: Handed to the check.
      answer: The model's whole answer.
      record: What the check needs.
      check: Name of the text reward that says what is correct, by its `accuracy` (at least 1 is
        correct): "puzzles.countdown", "puzzles.sudoku", "puzzles.final", "math_answer.grade", or
        "package.module:function". It must take `tag` if that is not "answer".
      acc_weight, format_weight: a and b.
      think, tag: As `in_form`.

    Returns:
      dict of accuracy and format, in {0, 1}, and reward = R_q.

    Raises:
      KeyError: for an unknown check, one without `accuracy`, or a record that lacks its fields.
      ValueError: if the check does not take `tag`.

    References:
      MRO, quality reward. The paper names the two terms; a = b = 1 and what the form is in detail
      are ours.
    """
    parts = _check(check, tag)(prompt, answer, record)
    parts = parts if isinstance(parts, dict) else {"accuracy": parts}
    if "accuracy" not in parts:
        raise KeyError(
            f"check {check!r} must give a part named accuracy; it gives {', '.join(parts)}"
        )
    accuracy = float(parts["accuracy"] >= 1.0)
    form = float(in_form(answer, think=think, tag=tag))
    reward = acc_weight * accuracy + format_weight * form
    return {"accuracy": accuracy, "format": form, "reward": float(reward)}


@functools.lru_cache(maxsize=64)
def _check(name, tag):
    return resolve.resolve("rewards", name, **({} if tag == "answer" else {"tag": tag}))


def gsm8k(prompt, answer, record, *, think="reasoning", tag="answer"):
    r"""d1's reward for GSM8K: 2 accuracy + 0.5 integer + 0.5 soft + 0.5 strict + marks.

    Args:
      prompt: Not read.
      answer: The model's whole answer. What follows its last <tag> is the answer, up to </tag>;
        without one the whole text is.
      record: `answer`, as `math_answer.reference` reads it.
      think, tag: Names of the tags.

    Returns:
      dict of accuracy (1.0 if the answer is the reference, letter for letter), integer (1.0 if
      it is nothing but digits), soft (1.0 if the text begins with both blocks, one after the
      other), strict (1.0 if it is both blocks, each tag on a line of its own, and ends with a line
      end), marks (0.125 for each tag that stands once with its line ends, less 0.001 for each
      character after the last; it can be negative) and reward, the sum above.

    Raises:
      KeyError: if the record has no answer.

    References:
      d1, `correctness_reward_func`, `int_reward_func`, `soft_format_reward_func`,
      `strict_format_reward_func` and `count_xml`, term by term; digits are only ASCII's here. As
      there, an answer block that opens but does not close pays for its whole text.
    """
    del prompt
    found = answer.rpartition(f"<{tag}>")[2].partition(f"</{tag}>")[0].strip()
    parts = {
        "accuracy": float(found == math_answer.reference(record).strip()),
        "integer": float(found.isascii() and found.isdigit()),
        "soft": float(_soft(answer, think, tag)),
        "strict": float(_strict(answer, think, tag)),
        "marks": _marks(answer, think, tag),
    }
    paid = parts["integer"] + parts["soft"] + parts["strict"]
    return {**parts, "reward": 2.0 * parts["accuracy"] + 0.5 * paid + parts["marks"]}


def _soft(text, think, tag):
    # As re.match of "<think>.*?</think>\s*<answer>.*?</answer>" over lines, in one pass.
    between = re.compile(rf"</{re.escape(think)}>\s*<{re.escape(tag)}>")
    middle = between.search(text, len(think) + 2)
    return (
        text.startswith(f"<{think}>")
        and middle is not None
        and text.find(f"</{tag}>", middle.end()) >= 0
    )


def _strict(text, think, tag):
    start, middle, close = f"<{think}>\n", f"\n</{think}>\n<{tag}>\n", f"\n</{tag}>\n"
    at = text.find(middle, len(start))
    end = text[:-1] if text.endswith(f"{close}\n") else text  # "$" of re looks over a last line end
    return (
        text.startswith(start)
        and at >= 0
        and end.endswith(close)
        and at + len(middle) <= len(end) - len(close)
    )


def _marks(text, think, tag):
    value = 0.125 * (text.count(f"<{think}>\n") == 1) + 0.125 * (text.count(f"\n</{think}>\n") == 1)
    close = f"\n</{tag}>"
    if text.count(f"\n<{tag}>\n") == 1:
        value += 0.125 - 0.001 * len(text.split(f"{close}\n")[-1])
    if text.count(close) == 1:
        value += 0.125 - 0.001 * (len(text.split(close)[-1]) - 1)
    return value


def math(prompt, answer, record, *, tag="answer", mode="strict"):
    r"""d1's reward for MATH: 2 accuracy + format.

    Args:
      prompt: Not read.
      answer: The model's whole answer. Its last \boxed{} is the answer; without one the whole is.
      record: `answer`, as `math_answer.reference` reads it.
      tag: Name of the tag.
      mode: "released" finds no \boxed anywhere, since that code looks for a backspace and "oxed";
        its format is 0.75 or 0.25.

    Returns:
      dict of accuracy (1.0 if the answer is the reference by `math_answer.same`), format (1.0 for
      an answer block with \boxed in it, 0.75 for one without, 0.5 for \boxed and no block, 0.25
      for neither) and reward, the sum above.

    Raises:
      KeyError: if the record has no answer.
      ValueError: for an unknown mode.

    References:
      d1, `correctness_reward_func_math` and `boxed_and_answer_tags_format_reward`, half of
      `boxed_in_answer`. A block need not be closed there, nor here. Equality is by a list of
      spellings there, `math_answer.canonical` here.
    """
    del prompt
    _one_of("mode", mode, MODES)
    blocks = answer.split(f"<{tag}>")
    place = blocks[1].partition(f"</{tag}>")[0] if len(blocks) > 1 else answer
    box = "\x08oxed" if mode == "released" else "\\boxed"
    form = 0.5 * (len(blocks) > 1) + (0.5 if box in place else 0.25)
    accuracy = float(math_answer.same(math_answer.reference(record), _unboxed(answer)))
    return {"accuracy": accuracy, "format": form, "reward": 2.0 * accuracy + form}


def _one_of(word, value, known):
    if value not in known:
        raise ValueError(f"{word} must be {' or '.join(map(repr, known))}; received {value!r}")


def _fields(record, *names):
    missing = [name for name in names if record.get(name) is None]
    if missing:
        raise KeyError(
            f"{_named(record)} needs {', '.join(names)}; it lacks {', '.join(missing)} and has "
            f"{', '.join(map(str, record)) or 'no fields'}"
        )
    return [record[name] for name in names]


def _named(record):
    return f"record {record.get('id', '?')!r}"


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool)
