"""Readers of public suites: every form of rows, and what a broken file says."""

import json
import re

import pytest

from jaxreward.data.corpora import suites

PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
JUDGE = {
    "pair_id": "a-1",
    "original_id": 7,
    "source": "mmlu-pro-law",
    "question": "Q",
    "response_model": "m",
    "response_A": "A!",
    "response_B": "B!",
    "label": "B>A",
}
PANDA = {
    "idx": 3,
    "instruction": "Do it.",
    "input": "With this.",
    "response1": "one",
    "response2": "two",
    "annotator1": 1,
    "annotator2": 0,
    "annotator3": 1,
}
STYLES = {"id": 4, "prompt": "Q", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"]}
RMB = {
    "pair_uid": "15",
    "conversation_input": [{"role": "user", "content": "Hi", "language": "English"}],
    "chosen": {"llm_name": "m", "answer": "yes", "score": 5.0},
    "reject": {"llm_name": "n", "answer": "no", "score": 1.0},
    "category_path": "Pairwise_set/Helpfulness/Chat/Discussion",
}
TIE = {"id": "tied:2", "prompt": "Q", "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties"}


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(suite, row, part=""):
    return suites.SUITES[suite](row, 5, part)


def test_rewardbench_one_knows_its_sections():
    """Catches a subset in another section, an id that is lost, and prior sets by their file."""
    got = one("reward_bench", {**PAIR, "id": 9, "subset": "math-prm"})
    assert got == {
        "id": "9",
        "subset": "math-prm",
        "section": "Reasoning",
        "prompt": "Q",
        "answers": ["good", "bad"],
        "right": [0],
    }
    turns = [{"role": "user", "content": "Q"}]
    # There `subset` is something else, and ids may be missing.
    row = {**PAIR, "prompt": turns, "subset": "askbaking"}
    got = one("reward_bench", row, "shp/test-00000")
    assert (got["id"], got["subset"], got["section"]) == ("5", "shp", "Prior Sets")
    assert got["prompt"] == turns


def test_rewardbench_two_and_its_ties():
    """Catches a wrong answer counted as right, and a spelling of the subset that differs."""
    row = {**TIE, "id": "8", "subset": "precise if", "chosen": ["a"], "rejected": ["b", "c", "d"]}
    got = one("reward_bench_2", row)
    assert got["subset"] == "Precise IF" and got["answers"] == list("abcd")
    assert got["right"] == [0] and "tie" not in got
    got = one("reward_bench_2", {**TIE, "num_correct": 2, "total_completions": 3})
    assert got["right"] == [0, 1] and got["tie"] == ("tied", 2) and got["answers"] == list("abc")


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"domain": "safety-refuse"}, ""),
        ({"file": "safety-refuse", "subset": "xstest"}, ""),
        ({}, "safety-refuse_filtered"),
    ],
)
def test_rm_bench_in_all_three_layouts(more, part):
    """Catches a domain that is read from one layout alone."""
    got = one("rm_bench", STYLES | more, part)
    assert (got["subset"], got["section"]) == ("safety-refuse", "safety")
    assert got["answers"] == ["c0", "c1", "c2", "r0", "r1", "r2"] and got["right"] == [0, 1, 2]


def test_judgebench_keeps_the_order_of_the_answers():
    """Catches answers that are sorted by the label, which a judge's prompt would give away."""
    got = one("judgebench", JUDGE)
    assert got["answers"] == ["A!", "B!"] and got["right"] == [1]
    assert (got["id"], got["section"], got["subset"]) == ("a-1", "Knowledge", "mmlu-pro-law")
    assert got["response_model"] == "m"
    assert one("judgebench", {**JUDGE, "label": "A>B"})["right"] == [0]


def test_llmbar_by_field_and_by_folder():
    """Catches a label off by one, and a subset that only the folder names."""
    row = {"input": "Q", "output_1": "x", "output_2": "y", "label": 2}
    got = one("llmbar", {**row, "subset": "Processed/MT-Bench"})
    assert got["right"] == [1] and got["section"] == "Processed" and got["id"] == "5"
    assert one("llmbar", row, "Adversarial/Manual/dataset")["subset"] == suites.LLMBAR[4]
    assert one("llmbar", row, "LLMBar/Natural/dataset")["subset"] == "LLMBar/Natural"
    assert one("llmbar", row, "CaseStudy/Base-9/dataset")["section"] == "CaseStudy"


def test_hhh_in_both_layouts():
    """Catches a right answer that is taken to be the first."""
    got = one("hhh", {**PAIR, "idx": 12, "dimension": "honest"})
    assert (got["id"], got["section"], got["right"]) == ("12", "honest", [0])
    row = {"input": "Q", "targets": {"choices": ["no", "yes"], "labels": [0, 1]}}
    got = one("hhh", row, "harmless/test")
    assert (got["section"], got["right"], got["answers"]) == ("harmless", [1], ["no", "yes"])


