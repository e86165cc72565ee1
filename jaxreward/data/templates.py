"""Chat templates: messages to the text that a model was trained on.

A checkpoint's chat template is Jinja, that is, a program from a stranger. It runs in Jinja's
sandbox inside a child process that holds nothing of value, and which a watchdog ends when a
rendering takes too long: an endless loop stops whatever the template does, since no co-operation
of the template or of the interpreter is needed. The child also may not take more than 1 GiB of
memory (where the system can limit that). One child serves all renderings of a process; a
rendering costs about 0.1 ms more than in-process.
"""

import atexit
import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

MAX_CHARACTERS = 4_000_000
TIME_LIMIT = 10.0

_children = {}  # process id -> (lock, [child]): a forked worker must not share its parent's pipe


def as_messages(prompt, answer=None):
    """Brings a prompt and an answer into message form.

    Args:
      prompt: str (one user message) or list of {"role", "content"} messages.
      answer: str (one assistant message), list of messages, or None (no answer yet).

    Returns:
      (prompt messages, answer messages), new lists.
    """
    return (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt),
        [{"role": "assistant", "content": answer}]
        if isinstance(answer, str)
        else list(answer or []),
    )


def render(
    source,
    messages,
    *,
    add_generation_prompt,
    bos_token=None,
    eos_token=None,
    tools=None,
    variables=None,
    time_limit=TIME_LIMIT,
    max_characters=MAX_CHARACTERS,
):
    """Renders messages with a chat template, as transformers' `apply_chat_template` does.

    Args:
      source: The template, Jinja source.
      messages: list of {"role", "content", ...}, plain JSON values only.
      add_generation_prompt: End with what opens an assistant's turn.
      bos_token, eos_token: As the template sees them; None leaves them undefined.
      tools: list of JSON schemas of tools, or None.
      variables: Further names for the template, such as pad_token, or None.
      time_limit: Seconds of wall time after which the rendering is ended.
      max_characters: Limit on the input (template and messages as JSON) and on the output.

    Returns:
      The text.

    Raises:
      ValueError: if the template is wrong, refuses the messages, or hits a limit.
    """
    return render_all(
        source,
        [(messages, add_generation_prompt)],
        bos_token=bos_token,
        eos_token=eos_token,
        tools=tools,
        variables=variables,
        time_limit=time_limit,
        max_characters=max_characters,
    )[0]


def render_all(
    source,
    conversations,
    *,
    bos_token=None,
    eos_token=None,
    tools=None,
    variables=None,
    time_limit=TIME_LIMIT,
    max_characters=MAX_CHARACTERS,
):
    """Renders several conversations in one question to the child, which saves time.

    Args:
      source: The template, Jinja source.
      conversations: list of (messages, add_generation_prompt).
      bos_token, eos_token, tools, variables, time_limit, max_characters: As `render`; the limits
        hold for all conversations together.

    Returns:
      list of texts.

    Raises:
      ValueError: as `render`.
    """
    if not all(messages for messages, _ in conversations):
        raise ValueError("a chat template needs at least one message; received none")
    names = {**(variables or {}), "bos_token": bos_token, "eos_token": eos_token}
    names = {name: value for name, value in names.items() if value is not None}
    try:
        request = json.dumps(
            {
                "source": source,
                "conversations": [
                    {"messages": [_message(m) for m in messages], "add_generation_prompt": opens}
                    for messages, opens in conversations
                ],
                "names": {**names, "tools": tools, "documents": None},
                "seconds": time_limit,
                "limit": max_characters,
            }
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"messages and tools must be plain JSON values for a chat template; {error}"
        ) from error
    if len(request) > max_characters:
        raise ValueError(
            f"template and messages hold {len(request)} characters, more than the limit of "
            f"{max_characters}; shorten the dialogue"
        )
    reply = _ask(request.encode(), time_limit)
    if "error" in reply:
        raise ValueError(f"the chat template failed: {reply['error']}")
    return reply["texts"]


def _message(message):
    # As transformers does: null fields are absent, and reasoning is known under all its names.
    message = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _ask(request, seconds):
    lock, slot = _children.setdefault(os.getpid(), (threading.Lock(), []))
    with lock:
        if not slot:
            slot.append(_start())
        child, began = slot[0], time.monotonic()
        try:
            child.stdin.write(request + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # interrupted between question and answer: the pipe is out of step
            slot.clear()
            _end(child)
            raise
        if line.endswith(b"\n"):
            return json.loads(line)
        slot.clear()
        _end(child)
        if time.monotonic() - began >= seconds:
            why = f"it ran longer than {seconds:g} s (an endless loop?)"
        else:
            why = f"its process ended with code {child.returncode}"
        raise ValueError(f"the chat template was stopped: {why}; use another template")


def _start():
    # -P and -c: this folder must not come first on the path, where tokenize.py would hide Python's.
    where = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", f"from {__name__} import _serve; _serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": where},
        start_new_session=True,  # Ctrl-C is for the parent; the child ends with its input
    )
    if child.stdout.readline() != b"ready\n":
        _end(child)
        raise RuntimeError(
            "the process that renders chat templates did not start; its own message stands above"
        )
    return child


def _end(child):
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        try:
            stream.close()
        except OSError:  # unsent bytes in the buffer of a pipe that is gone
            continue


@atexit.register
def _end_all():
    _, slot = _children.get(os.getpid(), (None, []))
    while slot:
        _end(slot.pop())


def _serve():
    """The child: reads requests, writes replies, one JSON object a line."""
    import functools

    environment = _environment()
    compiled = functools.lru_cache(maxsize=16)(environment.from_string)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system; time and output limits stand
    with Path(os.devnull).open("w") as sink:
        sys.stdout.buffer.write(b"ready\n")
        sys.stdout.buffer.flush()
        for line in sys.stdin.buffer:
            request = json.loads(line)
            # A C thread that needs no interpreter lock: it ends even 9**9**9**9.
            faulthandler.dump_traceback_later(request["seconds"], exit=True, file=sink)
            try:
                reply = {"texts": _rendered(compiled, request)}
            except Exception as error:  # whatever a stranger's program raises goes to the asker
                reply = {"error": f"{type(error).__name__}: {error}"[:2000]}
            faulthandler.cancel_dump_traceback_later()
            sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
            sys.stdout.buffer.flush()


def _rendered(compiled, request):
    template, texts, size = compiled(request["source"]), [], 0
    for conversation in request["conversations"]:
        parts = []
        for part in template.generate(**request["names"], **conversation):
            size += len(part)
            if size > request["limit"]:
                raise ValueError(f"output exceeds the limit of {request['limit']} characters")
            parts.append(part)
        texts.append("".join(parts))
    return texts


def _environment():
    """The sandboxed Jinja environment, with the names that transformers gives to templates."""
    from datetime import datetime

    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %} marks answers; its body is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
