r"""Sudoku, 4x4 to make and 4x4 or 9x9 to read: fill the blanks so that no digit repeats.

A puzzle is a str of 16 (or 81) digits, row by row, 0 for blank; a solution has no 0, and each row,
column and box of it holds each digit once. `problems` makes 4x4 puzzles with exactly one solution,
`solve` solves, `prompts` reads the public files; `rewards.puzzles.sudoku` checks an answer.

    form "plain"    0401002010030310\n      for small models that read bytes
    form "tags"     an instruction; reasoning and answer are to stand between tags

There are only 288 grids of 4x4, so puzzles on both sides of `reasoning_gym.split` share solutions,
though no two are the same puzzle. `held_out_grids` parts by the solution.

Data:
  - d1's `dataset/4x4_test_sudoku.csv` and `4x4_sudoku_unique_puzzles.csv` (arXiv:2504.12216), with
    the columns `Puzzle` and `Solution` of 16 digits. From d1's `diffu-grpo/data_utils.py`. CSV is
    not read here: hand the rows of `csv.DictReader` to `sources.write_jsonl` first.
  - Ritvik19/Sudoku-Dataset (Parquet): `puzzle` and `solution`, 9x9, beside `missing`, `set` and
    others. From several other people's readers of it; some expect "." for blank, which is read too.
We found no licence for either.

*Unverified: not yet run on the real files.*
"""

import functools
import itertools
import math
import random
import re

from jaxreward.data import formats, sources
from jaxreward.data.corpora import reasoning_gym
from jaxreward.rewards import puzzles

CELLS = 16
BY = ("grid", "pattern")