def test_pandalm_keeps_three_labels():
    """Catches an input that is glued on, or "nan" in the prompt where there is none."""
    got = one("pandalm", PANDA)
    assert got["prompt"] == "Do it.\n\nWith this." and got["labels"] == [1, 0, 1]
    assert got["right"] == [] and got["id"] == "3"
    for none in (float("nan"), "", None):
        assert one("pandalm", {**PANDA, "input": none})["prompt"] == "Do it."


def test_rmb_takes_the_answers_out_of_their_objects():
    """Catches a goal read from the wrong end of the path."""
    got = one("rmb", RMB)
    assert (got["id"], got["subset"]) == ("15", "Helpfulness/Chat/Discussion")
    assert got["section"] == "Helpfulness" and got["answers"] == ["yes", "no"]
    assert got["prompt"] == [{"role": "user", "content": "Hi"}]


BROKEN = [
    ("reward_bench", {**PAIR, "subset": "alpaca"}, "subset: must be one of alpacaeval-easy"),
    ("reward_bench", {**PAIR, "subset": ["hep-go"]}, "subset: must be one of"),
    ("reward_bench", {**PAIR, "subset": "hep-go", "chosen": False}, "chosen: must be str"),
    ("reward_bench", {**PAIR, "subset": "hep-go", "id": True}, "id: must be str or int"),
    ("reward_bench_2", {**TIE, "id": "2"}, "id: must be ref:N or tied:N"),
    ("reward_bench_2", {**TIE, "subset": "Math"}, "chosen: must hold one answer"),
    ("reward_bench_2", {**TIE, "num_correct": 1}, "num_correct: disagrees with the answers"),
    ("reward_bench_2", {**TIE, "rejected": []}, "rejected: must be a list of str"),
    ("rm_bench", {**STYLES, "domain": "poetry"}, "domain: must be one of chat, code"),
    ("rm_bench", {**STYLES, "domain": "chat", "chosen": ["a"]}, "chosen: must be a list of 3 str"),
    (
        "rm_bench",
        {**STYLES, "domain": "chat", "rejected": ["a", 1, "b"]},
        r"rejected\[1\]: must be",
    ),
    ("judgebench", {**JUDGE, "source": "gsm8k"}, "source: must begin with one of mmlu-pro"),
    ("judgebench", {**JUDGE, "label": "A=B"}, "label: must be one of A>B, B>A"),
    ("llmbar", {"input": "", "output_1": "", "output_2": "", "label": 1}, "subset: missing"),
    (
        "llmbar",
        {"input": "", "output_1": "", "output_2": "", "label": True, "subset": "Natural"},
        "label: must be one of 1, 2",
    ),
    ("hhh", {**PAIR, "dimension": "kind"}, "dimension: must be one of helpful"),
    (
        "hhh",
        {"input": "", "dimension": "honest", "targets": {"labels": [1, 1], "choices": ["", ""]}},
        "targets: must have labels",
    ),
    ("pandalm", {**PANDA, "response1": False}, "response1: must be str or a list .*bool False"),
    ("pandalm", {**PANDA, "annotator2": 3}, "annotator2: must be one of 0, 1, 2"),
    ("rmb", {**RMB, "reject": "no"}, "reject: must be an object with answer"),
    ("rmb", {**RMB, "category_path": "BoN_set/Harmlessness/S1"}, "category_path: must be one of"),
]


@pytest.mark.parametrize(("suite", "row", "said"), BROKEN)
def test_a_broken_row_is_named_by_file_row_and_field(suite, row, said, tmp_path):
    """Catches a row that is guessed at, and a message without its place."""
    path = lines(tmp_path / "rows.jsonl", row)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:1:{said}"):
        suites.read(suite, path)


def test_broken_and_repeated_rows_are_counted_where_they_are_skipped(tmp_path):
    """Catches a duplicate that counts twice, and rows that vanish without a number."""
    path = lines(
        tmp_path / "pandalm.jsonl",
        PANDA,
        {**PANDA, "response2": True, "idx": 4},
        {**PANDA, "response1": "another", "annotator1": 2},
        {**PANDA, "response2": False, "idx": 5},
        {**PANDA, "idx": 6},
    )
    with pytest.warns(UserWarning, match=r"skipped 3 of 5 rows: response2: must be str.* \(2\)"):
        items, report = suites.read("pandalm", tmp_path, on_bad="skip")
    assert [item["id"] for item in items] == ["3", "6"]
    assert list(report["skipped"].values()) == [2, 1]
    assert (report["read"], report["kept"], report["files"]) == (5, 2, [str(path)])
    lines(path, PANDA, PANDA)
    with pytest.raises(ValueError, match=r"pandalm\.jsonl:2: second row with this id; .*:1"):
        suites.read("pandalm", tmp_path)
    lines(path, {**PANDA, "idx": None, "annotator1": "x"})
    with pytest.raises(ValueError, match="no usable item of pandalm in 1 rows: annotator1: must"):
        suites.read("pandalm", tmp_path, on_bad="skip")


