"""Prompts to answer, with what their rewards need to know, as records and as token ids."""

import warnings

import numpy as np

from jaxreward.data import sources, tokenize


def read(path, *, on_bad="error", limit=None, corpus=None):
    """Reads prompts, as `sources.read_prompts`, with a report.

    Args:
      path, on_bad, limit, corpus: As `sources.read_pairs`.

    Returns:
      (records, report). Records are dict(id, prompt), other fields under "extra": those reach the
      rewards. The report is dict(read=int, kept=int, skipped={reason: int}).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming file:line:field; or when no row is left.
    """
    return sources.read_rows(
        path, sources.prompt_of, what="prompt", on_bad=on_bad, limit=limit, corpus=corpus
    )


def encode(tokenizer, records, *, template="auto", max_len=None, on_long="error"):
    """Encodes prompts to sample from. None is cut: what a cut prompt asks is another question.

    Args:
      tokenizer: Tokenizer.
      records: From `read`.
      template: As `tokenize.encode_conversation`.
      max_len: Most tokens of a prompt, or None.
      on_long: What to do with a longer one: "error", or "skip", which counts and warns once.

    Returns:
      (prompts, report). Prompts are dict(id, prompt, ids int32[T], record = the row's other fields,
      with its id). The report is dict(prompts, skipped).

    Raises:
      ValueError: naming the record; or when none is left.
    """
    if on_long not in ("error", "skip"):
        raise ValueError(f'on_long must be "error" or "skip"; received {on_long!r}')
    made, skipped = [], 0
    for record in records:
        try:
            row = tokenize.encode_conversation(tokenizer, record["prompt"], template=template)
        except ValueError as error:
            raise ValueError(f"prompt {record['id']!r}: {error}") from error
        size = len(row.tokens)
        if not size:
            raise ValueError(f"prompt {record['id']!r} has no token to begin from; leave it out")
        if max_len is not None and size > max_len:
            if on_long == "error":
                raise ValueError(
                    f"prompt {record['id']!r} takes {size} tokens, more than max_len {max_len}; "
                    "raise data.max_len, or set data.on_bad=skip"
                )
            skipped += 1
            continue
        made.append(
            {
                "id": record["id"],
                "prompt": record["prompt"],
                "ids": np.asarray(row.tokens, np.int32),
                "record": {**record.get("extra", {}), "id": record["id"]},
            }
        )
    if not made:
        raise ValueError(
            f"no prompt is left of {len(records)}: {skipped} were longer than max_len {max_len}; "
            "raise data.max_len"
        )
    if skipped:
        warnings.warn(
            f"max_len {max_len}: {skipped} of {len(records)} prompts were skipped as too long",
            stacklevel=2,
        )
    return made, {"prompts": len(made), "skipped": skipped}
