"""Sets of hypotheses: what is read, merged, spoilt and dropped, and that none of it is silent."""

import json

import numpy as np
import pytest

from jaxreward.data import hypotheses, sources

TEXT = "One two three. Four five six? Seven eight!\nNine ten eleven twelve."


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hyp(text, source="a", temp=None, **more):
    return {"text": text, "source": source, "temp": temp, **more}


def record(id, *hyps, prompt=None, domain="", scores=None):
    prompt = f"prompt {id}" if prompt is None else prompt
    made = {"id": id, "domain": domain, "prompt": prompt, "hyps": list(hyps)}
    return made | {"scores": scores or {}}


# Reading


def test_what_is_written_is_read(tmp_path):
    """Catches a field that is lost or renamed on the way, and defaults of another type."""
    full = record(
        "1",
        hyp("x", "sft", 0.7),
        hyp("", "dpo"),
        domain="math",
        prompt=[{"role": "user", "content": "q"}],
        scores={"rm": [1.5, None], "gold": [0.0, 1.0]},
    )
    path = tmp_path / "h.jsonl"
    sources.write_jsonl(path, [full])
    assert hypotheses.read(path) == [full]
    written(path, {"prompt": "p", "hyps": [{"text": "t"}], "more": 1}, {**full, "id": 7})
    first, second = hypotheses.read(path)
    assert first == record("1", hyp("t", ""), prompt="p")
    assert second["id"] == "7"
    assert len(hypotheses.read(path, limit=1)) == 1