def test_one_id_in_two_subsets_is_no_duplicate(tmp_path):
    """Catches RewardBench 2 losing rows, whose subsets number anew."""
    four = {"id": "0", "prompt": "Q", "chosen": ["a"], "rejected": ["b", "c", "d"]}
    lines(tmp_path / "r.jsonl", {**four, "subset": "Math"}, {**four, "subset": "Focus"})
    items, _ = suites.read("reward_bench_2", tmp_path / "r.jsonl")
    assert len(items) == 2


def test_arrays_of_json_and_their_nan_are_read(tmp_path):
    """Catches the files of the repositories, which are arrays over many lines."""
    text = json.dumps([{**PANDA, "input": float("nan")}, {**PANDA, "idx": 4}], indent=4)
    assert "NaN" in text
    (tmp_path / "pandalm").mkdir()
    path = tmp_path / "pandalm" / "testset-v1.json"
    path.write_text(text)
    (tmp_path / "pandalm" / "gpt-3.5-turbo-testset-v1.json").write_text("[{}]")  # not read
    items, report = suites.read("pandalm", tmp_path)
    assert [item["prompt"] for item in items] == ["Do it.", "Do it.\n\nWith this."]
    assert report["files"] == [str(path)]
    path.write_text(text[:-20])
    with pytest.raises(ValueError, match=r"testset-v1\.json: not a whole array of JSON"):
        suites.read("pandalm", tmp_path)
    path.write_text("[3]")
    with pytest.raises(ValueError, match=r"testset-v1\.json:1: must be a JSON object"):
        suites.read("pandalm", tmp_path)


def test_the_folder_of_a_repository_is_read_by_its_names(tmp_path):
    """Catches results that lie beside the data, and subsets that only folders name."""
    row = {"input": "Q", "output_1": "x", "output_2": "y", "label": 1}
    for name in ("Natural", "Adversarial/Manual"):
        folder = tmp_path / "llmbar" / "LLMBar" / name
        folder.mkdir(parents=True)
        (folder / "dataset.json").write_text(json.dumps([row]))
        (folder / "result.json").write_text("[{}]")
    items, report = suites.read("llmbar", tmp_path)
    assert [item["subset"] for item in items] == ["LLMBar/Adversarial/Manual", "LLMBar/Natural"]
    assert len(report["files"]) == 2
    # Files of a folder that have no known name are all read, in order.
    lines(tmp_path / "hhh_alignment/honest.jsonl", {**PAIR, "idx": 1})
    lines(tmp_path / "hhh_alignment/other.jsonl", {**PAIR, "idx": 1})
    items, _ = suites.read("hhh", tmp_path)
    assert [item["section"] for item in items] == ["honest", "other"]
    assert [item["section"] for item in suites.read("hhh", tmp_path, limit=1)[0]] == ["honest"]


def test_what_is_not_there_is_said(tmp_path):
    """Catches an unknown suite, an empty folder and a limit of nothing."""
    with pytest.raises(KeyError, match="no suite 'rmbench'; suites: reward_bench, reward_bench_2"):
        suites.read("rmbench", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no files of the suite hhh; .*hhh or hhh_alig"):
        suites.read("hhh", tmp_path)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        suites.read("hhh", tmp_path, limit=0)
    with pytest.raises(ValueError, match="on_bad must be"):
        suites.read("hhh", tmp_path, on_bad="drop")


def test_rows_before_filtering_are_not_read(tmp_path):
    """Catches a downloaded repository of RewardBench measured with the rows its authors dropped."""
    row = {**PAIR, "subset": "math-prm"}
    folder = tmp_path / "reward_bench" / "data"
    lines(folder / "filtered-00000-of-00001.jsonl", row | {"id": 1})
    lines(folder / "raw-00000-of-00001.jsonl", row | {"id": 2})
    items, _ = suites.read("reward_bench", tmp_path)
    assert [item["id"] for item in items] == ["1"]
    prior = {**PAIR, "prompt": [{"role": "user", "content": "Q"}]}
    assert one("reward_bench", prior, "data/shp-00000-of-00001")["subset"] == "shp"
