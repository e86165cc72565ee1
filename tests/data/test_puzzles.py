"""Countdown, Sudoku, paired tokens and GSM8K: made, solved, split, and read from files."""

import itertools
import json
import operator
import random
from fractions import Fraction

import pytest

from jaxreward.core.resolve import resolve_words
from jaxreward.data import prompts, sources
from jaxreward.data.corpora import countdown, gsm8k, paired, reasoning_gym, sudoku
from jaxreward.rewards import puzzles


@pytest.fixture(scope="module")
def sums():
    """Countdown problems of three numbers."""
    return countdown.problems(300, seed=0)


@pytest.fixture(scope="module")
def boards():
    """4x4 puzzles."""
    return sudoku.problems(200, seed=0, blanks=(4, 12))


@pytest.fixture
def file(tmp_path):
    """Writes rows into a file."""

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


# Countdown


def test_countdown_problems_are_solved_by_their_own_answers(sums):
    """Catches a wrong bracket, a number left out, a division that is not exact."""
    for problem in sums + countdown.problems(100, seed=1, numbers=5, largest=25, target=(10, 200)):
        parts = puzzles.countdown(problem["prompt"], problem["answer"], problem, form="plain")
        assert parts["accuracy"] == 1, problem
        numbers, target = problem["numbers"], problem["target"]
        assert problem["prompt"] == f"{' '.join(map(str, numbers))} -> {target}\n"
    assert all(1 <= p["target"] <= 99 and max(p["numbers"]) <= 9 for p in sums)
    assert {sign for p in sums for sign in "+-*/(" if sign in p["answer"]} == set("+-*/(")
    assert json.loads(json.dumps(sums)) == sums


def test_countdown_keys_and_seeds(sums):
    """The same problem in another order is one problem; a seed decides which are drawn."""
    key = countdown.key
    assert key([3, 5, 7], 22) == key([7, 3, 5], 22) != key([3, 5, 7], 23)
    assert key([1, 23], 4) != key([12, 3], 4)
    assert key([10, 9], 1) == "9,10=1"
    assert len({p["key"] for p in sums}) == len({p["id"] for p in sums}) == 300
    assert all(p["key"] == key(p["numbers"], p["target"]) for p in sums)
    assert countdown.problems(300, seed=0) == sums != countdown.problems(300, seed=1)
    rest, held = reasoning_gym.split(sums, fraction=0.2, seed=0)
    assert len(held) == 60 and not {p["key"] for p in rest} & {p["key"] for p in held}