GOOD = {"prompt": "p", "hyps": [{"text": "x"}, {"text": "y"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hyps": []}, r":1:hyps: must be a list of at least one"),
        ({"hyps": {"text": "x"}}, r":1:hyps: must be a list .* received dict"),
        ({"hyps": [{"text": "x"}, {"txt": "y"}]}, r":1:hyps\[1\]: must have a str text"),
        ({"hyps": ["x"]}, r":1:hyps\[0\]: must have a str text; received str 'x'"),
        ({"hyps": [{"text": "a\0"}]}, r":1:hyps\[0\]\.text: holds a NUL"),
        ({"hyps": [{"text": "x", "source": 3}]}, r":1:hyps\[0\]\.source: must be str"),
        ({"hyps": [{"text": "x", "temp": "hot"}]}, r":1:hyps\[0\]\.temp: must be a number"),
        ({"scores": [1, 2]}, r":1:scores: must be \{proxy: list\}; received list"),
        ({"scores": {"rm": [1]}}, r":1:scores\.rm: .* received 1 numbers for 2 hypotheses"),
        ({"scores": {"rm": 1}}, r":1:scores\.rm: must be a list with one number or null"),
        ({"scores": {"rm": [1, "2"]}}, r":1:scores\.rm\[1\]: must be a number; received str"),
        ({"scores": {"rm": [1, float("nan")]}}, r":1:scores\.rm\[1\]: must be finite"),
        ({"prompt": None}, r":1:prompt: missing"),
        ({"domain": 3}, r":1:domain: must be str"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    """Catches a row that is guessed at, or an error without its place."""
    path = written(tmp_path / "h.jsonl", {**GOOD, **change})
    with pytest.raises(ValueError, match=r"h\.jsonl" + message):
        hypotheses.read(path)


def test_an_id_that_stands_twice_is_named(tmp_path):
    """Catches raw log-probabilities of two sets that could not be told apart."""
    path = written(tmp_path / "h.jsonl", {**GOOD, "id": 4}, GOOD, {**GOOD, "id": "4"})
    with pytest.raises(ValueError, match="id '4' stands in 2 rows"):
        hypotheses.read(path)


# Sources and merging


def test_sources_are_merged_by_id(tmp_path):
    """Catches answers that go to another prompt, and a temperature or source that is lost; in the
    form that `jaxreward generate` writes, as reference answers and as pairs."""
    answer = lambda text, finished=True: {
        "text": text,
        "tokens": 1,
        "logp": -1.0,
        "finished": finished,
    }
    generated = written(
        tmp_path / "g.jsonl",
        {"id": "a", "prompt": "A", "domain": "math", "answers": [answer("1"), answer("2", False)]},
        {"id": "b", "prompt": "B", "answers": [answer("3")]},
    )
    chosen = [{"role": "assistant", "content": "4"}]
    references = written(
        tmp_path / "r.jsonl",
        {
            "id": "b",
            "prompt": "B",
            "domain": "chat",
            "chosen": chosen,
            "rejected": [{**chosen[0], "content": "5"}],
        },
        {"id": "c", "prompt": "C", "answer": "6"},
    )
    parts = [
        hypotheses.read_source(generated, source="sft", temp=0.7),
        hypotheses.read_source(references, source="human"),
    ]
    a, b, c = hypotheses.merge(parts)
    assert [x["id"] for x in (a, b, c)] == ["a", "b", "c"]
    assert (a["domain"], b["domain"]) == ("math", "chat")
    assert a["hyps"] == [
        hyp("1", "sft", 0.7, finished=True),
        hyp("2", "sft", 0.7, finished=False),
    ]
    assert [(h["text"], h["source"], h["temp"]) for h in b["hyps"]] == [
        ("3", "sft", 0.7),
        ("4", "human/chosen", None),
        ("5", "human/rejected", None),
    ]
    assert c["hyps"] == [hyp("6", "human")]
    assert len(parts[0][0]["hyps"]) == 2 and len(parts[1][0]["hyps"]) == 2  # merged into none


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (record("1", hyp("y"), prompt="Q"), "id '1' has two prompts, 'P' and 'Q'"),
        (record("1", hyp("y"), prompt="P", scores={"rm": [1.0]}), "merge first, then score"),
    ],
)
def test_what_cannot_be_merged(other, message):
    """Catches line numbers of two prompt files taken for one id, and scores beside the wrong
    hypotheses."""
    with pytest.raises(ValueError, match=message):
        hypotheses.merge([[record("1", hyp("x"), prompt="P")], [other]])


def test_a_bad_answer_is_named(tmp_path):
    """Catches answers of several messages that are cut to one, and rows without any."""
    turns = [{"role": r, "content": "x"} for r in ("assistant", "user", "assistant")]
    for row, message in (
        ({"prompt": "p", "answers": [{"txt": "x"}]}, r":1:answers\[0\]: must have a str text"),
        ({"prompt": "p", "answer": turns}, r":1:answer: must be one message"),
        ({"prompt": "p", "answers": []}, r":1:answer: needs exactly one of"),
    ):
        with pytest.raises(ValueError, match=message):
            hypotheses.read_source(written(tmp_path / "x.jsonl", row), source="s")


# Spoilt copies


def test_spoilt_copies_are_what_they_are_called():
    """Catches a copy that is the original, another set's that is this set's own, and a kind that
    is not the source."""
    sets = [record(str(i), hyp(f"{TEXT} {i}.", "gold/x"), hyp("other", "b")) for i in range(5)]
    out, without = hypotheses.corrupt(sets, source="gold", seed=3)
    assert without == {}
    for i, made in enumerate(out):
        assert made["hyps"][:2] == sets[i]["hyps"]
        assert [h["source"] for h in made["hyps"][2:]] == list(hypotheses.CORRUPTIONS)
        whole = f"{TEXT} {i}."
        truncated, shuffled, other = (h["text"] for h in made["hyps"][2:])
        assert whole.startswith(truncated)
        assert 0.1 * len(whole.split()) < len(truncated.split()) <= 0.6 * len(whole.split())
        assert shuffled != " ".join(whole.split())
        assert sorted(shuffled.split()) == sorted(whole.split())
        assert "Four five six?" in shuffled  # sentences, not words
        assert other in {f"{TEXT} {j}." for j in range(5) if j != i}
    assert sets[0]["hyps"] == [hyp(f"{TEXT} 0.", "gold/x"), hyp("other", "b")]


def test_spoilt_copies_follow_the_seed_and_the_id():
    """Catches draws that depend on what else is in the file, and a seed that does nothing."""
    sets = [record(str(i), hyp(f"{TEXT} {i}.")) for i in range(6)]
    kinds = ("truncated", "shuffled")
    texts = lambda out: [[h["text"] for h in made["hyps"]] for made in out]
    all_, _ = hypotheses.corrupt(sets, kinds)
    some, _ = hypotheses.corrupt(sets[3:], kinds)
    assert texts(all_)[3:] == texts(some)
    assert texts(hypotheses.corrupt(sets, kinds, seed=1)[0]) != texts(all_)
    assert texts(hypotheses.corrupt(sets)[0]) == texts(hypotheses.corrupt(sets)[0])


def test_what_cannot_be_spoilt_is_counted():
    """Catches a copy that is no different, and one that is missing without a word."""
    sets = [record("1", hyp("word")), record("2", hyp("x", "b"))]
    out, without = hypotheses.corrupt(sets, source="a")
    assert [h["text"] for h in out[0]["hyps"]] == ["word"] and len(out[1]["hyps"]) == 1
    assert without == {
        "no hypothesis of a": 1,
        **{f"{kind}: too short, or nothing to take": 1 for kind in hypotheses.CORRUPTIONS},
    }
    with pytest.raises(ValueError, match="of source 'c'; there are a, b"):
        hypotheses.corrupt(sets, source="c")
    with pytest.raises(ValueError, match="unknown corruption 'noise'; use one of truncated"):
        hypotheses.corrupt(sets, ["noise"])


# Dropping


def test_everything_that_is_dropped_is_counted():
    """Catches scores that stay behind when their hypothesis goes, a reason that is not counted,
    and a mark of building that is left in the row."""
    sets = [
        record(
            "1",
            hyp("one"),
            hyp(" one\n", "b"),
            hyp("two", finished=False),
            hyp("  "),
            hyp("much longer"),
            hyp("four", finished=True),
            scores={"rm": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]},
        ),
        record("2", hyp("x"), hyp("y"), prompt="prompt 1"),
        record("3", hyp("x"), hyp("x")),
    ]
    out, dropped = hypotheses.clean(sets, most=8)
    assert out == [record("1", hyp("one"), hyp("four"), scores={"rm": [0.0, 5.0]})]
    assert dropped == {
        "repeated": 2,
        "unfinished": 1,
        "empty": 1,
        "too long": 1,
        "repeated prompt": 1,
        "too few left": 1,
    }
    out, dropped = hypotheses.clean(
        sets[:1], most=1, length=lambda text: len(text.split()), keep_unfinished=True
    )
    assert [h["text"] for h in out[0]["hyps"]] == ["one", "two", "four"]
    assert dropped == {"repeated": 1, "empty": 1, "too long": 1}
    assert hypotheses.clean(sets[2:], least=1)[0] == [record("3", hyp("x"))]


# Arrays


def test_sets_of_different_sizes_as_arrays():
    """Catches a missing score that counts as 0, and a proxy that is taken for another set's."""
    sets = [
        record("1", hyp("x"), hyp("y"), hyp("z"), scores={"rm": [1.0, None, 3.0]}),
        record("2", hyp("x"), scores={"gold": [2.0], "rm": [5.0]}),
    ]
    values, valid = hypotheses.proxy_scores(sets, "rm")
    np.testing.assert_array_equal(values, [[1, 0, 3], [5, 0, 0]])
    np.testing.assert_array_equal(valid, [[1, 0, 1], [1, 0, 0]])
    values, valid = hypotheses.proxy_scores(sets, "gold")
    np.testing.assert_array_equal(values, [[0, 0, 0], [2, 0, 0]])
    np.testing.assert_array_equal(valid, [[0, 0, 0], [1, 0, 0]])
    assert hypotheses.proxies(sets) == ["rm", "gold"]
    assert hypotheses.padded([])[0].shape == (0, 0)
