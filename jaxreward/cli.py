"""The command line: `jaxreward COMMAND …`, which is also `python -m jaxreward COMMAND …`.

Each command is one short function that imports what it calls, so that `--help` and `--version`
start nothing. Exit codes: 0 done; 1 the command failed on something the user can put right; 2 the
command line or the config is wrong; 130 interrupted. Only results go to standard output.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import traceback
from pathlib import Path

from jaxreward import __version__
from jaxreward.core.resolve import near, resolve, resolve_words, words
from jaxreward.train import writers

STOPPED = "JAXREWARD_STOPPED_EXIT"


class UsageError(Exception):
    """The command line or the config is wrong: exit code 2."""


# Commands


def train(args):
    """Train what a config says, or resume the run that the workdir holds."""
    from jaxreward import overrides, presets

    with _usage():
        code = _stopped_code()
        if not args.config:
            raise ValueError(
                f"--config is missing; shipped configs: {', '.join(presets.shipped())}"
            )
        config = presets.load(args.config, args.overrides)
        if args.print_config:
            sys.stdout.write(presets.dumps(config))
            return
        if not args.workdir:
            raise ValueError(
                "--workdir is missing; it is where the run is written and resumed from"
            )
        if args.workdir.is_file():
            raise ValueError(f"--workdir {args.workdir} is a file; it must be a folder")
        if not config.get("recipe"):
            raise ValueError(f"{args.config}: config.recipe is empty; it names the training loop")
        run = resolve("recipes", f"{config.recipe}.run")
        args.workdir.mkdir(parents=True, exist_ok=True)
        path = args.workdir / "config.json"
        fresh = not path.exists()
        changed = {} if fresh else presets.diff(presets.read(path), config)
        overrides.check_resume(path, changed)
    _start()
    # Not above: they import jax, which the recipe has done by now.
    from jaxreward.parallel import hosts
    from jaxreward.train.loop import Stopped

    # Others may have found the writer's config already, or not yet.
    fresh = fresh and hosts.is_writer()
    if fresh or (changed and hosts.is_writer()):
        presets.save(config, path)
    try:
        run(config, args.workdir)
    except Stopped as stop:
        print(f"jaxreward train: {stop}", file=sys.stderr)
        return code
    except BaseException:
        # A run that failed before it did anything must not hold the next one to its config, which
        # may be what was wrong.
        if fresh and not _trained(args.workdir):
            path.unlink(missing_ok=True)
        raise


def evaluate(args):
    """Measure a model on pairs, labelled answers or suites; the result is printed as JSON."""
    pairs = {"name": args.name, "form": args.form, "corpus": args.corpus}
    suite = args.suite.partition(",")[0]
    if suite and pairs != {"name": "heldout", "form": "pairs", "corpus": ""}:
        raise UsageError("--name, --form and --corpus do not go with --suite")
    if (args.limit or args.overlap or args.by != "score") and (not suite or suite in _PAPERS):
        raise UsageError("--limit, --by and --overlap go with public suites (--suite)")
    if suite in _PAPERS and not args.output:
        raise UsageError(f"--suite {suite} needs --output FILE.json")
    with _usage():
        # Before anything starts: a misspelt keyword is a fault of the command line.
        _, given = words(args.suite, what="--suite") if suite in _PAPERS else ("", {})
        run = resolve("recipes", _PAPERS[suite], **given) if suite in _PAPERS else None
    _start(alone="evaluate --by judge" if args.by == "judge" else "")
    if suite == "heal":
        result = run(str(args.model).split(","), args.data, args.output, **_batch(args))
    elif suite in _PAPERS:
        result = run(args.model, args.data, args.output, **_batch(args))
    elif suite:
        from jaxreward.recipes import suites

        how = {"limit": args.limit, "by": args.by, "overlap": args.overlap} | _batch(args)
        result = suites.run(args.model, args.suite.split(","), args.data, args.output, **how)
    else:
        from jaxreward.recipes import evaluate

        result = evaluate.evaluate(
            args.model, args.data, output=args.output, **pairs, **_batch(args)
        )
    if result is not None and _writes():
        # float: numbers of NumPy are not known to json.
        print(json.dumps(result, indent=2, sort_keys=True, default=float))


def score(args):
    """Score prompts and answers with a reward model, or a denoiser: a JSON line in, one out."""
    if args.proxy and (args.corpus or args.template != "auto" or "-" in (args.input, args.output)):
        raise UsageError("--proxy reads and writes files of hypotheses; leave out --corpus, ...")
    masks = {"samples": args.likelihood, "guidance": args.guidance, "seed": args.seed}
    if any(masks.values()) and (args.proxy or not args.likelihood):
        raise UsageError("--guidance and --seed go with --likelihood N, and none with --proxy")
    _start()
    if args.proxy:
        from jaxreward.recipes import hypotheses

        models = {args.proxy: args.model}
        return hypotheses.proxies(args.input, args.output, models, **_batch(args))
    from jaxreward.recipes import evaluate, likelihood

    place = (args.model, args.input, args.output)
    how = {"template": args.template, "corpus": args.corpus, **_batch(args)}
    if args.likelihood:
        return likelihood.score(*place, **masks, **how)
    likelihood.refuse(args.model)
    evaluate.score(*place, **how)


def generate(args):
    """Sample answers to prompts from a language model, one JSON line in, one out."""
    _start(alone="generate")
    from jaxreward.recipes import generate

    generate.run(
        args.model,
        args.input,
        args.output,
        n=args.n,
        temperature=args.temperature,
        max_new=args.max_new,
        seed=args.seed,
        batch=args.batch,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        stop_strings=args.stop,
        steps=args.steps,
        block=args.block,
        threshold=args.threshold,
    )


def data(args):
    """Look at a data file before training: examples as tokens, lengths, duplicates."""
    if args.sets:
        other = (args.kind, args.corpus, args.overlap, args.limit, args.template)
        if other != ("auto", None, None, None, "auto") or (args.spoil and not args.corrupt):
            raise UsageError("--sets takes --corrupt (and with it --spoil), --model and --max_len")
        return _sets(args)
    if len(args.file) > 1 or args.corrupt or args.spoil:
        raise UsageError("several files, --corrupt and --spoil go with --sets OUT")
    if not args.model and (args.max_len or args.template != "auto"):
        raise UsageError("--max_len and --template are about tokens; give --model HF_FOLDER too")
    with _usage():
        corpus = resolve_words("data.corpora", args.corpus) if args.corpus else None
    from jaxreward.data import inspection, inspection_text, tokenize

    found = inspection.inspect(
        Path(args.file[0]),
        tokenizer=tokenize.load_tokenizer(args.model) if args.model else None,
        kind=args.kind,
        corpus=corpus,
        template=args.template,
        max_len=args.max_len,
        show=args.show,
        other=args.overlap,
        limit=args.limit,
    )
    text = inspection_text.render(found, colour=_coloured(sys.stdout))
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="")


def _sets(args):
    """Writes one file of hypotheses from the answers of several sources."""
    from jaxreward.recipes import hypotheses

    parts = []
    for text in args.file:
        path, name, temp = [*text.split(",", 2), "", ""][:3]
        try:
            parts.append((path, name or Path(path).stem, float(temp) if temp else None))
        except ValueError as error:
            raise UsageError(f"expected FILE[,SOURCE[,TEMPERATURE]]; received {text!r}") from error
    corruptions = args.corrupt.split(",") if args.corrupt else ()
    kw = {"corruptions": corruptions, "spoil": args.spoil, "tokenizer": args.model}
    made = hypotheses.build(parts, args.sets, most=args.max_len, **kw)
    print(json.dumps(made, indent=2))


def import_model(args):
    """Bring a model into a Hugging Face folder that the other commands read."""
    if bool(args.folder) == bool(args.source):
        raise UsageError("expected either a HF_FOLDER or --from, and not both")
    if args.source:
        from jaxreward.hub import gguf

        gguf.import_smollm2(args.out)
    else:
        from jaxreward.hub import load

        load.import_folder(args.folder, args.out)
    print(f"wrote {args.out}")


def export(args):
    """Write the model of a run as a Hugging Face folder."""
    from jaxreward.recipes import evaluate

    evaluate.export(args.model, args.out, dtype=args.dtype)
    print(f"wrote {args.out}")


def verify(args):
    """Compare a model folder as it is read here with transformers."""
    _start()
    from jaxreward.recipes import verify

    checks, facts = verify.verify(
        args.folder, pairs=args.pairs, limit=args.limit, template=args.template
    )
    print(verify.table(checks, facts))
    if not all(check.passed for check in checks):
        raise ValueError(f"{args.folder} is not the same model here as in transformers; see above")


def report(args):
    """Write one HTML page: about a run, or of several models' results side by side."""
    if bool(args.workdir) == bool(args.compare):
        raise UsageError("give --workdir DIR or --compare FILE.json ..., one of them")
    if args.compare and not args.out:
        raise UsageError("--compare needs --out FILE.html")
    out = args.out or args.workdir / "report.html"
    if args.compare:
        from jaxreward.report import compare

        compare.write(args.compare, out)
    else:
        from jaxreward.report import page

        page.write(args.workdir, out)
    print(f"wrote {out}")


