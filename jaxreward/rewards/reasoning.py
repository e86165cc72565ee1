r"""Answers to reasoning_gym's tasks, scored by the tasks' own scorers (package reasoning-gym, extra
`real`).

Some of these scorers hand what they score to Python's `eval` or to sympy's `parse_expr`, which is
`eval` too, so an answer could run code or take all memory. Those tasks are listed here, and their
answers are read with `ast` first: what is no literal, or no small formula, scores 0 and is never
evaluated. So are the parts of records that scorers evaluate. Other scorers can be made to take
long: run them under a time limit.
"""

import ast
import functools
import json
import re
from collections.abc import Mapping
from fractions import Fraction

from jaxreward.rewards import math_answer

FORMS = ("auto", "tag", "boxed", "line")

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

# What scorers evaluate as Python: of the answer, and of the record.
_LITERALS = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
_FORMULAS = {
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
}
_OF_RECORD = {
    "bitwise_arithmetic": lambda entry: entry["metadata"]["problem"],
    "intermediate_integration": lambda entry: entry["metadata"]["integrand"],
    "number_sorting": lambda entry: entry["answer"],
    "polynomial_multiplication": lambda entry: entry["answer"],
    "simple_integration": lambda entry: entry["metadata"]["integrand"],
}
_EXPONENTS = _FORMULAS | {"coin_flip"}  # 1e999999999 becomes an integer of as many digits
_REPEATS = {"rubiks_cube", "rush_hour"}  # which make F1000000000 as many moves
_NOT_A_NUMBER = {"complex_arithmetic"}  # whose distance to nan counts as none
_PREFIXES = {"coin_flip"}  # whose scorer gives full marks to the first digit, "0" for 0.25
_ANYTHING = {"game_of_life_halting"}  # whose scorer gives full marks to any text
_LONGEST = 20_000  # characters of an answer beyond twice the reference
_BOARDS = {"arc_agi", "rearc"}  # whose boards are tuples, which JSON makes lists

_FUNCTIONS = (
    "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log ln sqrt Abs erf Si Ci Ei pi"
)
_NAMES = frozenset(_FUNCTIONS.split())
_LARGEST = 1 << 20
_OPERATORS = (
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.Pow,
    ast.LShift,
    ast.RShift,
    ast.UAdd,
    ast.USub,
)
# What scorers raise on answers they cannot read.
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def extract(text, form="auto"):
    r"""The final answer of a text.

    Args:
      text: A model's whole answer; of one that thinks, only what follows "</think>" counts.
      form: "tag" is the last <answer>…</answer>, "boxed" the last \boxed{}, "line" the last line
        that is not empty; "auto" is the first of these that there is.

    Returns:
      (answer, form): str, stripped, and the form it was found in; (None, "none") if there is none.

    Raises:
      ValueError: for another form.
    """
    if form not in FORMS:
        raise ValueError(f"extract takes form {', '.join(map(repr, FORMS))}; received {form!r}")
    text = math_answer.answer_part(text)
    if form in ("auto", "tag"):
        tags = _TAG.findall(text)
        if tags:
            return tags[-1].strip(), "tag"
    if form in ("auto", "boxed"):
        boxes = math_answer.boxed(text)
        if boxes:
            return re.sub(r"^\\text\s*\{([^{}]*)\}$", r"\1", boxes[-1][2]), "boxed"
    if form in ("auto", "line"):
        lines = text.split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), None)
        if last is not None:
            return last, "line"
    return None, "none"


def grade(prompt, answer, record, *, form="auto", partial=False):
    """Text reward: the score of the task's own scorer for the final answer.

    Args:
      prompt: Unused; part of the contract of text rewards.
      answer: The model's answer, str.
      record: From `data.corpora.reasoning_gym.generate`: task (reasoning_gym's name), answer (str
        or None), metadata and optionally config (dicts, or JSON).
      form: As in `extract`.
      partial: Let near misses count as their score; else only full marks count.

    Returns:
      dict of accuracy (1.0 for full marks, else 0.0; with `partial` the score), score (the
      scorer's, in [0, 1]) and format (1.0 if the answer was tagged or boxed, or in the form asked
      for).

    Raises:
      ImportError: without the package reasoning-gym.
      KeyError: for a record without a field, or an unknown task.
      ValueError: for a record whose fields are not those of its task, or hold code.
    """
    del prompt
    found, how = extract(answer, form)
    value = 0.0 if found is None else score(found, record)
    accuracy = value if partial else float(value >= 1.0)
    return {
        "accuracy": accuracy,
        "score": value,
        "format": float(how != "none" and (how != "line" or form == "line")),
    }