@functools.cache
def _units(size):
    """For each cell the others of its row, column and box."""
    side = math.isqrt(size)
    box = math.isqrt(side)
    places = [(i // side, i % side, i // side // box, i % side // box) for i in range(size)]
    return [
        [
            j
            for j, b in enumerate(places)
            if j != i and (a[0] == b[0] or a[1] == b[1] or a[2:] == b[2:])
        ]
        for i, a in enumerate(places)
    ]


def solve(puzzle, *, most=None):
    """All solutions of a puzzle, by trying the blank with the fewest candidates first.

    Args:
      puzzle: str of 16 or 81 digits, 0 for blank.
      most: Stop after as many, or None. An 81-digit puzzle with few givens has very many.

    Returns:
      list of str, in no special order; empty if the givens contradict each other.

    Raises:
      ValueError: if the text is no puzzle, or most is below 1.
    """
    if not _is_puzzle(puzzle) or (most is not None and most < 1):
        raise ValueError(
            "solve takes 16 digits from 0 to 4 or 81 from 0 to 9, and most >= 1 or None; received "
            f"{puzzle!r} and {most!r}"
        )
    size = len(puzzle)
    units = _units(size)
    digits = "123456789"[: math.isqrt(size)]
    cells, found = list(puzzle), []
    if any(c != "0" and any(cells[j] == c for j in units[i]) for i, c in enumerate(cells)):
        return []

    def fill():
        best = None
        for i, cell in enumerate(cells):
            if cell == "0":
                taken = {cells[j] for j in units[i]}
                free = [digit for digit in digits if digit not in taken]
                if best is None or len(free) < len(best[1]):
                    best = (i, free)
        if best is None:
            found.append("".join(cells))
            return most is not None and len(found) >= most
        i, free = best
        for digit in free:
            cells[i] = digit
            if fill():
                return True
        cells[i] = "0"
        return False

    fill()
    return found


def _is_puzzle(text):
    pattern = {16: "[0-4]{16}", 81: "[0-9]{81}"}
    return isinstance(text, str) and bool(re.fullmatch(pattern.get(len(text), "(?!)"), text))


@functools.cache
def grids():
    """The 288 valid grids of 4x4.

    Returns:
      tuple of str, sorted.
    """
    return tuple(sorted(solve("0" * CELLS)))


@functools.cache
def _having():
    """(cell, digit) -> the grids that have it there, as the bits of an int."""
    return {
        (cell, digit): sum(1 << n for n, grid in enumerate(grids()) if grid[cell] == digit)
        for cell, digit in itertools.product(range(CELLS), "1234")
    }


def _unique(cells):
    """Whether exactly one grid has these givens; `solve` on 4x4, in a few operations."""
    left = (1 << len(grids())) - 1
    for place, digit in enumerate(cells):
        if digit != "0":
            left &= _having()[place, digit]
    return left & (left - 1) == 0 and left > 0


def prompt(puzzle, *, form="plain", think="think", tag="answer"):
    """What a model is asked.

    Args:
      puzzle: str of 16 or 81 digits.
      form: "plain" or "tags".
      think, tag: Names of the tags.

    Returns:
      str.

    Raises:
      ValueError: for another form.
    """
    if form == "plain":
        return f"{puzzle}\n"
    if form != "tags":
        raise ValueError(f"form must be 'plain' or 'tags'; received {form!r}")
    side = math.isqrt(len(puzzle))
    box = math.isqrt(side)
    return (
        f"Solve this {side}x{side} Sudoku, written row by row as {len(puzzle)} digits, 0 for a "
        f"blank cell: {puzzle}\nEach row, each column and each {box}x{box} box must hold the "
        f"digits 1 to {side} once. {puzzles.request(think, tag)} The answer is the whole grid, "
        f"{len(puzzle)} digits without spaces."
    )


def problems(count, *, seed, blanks=(6, 10), form="plain", think="think", tag="answer"):
    """Draws distinct 4x4 puzzles that have exactly one solution.

    A grid is drawn, and a number of blanks; cells are then emptied in random order, but for those
    without which a second grid would fit. Where that leaves too few blanks, all is drawn again.

    Args:
      count: How many.
      seed: Of the draw.
      blanks: Least and largest number of blank cells, from 1 to 12: with fewer than 4 givens no 4x4
        puzzle is unique.
      form, think, tag: As `prompt`.

    Returns:
      list of dict(id, prompt, answer, puzzle, solution, blanks, key), all str but blanks, an int;
      answer is the solution and key the puzzle itself, which no two share. Grids are shared.

    Raises:
      ValueError: for arguments out of range, or if too few distinct puzzles were drawn.
    """
    low, high = blanks
    if count < 1 or not 1 <= low <= high <= 12:
        raise ValueError(
            "problems needs count >= 1 and blanks with 1 <= least <= largest <= 12; received count "
            f"{count} and blanks {blanks}"
        )
    rng, made, draws = random.Random(seed), {}, 5 * count + 2000
    for _ in range(draws):
        solution, wanted = rng.choice(grids()), rng.randint(low, high)
        puzzle = _emptied(rng, solution, wanted)
        if puzzle.count("0") < wanted or puzzle in made:
            continue
        made[puzzle] = {
            "id": f"sudoku-{len(made)}",
            "prompt": prompt(puzzle, form=form, think=think, tag=tag),
            "answer": solution,
            "puzzle": puzzle,
            "solution": solution,
            "blanks": wanted,
            "key": puzzle,
        }
        if len(made) == count:
            return list(made.values())
    raise ValueError(
        f"blanks from {low} to {high} gave {len(made)} distinct puzzles in {draws} draws; count is "
        f"{count}; widen blanks"
    )


def _emptied(rng, solution, wanted):
    cells = list(solution)
    for place in rng.sample(range(CELLS), CELLS):
        digit, cells[place] = cells[place], "0"
        if not _unique(cells):
            cells[place] = digit
        elif cells.count("0") == wanted:
            break
    return "".join(cells)


def pattern(solution):
    """A grid with its digits named in the order they occur, so that its first row is 1234.

    Args:
      solution: str of digits.

    Returns:
      str; the same for grids that differ by what their digits are called. Of 4x4 there are 12.
    """
    names = {}
    return "".join(names.setdefault(digit, str(len(names) + 1)) for digit in solution)


def held_out_grids(problems, *, fraction, seed, by="grid"):
    """Parts puzzles by their solutions, so that no grid stands on both sides.

    Args:
      problems: From `problems`, or other dicts with `solution`.
      fraction: Share of the distinct solutions (or patterns) on the second side, 0 < fraction < 1.
      seed: Decides which.
      by: "grid", or "pattern" to keep grids together that differ by what their digits are called.

    Returns:
      (rest, held out), each in the given order, neither empty.

    Raises:
      ValueError: for another `by`, a fraction outside (0, 1) or fewer than two solutions.
    """
    if by not in BY:
        raise ValueError(f"by must be {' or '.join(map(repr, BY))}; received {by!r}")
    named = [
        {"key": p["solution"] if by == "grid" else pattern(p["solution"]), "problem": p}
        for p in problems
    ]
    sides = reasoning_gym.split(named, fraction=fraction, seed=seed)
    return tuple([entry["problem"] for entry in side] for side in sides)


def prompts(rows, *, form="tags", think="think", tag="answer"):
    """Brings numbered rows of either data set into the form of `sources.read_prompts`.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.
      form, think, tag: As `prompt`.

    Returns:
      Iterator of the same, with fields prompt, answer, puzzle, solution and key. Rows whose
      solution is none of their puzzle, or that have no blank cell, are `Bad`. Whether it is the
      only solution is not looked at.

    Raises:
      ValueError: for another form.
    """
    prompt("0" * CELLS, form=form)  # a wrong word is no fault of the rows

    def convert(row):
        upper = "Puzzle" in row or "Solution" in row
        fields = ("Puzzle", "Solution") if upper else ("puzzle", "solution")
        puzzle, solution = (sources.text_of(row, field) for field in fields)
        puzzle = puzzle.replace(".", "0") if isinstance(puzzle, str) else puzzle
        if not _is_puzzle(puzzle) or "0" not in puzzle:
            raise formats.Bad(
                "must be 16 digits from 0 to 4 or 81 from 0 to 9, with a blank among them; leading "
                "zeros are lost where a column was read as numbers",
                field=fields[0],
                came=formats.show(puzzle),
            )
        if not _solves(solution, puzzle):
            raise formats.Bad(
                "must be as many digits that keep the givens and repeat none in a row, column or "
                "box",
                field=fields[1],
                came=formats.show(solution),
            )
        return {
            "id": row.get("id"),
            "prompt": prompt(puzzle, form=form, think=think, tag=tag),
            "answer": solution,
            "puzzle": puzzle,
            "solution": solution,
            "key": puzzle,
        }

    return formats.mapped(rows, convert)


def _solves(solution, puzzle):
    return (
        _is_puzzle(solution)
        and len(solution) == len(puzzle)
        and "0" not in solution
        and all(given in ("0", cell) for given, cell in zip(puzzle, solution))
        and all(
            solution[i] != solution[j]
            for i, others in enumerate(_units(len(solution)))
            for j in others
        )
    )
