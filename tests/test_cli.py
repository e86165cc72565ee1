"""The command line: what each command calls, what it prints, and its exit code."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxreward import cli, presets

NAME = "reward_model/bradley_terry"
TRAIN = ["train", "--config", f"{NAME}:smoke"]


@pytest.fixture
def fake(monkeypatch):
    """fake("recipes.x", f=…) puts a stand-in module in place; returns the list of its calls."""
    import importlib

    calls = []

    def put(path, **functions):
        layer, name = path.split(".")
        module = types.ModuleType(f"jaxreward.{path}")
        for key, result in functions.items():

            def call(*args, _key=key, _result=result, **kwargs):
                calls.append((_key, args, kwargs))
                return _result(*args, **kwargs) if callable(_result) else _result

            setattr(module, key, call)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parent = importlib.import_module(f"jaxreward.{layer}")
        monkeypatch.setattr(parent, name, module, raising=False)
        return calls

    monkeypatch.delenv("JAXREWARD_DISTRIBUTED", raising=False)
    return put


def test_train_passes_the_locked_config_and_the_workdir(fake, tmp_path):
    """Catches overrides that are lost, and a run that leaves no config behind."""
    calls = fake("recipes.preference", run=None)
    workdir = tmp_path / "runs" / "bt"
    argv = [*TRAIN, "--workdir", str(workdir), "--config.seed=3", "--config.mesh.data", "-1"]
    assert cli.main([*argv, "--config.losses.bt.coef=2"]) == 0
    ((_, (config, got), _),) = calls
    assert got == workdir
    assert config.is_locked and config.seed == 3 and config.losses.bt.coef == 2.0
    assert config.models.policy.init == "tiny" and config.mesh.data == -1
    assert presets.diff(presets.read(workdir / "config.json"), config) == {}


def test_print_config_prints_json_and_runs_nothing(fake, capsys):
    """Catches a print that needs a workdir, and text around the JSON."""
    calls = fake("recipes.preference", run=None)
    assert cli.main([*TRAIN, "--print_config", "--config.seed=3"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 3
    assert calls == []


def run_once(fake, workdir, *more):
    """Trains with a stand-in recipe that logs a step; returns the exit code."""

    def run(config, where):
        (where / "metrics.jsonl").write_text('{"step": 1}\n')

    fake("recipes.preference", run=run)
    return cli.main([*TRAIN, "--workdir", str(workdir), *more])


def test_another_config_in_the_same_workdir_is_refused_key_by_key(fake, tmp_path, capsys):
    """Catches a run that continues with another learning rate than it says it has."""
    assert run_once(fake, tmp_path, "--config.models.policy.init=hf:a b") == 0
    before = (tmp_path / "config.json").read_bytes()
    assert run_once(fake, tmp_path, "--config.optim.lr=1e-3") == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxreward train: error: ") and "Traceback" not in err
    assert "  models.policy.init: hf:a b there, tiny now\n" in err
    assert "  optim.lr: 0.0001 there, 0.001 now\n" in err
    assert "another --workdir" in err
    assert "'--config.models.policy.init=hf:a b' --config.optim.lr=0.0001" in err
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ([], 0),
        (["--config.train.steps=40"], 0),
        (["--config.train.log_every=7", "--config.train.save_every=7"], 0),
        (["--config.train.eval_every=7", "--config.train.keep=7"], 0),
        (["--config.train.steps=3"], 2),
        (["--config.train.steps=0"], 2),
        (["--config.train.microbatches=2"], 2),
        (["--config.train.steps=40", "--config.seed=1"], 2),
    ],
)
def test_a_resumed_run_may_change_how_often_it_writes_and_run_longer(fake, tmp_path, more, code):
    """Catches too much and too little that may change; what is accepted is written down."""
    assert run_once(fake, tmp_path) == 0
    assert run_once(fake, tmp_path, *more) == code
    if code == 0:
        overrides = [word.removeprefix("--config.") for word in more]
        expected = presets.load(f"{NAME}:smoke", overrides)
        assert presets.diff(presets.read(tmp_path / "config.json"), expected) == {}


def test_a_run_of_an_older_version_goes_on(fake, tmp_path):
    """Catches a key that newer versions added, and that makes every older workdir useless."""
    assert run_once(fake, tmp_path) == 0
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    older = json.loads(path.read_text())
    older["data"]["source"] = "jsonl"
    for section, key in (("data", "form"), ("data", "corpus"), ("train", "wandb")):
        del older[section][key]
    del older["models"]["policy"]["head_dropout"], older["losses"]["bt"]["margin"]
    path.write_text(json.dumps(older))
    assert run_once(fake, tmp_path, "--config.losses.bt.margin=data") == 2
    assert run_once(fake, tmp_path, "--config.data.form=points") == 2
    assert run_once(fake, tmp_path) == 0
    assert json.loads(path.read_text()) == whole


def test_a_run_by_epochs_does_not_become_one_by_steps(fake, tmp_path):
    """Catches 0 steps ("by epochs") taken for a number that 40 is larger than."""
    assert run_once(fake, tmp_path, "--config.train.steps=0") == 0
    assert run_once(fake, tmp_path, "--config.train.steps=40") == 2


def test_a_run_stopped_by_sigterm_is_no_failure(fake, tmp_path, capsys):
    """Catches a scheduler that counts preemption as a crash, and a workdir that cannot go on."""
    from jaxreward.train.loop import Stopped

    def stopped(config, workdir):
        raise Stopped("stopped by SIGTERM at step 3 of 8; the same command goes on from here")

    fake("recipes.preference", run=stopped)
    assert cli.main([*TRAIN, "--workdir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    text = "stopped by SIGTERM at step 3 of 8; the same command goes on from here"
    assert (out, err) == ("", f"jaxreward train: {text}\n")
    assert (tmp_path / "config.json").exists()


def test_a_run_that_diverged_is_one_message(fake, tmp_path, capsys):
    """Catches a traceback where the message says what happened and what to change."""

    def diverged(config, workdir):
        raise FloatingPointError("loss not finite between steps 1 and 2; lower optim.lr")

    fake("recipes.preference", run=diverged)
    assert cli.main([*TRAIN, "--workdir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jaxreward train: error: loss not finite between steps 1 and 2; lower")
    assert "Traceback" not in err


def test_a_run_that_failed_at_once_does_not_bind_the_next(fake, tmp_path, capsys):
    """Catches a workdir spoilt by a misspelt data path, with nothing trained in it."""

    def missing(config, workdir):
        raise FileNotFoundError(f"no file {config.data.path}; set data.path")

    fake("recipes.preference", run=missing)
    argv = [*TRAIN, "--workdir", str(tmp_path), "--config.data.path=nope.jsonl"]
    assert cli.main(argv) == 1
    assert "jaxreward train: error: no file nope.jsonl; set data.path" in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()
    assert run_once(fake, tmp_path) == 0


def test_a_run_that_failed_later_keeps_its_config(fake, tmp_path):
    """Catches a resume that is checked against nothing, since the config was taken away."""

    def later(config, workdir):
        (workdir / "checkpoints" / "2").mkdir(parents=True)
        raise ValueError("the loss is not finite")

    fake("recipes.preference", run=later)
    assert cli.main([*TRAIN, "--workdir", str(tmp_path)]) == 1
    assert (tmp_path / "config.json").exists()
    assert run_once(fake, tmp_path, "--config.seed=1") == 2


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["train"], "--config is missing; shipped configs: "),
        (["train", "--config", NAME], "--workdir is missing"),
        (["train", "--config", "reward_model/bradly_terry"], f"did you mean {NAME}"),
        ([*TRAIN, "--config.losess.bt.coef=2"], "unknown key config.losess; did you mean losses?"),
        ([*TRAIN, "--config.seed=x"], "config.seed: expected int, got 'x'"),
        ([*TRAIN, "--config.seed"], "--config.seed has no value"),
        ([*TRAIN, "--config.seed", "--debug"], "--config.seed has no value"),
        ([*TRAIN, "--workdr=x"], "did you mean --workdir?"),
        ([*TRAIN, "--work", "x"], "not understood: --work x"),
        ([*TRAIN, "--workdir", "{file}"], "is a file; it must be a folder"),
        ([*TRAIN, "--workdir", "{dir}", "--config.recipe=nope"], "recipes: no module 'nope'"),
        ([*TRAIN, "--workdir", "{dir}", "--config.recipe="], "config.recipe is empty"),
        (["trian"], "unknown command 'trian'; did you mean train? commands: train, evaluate"),
        (["score", "--model", "m"], "the following arguments are required: --input, --output"),
        (["generate", "--n", "0"], "argument --n: expected 1 or more, got 0"),
        (["generate", "--temperature", "nan"], "expected a finite number, 0 or more"),
        (["import", "--out", "o"], "expected either a HF_FOLDER or --from"),
        (["import", "a", "--from", "smollm2", "--out", "o"], "and not both"),
        (["import", "--from", "gpt", "--out", "o"], "invalid choice: 'gpt'"),
    ],
)
def test_a_wrong_command_line_is_exit_2_with_one_clear_message(argv, text, tmp_path, capsys):
    """Catches tracebacks, silence and the wrong exit code for what the user got wrong."""
    (tmp_path / "file").write_text("")
    argv = [a.format(file=tmp_path / "file", dir=tmp_path / "dir") for a in argv]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert ": error: " in err and text in err and "Traceback" not in err


def test_a_damaged_config_json_is_exit_2(fake, tmp_path, capsys):
    """Catches a JSON error without the file's name, and a run started over it."""
    calls = fake("recipes.preference", run=None)
    (tmp_path / "config.json").write_text("{")
    assert cli.main([*TRAIN, "--workdir", str(tmp_path)]) == 2
    assert "config.json is not the JSON of a config" in capsys.readouterr().err
    assert calls == []


