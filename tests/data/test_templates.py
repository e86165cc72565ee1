"""Chat templates: equal to transformers' rendering, and harmless."""

import time

import pytest

from jaxreward.data import templates

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- set date = strftime_now("%d %b %Y") %}
{#- the system message comes first #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date + "\n" + system_message }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.content is none %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}
{% set ns = namespace(count=0) %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (ns.count % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
 [INST] {{ message['content'] }} [/INST]{% else %}
{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
{% endfor %}
{{ messages | map(attribute='role') | list | tojson }} {{ pad_token }} {{ documents is none }}
"""
USER = {"role": "user", "content": " What is <2> & 'é'\n\n? "}
ANSWER = {"role": "assistant", "content": '4\u2028 "quoted" ', "tool_calls": None}


@pytest.fixture(scope="module")
def hf():
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("source", [CHATML, LLAMA3, MISTRAL], ids=["chatml", "llama3", "mistral"])
@pytest.mark.parametrize(
    "messages",
    [[USER], [USER, ANSWER], [USER, ANSWER, {"role": "user", "content": ""}]],
    ids=["prompt", "answered", "three"],
)
def test_equals_transformers(hf, source, messages, opens):
    """Any difference in whitespace control, filters or names changes every token after it."""
    ours = templates.render(
        source,
        messages,
        add_generation_prompt=opens,
        bos_token="<s>",
        eos_token="</s>",
        variables={"pad_token": "<pad>"},
    )
    theirs = hf.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=opens
    )
    assert ours == theirs


def test_tools_reasoning_and_missing_tokens_equal_transformers(hf):
    """Tools, old names of reasoning and an undefined bos_token render as they do there."""
    import transformers

    source = (
        "{{ bos_token }}|{{ tools | tojson }}|{% for m in messages %}{{ m.reasoning_content }}/"
        "{{ m.thinking }}/{{ m.content is defined }}{% endfor %}"
    )
    messages = [{"role": "user", "content": None, "reasoning": "hm"}, {"role": "user"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=hf.backend_tokenizer)
    bare.bos_token = None
    theirs = bare.apply_chat_template(messages, tools=tools, chat_template=source, tokenize=False)
    ours = templates.render(source, messages, add_generation_prompt=False, tools=tools)
    assert ours == theirs
    assert ours.startswith("|[{")


def test_refusals_are_value_errors():
    """A template's own refusal, a syntax error and a sandbox breach reach the user as one type."""
    two_users = [USER, USER]
    with pytest.raises(ValueError, match="Roles must alternate"):
        templates.render(MISTRAL, two_users, add_generation_prompt=False)
    with pytest.raises(ValueError, match="TemplateSyntaxError"):
        templates.render("{% if %}", [USER], add_generation_prompt=False)
    with pytest.raises(ValueError, match="SecurityError"):
        templates.render("{{ messages.__class__.__mro__ }}", [USER], add_generation_prompt=False)
    with pytest.raises(ValueError, match="SecurityError"):
        templates.render("{{ messages.append(1) }}", [USER], add_generation_prompt=False)
    with pytest.raises(ValueError, match="at least one message"):
        templates.render(CHATML, [], add_generation_prompt=False)
    with pytest.raises(ValueError, match="plain JSON"):
        templates.render(CHATML, [{"role": {1}}], add_generation_prompt=False)


LOOPS = {
    "nested": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "one long operation": "{{ (7 ** (9 ** 9)) % 3 }}",
}


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS.keys())
def test_endless_templates_are_stopped(source):
    """A template that never ends must not hang the run, even inside one C call."""
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"longer than 0\.3 s"):
        templates.render(source, [USER], add_generation_prompt=False, time_limit=0.3)
    assert time.monotonic() - began < 10
    assert templates.render("ok", [USER], add_generation_prompt=False) == "ok"


def test_memory_and_sizes_are_limited():
    """Output that doubles and doubles must end in an error, and so must huge inputs."""
    double = (
        "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}{{ n.s }}"
    )
    with pytest.raises(ValueError, match=r"MemoryError|exceeds|longer than"):
        templates.render(double, [USER], add_generation_prompt=False)
    with pytest.raises(ValueError, match="output exceeds the limit of 500"):
        templates.render(
            "{% for i in range(999) %}x{% endfor %}",
            [USER],
            add_generation_prompt=False,
            max_characters=500,
        )
    with pytest.raises(ValueError, match="more than the limit of 100"):
        templates.render("x" * 101, [USER], add_generation_prompt=False, max_characters=100)


def test_as_messages():
    """Strings become one message each; lists are copied, not aliased."""
    prompt = [USER]
    before, after = templates.as_messages(prompt, "a")
    assert before == prompt and before is not prompt
    assert after == [{"role": "assistant", "content": "a"}]
    assert templates.as_messages("q") == ([{"role": "user", "content": "q"}], [])
