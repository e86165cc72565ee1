"""Reading judges: the forms of each stage, hostile answers, and the rewards."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxreward.rewards import verdict
from jaxreward.rewards.verdict import agreement, parse

GOOD = "<think>\nA is right.\n</think>\n<answer>A</answer>"

# Answer -> (verdict, fault) in mode "strict", (verdict, keeps its form) in mode "released".
READ = {
    GOOD: ("A", None, "A", True),
    "<THINK>x</Think><Answer> b </ANSWER>\n": ("B", None, "B", True),
    "A": (None, "text outside the tags", "A", False),
    " b\n": (None, "text outside the tags", "B", False),
    "": (None, "has the blocks none", None, False),
    "<answer>A</answer>": ("A", "has the blocks answer", "A", False),
    "<think>x</think>A": (None, "text outside", None, False),
    "<answer>A</answer><think>x</think>": ("A", "has the blocks answer, think", "A", True),
    "<think>x</think><answer>A</answer><answer>B</answer>": (None, "has the blocks", "A", True),
    "<think>x</think><answer>A</answer><answer>A</answer>": (None, "has the blocks", "A", True),
    "<think>x</think><think>y</think><answer>A</answer>": ("A", "has the blocks", "A", True),
    "<think>x</think> so: <answer>A</answer>": ("A", "text outside", "A", True),
    "<think>x</think><answer>A</answer> done": ("A", "text outside", "A", True),
    "<think></think><answer>A</answer>": ("A", "<think> is empty", "A", True),
    "<think>x</think><answer> </answer>": (None, "<answer> is empty", None, True),
    "<think>x</think><answer>A.</answer>": (None, "the answer is not one of A, B", None, True),
    "<think>x</think><answer>Response A</answer>": (None, "the answer is not", None, True),
    "<think>x</think><answer>A or B</answer>": (None, "the answer is not", None, True),
    "<think>x</think><answer>tie</answer>": (None, "the answer is not", None, True),
    # a verdict inside the thinking, or in thinking that never ends
    "<think><answer>A</answer></think><answer>B</answer>": (
        "B",
        "<answer> inside <think>",
        "A",
        True,
    ),
    "<think>x <answer>A</answer>": (None, "<answer> inside <think>", "A", False),
    "<think>x</think><answer>A": (None, "<answer> is not closed", None, False),
    "<think>x<answer>A</answer></think>": (None, "<answer> inside <think>", "A", True),
    "<answer><think>x</think>A</answer>": (None, "<think> inside <answer>", None, True),
    "<think>x<think>y</think></think><answer>A</answer>": (
        "A",
        "<think> inside <think>",
        "A",
        True,
    ),
    "</think><think>x</think><answer>A</answer>": ("A", "</think> closes nothing", "A", True),
    "<type>image generation</type>" + GOOD: ("A", "has the blocks type, think, ans", "A", True),
    # lookalikes: Cyrillic A, full-width A, dotless i, zero-width space, Kelvin sign in a tag
    "<think>x</think><answer>\u0410</answer>": (None, "the answer is not", None, True),
    "<think>x</think><answer>\uff21</answer>": (None, "the answer is not", None, True),
    "<think>x</think><answer>A\u200b</answer>": (None, "the answer is not", None, True),
    "<thin\u212a>x</thin\u212a><answer>A</answer>": ("A", "text outside", "A", True),
    "<think >x</think><answer>A</answer>": ("A", "text outside", "A", False),
    "&lt;answer&gt;A&lt;/answer&gt;": (None, "text outside", None, False),
}


@pytest.mark.parametrize("text", READ)
def test_reading(text):
    """Each case is one way to be paid for what is no verdict, or for a form that is not kept."""
    strict, fault, released, kept = READ[text]
    read = parse(text)
    assert read.verdict == strict
    assert read.fault is None if fault is None else read.fault.startswith(fault)
    loose = parse(text, mode="released")
    assert (loose.verdict, loose.fault is None) == (released, kept)


def reference(text, label):
    """Accuracy, format and task as the released code computes them, patterns and all."""

    def block(tag, text):
        found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL | re.IGNORECASE)
        return found[1].strip() if found else ""

    answer = (block("answer", text) or text).strip().upper()
    both = all(
        re.search(f"<{tag}>.*?</{tag}>", text, re.DOTALL | re.IGNORECASE)
        for tag in ("think", "answer")
    )
    task = (block("type", text.strip().lower()) or text.strip().lower()).replace("_", " ")
    task = " ".join(task.replace("-", " ").split())
    return {
        "accuracy": float(answer == label),
        "format": float(both),
        "read": float(answer in ("A", "B")),
        "task": float(task == "image generation"),
    }


PIECES = ["<think>", "</think>", "<ANSWER>", "</answer>", "<type>", "</type>", "</caption>", "A"]
PIECES += ["b", " ", "\n", "x", "Image_generation", "<", "<thin\u212a>", "</thin\u212a>"]


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), st.sampled_from("AB"))
def test_the_released_mode_is_the_released_code(text, label):
    """Catches a compatibility mode that is only nearly compatible."""
    record = {"label": label, "task_type": "image generation"}
    assert agreement("", text, record, stage="caption", mode="released") == reference(text, label)


@given(st.lists(st.sampled_from([*PIECES, "<think>x</think>", "<answer>A</answer>"]), max_size=7))
def test_strict_pays_no_more_than_the_form_is_worth(pieces):
    """Catches a fault overlooked: a text that keeps its form is one that `render` writes."""
    text = "".join(pieces)
    read = parse(text)
    if read.fault is None:
        written = verdict.render(read.verdict, read.blocks["think"])
        assert "".join(written.upper().split()) == "".join(text.upper().split())
    elif read.verdict is not None:
        assert text.lower().count("<answer>") >= 1


STAGED = {
    "text": GOOD,
    "caption": "<type>image_generation</type>" + GOOD,
    "media": "<type> Image-Generation </type>\n<caption>a dog</caption>\n" + GOOD,
}


@pytest.mark.parametrize("stage", STAGED)
@pytest.mark.parametrize("written", STAGED)
def test_every_stage_has_its_form(stage, written):
    """Catches a stage that takes the form of another; only the caption of "media" is optional."""
    read = parse(STAGED[written], stage=stage)
    fits = written == stage or (stage, written) == ("media", "caption")
    assert (read.fault is None) == fits
    assert read.verdict == "A"


@pytest.mark.parametrize("stage", STAGED)
def test_what_is_written_can_be_read(stage):
    """Catches training on a form that the reward then refuses."""
    task = None if stage == "text" else verdict.TASKS[2]
    caption = "a dog\n\nrunning" if stage == "media" else None
    text = verdict.render("B", "  because\n B < C  ", task=task, caption=caption)
    read = parse(text, stage=stage)
    assert (read.verdict, read.fault) == ("B", None)
    assert read.blocks["think"] == "because\n B < C"
    assert read.blocks.get("type") == task and read.blocks.get("caption") == caption


@pytest.mark.parametrize("think", ["", " \n", "write <answer>A</answer>", "then </THINK>"])
def test_what_could_not_be_read_is_not_written(think):
    """Catches a rationale that breaks the form it is to teach."""
    with pytest.raises(ValueError, match=r"the text of <think> (holds|is empty)"):
        verdict.render("A", think)


def test_rewards_by_hand():
    """Catches parts that are swapped, and a wrong letter that earns its form's reward twice."""
    graded = lambda answer, label: tuple(agreement("", answer, {"label": label}).values())
    assert list(agreement("", GOOD, {"label": "A"})) == ["accuracy", "format", "read"]
    assert graded(GOOD, "A") == (1.0, 1.0, 1.0)
    assert graded(GOOD, "B") == (0.0, 1.0, 1.0)
    assert graded("<answer>A</answer>", "A") == (1.0, 0.0, 1.0)
    assert graded("", "a") == (0.0, 0.0, 0.0)
    record = {"label": "A", "task_type": "image-generation"}
    for stage in ("caption", "media"):
        parts = agreement("", STAGED["caption"], record, stage=stage)
        assert parts == {"accuracy": 1.0, "format": 1.0, "read": 1.0, "task": 1.0}
        parts = agreement(
            "", STAGED["caption"], {**record, "task_type": verdict.TASKS[0]}, stage=stage
        )
        assert parts == {"accuracy": 1.0, "format": 1.0, "read": 1.0, "task": 0.0}
    assert verdict.WEIGHTS["paper"] == {"accuracy": 1.0, "format": 0.2, "task": 0.2}
    assert verdict.WEIGHTS["released"]["task"] == pytest.approx(0.2 * 0.2)


