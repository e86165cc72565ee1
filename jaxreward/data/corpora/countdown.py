r"""Countdown: reach a target with each of the given numbers once, by + - * /.

`problems` makes them, `solutions` solves them, `prompts` reads the public files. An answer is one
expression; `rewards.puzzles.countdown` checks it.

    form "plain"    3 5 7 -> 22\n           for small models that read bytes
    form "tags"     an instruction; reasoning and answer are to stand between tags

The same numbers in another order with the same target are the same problem: `key` says so, and
`reasoning_gym.split` holds problems out by it.

Data, in three forms that are told apart by their fields:
  - HKUNLP/diffusion-vs-ar (Ye et al. 2024, arXiv:2410.14157): `input`, "15,44,79,50", whose last
    number is the target, and `output`, the steps "44-15=29,79-29=50". From other people's readers
    of these files; the repository itself could not be read.
  - d1's `dataset/countdown_cd3_test.jsonl` (arXiv:2504.12216): `input`, "30,100,93", the numbers
    alone, and `output`, "23", the target. From a copy of the file (sea-virtue/d1_for_mmada).
  - Jiayi-Pan/Countdown-Tasks-3to4: `nums` (list of int) and `target` (int), 3 or 4 numbers. From
    d1's `diffu-grpo/data_utils.py`.
We found no licence for any of the three. Some of d1's test problems are said to be among those of
Countdown-Tasks-3to4: compare by `key` before training on the one and testing on the other.

*Unverified: the first and the third are not yet run on the real files.*
"""

import itertools
import random
import re
from fractions import Fraction

from jaxreward.data import formats, sources
from jaxreward.rewards import puzzles

MOST = 5  # numbers that `solutions` takes; with 5 it visits some 200 000 expressions

_STEP = re.compile(r"(\d{1,9})([-+*/])(\d{1,9})=(\d{1,9})")
# How tightly an expression holds together, from sums to single numbers.
_SUM, _PRODUCT, _ATOM = range(3)
_BINDS = {"+": _SUM, "-": _SUM, "*": _PRODUCT, "/": _PRODUCT}


def prompt(numbers, target, *, form="plain", think="think", tag="answer"):
    """What a model is asked.

    Args:
      numbers: list of int.
      target: int.
      form: "plain" or "tags".
      think, tag: Names of the tags.

    Returns:
      str.

    Raises:
      ValueError: for another form.
    """
    if form == "plain":
        return f"{' '.join(map(str, numbers))} -> {target}\n"
    if form != "tags":
        raise ValueError(f"form must be 'plain' or 'tags'; received {form!r}")
    return (
        f"The numbers are {', '.join(map(str, numbers))}. Write an expression whose value is "
        f"{target}. Use each of the numbers exactly once, with +, -, *, / and round brackets. "
        f"{puzzles.request(think, tag)} The answer is the expression alone, without an equals sign."
    )


def key(numbers, target):
    """Names a problem, whatever the order of its numbers: "3,5,7=22"."""
    return f"{','.join(map(str, sorted(numbers)))}={target}"


def problems(
    count,
    *,
    seed,
    numbers=3,
    largest=9,
    target=(1, 99),
    form="plain",
    think="think",
    tag="answer",
):
    """Draws distinct problems that have a solution.

    Numbers are uniform. A solution joins two parts at random until one is left; every part of
    it is an integer that is not negative. Targets outside of the range are thrown away.

    Args:
      count: How many.
      seed: Of the draw.
      numbers: How many numbers a problem has, at least 2.
      largest: Of the numbers; the smallest is 1.
      target: Least and largest target.
      form, think, tag: As `prompt`.

    Returns:
      list of dict(id, prompt, answer, numbers, target, key): answer is one solution, str; numbers
      list of int, in the order of the prompt; target int; no two problems share a key.

    Raises:
      ValueError: for arguments out of range, or if too few distinct problems were drawn.
    """
    if count < 1 or numbers < 2 or largest < 1:
        raise ValueError(
            "problems needs count >= 1, numbers >= 2 and largest >= 1; received count "
            f"{count}, numbers {numbers} and largest {largest}"
        )
    low, high = target
    draws = 200 * count + 10_000
    rng, made = random.Random(seed), {}
    for _ in range(draws):
        drawn = [rng.randint(1, largest) for _ in range(numbers)]
        value, answer = _draw(rng, drawn)
        if value is None or not low <= value <= high or (name := key(drawn, value)) in made:
            continue
        made[name] = {
            "id": f"countdown-{len(made)}",
            "prompt": prompt(drawn, value, form=form, think=think, tag=tag),
            "answer": answer,
            "numbers": drawn,
            "target": value,
            "key": name,
        }
        if len(made) == count:
            return list(made.values())
    raise ValueError(
        f"{numbers} numbers up to {largest} with targets from {low} to {high} gave {len(made)} "
        f"distinct problems in {draws} draws; count is {count}; widen largest or target"
    )


