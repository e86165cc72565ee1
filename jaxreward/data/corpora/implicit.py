"""Pairs of plain texts that begin alike: what they have in common is the prompt.

Form: TRL's preference type "with implicit prompt" in its standard format, `chosen` and `rejected`
(str), from the "Dataset formats and types" page of its documentation. Dialogues with an implicit
prompt, as messages or in HH-RLHF's form, need no corpus.
"""

from jaxreward.data import formats, sources
from jaxreward.data.formats import Bad


def pairs(rows):
    """Brings numbered rows into the form of `sources.read_pairs`, with a prompt.

    The prompt ends before the last white space that both texts have in common, so that no word is
    cut; TRL cuts where the texts first differ, and steps back over one space.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.

    Returns:
      Iterator of the same, with a prompt; all other fields as they are.
    """
    return formats.mapped(rows, _pair)


def _pair(row):
    if row.get("prompt") is not None:
        raise Bad("is there; read such rows without this corpus", field="prompt")
    texts = [sources.text_of(row, name) for name in ("chosen", "rejected")]
    if not all(isinstance(text, str) for text in texts):
        raise Bad("must be str; messages need no corpus", field="chosen")
    end = 0
    for index, (one, two) in enumerate(zip(*texts)):
        if one != two:
            break
        if one.isspace():
            end = index
    prompt = texts[0][:end]
    if not prompt.strip():
        raise Bad("has no whole word in common with the beginning of rejected", field="chosen")
    chosen, rejected = (text[end:] for text in texts)
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}