def test_no_command_shows_the_help(capsys):
    """Catches an empty command line that does nothing and says nothing."""
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err


@pytest.mark.parametrize("command", list(cli._COMMANDS))
def test_the_help_of_a_command_has_an_example_that_parses(command, capsys):
    """Catches an example that its own command refuses."""
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    example = text.split("example:\n")[1].replace("\\\n", " ").split()
    assert example[:2] == ["jaxreward", command]
    assert cli._parse(example[1:]).command == command


def boom(error):
    def run(*args, **kwargs):
        raise error

    return run


REPORT = ["report", "--workdir", "w"]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("bad row 3"), 1, "jaxreward report: error: bad row 3\n"),
        (KeyError("no key 'x' in y"), 1, "jaxreward report: error: no key 'x' in y\n"),
        (KeyError("x"), 1, "jaxreward report: error: KeyError: x\n"),
        (FileNotFoundError("no file f; give one"), 1, "error: no file f; give one\n"),
        (PermissionError(13, "Permission denied", "f"), 1, "Permission denied: 'f'\n"),
        (ImportError("needs the package gguf: install it"), 1, "error: needs the package gguf"),
        (KeyboardInterrupt(), 130, "jaxreward report: interrupted\n"),
    ],
)
def test_the_users_errors_are_one_message_and_an_exit_code(fake, capsys, error, code, text):
    """Catches tracebacks for what a user can put right, and codes that scripts misread."""
    fake("report.page", write=boom(error))
    assert cli.main(REPORT) == code
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err