def _draw(rng, numbers):
    """(value, expression) of a random tree over all numbers, or (None, "") where it has no exact
    one."""
    parts = [(number, str(number), _ATOM) for number in numbers]
    while len(parts) > 1:
        one, two = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        sign = rng.choice("+-*/")
        if sign in "-/" and one[0] < two[0]:
            one, two = two, one
        if sign == "/" and (two[0] == 0 or one[0] % two[0]):
            return None, ""
        value = one[0] // two[0] if sign == "/" else _value(one[0], sign, two[0])
        parts.append((value, *_text(one, sign, two)))
    return parts[0][:2]


def _value(a, sign, b):
    return a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b


def _text(one, sign, two):
    """(text, how tightly it binds) of two parts joined, with no more brackets than it takes."""
    (_, left, before), (_, right, after) = one, two
    binds = _BINDS[sign]
    if before < binds:
        left = f"({left})"
    if after < binds or (after == binds and sign in "-/"):
        right = f"({right})"
    return f"{left}{sign}{right}", binds


def solutions(numbers, target):
    """All solutions of a problem, found by trying everything in exact fractions.

    Parts may be negative or fractions, as in 8/(3-8/3). Of expressions that differ by the order of
    the two sides of a + or * only one is tried.

    Args:
      numbers: list of int, at most `MOST`.
      target: int.

    Returns:
      list of str, distinct, sorted; empty if there is none.

    Raises:
      ValueError: for no or too many numbers.
    """
    if not 1 <= len(numbers) <= MOST:
        raise ValueError(f"solutions takes 1 to {MOST} numbers; received {len(numbers)}")
    found = set()

    def join(parts):
        if len(parts) == 1:
            if parts[0][0] == target:
                found.add(parts[0][1])
            return
        for i, j in itertools.combinations(range(len(parts)), 2):
            rest = [part for k, part in enumerate(parts) if k not in (i, j)]
            one, two = parts[i], parts[j]
            for left, sign, right in (
                (one, "+", two),
                (one, "*", two),
                (one, "-", two),
                (two, "-", one),
                (one, "/", two),
                (two, "/", one),
            ):
                if sign != "/" or right[0] != 0:
                    value = _value(left[0], sign, right[0])
                    join([*rest, (value, *_text(left, sign, right))])

    join([(Fraction(number), str(number), _ATOM) for number in numbers])
    return sorted(found)


def prompts(rows, *, form="tags", think="think", tag="answer"):
    """Brings numbered rows of any of the three forms into that of `sources.read_prompts`.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.
      form, think, tag: As `prompt`.

    Returns:
      Iterator of the same, with fields prompt, numbers, target, key and, where the row has steps,
      steps; problems are held out by `key`.

    Raises:
      ValueError: for another form.
    """
    prompt([1], 1, form=form)  # a wrong word is no fault of the rows

    def convert(row):
        numbers, target, steps = _problem(row)
        name = key(numbers, target)
        made = {
            "id": row.get("id"),
            "prompt": prompt(numbers, target, form=form, think=think, tag=tag),
            "numbers": numbers,
            "target": target,
            "key": name,
            "held_out_by": name,
        }
        return {**made, "steps": steps} if steps else made

    return formats.mapped(rows, convert)


def _problem(row):
    """(numbers, target, steps or None) of a row. Raises `formats.Bad`."""
    if "nums" in row or "target" in row:
        for field in ("nums", "target"):
            if row.get(field) is None:
                raise formats.Bad("missing", field=field)
        numbers, target = row["nums"], row["target"]
        if not isinstance(numbers, list) or not numbers or not all(map(_natural, numbers)):
            raise formats.Bad(
                "must be a list of numbers from 0", field="nums", came=formats.show(numbers)
            )
        if not _natural(target):
            raise formats.Bad("must be int, from 0", field="target", came=formats.show(target))
        return numbers, target, None
    given, output = (sources.text_of(row, field) for field in ("input", "output"))
    if not isinstance(given, str) or not re.fullmatch(r"\d{1,9}(,\d{1,9})+", given, re.ASCII):
        raise formats.Bad(
            'must be numbers parted by commas, such as "15,44,79,50"',
            field="input",
            came=formats.show(given),
        )
    numbers = [int(number) for number in given.split(",")]
    if isinstance(output, str) and re.fullmatch(r"\d{1,9}", output, re.ASCII):
        return numbers, int(output), None
    target = numbers.pop()
    if not isinstance(output, str) or not _reaches(output, numbers, target):
        raise formats.Bad(
            "must be the target, or steps such as 44-15=29,79-29=50 that use each number once and "
            "end with the last number of the input",
            field="output",
            came=formats.show(output),
        )
    return numbers, target, output


def _reaches(steps, numbers, target):
    """Whether steps lead from the numbers to the target."""
    left = list(numbers)
    for step in steps.split(","):
        match = _STEP.fullmatch(step)
        if match is None:
            return False
        a, b, result = int(match[1]), int(match[3]), int(match[4])
        for used in (a, b):
            if used not in left:
                return False
            left.remove(used)
        if (match[2] == "/" and b == 0) or _value(Fraction(a), match[2], b) != result:
            return False
        left.append(result)
    return left == [target]


def _natural(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
