"""Checkpoints: a step's arrays and its JSON in one folder that is either whole or not there.

    run/checkpoints/20/  state   every array leaf under its path, written by Orbax while training goes on
                         extra   JSON: data position, config, tokenizer hash, ...; the metric; which leaves are random keys

The tree is saved flat, {"params/head/w": array}, so that reading asks for no Python class and a part of a tree is a prefix. A save
is written beside its place and moved there when it is complete. Restoring compares path, shape and dtype of every leaf with what
is asked for before it reads anything, because Orbax would cast another dtype silently.
"""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath

# Orbax logs a failed save as several tracebacks and then raises it too: the error is told once, by us.
for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(lambda record: "orbax" not in record.pathname and "orbax" not in record.getMessage())

Tree = Any


class SaveError(OSError):
    """A checkpoint could not be written; those before it are whole."""


class RestoreError(ValueError):
    """The stored leaves are not those asked for."""


class Checkpointer:
    """Writes the checkpoints of one run folder: keeps the newest `keep` and, with `best`, the one of smallest ("min") or largest
    ("max") metric. One writer a folder; readers need only the functions `latest` and `restore`.

    Opening clears away what killed saves left. Raises SaveError if the folder cannot be written.
    """

    def __init__(self, folder: epath.PathLike, keep: int = 3, best: Literal["min", "max"] | None = None, save_async: bool = True):
        if keep < 1:
            raise ValueError(f"keep={keep}: at least the newest checkpoint must be kept")
        self.folder, self.keep, self.better, self.save_async = _place(folder), keep, best, save_async
        self._pending: tuple[int, int] | None = None  # the step being written and its bytes
        if jax.process_index() == 0:
            _open(self.folder)
        self._saved = {step: _note(self.folder, step)["metric"] for step in steps(folder)}  # step -> metric
        self._orbax = ocp.AsyncCheckpointer(_handler())
        self._hook, sys.unraisablehook = sys.unraisablehook, _without_late_writes(sys.unraisablehook)

    def save(self, step: int, state: Tree, extra: Mapping[str, Any] | None = None, metric: float | int | None = None) -> bool:
        """Saves the jax Arrays of `state` and the JSON of `extra` as checkpoint `step`; False if that is the newest already.

        Returns when the state is copied, so that the next step may donate it; the writing goes on behind. Waits for the save
        before, and raises SaveError if that one failed.
        """
        self.wait()
        newest = max(self._saved, default=-1)
        if step == newest:
            return False
        if step < newest:
            raise ValueError(f"cannot save step {step}: {self.folder} already holds step {newest}; use another run folder")
        arrays, keys = _flat(state), {}
        for name, leaf in arrays.items():
            if not isinstance(leaf, jax.Array):
                raise ValueError(f"{name} is a {type(leaf).__name__}: state holds jax Arrays; plain values belong into `extra`")
            if leaf.size == 0:
                raise ValueError(f"{name} has shape {leaf.shape}: Orbax does not store arrays without elements")
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                keys[name], arrays[name] = str(jax.random.key_impl(leaf)), jax.random.key_data(leaf)
        note = json.loads(json.dumps({"extra": dict(extra or {}), "metric": metric, "keys": keys}))  # a copy, checked to be JSON
        self._pending = (step, sum(a.nbytes for a in arrays.values()))
        self._saved[step] = metric
        try:
            self._orbax.save(
                self.folder / str(step),
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), extra=ocp.args.JsonSave(note)),
            )
        except (OSError, ValueError) as e:
            raise self._failed(e) from None
        if not self.save_async:
            self.wait()
        return True

    def wait(self) -> None:
        """Returns when the last save is on disk, and deletes what need not be kept. Raises SaveError if it failed."""
        if self._pending is None:
            return
        try:
            self._orbax.wait_until_finished()
        except (OSError, ValueError) as e:
            raise self._failed(e) from None
        self._pending = None
        kept = {*sorted(self._saved)[-self.keep :], self.best()}
        for step in self._saved.keys() - kept:
            del self._saved[step]
            if jax.process_index() == 0:
                _delete(self.folder / str(step))

    def rate(self, step: int, metric: float) -> None:
        """Says how good a saved checkpoint is, where that is known only afterwards: an evaluation comes after its save."""
        self.wait()
        if jax.process_index() == 0:
            fresh = self.folder / str(step) / "metric.tmp"
            fresh.write_text(json.dumps(metric))
            fresh.rename(self.folder / str(step) / "metric")
        self._saved[step] = metric

    def latest(self) -> int | None:
        """The newest step that is on disk."""
        return max((step for step in self._saved if not self._pending or step != self._pending[0]), default=None)

    def best(self) -> int | None:
        """The step of the best metric so far; None where no checkpoint has one."""
        measured = [(metric, step) for step, metric in self._saved.items() if metric is not None]
        if not self.better or not measured:
            return None
        return (min if self.better == "min" else max)(measured, key=lambda pair: pair[0])[1]

    def restore(self, abstract: Tree, step: int | None = None, under: str = "") -> tuple[Tree, dict[str, Any]]:
        """`restore` of this folder, after the save in progress."""
        self.wait()
        return restore(self.folder.parent, abstract, step, under)

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._orbax.close()
            sys.unraisablehook = self._hook

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _failed(self, e: Exception) -> SaveError:
        step, size = self._pending  # type: ignore[misc]
        self._pending = None
        del self._saved[step]
        if jax.process_index() == 0:
            _clean(self.folder)  # a full disk gets its space back
        free = shutil.disk_usage(self.folder).free
        full = any(sign in str(e) for sign in ("No space left", "Disk quota", "File too large"))
        room = f"no space left on the disk ({free / 1e6:.1f} MB free, the state has {size / 1e6:.1f} MB)"
        reason = room if full else str(e).splitlines()[0]
        last = self.latest()
        good = "there is no other checkpoint" if last is None else f"the last good checkpoint is step {last}"
        return SaveError(f"checkpoint {step} was not saved in {self.folder}: {reason}; {good}")


