"""Checkpoints: orbax items `params | opt | extra | data | meta`, each restorable alone.

Arrays are saved asynchronously and a checkpoint appears whole or not at all. `data` (position of
the data iterator) and `meta` (step, format, what the frozen weights were) are JSON.

Disks and kills damage files, so nothing is trusted: `meta` holds a fingerprint of every array,
taken on the devices when it was saved, and a CRC of `data` and of itself. What does not agree is
reported, and the checkpoint before it is used.
"""

import contextlib
import errno
import gc
import json
import logging
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxreward.core import trees
from jaxreward.core.types import TrainState

log = logging.getLogger(__name__)
SHOWN = 8  # differences that a message lists
PyTree = Any
FORMAT = 2  # 1 had no fingerprints


class Damaged(ValueError):
    """A checkpoint that cannot be read, or does not hold what was saved."""


class Checkpoints:
    """The checkpoints of one run, under `<workdir>/checkpoints`.

    Use as a context manager: leaving it waits for the last asynchronous save.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 2):
        """Args: workdir: the run's folder. keep: newest checkpoints to keep."""
        import orbax.checkpoint as ocp

        logging.getLogger("absl").addFilter(_not_an_echo)
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
        self._saving: int | None = None  # the save that nobody has waited for yet
        self._failure: OSError | None = None  # of the last save
        self._said = False  # whether it is logged
        self._damaged: dict[int, str] = {}  # step -> reason, each said once

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # An error that is on its way out matters more than a save that failed, which is logged.
        self._close(required=kind is None)

    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None; one that is still being written counts."""
        return self._manager.latest_step()

    # Saving

    def save(self, state: TrainState, *, data: dict, meta: dict) -> None:
        """Starts saving a state; returns when the arrays are copied, not when they are written.

        A save that fails is logged when the next one starts or is waited for, and training may go
        on: `wait(required=True)` raises.

        Args:
          state: The state; its step names the checkpoint. The key is not saved: it is a function
            of the config's seed.
          data: JSON-able position of the data iterator.
          meta: JSON-able facts, such as the source and hash of frozen weights.
        """
        self.wait()
        args = self._ocp.args
        step = int(state.step)
        arrays = {"params": state.params, "opt": state.opt_state, "extra": state.extra}
        checks = {"leaves": _leaves(arrays), "data": _crc(data)}
        meta = {"format": FORMAT, "step": step, **meta, "checks": checks}
        items = {k: args.StandardSave(v) for k, v in arrays.items() if k != "extra" or v}
        items["data"] = args.JsonSave(data)
        items["meta"] = args.JsonSave({**meta, "crc": _crc(meta)})
        self._saving, self._failure, self._said = step, None, False
        try:
            # Somebody may have tidied up below a run that takes days.
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager.save(step, args=args.Composite(**items))
        except Exception as error:  # whatever the writer below raises: the run is worth more
            self._failed(error)

    def wait(self, *, required: bool = False) -> None:
        """Blocks until the last save is on disk, or has failed, which is logged.

        Args:
          required: Raise if the last save failed, instead of going on.

        Raises:
          OSError: naming the folder, the reason and the last good step.
        """
        if self._saving is not None:
            try:
                self._manager.wait_until_finished()
                if not (self.folder / str(self._saving)).is_dir():
                    raise FileNotFoundError(errno.ENOENT, "it is not there after it was written")
                self._saving = None
            except Exception as error:
                self._failed(error)
        if self._failure is None:
            return
        if required:
            failure, self._failure = self._failure, None
            raise failure
        if not self._said:
            log.warning("%s. The next save tries again", self._failure)
            self._said = True

    def _failed(self, error):
        step, self._saving = self._saving, None
        # The room that a part takes is what the next save may need.
        for path in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        # orbax has struck the oldest off its list already; it is still there.
        self._manager.reload()
        good = max(self._manager.all_steps(), default=None)
        last = "there is no earlier one" if good is None else f"the last good one is of step {good}"
        self._failure = OSError(
            f"checkpoint {step} was not saved in {self.folder}: {_reason(error)}; {last}"
        )
        self._failure.__cause__ = error

    def close(self) -> None:
        """Waits for the last save and releases the manager; raises OSError as `wait` does."""
        self._close(required=True)

    def _close(self, required):
        try:
            self.wait(required=required)
        finally:
            self._manager.close()

    def remove_unfinished(self) -> list[str]:
        """Deletes what saves that were killed left behind, and says so. For the training process
        alone: another one may be writing right now."""
        found = sorted(path.name for path in self.folder.glob("*.orbax-checkpoint-tmp*"))
        if found and jax.process_index() == 0:
            for name in found:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            log.warning("%s: removed what unfinished saves left: %s", self.folder, ", ".join(found))
        return found

    # Restoring

    def restore(
        self, like: TrainState, *, step: int | None = None
    ) -> tuple[TrainState, dict, dict]:
        """Restores onto the shapes and shardings of `like`, whatever mesh saved them.

        Without a `step`, a damaged checkpoint is logged with the reason, moved aside so that its
        step can be saved again, and the one before it is taken.

        Args:
          like: A state of arrays or abstract arrays; its key is kept.
          step: Which checkpoint; default the newest that is whole.

        Returns:
          (state, data, meta).

        Raises:
          FileNotFoundError: if there is no checkpoint.
          ValueError: if none is whole, or the asked one is not; if its format is newer than this
            version reads; or if it is of another model. The text names what differs.
        """
        wanted = {"params": like.params, "opt": like.opt_state, "extra": like.extra}
        at, got = self._newest(lambda at: self._arrays(at, wanted, data=True), step)
        if step is None:
            self._set_aside([other for other in self._steps() if other > at])
        state = like.replace(
            step=jax.device_put(jnp.int32(at), _sharding(like.step)),
            params=got["params"],
            opt_state=got["opt"],
            extra=got["extra"],
        )
        return state, got["data"], got["meta"]

    def params(self, like: PyTree, *, step: int | None = None, ema: bool = False) -> PyTree:
        """Restores the parameters alone, or their moving average alone, for scoring and export.

        A damaged checkpoint is logged and left where it is. Raises as `restore`.
        """
        if ema:
            read = lambda at: self._arrays(at, {"extra": {"ema": like}})["extra"]["ema"]
        else:
            read = lambda at: self._arrays(at, {"params": like})["params"]
        return self._newest(read, step)[1]

    def meta(self, step: int | None = None) -> dict:
        """The `meta` item of a checkpoint, by default of the newest that is whole."""
        return self._newest(lambda at: self._meta(at)[0], step)[1]

    def _newest(self, read, step):
        """(step, what `read` gives) of a checkpoint that can be read."""
        self.wait()
        steps = self._steps()
        if not steps:
            raise FileNotFoundError(
                f"{self.folder} holds no finished checkpoint; train first, or give another workdir"
            )
        if step is not None and step not in steps:
            raise FileNotFoundError(
                f"{self.folder} holds no checkpoint of step {step}; there are "
                f"{', '.join(map(str, steps))}"
            )
        for at in reversed(steps) if step is None else [step]:
            if at not in self._damaged:
                try:
                    return at, read(at)
                except Damaged as error:
                    self._damaged[at] = str(error)
                    if step is None:
                        log.warning(
                            "%s/%d is damaged and not used: %s", self.folder, at, self._damaged[at]
                        )
            if step is not None:
                raise ValueError(f"{self.folder}/{at} is damaged: {self._damaged[at]}")
        reasons = "\n".join(f"  {at}: {self._damaged[at]}" for at in reversed(steps))
        raise ValueError(
            f"{self.folder}: no checkpoint is whole\n{reasons}\nPut a copy of one back, or start "
            "anew in another workdir"
        )

    def _steps(self):
        return sorted(self._manager.all_steps())

    def _read(self, step, items):
        """The items of one checkpoint; every way in which reading fails becomes `Damaged`."""
        problem, got = "", None
        try:
            with _without_echoes():
                got = self._manager.restore(step, args=self._ocp.args.Composite(**items))
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # of this machine, not of the file
        except Exception as error:  # damaged files end in errors of many types, some in the reader
            problem = _reason(error)
        _agree(problem)
        return got

    def _meta(self, step):
        """(meta, checks) of one checkpoint; checks are None in format 1."""
        meta = self._read(step, {"meta": self._ocp.args.JsonRestore()})["meta"]
        meta = meta if isinstance(meta, dict) else {}
        crc, old = meta.pop("crc", None), meta.get("format") == 1
        if crc != _crc(meta) and not (crc is None and old):
            raise Damaged("meta does not hold what was saved")
        if meta["format"] > FORMAT:
            raise ValueError(
                f"{self.folder}: checkpoint format {meta['format']} was written by a newer "
                f"jaxreward; this one reads up to {FORMAT}. Upgrade jaxreward"
            )
        return meta, meta.pop("checks", None)

    def _arrays(self, step, wanted, *, data=False):
        """Restores the trees in `wanted` and compares them with their fingerprints."""
        args = self._ocp.args
        meta, checks = self._meta(step)
        if checks is None:
            log.warning("%s/%d has no fingerprints (format 1), not checked", self.folder, step)
            saved = self._shapes(step)
        else:
            saved = checks["leaves"]
        self._compare(step, saved, wanted)
        items = {k: args.StandardRestore(_abstract(v)) for k, v in wanted.items() if saved.get(k)}
        if data:
            items["data"] = args.JsonRestore()
        got = self._read(step, items)
        out = {k: got[k] if k in items else v for k, v in wanted.items()}
        if checks is not None:
            found = _leaves(out)
            changed = [
                f"{item}/{path}"
                for item, leaves in found.items()
                for path, leaf in leaves.items()
                if leaf != saved[item][path]
            ]
            if data and _crc(got["data"]) != checks["data"]:
                changed.append("data")
            _agree(f"{', '.join(changed)} not as saved" if changed else "")
        return {**out, "data": got["data"] if data else None, "meta": meta}

    def _shapes(self, step):
        """What `_leaves` gives, without fingerprints, of a checkpoint of format 1."""
        try:
            metadata = self._manager.item_metadata(step)
            flat = {item: trees.flatten(metadata.get(item)) for item in ("params", "opt", "extra")}
            return {
                item: {path: [list(x.shape), str(x.dtype), None] for path, x in leaves.items()}
                for item, leaves in flat.items()
            }
        except Exception as error:  # as in `_read`
            raise Damaged(_reason(error)) from error

    def _compare(self, step, saved, wanted):
        # orbax names neither the leaf nor more than one of them, and drops what nobody asks for.
        problems = []
        for item, tree in wanted.items():
            there, here = saved.get(item) or {}, trees.flatten(tree)
            problems += [f"{item}/{path} is missing" for path in here if path not in there]
            problems += [f"{item}/{path} is unknown" for path in there if path not in here]
            for path, x in here.items():
                shape, dtype, _ = there.get(path, (list(x.shape), str(x.dtype), 0))
                if shape != list(x.shape):
                    problems.append(f"{item}/{path} has shape {shape}, expected {list(x.shape)}")
                elif dtype != str(x.dtype):
                    problems.append(f"{item}/{path} is {dtype}, expected {x.dtype}")
        if problems:
            more = len(problems) - SHOWN
            told = "; ".join(problems[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
            raise ValueError(
                f"{self.folder}/{step} is of another model than the config describes: {told}. "
                "Use the config of that run, or another workdir"
            )

    def _set_aside(self, steps):
        """Moves damaged checkpoints out of the way of saves of the same step."""
        for step in steps:
            target = self.folder / f"{step}.damaged"
            if jax.process_index() == 0:
                shutil.rmtree(target, ignore_errors=True)
                os.replace(self.folder / str(step), target)
                log.warning("moved the damaged checkpoint to %s; delete it when you like", target)
            self._damaged.pop(step, None)
        if steps:
            _agree("")
            self._manager.reload()


# What is compared


def _mix(x):
    # The finaliser of MurmurHash3 (Appleby): one to one on 32 bits.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _fingerprint(x):
    """sum_i mix(bits_i ^ mix(i)) mod 2^32 over the elements i of an array.

    Integer sums have no order, so every mesh gives the same number. `mix` is one to one: a change
    within one element always shows, any other change but for 1 in 2^32.
    """
    if x.dtype == bool or x.dtype.itemsize < 4:
        kind = jnp.uint8 if x.dtype.itemsize == 1 else jnp.uint16
        bits = (x if x.dtype == bool else jax.lax.bitcast_convert_type(x, kind)).astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)  # 64 bits: one more axis of 2
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index += along * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_mix(bits ^ _mix(index)), dtype=jnp.uint32)


_fingerprints = jax.jit(lambda tree: jax.tree.map(_fingerprint, tree))


def _leaves(items):
    """{item: {path: [shape, dtype, fingerprint]}}, from one pass on the devices."""
    flat = {item: trees.flatten(tree) for item, tree in items.items()}
    prints = jax.device_get(_fingerprints(flat))
    return {
        item: {
            path: [list(x.shape), str(x.dtype), int(prints[item][path])]
            for path, x in leaves.items()
        }
        for item, leaves in flat.items()
    }


def _crc(value):
    """CRC-32 of a JSON-able value as it reads back: keys as text, tuples as lists."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return zlib.crc32(text.encode())


def _agree(problem):
    """Raises Damaged where this process or another one found a problem."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        found = multihost_utils.process_allgather(jnp.int32(bool(problem)))
        if not problem and found.any():
            problem = f"process {int(found.argmax())} found a problem"
    if problem:
        raise Damaged(problem)


def _not_an_echo(record):
    """False for errors that orbax logs with a traceback, from several threads, and raises too."""
    return not (record.exc_info and "orbax" in record.pathname)


@contextlib.contextmanager
def _without_echoes():
    """Of reads that run side by side, orbax raises the first error; the others would be printed by
    the garbage collector, a page for each array."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        gc.collect()
        raise
    finally:
        sys.unraisablehook = before


def _reason(error):
    # The libraries below begin with what was tried, end with what went wrong, and may append how
    # they were set up.
    text = " ".join(str(error).split()).partition(" [tensorstore_spec")[0]
    text = text if len(text) <= 300 else f"{text[:100]} … {text[-200:]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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
