"""Problems with exact checkers, made by reasoning_gym's own generators (Apache-2.0).

`problems` draws from three sorts of arithmetic, of which it knows every distinct problem;
`generate` draws from any of reasoning_gym's tasks.

The generators draw item i of seed s from the random state s + i, so two nearby seeds give nearly
the same problems: separate training from evaluation with `split`, not with another seed.
"""

import difflib
import functools
import json
import random

from jaxreward.rewards.final_number import final_number

# Name -> (reasoning_gym data set, its digits, distinct keys, problems in both orders). With digits
# 0..9 there are 55 unordered and 100 ordered pairs, with 10..99 there are 4095 and 8100; chain_sum
# draws + and -.
_TASKS = {
    "chain_sum_1": ("chain_sum", (1, 1), 55 + 100, 200),
    "products_1": ("products", (1, 1), 55, 100),
    "chain_sum_2": ("chain_sum", (1, 2), 55 + 100 + 4095 + 8100, 200 + 16200),
}


@functools.cache
def _dataset(task, seed):
    import reasoning_gym

    name, (low, high), *_ = _TASKS[task]
    return reasoning_gym.create_dataset(
        name, seed=seed, size=1, min_terms=2, max_terms=2, min_digits=low, max_digits=high
    )


def _known(task):
    if task not in _TASKS:
        raise KeyError(f"unknown task {task!r}; known: {', '.join(_TASKS)}")


def problem_key(expression):
    """Names a problem up to the order of operands where that does not matter.

    Args:
      expression: "A op B", operands and operation parted by spaces.

    Returns:
      str, equal for "3 + 5" and "5 + 3", different for "3 - 5" and "5 - 3".
    """
    left, operation, right = expression.split(" ")
    if operation in "+*":
        left, right = sorted((left, right), key=int)
    return f"{left}{operation}{right}"


def problems(task, *, count, seed, both_orders=False):
    """Draws distinct problems.

    Args:
      task: "chain_sum_1" (a ± b, one digit; 155 distinct), "products_1" (a * b, one digit; 55) or
        "chain_sum_2" (a ± b, both one or both two digits; 12350).
      count: How many.
      seed: Of the generator; non-negative int.
      both_orders: Take 3 + 5 and 5 + 3 as two problems (with one key, so that `split` keeps them
        together); 200, 100 and 16400 are then distinct.

    Returns:
      list of dict(id, prompt, answer, task, key), all str. No two share a key, unless both
      orders are taken. The same problem has the same key in every task.

    Raises:
      KeyError: for an unknown task.
      ValueError: if the task has fewer distinct problems than asked for.
    """
    _known(task)
    distinct = _TASKS[task][3 if both_orders else 2]
    if not 1 <= count <= distinct:
        raise ValueError(f"task {task} has {distinct} distinct problems; count is {count}")
    dataset, drawn, index = _dataset(task, seed), {}, 0
    while len(drawn) < count:
        item = dataset[index]
        index += 1
        expression = item["metadata"]["expression"]
        key = problem_key(expression)
        name = expression if both_orders else key
        if name not in drawn:
            drawn[name] = {
                "id": f"{task}-{len(drawn)}",
                "prompt": item["question"],
                "answer": item["answer"],
                "task": task,
                "key": key,
            }
    return list(drawn.values())


def generate(task, *, count, seed, config=None):
    """Draws distinct problems of any of reasoning_gym's tasks, for `rewards.reasoning`.

    Args:
      task: reasoning_gym's name, such as "basic_arithmetic" or "knights_knaves". "composite", which
        mixes others, is not taken: draw from each and join the lists.
      count: How many.
      seed: Of the generator; non-negative int.
      config: Settings of the task, a dict such as {"min_terms": 2}, JSON values; None for its own.

    Returns:
      list of dict(id, prompt, answer, task, key, metadata, config), all str, the last two JSON.
      `answer` is None where the task has no one answer. `key` is the question, word for word, for
      `split`: what asks the same in other words counts as another problem.

    Raises:
      KeyError: for an unknown task; names near misses.
      ValueError: for settings the task does not take, or if it gives too few distinct problems.
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS or task == "composite":
        near = difflib.get_close_matches(str(task), DATASETS, n=3)
        raise KeyError(
            f"unknown task {task!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
            + f" reasoning_gym has {len(DATASETS) - 1}, listed in its GALLERY.md"
        )
    draws = 3 * count + 100
    try:
        dataset = create_dataset(task, **{**(config or {}), "seed": seed, "size": draws})
    except (TypeError, ValueError, AssertionError) as error:
        fields = [name for name in DATASETS[task][1].__dataclass_fields__ if name != "size"]
        raise ValueError(
            f"task {task} does not take config {config} ({error}); its settings are "
            f"{', '.join(fields)}"
        ) from error
    drawn = {}
    for index in range(draws):
        item = dataset[index]
        if item["question"] not in drawn:
            drawn[item["question"]] = {
                "id": f"{task}-{len(drawn)}",
                "prompt": item["question"],
                "answer": item["answer"],
                "task": task,
                "key": item["question"],
                "metadata": json.dumps(item["metadata"]),
                "config": json.dumps(config or {}),
            }
        if len(drawn) == count:
            return list(drawn.values())
    raise ValueError(
        f"task {task} with config {config or {}} gave {len(drawn)} distinct problems in {draws} "
        f"draws; count is {count}; widen its settings"
    )


def split(problems, *, fraction, seed):
    """Parts problems by key, so that no problem stands on both sides in another operand order.

    Args:
      problems: From `problems` or `generate`; several tasks may be mixed, keys may repeat.
      fraction: Share of the distinct keys on the second side, 0 < fraction < 1.
      seed: Decides which.

    Returns:
      (rest, held out), each in the given order, neither empty.

    Raises:
      ValueError: for a fraction outside (0, 1) or fewer than two distinct keys.
    """
    keys = sorted({problem["key"] for problem in problems})
    if not 0 < fraction < 1 or len(keys) < 2:
        raise ValueError(
            f"split needs 0 < fraction < 1 and at least 2 distinct problems; received fraction "
            f"{fraction} and {len(keys)} distinct"
        )
    random.Random(seed).shuffle(keys)
    held = set(keys[: min(len(keys) - 1, max(1, round(fraction * len(keys))))])
    return (
        [problem for problem in problems if problem["key"] not in held],
        [problem for problem in problems if problem["key"] in held],
    )


def check(problem, text):
    """Says whether an answer is right: its last number, scored by the task's own checker.

    The checker gives partial credit to near misses; only full credit counts here.

    Args:
      problem: From `problems`.
      text: The whole answer.

    Returns:
      bool.

    Raises:
      KeyError: for an unknown task.
    """
    _known(problem["task"])
    number = final_number(text)
    if number is None:
        return False
    try:
        score = _dataset(problem["task"], 0).score_answer(number, {"answer": problem["answer"]})
    except (ArithmeticError, ValueError, TypeError):
        return False  # the checker may raise on numbers it cannot read, such as 1e999999999
    return score >= 1.0