def _without_late_writes(hook: Callable) -> Callable:
    """When one array of a save fails, Orbax stops waiting; each other one that fails then says, from a thread of its own, that nobody
    listens any more."""
    late = lambda told: told.exc_type is RuntimeError and str(told.exc_value) == "Event loop is closed"
    return lambda told: None if late(told) else hook(told)


def clear(folder: epath.PathLike) -> None:
    """Deletes every checkpoint of a run folder."""
    if _place(folder).exists():
        _place(folder).rmtree()


def steps(folder: epath.PathLike) -> list[int]:
    """The steps of the complete checkpoints in a run folder, oldest first."""
    place = _place(folder)
    found = [p for p in place.iterdir() if p.name.isdecimal()] if place.is_dir() else []
    return sorted(int(p.name) for p in found if ocp.path.step.is_checkpoint_finalized(p))


def latest(folder: epath.PathLike) -> int | None:
    """The newest complete checkpoint of a run folder; None if there is none."""
    return max(steps(folder), default=None)


def read_extra(folder: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """The JSON saved with a checkpoint (the newest by default), without reading its arrays."""
    return _note(_place(folder), _pick(folder, step))["extra"]


def restore(folder: epath.PathLike, abstract: Tree, step: int | None = None, under: str = "") -> tuple[Tree, dict[str, Any]]:
    """(the state, its extra) of a checkpoint in a run folder, the newest by default.

    `abstract` has the wanted tree with a shape, dtype and sharding (None: the first device) on each leaf, as of
    `jax.ShapeDtypeStruct`; the stored arrays may have been sharded otherwise. `under="params"` reads that part of what was saved.
    Raises RestoreError, before anything is read, unless the stored leaves and the wanted ones agree in path, shape and dtype.
    """
    path, note, wanted, prefix = _checked(folder, abstract, step, under)
    handler = ocp.PyTreeCheckpointHandler()
    item, how = {}, {}
    for name, leaf in wanted.items():
        sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        item[prefix + name] = leaf
        how[prefix + name] = ocp.ArrayRestoreArgs(sharding=sharding)
    args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    read = handler.restore(path / "state", args=args) if wanted else {}  # orbax does not read nothing
    for name, impl in note["keys"].items():
        if name in read:
            read[name] = jax.random.wrap_key_data(read[name], impl=impl)
    return jax.tree.unflatten(jax.tree.structure(abstract), [read[prefix + name] for name in wanted]), note["extra"]


def check(folder: epath.PathLike, abstract: Tree, step: int | None = None, under: str = "") -> None:
    """Raises the RestoreError that `restore` would raise, and reads no array."""
    _checked(folder, abstract, step, under)


def _checked(folder: epath.PathLike, abstract: Tree, step: int | None, under: str) -> tuple[epath.Path, dict, dict, str]:
    step = _pick(folder, step)
    path, note = _place(folder) / str(step), _note(_place(folder), step)
    prefix = under.rstrip("/") + "/" if under else ""
    handler = ocp.PyTreeCheckpointHandler()
    stored = {}
    for name, leaf in handler.metadata(path / "state").tree.items():
        if name.startswith(prefix):
            shape, dtype = tuple(leaf.shape), jax.numpy.dtype(leaf.dtype)
            if name in note["keys"]:
                shape, dtype = shape[:-1], _key_dtype(note["keys"][name])
            stored[name[len(prefix) :]] = (shape, dtype)
    wanted = _flat(abstract)
    _compare(stored, {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in wanted.items()}, path, under)
    return path, note, wanted, prefix


def _compare(stored: dict[str, tuple], wanted: dict[str, tuple], path: epath.Path, under: str) -> None:
    both = [name for name in wanted if name in stored]
    differ = {
        "missing in the checkpoint": [name for name in wanted if name not in stored],
        "in the checkpoint, but not asked for": [name for name in stored if name not in wanted],
        "of another shape": [f"{n} {stored[n][0]}, asked for {wanted[n][0]}" for n in both if stored[n][0] != wanted[n][0]],
        "of another dtype": [f"{n} {stored[n][1]}, asked for {wanted[n][1]}" for n in both if stored[n][1] != wanted[n][1]],
    }
    if any(differ.values()):
        part = f" (under {under!r})" if under else ""
        lines = [f"{path}{part} does not fit: of {len(stored)} stored leaves and {len(wanted)} asked for,"]
        for what, names in differ.items():
            if names:
                more = [f"and {len(names) - 10} more"] if len(names) > 10 else []
                lines.append(f"  {len(names)} {what}: " + "; ".join(names[:10] + more))
        lines.append("Restore with the config that was saved with it, or begin a new run folder (init_from takes parameters alone).")
        raise RestoreError("\n".join(lines))


def _handler() -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(), extra=ocp.JsonCheckpointHandler("extra.json"))