_PAPERS = {"mrmbench": "probing.run", "heal": "hypotheses.run"}  # suites with settings of their own
_COMMANDS = {
    "train": (
        train,
        "jaxreward train --config reward_model/bradley_terry --workdir runs/bt \\\n"
        "    --config.models.policy.init=hf:models/smollm2 --config.data.path=pairs.jsonl",
    ),
    "evaluate": (evaluate, "jaxreward evaluate --model runs/bt --data pairs.jsonl"),
    "score": (score, "jaxreward score --model runs/bt --input answers.jsonl --output scores.jsonl"),
    "generate": (
        generate,
        "jaxreward generate --model models/smollm2 --input prompts.jsonl \\\n"
        "    --output answers.jsonl --n 4 --temperature 0.8",
    ),
    "data": (data, "jaxreward data pairs.jsonl --model models/smollm2 --max_len 512"),
    "import": (import_model, "jaxreward import --from smollm2 --out models/smollm2"),
    "export": (export, "jaxreward export --model runs/bt --out models/bt"),
    "verify": (verify, "jaxreward verify models/smollm2"),
    "report": (report, "jaxreward report --workdir runs/bt"),
}


# The flags


def _flags(command, add):
    """Declares the flags of `command` with `add`, which is argparse's add_argument."""
    if command == "train":
        add("--config", metavar="NAME", help="shipped config or .py file, with words after a ':'")
        add(
            "--workdir", type=Path, metavar="DIR", help="where the run is written, and resumed from"
        )
        add("--print_config", action="store_true", help="print the config as JSON and stop")
    if command == "evaluate":
        add("--model", type=Path, required=True, metavar="DIR", help="workdir or exported folder")
        add("--data", type=Path, required=True, metavar="FILE", help="pairs: JSON Lines, Parquet")
        add("--suite", default="", metavar="A,B", help="see docs/evaluation.md; --data is a folder")
        add("--limit", type=_positive, metavar="N", help="first items of each suite")
        add("--by", default="score", metavar="WHAT", help="score, an output, likelihood or judge")
        add("--overlap", type=Path, metavar="FILE", help="training data: measure without its rows")
        add("--form", default="pairs", choices=["pairs", "points"], help="default: %(default)s")
        add("--corpus", default="", metavar="NAME", help="rows of another form: NAME[,key=value]")
        add("--output", "--out", type=Path, metavar="FILE.json", help="also write the result there")
        add("--name", default="heldout", help="name of the result (default: %(default)s)")
        add("--batch", type=_positive, metavar="N", help="rows at a time")
    if command == "score":
        add("--model", type=Path, required=True, metavar="DIR", help="workdir or exported folder")
        add("--input", type=_stream, required=True, metavar="FILE", help="JSON lines; - is stdin")
        add("--output", type=_stream, required=True, metavar="FILE", help="- is stdout")
        add("--corpus", default="", metavar="NAME", help="rows of another form: NAME[,key=value]")
        add("--batch", type=_positive, metavar="N", help="rows at a time")
        add("--template", default="auto", help="auto, chat or plain (default: %(default)s)")
        add(
            "--proxy", default="", metavar="NAME", help="score a file of hypotheses under this name"
        )
        add("--likelihood", type=_positive, metavar="N", help="of a denoiser: masks per answer")
        add("--guidance", type=float, default=0.0, help="of --likelihood; 0: none (the default)")
        add("--seed", type=int, default=0, help="of --likelihood (default: %(default)s)")
    if command == "generate":
        add("--model", type=Path, required=True, metavar="DIR", help="folder of a language model")
        add("--input", type=_stream, required=True, metavar="FILE", help="prompts, JSON lines")
        add("--output", type=_stream, required=True, metavar="FILE", help="answers, JSON lines")
        add("--n", type=_positive, default=4, help="answers per prompt (default: %(default)s)")
        add("--temperature", type=_temperature, default=0.8, help="default: %(default)s; 0: greedy")
        add("--top_k", type=int, default=0, help="most likely tokens to draw from; 0: all")
        add("--top_p", type=float, default=1.0, help="mass to draw from (default: %(default)s)")
        add("--min_p", type=float, default=0.0, help="least share of the most likely (default: 0)")
        add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; many")
        add("--max_new", type=_positive, default=64, help="tokens at most (default: %(default)s)")
        add("--seed", type=int, default=0, help="default: %(default)s")
        add("--batch", type=_positive, default=64, help="answers at a time (default: %(default)s)")
        add("--steps", type=int, default=0, help="of a denoiser; 0: a token a step")
        add("--block", type=int, default=0, help="positions of a denoiser's block; 0: all")
        add("--threshold", type=float, default=0.0, help="of a denoiser: commit all that are surer")
    if command == "data":
        add("file", nargs="+", metavar="FILE", help="JSON Lines, Parquet, ArrayRecord or tfds:NAME")
        add("--model", type=Path, metavar="HF_FOLDER", help="its tokenizer; else by characters")
        add(
            "--kind",
            choices=["auto", "pairs", "points", "chats", "prompts"],
            default="auto",
            help="what a row is (default: %(default)s, from the fields)",
        )
        add("--corpus", metavar="NAME", help="maps the fields, as data.corpus: NAME[,key=value]")
        add("--template", default="auto", help="auto, chat or plain (default: %(default)s)")
        add("--max_len", type=_positive, metavar="N", help="tokens of prompt and answer at most")
        add("--show", type=int, default=2, metavar="N", help="examples (default: %(default)s)")
        add("--overlap", type=Path, metavar="FILE2", help="look for its prompts in FILE")
        add("--limit", type=_positive, metavar="N", help="usable rows of FILE at most")
        add("--sets", type=Path, metavar="OUT", help="merge FILE[,SOURCE[,TEMP]] ... into it")
        add(
            "--corrupt", default="", metavar="A,B", help="of --sets: truncated, shuffled, off_topic"
        )
        add("--spoil", metavar="SOURCE", help="with --corrupt: whose answers")
    if command == "import":
        add("folder", nargs="?", type=Path, metavar="HF_FOLDER", help="a Hugging Face folder")
        add("--from", dest="source", choices=["smollm2"], help="a model from an installed package")
        add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    if command == "export":
        add("--model", type=Path, required=True, metavar="WORKDIR", help="workdir of a run")
        add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
        add("--dtype", default="float32", help="dtype of the weights (default: %(default)s)")
    if command == "verify":
        add("folder", type=Path, metavar="HF_FOLDER", help="a language model or a reward model")
        add("--pairs", type=Path, metavar="FILE", help="preference pairs to run it on")
        add("--limit", type=_positive, default=32, help="pairs at most (default: %(default)s)")
        add("--template", default="auto", help="auto, chat or plain (default: %(default)s)")
    if command == "report":
        add("--workdir", type=Path, metavar="DIR", help="workdir of a run")
        add("--compare", nargs="+", type=Path, metavar="FILE.json", help="results of evaluations")
        add("--out", type=Path, metavar="FILE", help="default: report.html in the workdir")
    add(
        "--log_level",
        choices=writers.LEVELS,
        default="info",
        help="what is printed beside results (default: %(default)s)",
    )
    add("--debug", action="store_true", help="show the traceback of an error")


