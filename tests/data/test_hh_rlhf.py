"""HH-RLHF dialogues."""

import pytest

from jaxreward.data.corpora import hh_rlhf

TEXT = "\n\nHuman: Hi\n\nthere\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: Bye."


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_to_messages_and_back():
    """Catches turns split inside a paragraph, and lost or gained whitespace."""
    messages = [user("Hi\n\nthere"), assistant("Hello!"), user("Bye"), assistant("Bye.")]
    assert hh_rlhf.to_messages(TEXT) == messages
    assert hh_rlhf.to_text(messages) == TEXT
    assert hh_rlhf.to_text(messages[:1], add_generation_prompt=True) == (
        "\n\nHuman: Hi\n\nthere\n\nAssistant:"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Human: hi", "must begin with"),
        ("", "must begin with"),
        ("\n\nAssistant: hi", "must begin with"),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "turns 1 and 2 are both Human"),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "turns 2 and 3 are both Assistant"),
    ],
)
def test_malformed(text, words):
    """A malformed dialogue must be named, not silently mended."""
    with pytest.raises(ValueError, match=words):
        hh_rlhf.to_messages(text)


def test_split_at_last_turn():
    """The usual row: all but the last turn is the prompt."""
    front = [user("q")]
    assert hh_rlhf.split_pair(front + [assistant("a")], front + [assistant("b")]) == (
        front,
        [assistant("a")],
        [assistant("b")],
    )


def test_split_earlier():
    """Dialogues that part earlier keep their remaining turns instead of losing them."""
    front = [user("q"), assistant("a")]
    chosen, rejected = [user("r"), assistant("b")], [user("s"), assistant("c")]
    assert hh_rlhf.split_pair(front + chosen, front + rejected) == (front, chosen, rejected)


def test_split_keeps_an_answer_when_one_is_a_prefix():
    """A dialogue that is the beginning of the other must not lose its answer to the prompt."""
    short = [user("q"), assistant("a")]
    long = [*short, user("r"), assistant("b")]
    assert hh_rlhf.split_pair(short, long) == (short[:1], short[1:], long[1:])


def test_split_wants_assistant_last():
    """A dialogue ending with the user has no answer to compare."""
    with pytest.raises(ValueError, match="rejected must end with an assistant turn"):
        hh_rlhf.split_pair([user("q"), assistant("a")], [user("q")])


def test_to_text_names_unknown_roles():
    """A system message has no place in this format and must not vanish."""
    with pytest.raises(ValueError, match="'system'"):
        hh_rlhf.to_text([{"role": "system", "content": "x"}])
