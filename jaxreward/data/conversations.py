"""Texts to imitate: conversations, prompts with a completion, or plain text, as records and trees.

Only the assistant's tokens are supervised, with the end token that closes each of its turns. Of
plain text all are.
"""

from jaxreward.data import sources, templates
from jaxreward.data.formats import Bad, show
from jaxreward.data.tokenize import AnswerTooLong, Tree, chosen_template, encode_tree, shortened

_FORMS = "messages, or prompt and completion, or text"


def read(path, *, on_bad="error", corpus=None):
    """Reads conversations to learn from.

    A row has `messages`, a list of {"role", "content"} with at least one of the assistant's after
    something to answer; or `prompt` (str or messages) and `completion` (str, or messages that begin
    and end with the assistant's); or neither but `text` (str), which is learnt whole. `id` (str or
    int) is optional. A row whose `label` is false is an answer not to imitate, and refused.

    Args:
      path: As `formats.rows`.
      on_bad: "error" stops at the first row that cannot be used, "skip" leaves such rows out,
        counts them by reason and warns once.
      corpus: As `sources.read_pairs`; `corpora.chosen` makes conversations of preference pairs.

    Returns:
      (records, report). Records are dict(id, prompt, completion): of `messages`, the prompt is what
      comes before the assistant's first, of `text` it is "". The report is dict(read=int, kept=int,
      skipped={reason: int}).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming file:line:field, what was expected and what came; or when no row is left.
    """
    return sources.read_rows(
        path, conversation_of, what="conversation", on_bad=on_bad, corpus=corpus
    )


def conversation_of(row, number):
    """A record of `read` of a row. Raises `formats.Bad`."""
    name = sources.id_of(row, number)
    have = {k for k in ("messages", "prompt", "completion") if row.get(k) is not None}
    if row.get("label") is False:
        raise Bad("is false: an answer not to imitate", field="label")
    if not have and row.get("text") is not None:
        text = sources.text_of(row, "text")
        if not isinstance(text, str) or not text:
            raise Bad("must be str and not empty", field="text", came=show(text))
        return {"id": name, "prompt": "", "completion": text}
    if have == {"messages"}:
        messages = _plain(sources.text_of(row, "messages"))
        if isinstance(messages, str):
            raise Bad("must be a list of messages", field="messages", came=show(messages))
        first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
        if not first:
            raise Bad(
                "must hold something to answer and then a message of the assistant",
                field="messages",
                came=f"the roles {', '.join(m['role'] for m in messages)}",
            )
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        # What follows the last answer is not learnt, so it is not read either.
        return {"id": name, "prompt": messages[:first], "completion": messages[first : last + 1]}
    if have != {"prompt", "completion"}:
        hint = "; data.corpus=chosen.completions learns what was chosen" * ("chosen" in row)
        raise Bad(f"a row needs {_FORMS}{hint}", came=", ".join(sorted(row)) or "no field")
    prompt, completion = (_plain(sources.text_of(row, k)) for k in ("prompt", "completion"))
    if not isinstance(completion, str):
        ends = [completion[0]["role"], completion[-1]["role"]]
        if ends != ["assistant", "assistant"]:
            raise Bad(
                "must begin and end with a message of the assistant",
                field="completion",
                came=" and ".join(ends),
            )
    return {"id": name, "prompt": prompt, "completion": completion}


def _plain(text):
    """Messages without fields that no template is given, such as names or times."""
    if isinstance(text, str):
        return text
    return [{"role": m["role"], "content": m["content"]} for m in text]


def _turns(record):
    """The record once for every turn of the assistant, each with all that came before it."""
    completion = record["completion"]
    if isinstance(completion, str):
        return [record]
    whole = templates.as_messages(record["prompt"], completion)
    before, after = list(whole[0]), list(whole[1])
    return [
        {**record, "prompt": before + after[:i], "completion": [message]}
        for i, message in enumerate(after)
        if message["role"] == "assistant"
    ]


def encode(tokenizer, records, *, template="auto", max_len=None, on_long="error"):
    """Encodes conversations, each as a tree of a prompt and one answer.

    A chat template renders a conversation of several turns once, and all of the assistant's are
    supervised. Plain text has no end of a turn to stop at, so there each turn of the assistant is
    a tree of its own. A completion to an empty prompt is text without a dialogue, and encoded as
    plain whatever the template: BOS if the tokenizer adds one, the text, and EOS.

    Args:
      tokenizer: Tokenizer.
      records: From `read`.
      template: As `tokenize.encode_conversation`.
      max_len: Most tokens of a conversation, or None. What is too long loses the beginning of its
        prompt.
      on_long: What to do with a completion that alone exceeds max_len: "error", or "skip", which
        counts.

    Returns:
      (trees, report). The report is dict(trees, tokens = those supervised, skipped, truncated =
      trees that lost prompt tokens, dropped_tokens). Warns once, with counts, if anything was
      truncated or skipped.

    Raises:
      ValueError: naming the record; or when none is left.
    """
    if on_long not in ("error", "skip"):
        raise ValueError(f'on_long must be "error" or "skip"; received {on_long!r}')
    if chosen_template(tokenizer, template) == "plain":
        records = [turn for record in records for turn in _turns(record)]
    trees: list[Tree] = []
    skipped = 0
    for record in records:
        prompt, completion = record["prompt"], record["completion"]
        whole = prompt == "" and isinstance(completion, str)
        try:
            tree = encode_tree(
                tokenizer,
                prompt,
                [completion],
                template="plain" if whole else template,
                max_len=max_len,
                id=record["id"],
            )
        except ValueError as error:
            long = isinstance(error, AnswerTooLong)
            if long and on_long == "skip":
                skipped += 1
                continue
            kind = AnswerTooLong if long else ValueError
            raise kind(f"conversation {record['id']!r}: {error}") from error
        trees.append(tree)
    report = shortened(trees, skipped, max_len, total=len(records), what="conversation")
    return trees, {"tokens": sum(int(loss.sum()) for t in trees for loss in t.loss), **report}
