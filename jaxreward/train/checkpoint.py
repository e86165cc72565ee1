"""Checkpoints: orbax items `params | opt | extra | data | meta`, each restorable alone.

Arrays are saved asynchronously and a checkpoint appears whole or not at all. `data` (position of
the data iterator) and `meta` (step, format, what the frozen weights were) are JSON.
"""

import json
from pathlib import Path
from typing import Any

import jax

from jaxreward.core import trees
from jaxreward.core.types import TrainState

PyTree = Any
FORMAT = 1


class Checkpoints:
    """The checkpoints of one run, under `<workdir>/checkpoints`.

    Use as a context manager: leaving it waits for the last asynchronous save.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 2):
        """Args: workdir: the run's folder. keep: newest checkpoints to keep."""
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = (Path(workdir) / "checkpoints").resolve()
        handlers = {
            **{name: ocp.StandardCheckpointHandler() for name in ("params", "opt", "extra")},
            **{name: ocp.JsonCheckpointHandler() for name in ("data", "meta")},
        }
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True
            ),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None; one that is still being written counts."""
        return self._manager.latest_step()

    def save(self, state: TrainState, *, data: dict, meta: dict) -> None:
        """Starts saving a state; returns when the arrays are copied, not when they are written.

        Args:
          state: The state; its step names the checkpoint. The key is not saved: it is a function
            of the config's seed.
          data: JSON-able position of the data iterator.
          meta: JSON-able facts, such as the source and hash of frozen weights.
        """
        args = self._ocp.args
        items = {
            "params": args.StandardSave(state.params),
            "opt": args.StandardSave(state.opt_state),
            "data": args.JsonSave(data),
            "meta": args.JsonSave({"format": FORMAT, "step": int(state.step), **meta}),
        }
        if state.extra:
            items["extra"] = args.StandardSave(state.extra)
        self._manager.save(int(state.step), args=args.Composite(**items))

    def restore(
        self, like: TrainState, *, step: int | None = None
    ) -> tuple[TrainState, dict, dict]:
        """Restores onto the shapes and shardings of `like`, whatever mesh saved them.

        Args:
          like: A state of arrays or abstract arrays; its key is kept.
          step: Which checkpoint; default the newest.

        Returns:
          (state, data, meta).

        Raises:
          FileNotFoundError: if there is no checkpoint.
          ValueError: if its format is newer than this version reads, or it is of another model.
        """
        args = self._ocp.args
        step = self._require(step)
        self.meta(step)
        self._check(step, like.params)
        items = {
            "params": args.StandardRestore(_abstract(like.params)),
            "opt": args.StandardRestore(_abstract(like.opt_state)),
            "data": args.JsonRestore(),
            "meta": args.JsonRestore(),
        }
        if like.extra:
            items["extra"] = args.StandardRestore(_abstract(like.extra))
        got = self._manager.restore(step, args=args.Composite(**items))
        state = like.replace(
            step=jax.device_put(jax.numpy.int32(step), _sharding(like.step)),
            params=got["params"],
            opt_state=got["opt"],
            extra=got["extra"] if like.extra else like.extra,
        )
        return state, got["data"], got["meta"]

    def params(self, like: PyTree, *, step: int | None = None) -> PyTree:
        """Restores the parameters alone, for scoring and export; raises as `restore`."""
        args = self._ocp.args
        step = self._require(step)
        self.meta(step)
        self._check(step, like)
        return self._manager.restore(
            step, args=args.Composite(params=args.StandardRestore(_abstract(like)))
        )["params"]

    def meta(self, step: int | None = None) -> dict:
        """The `meta` item of a checkpoint."""
        args = self._ocp.args
        meta = self._manager.restore(
            self._require(step), args=args.Composite(meta=args.JsonRestore())
        )["meta"]
        if meta["format"] > FORMAT:
            raise ValueError(
                f"{self.folder}: checkpoint format {meta['format']} was written by a newer "
                f"jaxreward; this one reads up to {FORMAT}. Upgrade jaxreward"
            )
        return meta

    def _check(self, step, like):
        # orbax names neither the parameter nor more than one of them.
        saved = trees.flatten(self._manager.item_metadata(step)["params"])
        wanted = trees.flatten(like)
        problems = [f"{path} is missing" for path in wanted if path not in saved]
        problems += [f"{path} is unknown" for path in saved if path not in wanted]
        problems += [
            f"{path} has shape {list(saved[path].shape)}, expected {list(x.shape)}"
            for path, x in wanted.items()
            if path in saved and tuple(saved[path].shape) != tuple(x.shape)
        ]
        if problems:
            raise ValueError(
                f"{self.folder}/{step} is of another model than the config describes: "
                f"{'; '.join(problems)}. Use the config of that run, or another workdir"
            )

    def _require(self, step):
        step = self.latest() if step is None else step
        if step is None:
            raise FileNotFoundError(
                f"{self.folder} holds no finished checkpoint; train first, or give another workdir"
            )
        if step not in (steps := sorted(self._manager.all_steps())):
            raise FileNotFoundError(
                f"{self.folder} holds no checkpoint of step {step}; there are "
                f"{', '.join(map(str, steps)) or 'none'}"
            )
        return step

    def wait(self) -> None:
        """Blocks until the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and releases the manager."""
        self._manager.close()


def _sharding(x):
    return getattr(x, "sharding", None)


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def read_config(workdir: str | Path) -> dict:
    """The resolved config of a run.

    Raises:
      FileNotFoundError: if the folder is not a workdir.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is not a workdir: {path} does not exist")
    return json.loads(path.read_text())


def is_workdir(folder: str | Path) -> bool:
    """True for a run's folder; a Hugging Face folder's config.json names no recipe."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return False
    try:
        return "recipe" in json.loads(path.read_text())
    except json.JSONDecodeError:
        return False