def _stream(text):
    return text if text == "-" else Path(text)


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def _temperature(text):
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number, 0 or more, got {text}")
    return value


def _parse(argv):
    """The parsed command line. argparse exits by itself on --help, --version and its own errors."""
    top = argparse.ArgumentParser(
        prog="jaxreward",
        description="Reward models and preference optimisation in JAX.",
        epilog="`jaxreward COMMAND --help` shows the flags of a command and an example.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"jaxreward {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    parsers = {}
    for name, (run, example) in _COMMANDS.items():
        what = run.__doc__.splitlines()[0]
        parsers[name] = commands.add_parser(
            name,
            help=what,
            description=what,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _flags(name, parsers[name].add_argument)
    if not argv:
        top.print_help(sys.stderr)
        raise SystemExit(2)
    command = argv[0]
    if not command.startswith("-") and command not in _COMMANDS:
        top.error(
            f"unknown command {command!r}{near(command, list(_COMMANDS))} "
            f"commands: {', '.join(_COMMANDS)}"
        )
    overrides = []
    if command == "train":
        argv, overrides = _split_overrides(argv, parsers["train"].error)
    args, rest = top.parse_known_args(argv)
    if rest:
        parser = parsers.get(args.command, top)
        known = re.findall(r"--[\w-]+", parser.format_usage())
        parser.error(
            f"not understood: {' '.join(rest)}{near([r.split('=')[0] for r in rest], known)} "
            f"flags: {', '.join(known)}"
        )
    args.overrides = overrides
    return args


def _split_overrides(argv, fail):
    """The `--config.a.b=v` and `--config.a.b v` of `argv` apart from the rest."""
    rest, overrides, words = [], [], iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                fail(f"{word} has no value; write {word}=VALUE")
        overrides.append(f"{key}={value}")
    return rest, overrides


# Helpers of the commands


def _coloured(stream):
    """Whether colour can be shown and nobody has asked for none (https://no-color.org)."""
    asked = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return asked and stream.isatty()


def _batch(args):
    """`batch` as a keyword where it was given, so that the callee's own default stands."""
    return {} if args.batch is None else {"batch": args.batch}


def _trained(workdir):
    """Whether the workdir holds anything that a run made: a logged step or a checkpoint."""
    metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    return (metrics.is_file() and metrics.stat().st_size > 0) or (
        checkpoints.is_dir() and any(checkpoints.iterdir())
    )


def _start(alone=""):
    """Joins the other processes, where the launcher says that there are some, and switches the
    cache of compiled programs on. `alone` names a command that runs in one process only."""
    from jaxreward.parallel import hosts
    from jaxreward.train import compile_cache

    with _usage():
        if alone and os.environ.get(hosts.SWITCH) == "1":
            raise ValueError(
                f"{alone} runs in one process, on all devices of one host; unset {hosts.SWITCH} "
                "and start it once"
            )
        hosts.join()
        compile_cache.enable()


def _writes():
    """Whether this process is the one that writes results."""
    from jaxreward.parallel import hosts

    return hosts.is_writer()


def _stopped_code():
    """The exit code of a run that SIGTERM stopped; schedulers that restart only what failed get
    another one than 0."""
    text = os.environ.get(STOPPED, "") or "0"
    if not text.isdigit() or int(text) > 125:
        raise ValueError(f"{STOPPED}: expected an exit code from 0 to 125, got {text!r}")
    return int(text)


@contextlib.contextmanager
def _usage():
    """Turns what is wrong with a config into a UsageError."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(_text(error)) from error


def _text(error):
    """The message of `error`; str() of a KeyError would put it in quotes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    # A bare key or nothing says too little without the type.
    return text if " " in text else f"{type(error).__name__}: {text}"


def main(argv=None):
    """Runs one command.

    Args:
      argv: The command line without the program's name; sys.argv's by default.

    Returns:
      The exit code: 0 done (or stopped by SIGTERM, to go on later, if JAXREWARD_STOPPED_EXIT names
      no other), 1 the command failed, 2 wrong command line or config, 130 interrupted. An error
      that is not the user's is raised as it is.
    """
    try:
        args = _parse(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:
        return stop.code or 0
    where = f"jaxreward {args.command}"
    try:
        with writers.log_level(args.log_level):
            code = _COMMANDS[args.command][0](args)
    except KeyboardInterrupt:
        print(f"{where}: interrupted", file=sys.stderr)
        return 130
    except (UsageError, ValueError, KeyError, OSError, ImportError, FloatingPointError) as error:
        # ImportError: an optional package is missing, and the text says how to install it.
        # FloatingPointError: a run diverged, and the text says where and what to change.
        usage = isinstance(error, UsageError)
        if args.debug:
            traceback.print_exc()
        print(f"{where}: error: {_text(error)}", file=sys.stderr)
        if not usage and not args.debug:
            print("(--debug shows where it was raised)", file=sys.stderr)
        return 2 if usage else 1
    return code or 0


def entry():
    """The console script.

    Where several processes run and this one fails, it ends at once: on the way out JAX would wait
    for the others, which wait for this one.
    """
    if os.environ.get("JAXREWARD_DISTRIBUTED") != "1":
        sys.exit(main())
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    if code in (1, 2):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