@pytest.mark.parametrize(
    ("answer", "strict", "released"),
    [
        ("<answer>B</answer>", 1, 1),  # wrong and out of form, and still a verdict
        ("so <answer> b </answer>", 1, 1),
        ("B", 0, 1),
        ("<think>x</think><answer>C</answer>", 0, 0),  # the released form without a verdict
        ("<think><answer>B</answer>", 0, 1),
        ("<answer>A</answer><answer>B</answer>", 0, 1),
        ("B, clearly", 0, 0),
        ("", 0, 0),
    ],
)
def test_a_verdict_is_read_or_not_whatever_its_form(answer, strict, released):
    """Catches a broken form that hides a verdict, and a form that passes for one."""
    for mode, read in (("strict", strict), ("released", released)):
        for label in "AB":
            assert agreement("", answer, {"label": label}, mode=mode)["read"] == read


def test_replayed_text_samples_have_no_task():
    """Catches a text sample that is punished for not naming a task, or paid for naming one."""
    for answer, form in ((GOOD, 1.0), (STAGED["caption"], 0.0)):
        parts = agreement("", answer, {"label": "A"}, stage="caption")
        assert parts == {"accuracy": 1.0, "format": form, "read": 1.0, "task": 0.0}


def test_ties_are_verdicts_only_where_they_are_allowed():
    """Catches a tie read as a letter, or a tie that is right by default."""
    tie = GOOD.replace(">A<", "> Tie <")
    choices = ("A", "B", "tie")
    assert parse(tie, choices=choices).verdict == "tie" and parse(tie).verdict is None
    assert agreement("", tie, {"label": "tie"}, choices=choices)["accuracy"] == 1.0
    assert agreement("", GOOD, {"label": "tie"}, choices=choices)["accuracy"] == 0.0
    assert parse(GOOD.replace(">A<", ">t\u0131e<"), choices=choices).verdict is None


