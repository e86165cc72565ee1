"""One function renders and tokenises: its ids, its boundary, its loss mask, its truncation."""

import dataclasses
import json

import numpy as np
import pytest

from jaxreward.data import tokenize

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
# Rewrites the last user turn, so that a prompt's rendering is no prefix of the whole.
REWRITES = (
    "{{ bos_token }}{% for m in messages %}{% if loop.last and m['role'] == 'user' %}[now]"
    "{% endif %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<pad>"]
USER = [{"role": "user", "content": "What is 2 + 2?"}]


def save(
    folder, *, template=None, adds_bos=False, bos="<s>", eos="</s>", generation=None, config=None
):
    """A small byte-level BPE tokenizer whose post-processor trims offsets, as Llama 3's does."""
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = "the answer is four. \n\n What is user assistant the answers are forty\n\n"
    backend.train_from_iterator([words] * 20, trainer)
    after = [processors.ByteLevel(trim_offsets=True)]
    if adds_bos:
        special = [(bos, backend.token_to_id(bos))]
        after.append(
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=special
            )
        )
    backend.post_processor = processors.Sequence(after)
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<pad>"
    )
    hf.chat_template = template
    hf.save_pretrained(str(folder))
    for name, value in (("generation_config", generation), ("config", config)):
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps({"eos_token_id": value}))
    return folder


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatml")
    return tokenize.load_tokenizer(
        save(folder, template=CHATML, bos=None, eos="<|im_end|>", generation=[3, 1])
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return tokenize.load_tokenizer(
        save(folder, template=LLAMA3, adds_bos=True, generation=[1, 6], config=1)
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tokenize.load_tokenizer(save(tmp_path_factory.mktemp("plain"), adds_bos=True))


def test_load(chatml, llama, plain):
    """Several EOS ids from three files, BOS or none, and the template must all be found."""
    assert chatml.eos_ids == {1, 3} and chatml.eos_id == 3
    assert chatml.bos_id is None and not chatml.adds_bos
    assert llama.eos_ids == {1, 6} and llama.bos_id == 0 and llama.adds_bos
    assert plain.eos_ids == {1} and plain.template is None and plain.pad_id == 7
    assert (chatml.template, chatml.vocab_size) == (CHATML, len(chatml.hf))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.pad_id = 3


def test_load_names_what_is_missing(tmp_path):
    """A folder without tokenizer.json or with a damaged config must be named."""
    with pytest.raises(FileNotFoundError, match="is no folder"):
        tokenize.load_tokenizer(tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FileNotFoundError, match=r"must hold tokenizer.json; it holds config.json"):
        tokenize.load_tokenizer(tmp_path)
    save(tmp_path, config=None)
    with pytest.raises(ValueError, match=r"config.json must be JSON"):
        tokenize.load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(ValueError, match="received 'x'"):
        tokenize.load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["the answer", " é\n\n日本 ", "a  b </s> c", "", "don't  stop\n"])
def test_ids_and_decode(llama, text):
    """Ids equal transformers' own without special tokens, and text comes back byte for byte."""
    assert llama.ids(text) == llama.hf(text, add_special_tokens=False).input_ids
    assert llama.decode(llama.ids(text), skip_special=False) == text


@pytest.mark.parametrize("answer", ["It is four.", " é日\n\n", "", "a<|im_end|>b"])
@pytest.mark.parametrize("name", ["chatml", "llama"])
def test_chat_equals_transformers(request, name, answer):
    """A user who calls apply_chat_template must get the very same ids."""
    tokenizer = request.getfixturevalue(name)
    after = [{"role": "assistant", "content": answer}]
    encoded = tokenize.encode_conversation(tokenizer, USER[0]["content"], answer)
    assert encoded.text == tokenizer.hf.apply_chat_template(USER + after, tokenize=False)
    assert encoded.tokens == tokenizer.hf.apply_chat_template(USER + after, return_dict=False)
    asked = tokenize.encode_conversation(tokenizer, USER)
    assert asked.tokens == tokenizer.hf.apply_chat_template(
        USER, add_generation_prompt=True, return_dict=False
    )
    assert asked.prompt_len == len(asked.tokens) and not any(asked.loss_mask)
    if tokenizer.bos_id is not None:
        assert encoded.tokens.count(tokenizer.bos_id) == 1


def test_chat_boundary_and_loss(chatml):
    """Supervised: the answer and its closing EOS; not the prompt, not the newline after EOS."""
    encoded = tokenize.encode_conversation(chatml, USER, "It is four.")
    tokens, cut = encoded.tokens, encoded.prompt_len
    head = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.decode(tokens[:cut], skip_special=False) == head
    assert chatml.decode(tokens[cut:], skip_special=False) == "It is four.<|im_end|>\n"
    supervised = [token for token, kept in zip(tokens, encoded.loss_mask) if kept]
    assert chatml.decode(supervised, skip_special=False) == "It is four.<|im_end|>"
    assert encoded.loss_mask[-1] is False and tokens[-2] == 3


def test_loss_closes_at_the_last_eos_of_the_turn(chatml):
    """EOS written inside an answer must not cut the supervision short."""
    encoded = tokenize.encode_conversation(chatml, USER, "a<|im_end|>b")
    supervised = [token for token, kept in zip(encoded.tokens, encoded.loss_mask) if kept]
    assert chatml.decode(supervised, skip_special=False) == "a<|im_end|>b<|im_end|>"


def test_loss_skips_user_turns_inside_an_answer(chatml):
    """Where dialogues part early, only the assistant's turns may be learned."""
    prompt = [*USER, {"role": "assistant", "content": "four"}]
    answer = [
        {"role": "user", "content": "the user"},
        {"role": "assistant", "content": "the first"},
        {"role": "user", "content": "What"},
        {"role": "assistant", "content": "the last"},
    ]
    encoded = tokenize.encode_conversation(chatml, prompt, answer)
    supervised = [token for token, kept in zip(encoded.tokens, encoded.loss_mask) if kept]
    assert chatml.decode(supervised, skip_special=False) == "the first<|im_end|>the last<|im_end|>"
    head = chatml.decode(encoded.tokens[: encoded.prompt_len], skip_special=False)
    assert head.endswith("four<|im_end|>\n")  # no assistant's turn is opened before a user's


def test_boundary_inside_a_token(plain):
    """A token that joins the prompt's last character to the answer's first is no prompt token."""
    assert len(plain.ids(" \n\n")) == 1
    encoded = tokenize.encode_conversation(plain, "four. ", "\n\n What")
    assert plain.decode(encoded.tokens[: encoded.prompt_len]) == "four."
    assert encoded.tokens[encoded.prompt_len] == plain.ids(" \n\n")[0]


def test_rewritten_prompt_uses_what_is_common(tmp_path):
    """A template that changes earlier turns must not let answer tokens pass for the prompt."""
    tokenizer = tokenize.load_tokenizer(save(tmp_path, template=REWRITES))
    encoded = tokenize.encode_conversation(tokenizer, "the answer", "is four.")
    assert encoded.text == "<s>the answeris four.</s>"
    assert encoded.prompt_len == 1  # "<s>" alone; then "[now]" stands against "the"
    assert encoded.loss_mask[0] is False and all(encoded.loss_mask[1:])


def test_rewritten_prompt_also_compares_tokens(tmp_path):
    """Common characters that the prompt alone tokenises otherwise are not counted as its tokens."""
    ends = "{{ m['content'] }}{{ 's' if loop.last and m['role'] == 'user' else eos_token }}"
    template = "{% for m in messages %}" + ends + "{% endfor %}"
    tokenizer = tokenize.load_tokenizer(save(tmp_path, template=template))
    head, text = (tokenizer.ids("the answer" + end) for end in ("s", "</s>"))
    assert head[-1] != text[-2] and text[-1] == 1  # " answers" is one token
    encoded = tokenize.encode_conversation(tokenizer, "the answer", "x")
    assert encoded.tokens[: len(text)] == text
    assert encoded.prompt_len == len(text) - 2


def test_plain_bos_and_eos(plain, chatml):
    """One BOS, one EOS: never doubled, never lost, never invented."""
    one = tokenize.encode_conversation(plain, "What", " is four.")
    assert one.tokens == [0, *plain.ids("What is four."), 1]
    assert one.loss_mask == [False] * one.prompt_len + [True] * (len(one.tokens) - one.prompt_len)
    same = tokenize.encode_conversation(plain, "<s>What", " is four.</s>")
    assert (same.tokens, same.prompt_len) == (one.tokens, one.prompt_len)
    asked = tokenize.encode_conversation(plain, "What")
    assert asked.tokens == [0, *plain.ids("What")] and asked.prompt_len == len(asked.tokens)
    bare = tokenize.encode_conversation(chatml, "What", " is", template="plain")
    assert bare.tokens == [*chatml.ids("What is"), 3]
    empty = tokenize.encode_conversation(plain, "What</s>", "")
    assert empty.tokens[-2:] == [1, 1] and empty.loss_mask[-2:] == [False, True]


def test_plain_messages_are_a_dialogue(plain):
    """Message lists without a chat template keep who said what, the answer after the prompt."""
    encoded = tokenize.encode_conversation(plain, USER, [{"role": "assistant", "content": "four"}])
    assert encoded.text == "\n\nHuman: What is 2 + 2?\n\nAssistant: four"
    head = plain.decode(encoded.tokens[: encoded.prompt_len])
    assert head == "\n\nHuman: What is 2 + 2?\n\nAssistant:"
    assert tokenize.encode_conversation(plain, USER).text == head
    lone = tokenize.encode_conversation(plain, "a", [{"role": "assistant", "content": "b"}])
    assert lone.text == "ab"


def test_template_choice(plain, chatml):
    """auto follows the tokenizer; a missing template and a misspelling are named."""
    assert tokenize.chosen_template(plain, "auto") == "plain"
    assert tokenize.chosen_template(chatml, "auto") == "chat"
    with pytest.raises(ValueError, match="no chat template; use template='plain'"):
        tokenize.encode_conversation(plain, "a", "b", template="chat")
    with pytest.raises(ValueError, match="did you mean 'plain'"):
        tokenize.encode_conversation(plain, "a", "b", template="plian")


@pytest.mark.parametrize("name", ["chatml", "llama", "plain"])
def test_truncation_keeps_bos_and_answer(request, name):
    """What is dropped is the beginning of the prompt, behind BOS, and no more than needed."""
    tokenizer = request.getfixturevalue(name)
    whole = tokenize.encode_conversation(tokenizer, "What is the answer? " * 3, "It is four.")
    size = len(whole.tokens)
    assert (
        tokenize.encode_conversation(
            tokenizer, "What is the answer? " * 3, "It is four.", max_len=size
        )
        == whole
    )
    short = tokenize.encode_conversation(
        tokenizer, "What is the answer? " * 3, "It is four.", max_len=size - 5
    )
    bos = int(tokenizer.bos_id is not None)
    assert short.tokens == whole.tokens[:bos] + whole.tokens[bos + 5 :]
    assert short.loss_mask == whole.loss_mask[:bos] + whole.loss_mask[bos + 5 :]
    assert (short.prompt_len, short.truncated) == (whole.prompt_len - 5, 5)
    least = size - whole.prompt_len + bos
    tight = tokenize.encode_conversation(
        tokenizer, "What is the answer? " * 3, "It is four.", max_len=least
    )
    assert (len(tight.tokens), tight.prompt_len) == (least, bos)
    with pytest.raises(tokenize.AnswerTooLong, match=f"more than max_len {least - 1}"):
        tokenize.encode_conversation(
            tokenizer, "What is the answer? " * 3, "It is four.", max_len=least - 1
        )


@pytest.mark.parametrize("name", ["chatml", "llama", "plain"])
@pytest.mark.parametrize(
    "answers", [[" the answer", " the answers are forty", " x"], ["same", "same"], ["", " a"]]
)
@pytest.mark.parametrize("drop", [0, 3])
def test_tree_equals_each_answer_alone(request, name, answers, drop):
    """Neither sharing nor a longer neighbour may change a token or a loss flag of an answer."""
    tokenizer = request.getfixturevalue(name)
    prompt = "What is the answer? the user"
    longest = max(
        len(tokenize.encode_conversation(tokenizer, prompt, answer).tokens) for answer in answers
    )
    max_len = longest - drop
    alone = [
        tokenize.encode_conversation(tokenizer, prompt, answer, max_len=max_len)
        for answer in answers
    ]
    tree = tokenize.encode_tree(tokenizer, prompt, answers, max_len=max_len)
    assert tree.truncated == sum(row.truncated for row in alone)
    assert (tree.truncated > 0) == (drop > 0)
    for row, leaf, loss in zip(alone, tree.answers, tree.loss, strict=True):
        assert [*tree.prompt, *leaf] == row.tokens
        assert [False] * len(tree.prompt) + list(loss) == row.loss_mask
        assert len(leaf) >= 1 and len(tree.prompt) <= row.prompt_len
        assert leaf.dtype == np.int32 and loss.dtype == np.bool_
    # shared as far as allowed: one more token would differ or leave the prompt
    first = [int(leaf[0]) for leaf in tree.answers]
    limit = min(row.prompt_len for row in alone)
    assert len(tree.prompt) == limit or len(set(first)) > 1 or min(map(len, tree.answers)) == 1


def test_tree_truncates_each_answer_on_its_own(plain):
    """By hand: the short answer keeps its whole prompt, whatever the long one beside it loses."""
    # One token a letter: BOS a b c d e f | x EOS, and BOS a b c d e f | x y z EOS.
    prompt, answers = "q w z j k v", [" x", " x y z"]
    ids = plain.ids(prompt)
    short, long = (plain.ids(answer) for answer in answers)
    whole = 1 + len(ids) + len(long) + 1
    drop = len(long) - len(short)
    tree = tokenize.encode_tree(plain, prompt, answers, max_len=whole - drop)
    assert [*tree.prompt, *tree.answers[0]] == [0, *ids, *short, 1]
    assert [*tree.prompt, *tree.answers[1]] == [0, *ids[drop:], *long, 1]
    assert tree.truncated == drop > 0
    assert tree.prompt.tolist() == [0]  # BOS is all that the two still have in common
    assert tree.loss[0].tolist() == [False] * len(ids) + [True] * (len(short) + 1)


def test_tree_leaves_a_token_to_each_answer(tmp_path):
    """An empty answer without EOS takes the prompt's last token rather than none."""
    tokenizer = tokenize.load_tokenizer(save(tmp_path, eos=None))
    tree = tokenize.encode_tree(tokenizer, "the answer", ["", " is"], template="plain")
    assert [len(leaf) > 0 for leaf in tree.answers] == [True, True]
    assert not tree.loss[0].any()
    with pytest.raises(ValueError, match="empty and the tokenizer has no EOS"):
        tokenize.encode_tree(tokenizer, "", [""], template="plain")
    with pytest.raises(ValueError, match="at least one answer"):
        tokenize.encode_tree(tokenizer, "q", [])
