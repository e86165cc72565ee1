"""MRMBench: ratings become classes, rows become items, and texts become tokens, once each."""

import json

import numpy as np
import pytest

from jaxreward import testing
from jaxreward.data import tokenize
from jaxreward.data.corpora import mrmbench


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenize.load_tokenizer(testing.write_tokenizer(tmp_path_factory.mktemp("tok")))


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return mrmbench.write_toy(tmp_path_factory.mktemp("toy"), train=40, test=20, seed=3)


def item(text, answer, *, task="helpfulness", label=0, prompt=None):
    made = {"id": "1", "task": task, "input": text, "prompt": prompt or text}
    return {**made, "answer": answer, "label": label}


def write(path, rows, *, lines=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_text(text)
    return path


def rating(**changes):
    """A row of HelpSteer2."""
    row = {"prompt": "p", "response": "r", "helpfulness": 3, "correctness": 3, "coherence": 4}
    return {**row, "complexity": 2, "verbosity": 1, **changes}


# Labels


@pytest.mark.parametrize("level", mrmbench.LEVELS)
@pytest.mark.parametrize("task", mrmbench.TASKS)
def test_bins_are_total_monotone_and_use_every_class(task, level):
    """Catches a rating without a class, a class nobody gets, and cuts in the wrong order."""
    raw = np.arange(4 if task == "harmlessness" else 5)
    got = mrmbench.bin_labels(raw, task, level)
    step = np.diff(got) * (-1 if task == "harmlessness" else 1)
    assert (step >= 0).all() and got.dtype == np.int32
    assert set(got) == set(range(len(mrmbench.LABELS[level][task])))


def test_bins_by_hand():
    """Catches a cut one off: the table of the specification, written out."""
    easy = {"helpfulness": 3, "correctness": 3, "coherence": 4, "complexity": 3, "verbosity": 3}
    for task, cut in easy.items():
        got = mrmbench.bin_labels([0, 1, 2, 3, 4], task, "easy")
        assert got.tolist() == [int(raw >= cut) for raw in range(5)], task
    hard = {"helpfulness": "00122", "correctness": "00012", "coherence": "00012"}
    for task, want in {**hard, "complexity": "00122", "verbosity": "00122"}.items():
        got = mrmbench.bin_labels(np.arange(5.0), task, "hard")
        assert "".join(map(str, got)) == want, task
    assert mrmbench.bin_labels([0, 1, 2, 3], "harmlessness", "easy").tolist() == [1, 0, 0, 0]
    assert mrmbench.bin_labels([0, 1, 2, 3], "harmlessness", "hard").tolist() == [2, 1, 0, 0]


def test_hard_refines_easy():
    """Catches levels that disagree: an easy class is a union of hard ones."""
    for task in mrmbench.TASKS:
        raw = np.arange(4 if task == "harmlessness" else 5)
        easy = mrmbench.bin_labels(raw, task, "easy")
        hard = mrmbench.bin_labels(raw, task, "hard")
        assert all(len(set(easy[hard == k])) == 1 for k in set(hard)), task


@pytest.mark.parametrize("raw", [-1, 5, 2.5, float("nan")])
def test_a_rating_that_is_none_is_refused(raw):
    """Catches a rating that wraps around, or is rounded, into a class."""
    with pytest.raises(ValueError, match="whole numbers from 0 to 4"):
        mrmbench.bin_labels([1, raw], "verbosity", "easy")


def test_unknown_names_are_refused():
    """Catches a misspelt task or level that would fall through as a KeyError."""
    for task, level in (("length", "easy"), ("verbosity", "middle")):
        with pytest.raises(ValueError, match="expected a task of"):
            mrmbench.bin_labels([1], task, level)


@pytest.mark.parametrize(("task", "level"), [("complexity", "easy"), ("correctness", "hard")])
def test_a_whole_split_is_held_to_the_published_shares(task, level):
    """Catches wrong cuts or another split: the shares the tables imply, within 0.3 points."""
    ((label, share),) = mrmbench.SHARES[level][task].items()
    labels = np.full(1038, 2 if label != 2 else 0)
    labels[: round(share * 1038)] = label
    mrmbench.check_split(labels, task, level)
    labels[: round(share * 1038) + 6] = label  # 0.6 points more
    with pytest.raises(ValueError, match="the published tables imply"):
        mrmbench.check_split(labels, task, level)
    with pytest.raises(ValueError, match="has 1038 answers; received 1000"):
        mrmbench.check_split(labels[:1000], task, level)


# Rows


def test_rows_of_helpsteer2_give_five_items():
    """Catches a lost attribute, and a dialogue whose turns are lost or whose raw text is."""
    text = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"
    found = [x for _, x in mrmbench.rated([(7, rating(prompt=text, verbosity=None))], "hard")]
    assert [x["task"] for x in found] == ["helpfulness", "correctness", "coherence", "complexity"]
    assert [x["label"] for x in found] == [2, 1, 2, 1]
    assert {x["input"] for x in found} == {text}
    assert [m["role"] for m in found[0]["prompt"]] == ["user", "assistant", "user"]


def test_rows_of_pku_saferlhf_give_two_items():
    """Catches severities of the other answer, and labels the wrong way round."""
    row = {"prompt": "q", "response_0": "kind", "response_1": "cruel"}
    row |= {"response_0_severity_level": 0, "response_1_severity_level": 3}
    found = [x for _, x in mrmbench.graded([(4, row)], "hard")]
    assert [(x["id"], x["answer"], x["label"]) for x in found] == [
        ("4-0", "kind", 2),
        ("4-1", "cruel", 0),
    ]


@pytest.mark.parametrize(
    ("items", "row", "words"),
    [
        (mrmbench.rated, rating(coherence=9), "bad:1:coherence: .*from 0 to 4; received 9"),
        (mrmbench.rated, rating(response=None), "bad:1:response: missing"),
        (mrmbench.graded, {"prompt": "q", "response_0": "a"}, "bad:1:response_0_severity_level"),
        (mrmbench.labelled, {"input": "a", "output": "b", "label": True}, "bad:1:label: must be"),
        (mrmbench.labelled, {"input": "a", "output": "b", "label": 2}, "to 1; received int 2"),
        (mrmbench.labelled, {"input": "a", "label": 1}, "bad:1:output: missing"),
        (mrmbench.labelled, [1], "bad:1: .*must be a JSON object"),
    ],
)
def test_bad_rows_are_named(tmp_path, items, row, words):
    """Catches a row that is dropped in silence, or an error without its place."""
    path = write(tmp_path / "bad", [row])
    args = ("verbosity", "easy") if items is mrmbench.labelled else ("easy",)
    with pytest.raises(ValueError, match=words):
        mrmbench.read(path, items, *args)


# Folders


def test_own_files_are_json_arrays_or_lines(tmp_path):
    """Catches a reader that takes the array for one broken line."""
    rows = [{"input": "a", "output": str(k), "label": k} for k in (0, 1)]
    where = tmp_path / "mrm_easy" / "verbosity"
    train = write(where / "train.json", rows, lines=False)
    test = write(where / "test.json", rows[::-1])
    found, files = mrmbench.load(tmp_path, "easy")
    assert list(found) == ["verbosity"] and files == [train, test]
    assert [x["label"] for x in found["verbosity"]["train"]] == [0, 1]
    assert [x["label"] for x in found["verbosity"]["test"]] == [1, 0]
    with pytest.raises(FileNotFoundError, match="harmlessness: neither"):
        mrmbench.load(tmp_path, "easy", tasks=("verbosity", "harmlessness"))
    with pytest.raises(FileNotFoundError, match="holds none of mrm_hard"):
        mrmbench.load(tmp_path, "hard")
    with pytest.raises(ValueError, match="1038 answers; received 2"):
        mrmbench.load(tmp_path, "easy", whole=True)


def test_sources_give_six_tasks(toy_folder):
    """Catches a task that reads another's file, and a split that is mixed up with the other."""
    found, files = mrmbench.load(toy_folder, "hard")
    assert list(found) == list(mrmbench.TASKS) and len(files) == 4
    for task, splits in found.items():
        assert {k: len(v) for k, v in splits.items()} == {"train": 40, "test": 20}
        assert {x["task"] for x in splits["test"]} == {task}
    answers = {s: {x["answer"] for x in found["verbosity"][s]} for s in ("train", "test")}
    for split, some in answers.items():
        assert {x["answer"] for x in found["harmlessness"][split]} == some


def test_samples_are_of_the_same_texts(toy_folder):
    """Catches draws by place: the five tasks must share the texts whose states are computed."""
    found, _ = mrmbench.load(toy_folder, "easy")
    some = {task: mrmbench.sample(splits["train"], 7, seed=1) for task, splits in found.items()}
    texts = {tuple(x["answer"] for x in items) for items in some.values()}
    assert len(texts) == 1 and len(texts.pop()) == 7
    assert mrmbench.sample(found["verbosity"]["train"], 7, seed=2) != some["verbosity"]
    assert mrmbench.sample(found["verbosity"]["train"], 99) == found["verbosity"]["train"]


# Tokens


def test_the_text_of_the_paper_by_hand(tokenizer):
    """Catches a separator, a template, or a missing end token."""
    trees, index = mrmbench.encode(tokenizer, [item("ab", "cd")])
    whole = np.concatenate([trees[0].prompt, trees[0].answers[0]]).tolist()
    assert whole == [*tokenizer.ids("abcd"), tokenizer.eos_id] and index.tolist() == [0]
    trees, _ = mrmbench.encode(tokenizer, [item("ab", "cd")], form="template")
    whole = np.concatenate([trees[0].prompt, trees[0].answers[0]]).tolist()
    assert whole == tokenize.encode_conversation(tokenizer, "ab", "cd", template="chat").tokens
    with pytest.raises(ValueError, match="form must be one of paper, template"):
        mrmbench.encode(tokenizer, [item("ab", "cd")], form="raw")


def test_texts_are_encoded_once_and_long_ones_left_out(tokenizer):
    """Catches texts cut instead of dropped, an index that counts the dropped, or one text twice."""
    items = [item("q", "a" * 5), item("q", "b" * 50), item("r", "c"), item("q", "a" * 5)]
    items += [item("q", "d", task="verbosity")]
    trees, index = mrmbench.encode(tokenizer, items, max_len=20)
    flat = [np.concatenate([t.prompt, a]) for t in trees for a in t.answers]
    assert len(flat) == 3 and index[1] == -1 and index[0] == index[3]
    for i in (0, 2, 4):
        want = [*tokenizer.ids(items[i]["input"] + items[i]["answer"]), tokenizer.eos_id]
        assert flat[index[i]].tolist() == want
    _, index = mrmbench.encode(tokenizer, [item("q", "a" * 18)], max_len=20)
    assert index.tolist() == [0]  # exactly 20 tokens stay
    with pytest.raises(ValueError, match="no text is left of 1"):
        mrmbench.encode(tokenizer, [item("q", "a" * 19)], max_len=20)


def test_the_toy_says_what_its_ratings_say():
    """Catches dimensions that hang together: each rating must be readable from its own words."""
    rows = mrmbench.toy(400, seed=1)
    for row in rows:
        text, word = row["response"], row["prompt"].split()[-1][:-1]
        assert (text.count("as i say") == 3) == (row["verbosity"] == 4)
        assert (f" {word}" in text) == (row["helpfulness"] == 4)
        assert ("hit" in text) == (row["harmlessness"] == 3)
    raw = np.array([[row[task] for task in mrmbench.TASKS] for row in rows], float)
    apart = np.corrcoef(raw.T) - np.eye(6)
    assert np.abs(apart).max() < 0.2