def score(answer, record):
    """The scorer's mark for a final answer.

    Args:
      answer: str, extracted.
      record: As in `grade`.

    Returns:
      float in [0, 1]; 0 for what the scorer cannot read, or what is not safe to be evaluated.

    Raises:
      ImportError, KeyError, ValueError: as `grade`.
    """
    task, entry, config = _entry(record)
    scorer = _scorer(task, config)
    _check_record(task, record, entry)
    own = entry["answer"] or ""
    if task in _ANYTHING:
        return float(answer.casefold() == own.casefold())
    if answer != own and (len(answer) > _LONGEST + 2 * len(own) or not _safe(task, answer)):
        return 0.0
    try:
        value = float(scorer(answer, entry))
    except _UNREADABLE as error:
        # Is it the answer that cannot be read, or the record?
        if entry["answer"] is not None:
            try:
                scorer(entry["answer"], entry)
            except _UNREADABLE:
                raise ValueError(
                    f"record {record.get('id', '?')!r} does not fit task {task!r}: scoring its own "
                    f"answer raises {type(error).__name__}: {error}"
                ) from error
        return 0.0
    if task in _PREFIXES and value >= 1.0 and abs(Fraction(answer) - Fraction(own)) > 1e-4:
        return 0.0
    return min(max(0.0, value), 1.0)  # in this order NaN becomes 0


def _entry(record):
    missing = [name for name in ("task", "answer", "metadata") if name not in record]
    if missing:
        raise KeyError(
            f"record {record.get('id', '?')!r} needs task, answer and metadata, as "
            f"data.corpora.reasoning_gym.generate makes them; it lacks {', '.join(missing)}"
        )
    fields = {}
    for name in ("metadata", "config"):
        value = record.get(name) or {}
        try:
            fields[name] = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(
                f"record {record.get('id', '?')!r}: {name} must be JSON: {error}"
            ) from error
        if not isinstance(fields[name], Mapping):
            raise ValueError(
                f"record {record.get('id', '?')!r}: {name} must be an object; received {value!r}"
            )
    # Scorers may write into what they are given.
    metadata = json.loads(json.dumps(fields["metadata"]))
    if record["task"] in _BOARDS and "output" in metadata:
        metadata["output"] = tuple(map(tuple, metadata["output"]))
    config = json.dumps(fields["config"], sort_keys=True)
    return record["task"], {"answer": record["answer"], "metadata": metadata}, config


@functools.lru_cache(maxsize=256)
def _scorer(task, config):
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ImportError(
            "scoring reasoning_gym's tasks needs the package reasoning-gym; install it with "
            "pip install 'jaxreward[real]'"
        ) from error
    if task not in DATASETS or task == "composite":
        raise KeyError(f"unknown task {task!r}; it must be one of reasoning_gym's, not composite")
    try:
        dataset = create_dataset(task, **{**json.loads(config), "seed": 0, "size": 1})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"task {task} does not take config {config}: {error}") from error
    return dataset.score_answer


def _check_record(task, record, entry):
    """Refuses a record with code where its scorer would run it."""
    if task not in _OF_RECORD:
        return
    try:
        text = _OF_RECORD[task](entry)
    except LookupError as error:
        raise ValueError(
            f"record {record.get('id', '?')!r} does not fit task {task!r}: "
            f"its metadata lacks {error}"
        ) from error
    if not (_literal(text) if task == "number_sorting" else _formula(text, _LARGEST)):
        raise ValueError(
            f"record {record.get('id', '?')!r} of task {task!r} holds {str(text)[:80]!r}, which "
            "its scorer would evaluate as Python; only literals and small formulas are"
        )


def _safe(task, answer):
    """Whether a scorer may be given this answer."""
    if task in _EXPONENTS and re.search(r"[\d.][eE][-+]?[\d_]{3}", answer):
        return False
    if task in _REPEATS and re.search(r"\d{4}", answer):
        return False
    if task in _NOT_A_NUMBER and re.search(r"nan|inf", answer, re.IGNORECASE):
        return False
    if task in _FORMULAS:
        return _formula(answer)
    return task not in _LITERALS or _literal(answer)


def _literal(text):
    """Whether text is a literal of Python, or plainly nothing that Python could evaluate."""
    try:
        ast.literal_eval(text)
    except SyntaxError:
        return not _parses(text)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _parses(text):
    try:
        ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        return False
    except (ValueError, MemoryError, RecursionError):
        return True
    return True


def _formula(text, bits=10_000):
    """Whether text is a small formula: numbers, letters, + - * / ** << >>, and known functions."""
    if len(text) > 2000:
        return False
    try:
        return _size(ast.parse(text.strip(), mode="eval").body) <= bits
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
        return False


def _size(node):
    """Upper bound of the bits of a formula's numbers; ValueError if it is more than a formula."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return max(1, int(abs(node.value)).bit_length())
    if isinstance(node, ast.Name) and (len(node.id) == 1 or node.id in _NAMES):
        return 1
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id in _NAMES and 1 <= len(node.args) <= 2:
            return max(map(_size, node.args))
        raise ValueError(f"{node.func.id}(…) is no part of a formula")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, _OPERATORS):
        return _size(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, _OPERATORS):
        left, right = _size(node.left), _size(node.right)
        if isinstance(node.op, ast.Pow):
            size = left * 2 ** min(right, 21)  # the right side is below 2 ** right
        elif isinstance(node.op, ast.LShift):
            size = left + 2 ** min(right, 21)
        elif isinstance(node.op, ast.RShift):
            size = left
        elif isinstance(node.op, ast.Mult | ast.Div):
            size = left + right
        else:
            size = max(left, right) + 1
        return min(size, _LARGEST + 1)
    raise ValueError(f"{type(node).__name__} is no part of a formula")