@pytest.mark.parametrize(
    ("record", "kw", "text"),
    [
        ({}, {}, r"record\['label'\] must be one of A, B; received None"),
        ({"label": "chosen"}, {}, "received 'chosen'"),
        ({"label": "tie"}, {}, "received 'tie'"),
        ({"label": "A", "task_type": "audio"}, {"stage": "caption"}, "task_type.*'audio'"),
        ({"label": "A"}, {"stage": "captions"}, "stage text, caption, media"),
        ({"label": "A"}, {"mode": "lax"}, "mode strict or released"),
    ],
)
def test_faults_of_data_and_config_are_not_wrong_answers(record, kw, text):
    """Catches a missing label that makes every answer wrong."""
    with pytest.raises(ValueError, match=text):
        agreement("", GOOD, record, **kw)


def test_order():
    """Catches a tie or an unread verdict that changes with the order."""
    assert [verdict.swapped(v) for v in ("A", "B", "tie", None)] == ["B", "A", "tie", None]


MEGABYTE = {
    "never closed": "<think>" * 150_000,
    "answers never closed": "<answer>" * 130_000,
    "nested": "<think>" * 66_000 + "</think>" * 66_000,
    "closed only": "</answer>" * 110_000,
    "many answers": "<answer>A</answer>" * 55_000,
    "half tags": "<think" * 170_000,
    "spaces": "<think>" + " " * 1_000_000,
    "brackets": "[[" * 500_000,
    "digits": "1" * 1_000_000,
    "names": "assistant " * 100_000,
    "numbers": "1 " * 500_000,
    "lines": "\n" * 1_000_000,
    "long": "<think>" + "x" * 1_000_000 + "</think><answer>A</answer>",
}


@pytest.mark.parametrize("text", MEGABYTE)
def test_a_megabyte_takes_linear_time(text):
    """Catches a pattern with quadratic time, for which a megabyte takes hours and not a second."""
    text = MEGABYTE[text]
    began = time.process_time()
    for mode in ("strict", "released"):
        parse(text, stage="media", mode=mode)
    verdict.brackets(text)
    verdict.first_line(text)
    verdict.scores(text, 2)
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("fine. [[A>B]]", "A"),
        ("[[A>>B]]", "A"),
        ("[[B>A]]", "B"),
        ("[[B>>A]] yes [[B>>A]]", "B"),
        ("[[A<B]]", "B"),
        ("[[A]]", "A"),
        ("[[B]]", "B"),
        ("[[C]]", "tie"),
        ("[[A=B]]", "tie"),
        ("[[A=B=Good]]", "tie"),
        ("[[A=B=Bad]]", "tie"),
        ("[[A>B]] no, [[B>A]]", None),  # two verdicts
        ("[[A>>B]] or [[A>B]]", None),  # as JudgeBench has it
        ("[[A>A]]", None),
        ("[[>]]", None),
        ("[[A > B]]", None),
        ("[A>B]", None),
        ("[[\u0410>B]]", None),
        ("", None),
    ],
)
def test_brackets(text, read):
    """Each case is a verdict misread, or read where there is none."""
    assert verdict.brackets(text) == read


def test_first_line():
    """Catches a rationale that decides, and a verdict that is only part of a line."""
    assert verdict.first_line("\n2 \nResponse 1 is worse.\n") == ("2", "Response 1 is worse.")
    assert verdict.first_line("TIE") == ("tie", "")
    assert verdict.first_line("1 is better\n2")[0] is None
    assert verdict.first_line("") == (None, "")


@pytest.mark.parametrize(
    ("text", "count", "read"),
    [
        ("8 6.5", 2, (8.0, 6.5)),
        ("\n 7, 9\nbecause of 3 faults", 2, (7.0, 9.0)),
        ("Assistant 1: 8 Assistant 2: 6", 2, (8.0, 6.0)),  # digits of names taken for scores
        ("Response A 3/10, Response B: 10/10", 2, (3.0, 10.0)),
        ("8 out of 10", 1, (8.0,)),
        ("Score: 10/10", 1, (10.0,)),
        ("", 2, None),
        ("none", 1, None),
        ("8", 2, None),
        ("8 7 6", 2, None),
        ("11", 1, None),  # off the scale, which is no 10
        ("0.5", 1, None),
        ("-3", 1, None),
        ("8\n7", 2, None),
    ],
)
def test_scores(text, count, read):
    """Each case is a number misread, or made up where there is none."""
    assert verdict.scores(text, count) == read
