"""Several configs run in turn, each from the weights of the one before.

stage 1 -> its checkpoints -> export (adapters merged) -> stage 2's initial model -> ... -> last

    <workdir>/config.json          the stages
    <workdir>/<stage>/             the run of a stage, as if it had been started alone
    <workdir>/<stage>/export/      its model, where the next stage starts; none of the last stage

A stage is done when its export is there, which appears whole or not at all, after its last step. So
a run that was killed goes on in the stage where it was, at that stage's newest checkpoint. Every
config is read, and held to what its workdir was started with, before the first stage runs.
"""

import re
from pathlib import Path

import jax

from jaxreward import overrides, presets
from jaxreward.core.resolve import resolve
from jaxreward.hub import load
from jaxreward.models import trainable
from jaxreward.recipes import evaluate
from jaxreward.train import writers


def configs(config, workdir: str | Path) -> dict:
    """{stage: its config}, in the order in which they run; each starts from the one before.

    `config.stages` has an entry for each stage, which run in the order of their names: `config`, a
    shipped name or the path of a file, with words behind a ":"; and `overrides`, strings
    "section.key=value" for it. `config.seed` is that of every stage whose overrides set no other.

    Args:
      config: Its stages and seed are read.
      workdir: Of the whole run; a stage after the first has its `models.policy.init` there.

    Raises:
      ValueError, KeyError, FileNotFoundError: naming the stage and what in its config does not fit.
    """
    if not config.stages:
        raise ValueError("config.stages names no stage")
    made, before = {}, None
    for name in sorted(config.stages):
        stage = config.stages[name]
        if not re.fullmatch(r"\w[\w-]*", name):
            raise ValueError(
                f"config.stages.{name}: a stage's name is a folder's: letters, 0-9, _-"
            )
        changes = [f"seed={config.seed}", *stage.get("overrides", ())]
        if before is not None:
            if any(text.startswith("models.policy.init=") for text in changes):
                raise ValueError(
                    f"config.stages.{name}.overrides sets models.policy.init, which is the export "
                    f"of stage {before} before it"
                )
            folder = Path(workdir).resolve() / before / "export"
            changes.append(f"models.policy.init=hf:{folder}")
        try:
            made[name] = presets.load(stage.config, changes)
            head = made[name].models.policy.head
        except (ValueError, KeyError, AttributeError, FileNotFoundError) as error:
            text = error.args[0] if isinstance(error, KeyError) else error
            raise ValueError(f"stage {name} ({stage.config}): {text}") from error
        was = made[before].models.policy.head if before is not None else head
        if was not in (head, trainable.LANGUAGE):
            raise ValueError(
                f"stage {name} ({made[name].recipe}, models.policy.head={head}) cannot start from "
                f"stage {before} ({made[before].recipe}, models.policy.head={was}): a reward model "
                "is followed by reward models of the same head only"
            )
        before = name
    return made


def _check(name, config, workdir):
    """Refuses a stage that has saved anything under another config."""
    path = workdir / "config.json"
    if not any((workdir / "checkpoints").glob("*")):
        return  # it failed before it did anything, perhaps for what was wrong in its config
    changed = presets.diff(presets.read(path), config)
    try:
        overrides.check_resume(path, changed)
    except ValueError as error:
        raise ValueError(
            f"stage {name}: {error}\n(values of a stage go into config.stages.{name}.overrides, as "
            "strings without the --config.)"
        ) from error
    if "train.steps" in changed and (workdir / "export").is_dir():
        raise ValueError(
            f"stage {name} has ended, and the next one starts from {workdir / 'export'}: its "
            "train.steps cannot be raised any more; use another --workdir"
        )


def run(config, workdir: str | Path) -> Path:
    """Runs the stages, or goes on in the one where the workdir stands. Returns the workdir.

    The last stage is not exported: `<workdir>/<its name>` is a workdir like any other.

    Args:
      config: As `configs` reads it.
      workdir: Of the whole run.

    Raises:
      ValueError, KeyError, FileNotFoundError: as `configs`; for a stage that was started with
        another config; and what the stages raise.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "staged runs in one process, on all devices of a host: a stage's export is read by the "
            "next; start its stages one by one"
        )
    workdir = Path(workdir)
    stages = configs(config, workdir)
    runs = {name: resolve("recipes", f"{stage.recipe}.run") for name, stage in stages.items()}
    for name, stage in stages.items():
        _check(name, stage, workdir / name)
    workdir.mkdir(parents=True, exist_ok=True)
    presets.save(config, workdir / "config.json")
    last = len(stages)
    for number, (name, stage) in enumerate(stages.items(), start=1):
        folder, out = workdir / name, workdir / name / "export"
        what = f"stage {number}/{last}   {name}: {config.stages[name].config}"
        if number < last and out.is_dir():
            load.read_config(out)
            writers.say(f"{what}, done: {out}")
            continue
        writers.say(f"{what} -> {folder}")
        runs[name](stage, folder)
        if number < last:
            evaluate.export(folder, out)
            writers.say(f"exported    {out}")
    return workdir