def _place(folder: epath.PathLike) -> epath.Path:
    return epath.Path(folder).absolute() / "checkpoints" if "://" not in str(folder) else epath.Path(folder) / "checkpoints"


def _pick(folder: epath.PathLike, step: int | None) -> int:
    there = steps(folder)
    if step in there or (step is None and there):
        return there[-1] if step is None else step
    listed = f"it has {', '.join(map(str, there))}" if there else "it has none"
    raise RestoreError(f"no checkpoint{'' if step is None else f' {step}'} in {_place(folder)}: {listed}")


def _note(place: epath.Path, step: int) -> dict[str, Any]:
    note, rated = json.loads((place / str(step) / "extra" / "extra.json").read_text()), place / str(step) / "metric"
    return note | ({"metric": json.loads(rated.read_text())} if rated.exists() else {})


def _flat(tree: Tree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _key_dtype(impl: str) -> Any:
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype


def _open(place: epath.Path) -> None:
    """Makes the folder, clears it, and shows that it can be written."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        _clean(place)
        probe = place / "writable"
        probe.write_text("")
        probe.unlink()
    except OSError as e:
        raise SaveError(f"checkpoints cannot be written in {place}: {e.strerror or e}; give a run folder that can be written") from None


def _clean(place: epath.Path) -> None:
    """Deletes what killed or failed saves and deletions left."""
    for path in place.iterdir():
        if ".orbax-checkpoint-tmp" in path.name or path.name.endswith(".deleted"):
            path.rmtree()


def _delete(path: epath.Path) -> None:
    doomed = path.rename(path.parent / f"{path.name}.deleted")  # a kill half-way leaves no checkpoint with holes
    doomed.rmtree()