def test_debug_shows_the_traceback(fake, capsys):
    """Catches a --debug flag that does nothing."""
    fake("report.page", write=boom(ValueError("bad row")))
    assert cli.main([*REPORT, "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("jaxreward report: error: bad row\n")


def test_a_bug_is_not_dressed_up_as_the_users_error(fake):
    """Catches a handler so broad that it hides programming errors."""
    fake("report.page", write=boom(TypeError("bug")))
    with pytest.raises(TypeError, match="bug"):
        cli.main(REPORT)


def test_evaluate_prints_the_result_as_json(fake, capsys):
    """Catches arguments in the wrong place and NumPy numbers that json refuses."""
    import numpy as np

    calls = fake("recipes.evaluate", evaluate={"metrics": {"accuracy": np.float32(0.5)}})
    argv = ["evaluate", "--model", "m", "--data", "d.jsonl", "--output", "o.json"]
    assert cli.main([*argv, "--name", "mine", "--batch", "4", "--form", "points"]) == 0
    assert json.loads(capsys.readouterr().out) == {"metrics": {"accuracy": 0.5}}
    kwargs = {"output": Path("o.json"), "name": "mine", "form": "points", "corpus": "", "batch": 4}
    assert calls == [("evaluate", (Path("m"), Path("d.jsonl")), kwargs)]


def test_suites_of_papers_take_words(monkeypatch, capsys):
    """Catches words that are dropped or misread, and faults found only after a model was loaded."""
    from jaxreward.recipes import hypotheses, probing

    calls = []

    def probes(model, data, out, *, level="easy", quantile=0.9, batch=8):
        calls.append((model, data, out, level, quantile, batch))
        return {"metrics": 1}

    def heal(models, data, out=None, *, reference=None, every_checkpoint=False, batch=8):
        calls.append((models, data, out, reference, every_checkpoint))
        return {"metrics": 2}

    monkeypatch.setattr(probing, "run", probes)
    monkeypatch.setattr(hypotheses, "run", heal)
    argv = ["evaluate", "--model", "m,n", "--data", "d", "--out", "o.json", "--suite"]
    assert cli.main([*argv, "mrmbench,level=hard,quantile=0.5", "--batch", "2"]) == 0
    assert cli.main([*argv, "heal,reference=b,every_checkpoint=1"]) == 0
    assert calls == [
        (Path("m,n"), Path("d"), Path("o.json"), "hard", 0.5, 2),
        (["m", "n"], Path("d"), Path("o.json"), "b", 1),
    ]
    capsys.readouterr()
    for more, said in (
        ([*argv, "mrmbench,levle=hard"], "level"),
        ([*argv, "heal,reference"], "expected key=value"),
        ([*argv, "heal", "--limit", "3"], "go with public suites"),
        (["evaluate", "--model", "m", "--data", "d", "--suite", "heal"], "needs --output"),
    ):
        assert cli.main(more) == 2
        assert said in capsys.readouterr().err
    assert len(calls) == 2


def test_hypotheses_are_merged_and_scored(tmp_path, fake, capsys):
    """Catches sources and temperatures that get lost, and flags that mean nothing by themselves."""
    path = tmp_path / "cold.jsonl"
    answers = [{"text": "one two", "finished": True}, {"text": "three", "finished": True}]
    path.write_text(json.dumps({"id": "a", "prompt": "Q", "answers": answers}) + "\n")
    out = tmp_path / "sets.jsonl"
    argv = ["data", f"{path},base,0.3", f"{path},other"]
    assert cli.main([*argv, "--sets", str(out), "--corrupt", "truncated", "--spoil", "base"]) == 0
    assert json.loads(capsys.readouterr().out)["sets"] == 1
    hyps = json.loads(out.read_text())["hyps"]
    assert {(h["text"], h["source"], h["temp"]) for h in hyps} >= {("three", "base", 0.3)}
    for more, said in (
        (argv, "go with --sets"),
        (["data", str(path), "--corrupt", "truncated"], "go with --sets"),
        (["data", f"{path},base,hot", "--sets", str(out)], "TEMPERATURE"),
        (["data", str(path), "--sets", str(out), "--limit", "1"], "--sets takes"),
        (["data", str(path), "--sets", str(out), "--spoil", "base"], "--sets takes"),
    ):
        assert cli.main(more) == 2
        assert said in capsys.readouterr().err
    calls = fake("recipes.hypotheses", proxies=None)
    argv = ["score", "--model", "m", "--input", str(out), "--output", str(out), "--proxy", "rm"]
    assert cli.main(argv) == 0
    assert calls == [("proxies", (out, out, {"rm": Path("m")}), {})]
    assert cli.main([*argv, "--template", "plain"]) == 2
    assert "--proxy reads" in capsys.readouterr().err


def test_evaluate_on_suites(fake, capsys):
    """Catches suites that are measured as a file of pairs, and flags that are dropped."""
    calls = fake("recipes.suites", run={"suites": {}})
    argv = ["evaluate", "--model", "m", "--suite", "hhh,rm_bench", "--data", "d"]
    assert cli.main([*argv, "--out", "o.json", "--limit", "5", "--batch", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == {"suites": {}}
    assert cli.main([*argv, "--by", "likelihood", "--overlap", "t.jsonl"]) == 0
    names = ["hhh", "rm_bench"]
    assert calls == [
        (
            "run",
            (Path("m"), names, Path("d"), Path("o.json")),
            {"limit": 5, "by": "score", "overlap": None, "batch": 2},
        ),
        (
            "run",
            (Path("m"), names, Path("d"), None),
            {"limit": None, "by": "likelihood", "overlap": Path("t.jsonl")},
        ),
    ]
    assert cli.main([*argv, "--by", "helpfulness"]) == 0  # which the model may have as an output
    assert calls.pop()[2]["by"] == "helpfulness"
    capsys.readouterr()
    for more, said in (
        ([*argv, "--form", "points"], "do not go with --suite"),
        ([*argv, "--name", "x"], "do not go with --suite"),
        ([*argv[:3], "--data", "d", "--limit", "5"], "--limit, --by and --overlap go with"),
    ):
        assert cli.main(more) == 2
        assert said in capsys.readouterr().err
    assert len(calls) == 2


def test_score_through_pipes_leaves_standard_output_to_the_scores(fake, capsys):
    """Catches "-" taken for a file name, and a line of ours between the scores."""
    calls = fake("recipes.evaluate", score=lambda *a, **k: print('{"score": 1}'))
    fake("recipes.likelihood", refuse=None)
    assert cli.main(["score", "--model", "m", "--input", "-", "--output", "-"]) == 0
    assert capsys.readouterr().out == '{"score": 1}\n'
    how = {"template": "auto", "corpus": ""}
    assert calls == [("refuse", (Path("m"),), {}), ("score", (Path("m"), "-", "-"), how)]


def test_score_passes_batch_and_template(fake):
    """Catches flags that are parsed and dropped."""
    calls = fake("recipes.evaluate", score=None)
    fake("recipes.likelihood", refuse=None)
    argv = ["score", "--model", "m", "--input", "i", "--output", "o", "--batch", "2"]
    assert cli.main([*argv, "--template", "plain", "--corpus", "helpsteer3.pairs"]) == 0
    kwargs = {"template": "plain", "corpus": "helpsteer3.pairs", "batch": 2}
    place = (Path("m"), Path("i"), Path("o"))
    assert calls == [("refuse", (Path("m"),), {}), ("score", place, kwargs)]


def test_score_asks_a_denoiser_for_likelihoods(fake, capsys):
    """Catches a number that is dropped, and flags that mean nothing by themselves."""
    calls = fake("recipes.evaluate", score=None)
    fake("recipes.likelihood", score=None, refuse=None)
    argv = ["score", "--model", "m", "--input", "i", "--output", "o"]
    more = ["--likelihood", "128", "--guidance", "0.5", "--seed", "3", "--batch", "2"]
    assert cli.main([*argv, *more]) == 0
    kwargs = {"samples": 128, "guidance": 0.5, "seed": 3, "template": "auto", "corpus": ""}
    assert calls == [("score", (Path("m"), Path("i"), Path("o")), kwargs | {"batch": 2})]
    for more, said in (
        (["--likelihood", "0"], "expected 1 or more, got 0"),
        (["--guidance", "1"], "go with --likelihood N"),
        (["--seed", "1"], "go with --likelihood N"),
        (["--likelihood", "8", "--proxy", "rm"], "none with --proxy"),
    ):
        assert cli.main([*argv, *more]) == 2
        assert said in capsys.readouterr().err
    assert len(calls) == 1


def test_generate_passes_its_settings(fake):
    """Catches a default that differs from the documented one, and flags that are dropped."""
    calls = fake("recipes.generate", run=None)
    argv = ["generate", "--model", "m", "--input", "i", "--output", "o"]
    assert cli.main(argv) == 0
    more = ["--n", "2", "--temperature", "0", "--max_new", "8", "--seed", "5", "--batch", "16"]
    more += ["--top_k", "5", "--top_p", "0.9", "--min_p", "0.1", "--stop", "a", "--stop", "b c"]
    more += ["--steps", "4", "--block", "2", "--threshold", "0.9"]
    assert cli.main([*argv, *more]) == 0
    first = {"n": 4, "temperature": 0.8, "max_new": 64, "seed": 0, "batch": 64}
    first |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop_strings": []}
    first |= {"steps": 0, "block": 0, "threshold": 0.0}
    second = {"n": 2, "temperature": 0.0, "max_new": 8, "seed": 5, "batch": 16}
    second |= {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "stop_strings": ["a", "b c"]}
    second |= {"steps": 4, "block": 2, "threshold": 0.9}
    place = (Path("m"), Path("i"), Path("o"))
    assert calls == [("run", place, first), ("run", place, second)]


def test_import_goes_to_the_folder_or_to_the_package(fake, capsys):
    """Catches the two sources being mixed up."""
    calls = fake("hub.gguf", import_smollm2=None)
    assert fake("hub.load", import_folder=None) is calls
    assert cli.main(["import", "--from", "smollm2", "--out", "o"]) == 0
    assert cli.main(["import", "hf", "--out", "o"]) == 0
    assert calls == [
        ("import_smollm2", (Path("o"),), {}),
        ("import_folder", (Path("hf"), Path("o")), {}),
    ]
    assert capsys.readouterr().out == "wrote o\nwrote o\n"


def test_export_and_report_call_theirs(fake, capsys):
    """Catches arguments in the wrong order."""
    calls = fake("recipes.evaluate", export=None)
    fake("report.page", write=None)
    assert cli.main(["export", "--model", "w", "--out", "o", "--dtype", "bfloat16"]) == 0
    assert cli.main(["report", "--workdir", "w"]) == 0
    assert cli.main(["report", "--workdir", "w", "--out", "p.html"]) == 0
    assert calls == [
        ("export", (Path("w"), Path("o")), {"dtype": "bfloat16"}),
        ("write", (Path("w"), Path("w/report.html")), {}),
        ("write", (Path("w"), Path("p.html")), {}),
    ]


def test_report_compares_results(fake, capsys):
    """Catches one file of several, and a workdir that is dropped in silence."""
    calls = fake("report.compare", write=None)
    files = ["a.json", "b.json"]
    assert cli.main(["report", "--compare", *files, "--out", "p.html"]) == 0
    assert calls == [("write", ([Path(x) for x in files], Path("p.html")), {})]
    for more, said in (
        (["--compare", "a.json"], "--compare needs --out"),
        (["--compare", "a.json", "--workdir", "w", "--out", "p.html"], "one of them"),
        ([], "give --workdir DIR or --compare"),
    ):
        assert cli.main(["report", *more]) == 2
        assert said in capsys.readouterr().err


def test_distributed_start_comes_first_and_only_when_asked(fake, monkeypatch, tmp_path, capsys):
    """Catches processes that train alone, and a laptop that waits for a coordinator."""
    import jax

    order = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: order.append("initialize"))
    fake("recipes.preference", run=lambda *_: order.append("run"))
    argv = [*TRAIN, "--workdir", str(tmp_path)]
    monkeypatch.setenv("JAXREWARD_DISTRIBUTED", "0")
    assert cli.main(argv) == 0
    monkeypatch.setenv("JAXREWARD_DISTRIBUTED", "1")
    assert cli.main(argv) == 0
    assert order == ["run", "initialize", "run"]
    monkeypatch.setenv("JAXREWARD_DISTRIBUTED", "yes")
    assert cli.main(argv) == 2
    assert "JAXREWARD_DISTRIBUTED: expected 1, 0 or nothing, got 'yes'" in capsys.readouterr().err


def test_help_and_print_config_import_no_jax():
    """Catches an import that makes --help slow or claims a device."""
    code = (
        "import sys; from jaxreward import cli; codes = ["
        "cli.main(['--version']), cli.main(['--help']), cli.main(['train', '--help']), "
        f"cli.main(['train', '--config', '{NAME}', '--print_config'])]; "
        "heavy = {'jax', 'numpy', 'flax', 'orbax', 'transformers', 'grain'}; "
        "print(codes, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stderr.strip() == "[0, 0, 0, 0] []"


def test_the_module_runs_as_a_program():
    """Catches an entry point that drops the exit code or shows a traceback."""
    argv = [sys.executable, "-W", "error", "-m", "jaxreward", "trian"]
    out = subprocess.run(argv, capture_output=True, text=True)
    assert out.returncode == 2
    assert "did you mean train?" in out.stderr and "Traceback" not in out.stderr


def test_the_exit_code_of_a_stopped_run_can_be_chosen(fake, monkeypatch, tmp_path, capsys):
    """Catches a scheduler that takes a preempted run for a finished one; a bad code."""
    from jaxreward.train.loop import Stopped

    def stop(*_):
        raise Stopped("stopped by SIGTERM at step 3 of 9")

    fake("recipes.preference", run=stop)
    argv = [*TRAIN, "--workdir", str(tmp_path)]
    assert cli.main(argv) == 0
    monkeypatch.setenv("JAXREWARD_STOPPED_EXIT", "75")
    assert cli.main(argv) == 75
    monkeypatch.setenv("JAXREWARD_STOPPED_EXIT", "soon")
    assert cli.main(argv) == 2
    assert "expected an exit code from 0 to 125, got 'soon'" in capsys.readouterr().err


def test_generate_refuses_to_be_one_of_several(monkeypatch, capsys):
    """Catches several processes that write one file of answers."""
    monkeypatch.setenv("JAXREWARD_DISTRIBUTED", "1")
    argv = ["generate", "--model", "m", "--input", "a.jsonl", "--output", "b.jsonl"]
    assert cli.main(argv) == 2
    assert "generate runs in one process" in capsys.readouterr().err


@pytest.fixture
def pairs_file(tmp_path):
    """Three rows, one of which is no pair."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "p2"}]))
    return path


def test_data_shows_a_file_with_and_without_a_model(pairs_file, tiny_folder, capsys):
    """Catches flags that are parsed and dropped, and escapes where there is no terminal."""
    assert cli.main(["data", str(pairs_file), "--kind", "pairs"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "Lengths in characters" in out and "3 rows, 2 kept, 1 skipped" in out
    argv = ["data", str(pairs_file), "--model", str(tiny_folder), "--max_len", "23", "--show", "1"]
    more = ["--overlap", str(pairs_file), "--limit", "1", "--template", "chat"]
    assert cli.main([*argv, *more]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    for part in (
        "⟦yes<|im_end|>⟧↵",
        "chat template, tokenizer of",
        "Cut off at --max_len 23",
        "--limit 1 stopped it there",
        "1.  id 1",
        "1 (50.0 %), ids there = here: 1 = 1",
    ):
        assert part in out


def test_data_reads_through_a_corpus(tmp_path, capsys):
    """Catches a name that is not looked up among the corpora, or not passed on."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "p"}\n')
    corpus = sys.modules[__name__]
    assert cli.main(["data", str(path), "--corpus", f"{corpus.__name__}:questions"]) == 0
    assert "1 prompt" in capsys.readouterr().out
    assert cli.main(["data", str(path), "--corpus", "hh_rlf.x"]) == 2
    assert "data.corpora: no module 'hh_rlf'" in capsys.readouterr().err


def test_data_passes_keywords_to_a_corpus(tmp_path, capsys):
    """Catches words behind the name that are dropped, and an error that is none of usage."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "q", "completion": str(i), "label": i < 2} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for words, count in (("", 4), (",most=3", 3)):
        assert cli.main(["data", str(path), "--corpus", f"unpaired.pairs{words}"]) == 0
        assert f": {count} pairs" in capsys.readouterr().out
    for words, text in (("mots=3", "did you mean most?"), ("most", "expected key=value behind")):
        assert cli.main(["data", str(path), "--corpus", f"unpaired.pairs,{words}"]) == 2
        assert text in capsys.readouterr().err
    assert cli.main(["data", str(path), "--kind", "points"]) == 0
    assert "label           True 2, False 2" in capsys.readouterr().out


def questions(rows):
    """A corpus for the test above."""
    return ((number, {"prompt": row["q"]}) for number, row in rows)


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
)
def test_data_is_coloured_on_a_terminal_unless_told_not_to(
    pairs_file, monkeypatch, capsys, variables, coloured
):
    """Catches escapes that somebody has switched off, and a colour that is never shown."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["data", str(pairs_file)]) == 0
    assert ("\x1b[" in capsys.readouterr().out) is coloured


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (["--max_len", "8"], 2, "--max_len and --template are about tokens; give --model"),
        (["--template", "chat"], 2, "--max_len and --template are about tokens; give --model"),
        (["--kind", "pair"], 2, "argument --kind: invalid choice: 'pair'"),
        (["--kind", "chats"], 1, "holds no usable conversation in 3 lines"),
        (["--overlap", "nope.jsonl"], 1, "data file nope.jsonl does not exist"),
        (["--model", "nope"], 1, "nope must hold tokenizer.json"),
    ],
)
def test_data_says_what_is_wrong(pairs_file, capsys, more, code, text):
    """Catches a traceback, a wrong exit code, and half a report before an error."""
    assert cli.main(["data", str(pairs_file), *more]) == code
    out, err = capsys.readouterr()
    assert out == "" and text in err and "Traceback" not in err