def values(numbers):
    """Every value of every tree over the numbers in every order: another way than the solver's."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    found = set()
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            left = [numbers[i] for i in chosen]
            right = [n for i, n in enumerate(numbers) if i not in chosen]
            for a, b in itertools.product(values(left), values(right)):
                found |= {op(a, b) for op in (operator.add, operator.sub, operator.mul)}
                if b:
                    found.add(a / b)
    return found


def test_the_solver_agrees_with_brute_force():
    """Catches trees that are never tried, wrong fractions, and texts of another value."""
    rng = random.Random(0)
    for size in (1, 2, 3, 3, 3, 4):
        numbers = [rng.randint(1, 9) for _ in range(size)]
        reachable = values(numbers)
        for target in range(-3, 40 if size < 4 else 3):
            texts = countdown.solutions(numbers, target)
            assert bool(texts) == (target in reachable), (numbers, target)
            record = {"numbers": numbers, "target": target}
            right = [puzzles.countdown("", text, record, form="plain") for text in texts]
            assert all(parts["accuracy"] for parts in right), (numbers, target)
    assert countdown.solutions([3, 3, 8, 8], 24) == ["8/(3-8/3)"]
    assert countdown.solutions([1, 1], 3) == []
    assert countdown.solutions([2, 3], 1) == ["3-2"]
    with pytest.raises(ValueError, match="1 to 5 numbers; received 6"):
        countdown.solutions([1] * 6, 1)


def test_every_countdown_problem_has_a_solution(sums):
    """Catches a problem whose target cannot be reached, by the solver rather than its answer."""
    assert all(countdown.solutions(p["numbers"], p["target"]) for p in sums[:60])


def test_countdown_arguments():
    """Too few problems, and arguments out of range, must say so."""
    with pytest.raises(
        ValueError, match=r"gave \d+ distinct problems in 30000 draws; count is 100"
    ):
        countdown.problems(100, seed=0, numbers=2, largest=3)
    with pytest.raises(ValueError, match="numbers >= 2"):
        countdown.problems(1, seed=0, numbers=1)
    with pytest.raises(ValueError, match="form must be 'plain' or 'tags'; received 'tag'"):
        countdown.problems(1, seed=0, form="tag")


def test_prompts_with_tags_ask_for_what_is_paid():
    """Catches tags in the prompt other than those that the reward looks for."""
    (problem,) = countdown.problems(1, seed=0, form="tags", think="reasoning")
    text = f"<reasoning>so</reasoning><answer>{problem['answer']}</answer>"
    paid = puzzles.quality("", text, problem, check="puzzles.countdown", think="reasoning")
    assert paid["reward"] == 2
    assert all(mark in problem["prompt"] for mark in ("<reasoning>", "</answer>"))
    assert "<think>" not in problem["prompt"] and str(problem["target"]) in problem["prompt"]
    (board,) = sudoku.problems(1, seed=0, form="tags")
    assert all(word in board["prompt"] for word in (board["puzzle"], "4x4", "2x2", "<think>"))


def test_countdown_files(file):
    """Three forms of rows; the last number of a row with steps is the target, not a number."""
    steps = {"input": "15,44,79,50", "output": "44-15=29,79-29=50"}
    bare = {"input": "30,100,93", "output": "23"}
    columns = {"nums": [100, 30, 93], "target": 23, "id": 7}
    path = file(steps, bare, columns)
    corpus = resolve_words("data.corpora", "countdown.prompts,form=plain")
    records, report = prompts.read(path, corpus=corpus)
    assert report["kept"] == 3 and records[2]["id"] == "7"
    assert [r["prompt"] for r in records] == [
        "15 44 79 -> 50\n",
        "30 100 93 -> 23\n",
        "100 30 93 -> 23\n",
    ]
    first = {"numbers": [15, 44, 79], "target": 50, "key": "15,44,79=50", "steps": steps["output"]}
    assert records[0]["extra"] == first and "steps" not in records[1]["extra"]
    assert puzzles.countdown("", "79-(44-15)", records[0]["extra"], form="plain")["accuracy"] == 1
    assert records[1]["held_out_by"] == records[2]["held_out_by"]
    tagged, _ = prompts.read(path, corpus=countdown.prompts)
    assert "<answer>" in tagged[0]["prompt"] and "30, 100, 93" in tagged[1]["prompt"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input": "15;44", "output": "29"}, "input: must be numbers parted by commas"),
        ({"input": "15,44,79,50"}, "output: missing"),
        ({"input": "15,44,79,50", "output": "44-15=29"}, "output: must be the target, or steps"),
        ({"input": "15,44,79,50", "output": "44-15=28,79-28=51"}, "output: must be"),
        ({"input": "15,44,79,50", "output": "79-15=64,64-15=49"}, "output: must be"),
        ({"input": "4,0,1", "output": "4/0=1"}, "output: must be"),
        (
            {"nums": "3,5", "target": 8},
            r"nums: must be a list of numbers from 0; received str '3,5'",
        ),
        ({"nums": [3, 5.0], "target": 8}, "nums: must be a list"),
        ({"nums": [3, 5]}, "target: missing"),
        ({"nums": [3, 5], "target": "8"}, "target: must be int"),
    ],
)
def test_broken_countdown_rows_are_named(file, row, words):
    """Catches a broken row that becomes another problem: file, line and field come first."""
    path = file({"nums": [3, 5], "target": 8}, row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2:{words}"):
        prompts.read(path, corpus=countdown.prompts)


# Sudoku


def test_grids():
    """There are 288 grids of 4x4, in 12 patterns, and each is valid."""
    assert len(set(sudoku.grids())) == 288
    assert len({sudoku.pattern(grid) for grid in sudoku.grids()}) == 12
    assert sudoku.pattern("4321214334121234") == "1234341221434321"
    for grid in sudoku.grids():
        rows = [grid[i : i + 4] for i in range(0, 16, 4)]
        boxes = [rows[r][c : c + 2] + rows[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
        assert all(set(unit) == set("1234") for unit in [*rows, *map("".join, zip(*rows)), *boxes])


def test_sudoku_problems_have_one_solution(boards):
    """Catches two solutions, which would pay a right answer as wrong; by filtering all grids."""
    for board in boards:
        puzzle = board["puzzle"]
        fits = [g for g in sudoku.grids() if all(p in ("0", c) for p, c in zip(puzzle, g))]
        assert fits == sudoku.solve(puzzle) == [board["solution"]]
        assert puzzle.count("0") == board["blanks"]
        parts = puzzles.sudoku(board["prompt"], board["answer"], board, form="plain")
        assert parts == {"accuracy": 1, "givens": 1, "reward": 1}
        assert board["prompt"] == f"{puzzle}\n"
    assert {b["blanks"] for b in boards} == set(range(4, 13))


def test_sudoku_seeds_and_arguments(boards):
    """Distinct puzzles, repeatable; a range that is impossible or used up must say so."""
    many = sudoku.problems(1000, seed=0, blanks=(1, 1))  # of 4608, so some are drawn again
    assert len({b["key"] for b in many}) == len({b["id"] for b in many}) == len(many) == 1000
    again = sudoku.problems(200, seed=0, blanks=(4, 12))
    assert again == boards != sudoku.problems(200, seed=1, blanks=(4, 12))
    with pytest.raises(ValueError, match="largest <= 12"):
        sudoku.problems(1, seed=0, blanks=(4, 13))
    with pytest.raises(ValueError, match="count is 5000; widen blanks"):
        sudoku.problems(5000, seed=0, blanks=(1, 1))  # 288 * 16 are there


def test_solve():
    """All solutions, none for a contradiction, and 9x9 too."""
    assert len(sudoku.solve("1200340000000000")) == len(
        [g for g in sudoku.grids() if g.startswith("12") and g[4:6] == "34"]
    )
    assert sudoku.solve("1100000000000000") == []
    assert sudoku.solve("1230000400000000") == []  # no digit is left for the fourth cell
    assert len(sudoku.solve("0" * 16, most=5)) == 5
    assert sudoku.solve(NINE) == [NINE_SOLVED]
    for puzzle, most in (("123", None), ("5" + "0" * 15, None), ("0" * 16, 0)):
        with pytest.raises(ValueError, match="16 digits from 0 to 4"):
            sudoku.solve(puzzle, most=most)


def test_held_out_grids(boards):
    """A split by puzzle shares grids, which is why there is another."""
    rest, held = reasoning_gym.split(boards, fraction=0.3, seed=0)
    assert not {b["puzzle"] for b in rest} & {b["puzzle"] for b in held}
    assert {b["solution"] for b in rest} & {b["solution"] for b in held}
    for by, name in (("grid", str), ("pattern", sudoku.pattern)):
        rest, held = sudoku.held_out_grids(boards, fraction=0.3, seed=0, by=by)
        assert len(rest) + len(held) == 200 and held and rest[0] in boards
        assert not {name(b["solution"]) for b in rest} & {name(b["solution"]) for b in held}
        assert sudoku.held_out_grids(boards, fraction=0.3, seed=0, by=by) == (rest, held)
    with pytest.raises(ValueError, match="by must be 'grid' or 'pattern'"):
        sudoku.held_out_grids(boards, fraction=0.3, seed=0, by="grids")


NINE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
NINE_SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def test_sudoku_files(file):
    """Both data sets; "." is a blank, and other columns do not reach the record."""
    small = {"Puzzle": "0034341221434320", "Solution": "1234341221434321"}
    large = {"puzzle": NINE.replace("0", "."), "solution": NINE_SOLVED, "missing": 51, "set": "1m"}
    corpus = resolve_words("data.corpora", "sudoku.prompts,form=plain")
    records, _ = prompts.read(file(small, large), corpus=corpus)
    assert [r["prompt"] for r in records] == [f"{small['Puzzle']}\n", f"{NINE}\n"]
    for record in records:
        parts = puzzles.sudoku("", record["extra"]["answer"], record["extra"], form="plain")
        assert parts["accuracy"] == parts["reward"] == 1
    assert records[1]["extra"] == {
        "answer": NINE_SOLVED,
        "puzzle": NINE,
        "solution": NINE_SOLVED,
        "key": NINE,
    }
    for row, words in (
        ({**small, "Puzzle": "34341221434320"}, "Puzzle: must be 16 digits"),
        ({**small, "Puzzle": 34341221434320}, "Puzzle: must be str"),
        ({**small, "Puzzle": small["Solution"]}, "Puzzle: must be 16 digits .* with a blank"),
        ({**small, "Puzzle": "0034341221434310"}, "Solution: must be as many digits that keep"),
        ({**small, "Solution": "1134341221434321"}, "Solution: must be as many"),
        ({"puzzle": NINE}, "solution: missing"),
    ):
        with pytest.raises(ValueError, match=rf"rows\.jsonl:2:{words}"):
            prompts.read(file(small, row), corpus=sudoku.prompts)


# Paired tokens


def test_paired_tokens():
    """Answers are right and balanced; with each token from its own marginal 2^-n of them are."""
    rows = paired.problems(400, seed=0, pairs=2)
    assert rows == paired.problems(400, seed=0, pairs=2) != paired.problems(400, seed=1, pairs=2)
    assert all(puzzles.paired("", row["answer"], row)["accuracy"] for row in rows)
    counts = [sum(row["answer"][i] == "a" for row in rows) for i in range(4)]
    assert all(150 < count < 250 for count in counts)
    every = ["".join(letters) for letters in itertools.product("ab", repeat=4)]
    right = [text for text in every if puzzles.paired("", text, rows[0])["accuracy"]]
    assert right == ["aaaa", "aabb", "bbaa", "bbbb"] == sorted({row["answer"] for row in rows})
    assert len(right) / len(every) == 2**-2
    with pytest.raises(ValueError, match="pairs >= 1; received count 1 and pairs 0"):
        paired.problems(1, seed=0, pairs=0)


# GSM8K


def test_gsm8k_files(file):
    """The answer after the mark, as it is written; a row without one is named."""
    row = {"question": "How many?", "answer": "He has 48/2=<<48/2=24>>24.\n#### 1,024"}
    (record,), _ = prompts.read(file(row), corpus=gsm8k.prompts)
    assert record["prompt"] == "How many?"
    assert record["extra"] == {"answer": "1,024", "solution": "He has 48/2=<<48/2=24>>24."}
    text = "<reasoning>\nx\n</reasoning>\n<answer>\n1,024\n</answer>\n"
    assert puzzles.gsm8k("", text, record["extra"])["accuracy"] == 1
    corpus = resolve_words("data.corpora", "gsm8k.prompts,form=tags,think=reasoning")
    (tagged,), _ = prompts.read(file(row), corpus=corpus)
    assert tagged["prompt"].startswith("How many?\n") and "</reasoning>" in tagged["prompt"]
    for broken, words in (
        ({**row, "answer": "24"}, 'answer: must be a worked solution that ends in "#### 72"'),
        ({**row, "answer": "so\n#### "}, "answer: must be"),
        ({"answer": "so\n#### 2"}, "question: missing"),
    ):
        with pytest.raises(ValueError, match=rf"rows\.jsonl:2:{words}"):
            prompts.read(file(row, broken), corpus=gsm8k.prompts)
    with pytest.raises(ValueError, match="form must be 'plain' or 'tags'"):
        sources.read_prompts(file(row), corpus=lambda rows: gsm8k.prompts(rows, form="tag"))
