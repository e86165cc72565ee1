"""HH-RLHF text (Anthropic's helpful and harmless comparisons) as messages and back.

Data: Bai et al. 2022, "Training a Helpful and Harmless Assistant with Reinforcement Learning from
Human Feedback"; released under the MIT licence. A row holds two whole dialogues, `chosen` and
`rejected`, written "\\n\\nHuman: …\\n\\nAssistant: …", which share all but their last turns.
"""

import itertools
import re

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_NAMES = {role: name for name, role in _ROLES.items()}


def is_dialogue(text):
    """True if a text claims to be an HH-RLHF dialogue, that is, begins with "\\n\\nHuman:"."""
    return text.startswith("\n\nHuman:")


def to_messages(text):
    """Splits an HH-RLHF dialogue into messages.

    Whitespace around each turn is dropped, as it carries no meaning there.

    Args:
      text: "\\n\\nHuman: …\\n\\nAssistant: …", turns alternating.

    Returns:
      list of {"role": "user" | "assistant", "content": str}.

    Raises:
      ValueError: naming what is wrong with the dialogue.
    """
    if not is_dialogue(text):
        raise ValueError(f'dialogue must begin with "\\n\\nHuman:"; it begins with {text[:24]!r}')
    parts = _TURN.split(text)[1:]
    messages = [
        {"role": _ROLES[name], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2])
    ]
    for number, (one, two) in enumerate(itertools.pairwise(messages), start=2):
        if one["role"] == two["role"]:
            raise ValueError(
                f"dialogue turns must alternate; turns {number - 1} and {number} are both "
                f"{_NAMES[one['role']]}"
            )
    return messages


def to_text(messages, *, add_generation_prompt=False):
    """Writes messages as an HH-RLHF dialogue, the inverse of `to_messages`.

    Args:
      messages: list of {"role": "user" | "assistant", "content": str}.
      add_generation_prompt: End with "\\n\\nAssistant:", ready for an answer.

    Returns:
      The dialogue text.

    Raises:
      ValueError: for a role that the format has no name for.
    """
    for message in messages:
        if message["role"] not in _NAMES:
            raise ValueError(
                f"plain dialogue text knows the roles user and assistant; received "
                f"{message['role']!r}. Use a tokenizer with a chat template, or a str prompt"
            )
    text = "".join(f"\n\n{_NAMES[m['role']]}: {m['content']}" for m in messages)
    return text + ("\n\nAssistant:" if add_generation_prompt else "")


def split_pair(chosen, rejected):
    """Splits two dialogues into the prompt they share and the answers that differ.

    The prompt is all leading messages that are equal, but never a dialogue's last message. When
    the dialogues part before their last turn, each answer keeps all its remaining turns.

    Args:
      chosen: Messages of the preferred dialogue.
      rejected: Messages of the other one.

    Returns:
      (prompt, chosen answer, rejected answer), each a list of messages; the prompt may be empty.

    Raises:
      ValueError: if a dialogue is empty or does not end with an assistant message.
    """
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != "assistant":
            last = messages[-1]["role"] if messages else "no message"
            raise ValueError(f"{name} must end with an assistant turn; it ends with {last}")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]
