"""A tiny world of overthinking: arithmetic whose traces go on checking after they have the answer.

A trace derives, states its answer, and then checks it m times, m geometric. It is made, not sampled
from a model, so where the reasoning anchor lies is known. Fine-tuning on such traces installs
overthinking in a small model; RL is then to remove it.

    prompt       7+5-3+6=?\\n<think>\\n
    completion   7+5=12\\n12-3=9\\n9+6=15\\nanswer is 15\\n\\n
                 wait\\n7+5=12\\n12-3=9\\n9+6=15\\nanswer is 15\\n\\n
                 </think>\\\\boxed{15}

Three kinds of problems, named by `subset`:

    easy    one sum or difference of two digits
    hard    four digits, three steps
    helps   a+b*c, which the traces first work out from left to right, wrongly, and correct when
            they check; who stops at the first answer is wrong

Texts are ASCII and completions shorter than 200 bytes, for models that read bytes: the numbers of
bytes here are then numbers of tokens. `reasoning_gym.split` holds problems out, by their keys.

Ours; the specification of APR (arXiv:2602.00760) is not public, and it trains on no such data.
"""

import functools
import itertools
import random

from jaxreward.rewards import math_answer

KINDS = ("easy", "hard", "helps")
LIMIT = 200  # bytes of a completion, exclusive
_DIGITS = range(1, 10)


@functools.cache
def _all(kind):
    """{key: expressions} of a kind; the key is blind to the order of what may be swapped."""
    found = {}
    if kind == "helps":
        for a, b, c in itertools.product(_DIGITS, _DIGITS[1:], _DIGITS[1:]):
            found.setdefault(f"{a}+{min(b, c)}*{max(b, c)}", []).append(f"{a}+{b}*{c}")
        return found
    size = 2 if kind == "easy" else 4
    for numbers in itertools.product(_DIGITS, repeat=size):
        for signs in itertools.product("+-", repeat=size - 1):
            terms = [numbers[0], *(n if s == "+" else -n for s, n in zip(signs, numbers[1:]))]
            if min(itertools.accumulate(terms)) < 0:
                continue
            key = "".join(f"{term:+d}" for term in sorted(terms, reverse=True))
            text = str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:])
            found.setdefault(key, []).append(text)
    return found


def derivation(expression, *, left_to_right=False):
    """Works an expression out.

    Args:
      expression: As `problems` makes them: "7+5-3+6" or "2+3*4".
      left_to_right: Whether a product waits for its turn, which is wrong.

    Returns:
      (text, value): a line a step and the statement of the answer, and the answer.
    """
    numbers = [int(run) for run in expression.replace("-", "+").replace("*", "+").split("+")]
    signs = [char for char in expression if char in "+-*"]
    lines = []

    def work(a, sign, b):
        value = a + b if sign == "+" else a - b if sign == "-" else a * b
        lines.append(f"{a}{sign}{b}={value}\n")
        return value

    if "*" in signs and not left_to_right:
        a, b, c = numbers
        value = work(a, "+", work(b, "*", c))
    else:
        value = numbers[0]
        for sign, number in zip(signs, numbers[1:]):
            value = work(value, sign, number)
    return f"{''.join(lines)}answer is {value}\n\n", value


def problems(kind, *, count, seed):
    """Draws distinct problems.

    Args:
      kind: "easy" (90 distinct), "hard" or "helps" (324).
      count: How many.
      seed: Of the draw.

    Returns:
      list of dict(id, prompt, answer, subset, key, derivation). `key` is the same for 7+5 and 5+7,
      and no two problems share one. `derivation` is the number of bytes of the shortest right
      reasoning in this world, an int; the others are str.

    Raises:
      KeyError: for another kind.
      ValueError: if there are fewer distinct problems than asked for.
    """
    if kind not in KINDS:
        raise KeyError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    known = _all(kind)
    if not 1 <= count <= len(known):
        raise ValueError(f"kind {kind} has {len(known)} distinct problems; count is {count}")
    rng = random.Random(seed)
    made = []
    for key in rng.sample(list(known), count):
        expression = rng.choice(known[key])
        text, value = derivation(expression)
        made.append(
            {
                "id": f"{kind}-{len(made)}",
                "prompt": f"{expression}=?\n<think>\n",
                "answer": str(value),
                "subset": kind,
                "key": key,
                "derivation": len(text),
            }
        )
    return made


def traces(problems, *, seed, stop=0.5, wavers=0.25, each=1):
    """Traces that overthink, as rows to fine-tune on.

    Every trace checks at least once, and after each check ends with probability `stop`; so the
    number of checks is geometric, cut to what fits into `LIMIT`. Traces of "helps" change their
    first answer at the first check. A share `wavers` of those goes back to the wrong answer once
    more and corrects it again, so that the first right answer is not yet the stable one.

    Args:
      problems: From `problems`, of any kinds.
      seed: Of the draw.
      stop: In (0, 1].
      wavers: Share of the traces of "helps", in [0, 1].
      each: Traces a problem.

    Returns:
      list of the problems' dicts with `completion` (str) and the ints `checks` (m) and `anchor`
      (bytes of the completion up to the end of the paragraph after which the answer stays).

    Raises:
      ValueError: for a share or probability out of range.
    """
    if not 0 < stop <= 1 or not 0 <= wavers <= 1:
        raise ValueError(
            f"traces needs 0 < stop <= 1 and 0 <= wavers <= 1; received stop {stop} and wavers "
            f"{wavers}"
        )
    rng = random.Random(seed)
    rows = []
    for problem, turn in itertools.product(problems, range(each)):
        expression = problem["prompt"].partition("=")[0]
        right, _ = derivation(expression)
        paragraphs = [right]
        if problem["subset"] == "helps":
            wrong, _ = derivation(expression, left_to_right=True)
            back = rng.random() < wavers
            paragraphs = [wrong, right] + [wrong, right] * back
        paragraphs = [paragraphs[0], *(f"wait\n{text}" for text in paragraphs[1:])]
        anchor = len("".join(paragraphs))
        end = f"</think>\\boxed{{{problem['answer']}}}"
        check = f"wait\n{right}"
        room = (LIMIT - 1 - anchor - len(end)) // len(check)
        more = _checks(rng, stop, least=int(len(paragraphs) == 1), most=room)
        rows.append(
            {
                **problem,
                "id": f"{problem['id']}-{turn}" if each > 1 else problem["id"],
                "completion": "".join(paragraphs) + check * more + end,
                "checks": len(paragraphs) - 1 + more,
                "anchor": anchor,
            }
        )
    return rows


def _checks(rng, stop, *, least, most):
    """least, least + 1, … with geometric chances, given that it is at most `most`."""
    chances = [stop * (1 - stop) ** i for i in range(most - least + 1)]
    return rng.choices(range(least, most + 1), chances)[0]


def check(problem, text):
    """Says whether an answer is right: what it ends up with after its thinking.

    Args:
      problem: From `problems` or `traces`.
      text: The whole answer.

    Returns:
      bool; False without exactly one "</think>".
    """
    if text.count("</think>") != 1:
        return False
    final, _ = math_answer.final_answer(text)
    return final is not None and math_answer.same(problem["answer"], final)
