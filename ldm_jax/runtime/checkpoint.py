"""Checkpoints that resume a run and snapshots that sample, written by Orbax: whole or not at all.

    RUN/checkpoints/STEP/{params, ema_params, opt_state, ..., meta}    each part restorable alone
    RUN/snapshots/STEP/{params, meta}                                  weights to sample with
    RUN/damaged/STEP                                                   could not be restored

Every process of a run calls these functions together.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ldm_jax.runtime import checkpoint_bounds, checksums, processes, reading, storage
from ldm_jax.runtime.checkpoint_manager import Manager
from ldm_jax.runtime.log import LOG

DRAFT = ".orbax-checkpoint-tmp"  # in the name of a folder that is not complete yet
PACKED = 0.9  # compressed size of weights over their size in memory
FORMAT = 1  # of checkpoints, snapshots and frozen parts; a reader refuses a newer one
SMALL = ("step", "bad_steps", "skips")  # fields of a state that are kept in its meta
RESUME_SO = "use the config that the run was started with, or another workdir"
LOAD_SO = "bring back the config.json that the run was started with"


class DamagedError(ValueError):
    """A checkpoint, snapshot or frozen part cannot be read back as it was saved."""


def manager(run: epath.PathLike, max_to_keep: int | None = None, max_failed: int = 0) -> Manager:
    """Writer of RUN/checkpoints, in the background; `close()` waits for the write under way.

    Reports the folders that an interrupted write left in the run, and removes them. `max_failed`
    saves in a row may fail before `save` raises.
    """
    run = absolute(run)
    _drop_drafts(run)
    return Manager(run / "checkpoints", max_to_keep, max_failed)


def saved_steps(source: epath.PathLike | Manager) -> list[int]:
    """Steps of a run (or its manager) with a complete checkpoint, oldest first."""
    return _steps(_folder(source))


def latest_step(source: epath.PathLike | Manager) -> int | None:
    """Step of the newest checkpoint, or None."""
    return max(saved_steps(source), default=None)


def save(manager: Manager, state: Any, meta: Mapping[str, Any], *, final: bool = False) -> bool:
    """Saves a state dataclass with `meta` (JSON values); False if its step is saved already.

    Returns when the arrays are copied off the device, so the state may be donated. ValueError if
    a number is not finite, naming its part: nothing is written then. False also if there is no
    room or the former write has failed, as long as the manager's `max_failed` allows it; OSError
    if it does not, or if this save is `final`.
    """
    step = int(state.step)
    if processes.any_of(step in saved_steps(manager)):
        return False
    parts = _parts(state)
    needed = sum(x.nbytes for x in jax.tree.leaves(parts))
    manager.remove_drafts()
    free = storage.free_bytes(manager.directory)
    if processes.any_of(free is not None and free < PACKED * needed):
        manager.fail(step, needed, "the disk is full", final)
        return False
    sums = checksums.part_checksums(parts, f"{manager.directory}/{step}")
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in parts.items()}
    small = {n: jax.tree.map(lambda x: np.asarray(x).tolist(), getattr(state, n)) for n in SMALL}
    header = checksums.sealed({**_header(), **meta, **small, "checksums": sums})
    args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(header))
    return manager.begin(step, needed, args)


def resume(manager: Manager, abstract: Any) -> Any | None:
    """The state of the newest checkpoint that is whole, as `restore` gives it; None without any.

    Damaged newer ones are moved to RUN/damaged, and reported, once an older one has been restored.
    If none can be restored nothing is moved: `DamagedError`, never a fresh start. Other errors as
    from `restore`. Process 0 decides for all which steps there are.
    """
    damaged: list[tuple[int, DamagedError]] = []
    for step in reversed(processes.broadcast_from_first(saved_steps(manager))):
        try:
            state = restore(manager, abstract, step)
        except DamagedError as error:
            damaged.append((step, error))
            continue
        for bad, error in damaged:
            LOG.info(f"{error}; moved to {_set_aside(manager, bad)}")
        if damaged:
            LOG.info(f"{manager.directory}: going on from step {step}, later steps are made again")
        return state
    if damaged:
        older = ", nor any older one" if len(damaged) > 1 else ", and there is no older one"
        raise DamagedError(f"{damaged[0][1]}{older}: bring back a copy, or begin in a new run")
    return None


def restore(source: epath.PathLike | Manager, abstract: Any, step: int | None = None) -> Any:
    """The state of `step` (default: the newest), every array as `abstract` has it sharded.

    `abstract` is a state of arrays or of ShapeDtypeStructs with shardings; the mesh may differ
    from that of the run that saved. FileNotFoundError if there is no such checkpoint, DamagedError
    if one of its processes cannot read it whole, ValueError if it is from a newer version or of
    another model, OSError if the storage fails: all name its folder.
    """
    folder = _step_folder(_folder(source), step)
    wanted = _parts(abstract)

    def read() -> tuple[dict[str, Any], dict[str, Any]]:
        meta = read_meta(folder)
        if str(meta["step"]) != folder.name:  # copied or renamed by hand
            raise _damaged(folder, ValueError(f"its meta is that of step {meta['step']}"))
        if sorted(wanted) != sorted(meta["checksums"]):
            raise ValueError(
                f"{folder}: holds {', '.join(sorted(meta['checksums']))}, but this configuration"
                f" has {', '.join(sorted(wanted))}: resume with the config that the run was"
                " started with"
            )
        return meta, {name: _read(folder, name, tree) for name, tree in wanted.items()}

    meta, restored = processes.on_all(str(folder), read, DamagedError)
    for name, tree in restored.items():  # sums over all processes: all reach the same verdict
        _check_sum(folder, name, tree, meta)
    try:  # the same meta in all processes
        for name in SMALL:
            like = getattr(abstract, name)
            if name in meta:
                restored[name] = jax.tree.map(_placed, like, meta[name])
            else:  # saved by a version without this field
                restored[name] = jax.tree.map(lambda x: _placed(x, np.zeros(x.shape)), like)
    except (ValueError, TypeError, OverflowError) as error:
        raise _damaged(folder, ValueError(f"{name} of its meta is {meta[name]!r:.40}")) from error
    return dataclasses.replace(abstract, **restored)


def _placed(like: Any, value: Any) -> jax.Array:
    value = np.asarray(value, like.dtype).reshape(like.shape)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda i: value[i])


def saved_shapes(source: epath.PathLike | Manager, step: int | None, part: str) -> Any:
    """The tree of Orbax's metadata of a part, with shapes and dtypes; {} if it was empty."""
    folder = _step_folder(_folder(source), step)
    with _remedy():
        return _metadata(folder, part) if part in read_meta(folder)["checksums"] else {}


def restore_parts(
    source: epath.PathLike | Manager,
    step: int | None,
    parts: Sequence[str],
    shapes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """{part: tree of host arrays}; a part that the state held empty comes back as {}.

    shapes: as of `read_tree`, for each part.
    """
    folder = _step_folder(_folder(source), step)
    with _remedy():
        meta = read_meta(folder)
        held = meta["checksums"]
        return {
            name: read_tree(folder, name, meta, shapes) if name in held else {} for name in parts
        }


@contextlib.contextmanager
def _remedy() -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"{error}; give another step, or bring back a copy") from error


# --- snapshots ----------------------------------------------------------------------------------


def save_snapshot(
    run: epath.PathLike, step: int, params: dict, model: Mapping[str, Any]
) -> epath.Path:
    """Writes weights and the model section of the config (as JSON values) to RUN/snapshots/STEP.

    An existing snapshot stays: a run that resumes would write the same one again. ValueError
    if a weight is not finite.
    """
    folder = absolute(run) / "snapshots" / str(step)
    if not processes.any_of(is_complete(folder)):
        write_folder(folder, params, {"step": step, "model": model})
    return folder


def snapshot_steps(run: epath.PathLike) -> list[int]:
    """Steps of a run with a snapshot, oldest first."""
    return _steps(absolute(run) / "snapshots")


def load_snapshot(
    run: epath.PathLike, step: int | None = None, shapes: Mapping[str, Any] | None = None
) -> tuple[dict, dict]:
    """(host parameters, meta with "step" and "model") of the snapshot of `step`, or the newest.

    shapes: as of `read_tree`.
    """
    folder = _step_folder(absolute(run) / "snapshots", step)
    with _remedy():
        meta = read_meta(folder)
        return read_tree(folder, "params", meta, shapes), meta


def trained(
    run: epath.PathLike, shapes: Mapping[str, Any], step: int | None = None, ema: bool = True
) -> tuple[dict, int]:
    """(host parameters of the parts that trained, their step): snapshot or checkpoint, the newest.

    shapes: {part: shapes} of the run's config. With `ema` the averaged weights of the parts that
    have an average. FileNotFoundError or ValueError for a run that has none, or not of that step.
    """
    snapshots = set(snapshot_steps(run)) if ema else set()
    saved = set(saved_steps(run))
    if not snapshots | saved:
        raise FileNotFoundError(
            f"{run}: holds no {'snapshot or ' if ema else ''}checkpoint yet: train it first"
        )
    chosen = max(snapshots | saved) if step is None else step
    if chosen not in snapshots | saved:
        raise ValueError(f"{run}: has no step {chosen}; it has {sorted(snapshots | saved)}")
    if chosen in snapshots:
        found = load_snapshot(run, chosen, shapes)[0]
    else:
        parts = ("params", "ema_params") if ema else ("params",)
        restored = restore_parts(run, chosen, parts, shapes)
        found = {**restored["params"], **restored.get("ema_params", {})}
    if missing := shapes.keys() - found.keys() - {"logvar"}:
        raise ValueError(
            f"{run}: step {chosen} holds no {', '.join(sorted(missing))}: copy it anew"
        )
    return found, chosen


# --- folders ------------------------------------------------------------------------------------


def absolute(path: epath.PathLike) -> epath.Path:
    """The path with `~` expanded and made absolute, as Orbax needs it; gs:// is left as it is."""
    path = epath.Path(path).expanduser()
    return path if path.is_absolute() else path.absolute()  # absolute() would break gs://


def write_folder(folder: epath.Path, params: dict, meta: Mapping[str, Any]) -> None:
    """Writes {params, meta} to a new folder, which appears when it is complete.

    Without parameters only meta. ValueError if a number is not finite, OSError if it cannot be
    written.
    """
    parts = {"params": params} if jax.tree.leaves(params) else {}  # Orbax refuses empty trees
    header = checksums.sealed(
        {**_header(), **meta, "checksums": checksums.part_checksums(parts, str(folder))}
    )
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in parts.items()}
    args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(header))

    def write() -> None:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
            writer.save(folder, args=args)

    try:
        if jax.process_count() == 1:
            storage.retried(str(folder), write)
        else:  # the processes wait for each other inside: none can repeat it alone
            write()
    except Exception as error:
        needed = sum(x.nbytes for x in jax.tree.leaves(params))
        raise OSError(f"{folder}: {storage.not_written(folder, needed, error)}") from error


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """The meta of a checkpoint, snapshot or frozen part. DamagedError, ValueError if newer."""

    path = folder / "meta" / "metadata"  # where Orbax's JsonSave writes it
    try:
        meta = storage.retried(f"{folder}/meta", lambda: reading.read_object(path))
        version, _ = int(meta["format"]), dict(meta["checksums"])
    except Exception as error:  # whatever is wrong with it
        raise _unreadable(folder, error) from error
    if version > FORMAT:
        raise ValueError(
            f"{folder}: format {version} is newer than {FORMAT}; install a newer ldm_jax"
        )
    if meta.get("seal", checksums.seal(meta)) != checksums.seal(meta):  # older ones have none
        raise _damaged(folder, ValueError("the checksum of meta differs"))
    return meta


def read_tree(
    folder: epath.Path,
    part: str,
    meta: Mapping[str, Any],
    shapes: Mapping[str, Any] | None = None,
) -> Any:
    """One part of a folder as host arrays; `meta` is that of the folder. DamagedError.

    shapes: {name: tree of shapes} of all that the part may hold, by its names on top; ValueError,
    before anything is read, for other arrays in those that it holds.
    """
    tree = _read(folder, part, shapes=shapes)
    _check_sum(folder, part, tree, meta)
    return tree


def _metadata(folder: epath.Path, part: str) -> Any:
    """Names, shapes and dtypes of a part, as far as its files can hold that much."""
    handler = ocp.PyTreeCheckpointHandler()

    def read() -> Any:
        held = checkpoint_bounds.held_bytes(folder / part)
        tree = handler.metadata(folder / part).tree
        checkpoint_bounds.check_claims(tree, held)
        return tree

    try:
        return storage.retried(f"{folder}/{part}", read)
    except Exception as error:  # Orbax has no common class of errors for damaged files
        raise _unreadable(folder, error) from error


def _read(
    folder: epath.Path, part: str, abstract: Any = None, shapes: Mapping[str, Any] | None = None
) -> Any:
    """A part as it is on disk, like `abstract` in structure and sharding; without it host arrays.

    Uses Orbax's handlers, not its Checkpointer, in which the processes wait for each other: one
    that fails would never arrive. ValueError for other paths, shapes or dtypes than `abstract`.
    """
    handler, saved = ocp.PyTreeCheckpointHandler(), _metadata(folder, part)
    if abstract is None:
        if shapes is not None:
            wanted = {n: tree for n, tree in shapes.items() if n in saved}
            checkpoint_bounds.check_fit(folder / part, saved, wanted, LOAD_SO, dtypes=False)
        args = ocp.args.PyTreeRestore(
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        )
    else:
        checkpoint_bounds.check_fit(folder / part, saved, abstract, RESUME_SO, dtypes=True)
        like = jax.tree.map(
            lambda x: ocp.ArrayRestoreArgs(
                sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
            ),
            abstract,
        )
        args = ocp.args.PyTreeRestore(abstract, restore_args=like)
    try:
        return storage.retried(
            f"{folder}/{part}", lambda: handler.restore(folder / part, args=args)
        )
    except Exception as error:  # as above
        raise _unreadable(folder, error) from error


def _set_aside(manager: Manager, step: int) -> epath.Path:
    """Move a checkpoint out of the way, to RUN/damaged; returns its new path."""
    run = epath.Path(manager.directory).parent
    names = (f"{step}" if i == 1 else f"{step}.{i}" for i in itertools.count(1))
    target = next(t for t in (run / "damaged" / name for name in names) if not t.exists())
    processes.barrier("looked_aside")
    if jax.process_index() == 0:
        target.parent.mkdir(exist_ok=True)
        storage.retried(str(target), lambda: (run / "checkpoints" / str(step)).rename(target))
    processes.barrier("set_aside")
    manager.reload()
    return target


def _drop_drafts(run: epath.Path) -> None:
    """Remove the drafts of interrupted writes, and report them; Orbax removes those of
    checkpoints."""
    if jax.process_index() != 0:
        return
    for place in ("checkpoints", "snapshots", "frozen"):
        folder = run / place
        for path in sorted(folder.iterdir()) if folder.exists() else ():
            if DRAFT in path.name:
                LOG.info(f"{path}: is half written, the run ended while it was saved; removed")
                if place != "checkpoints":
                    path.rmtree()
            elif path.name.isdigit() and path.is_dir() and not is_complete(path):
                LOG.info(f"{path}: is half written, the run ended while it was saved; left out")


def _check_sum(folder: epath.Path, part: str, tree: Any, meta: Mapping[str, Any]) -> None:
    if checksums.tree_checksum(tree) != meta["checksums"][part]:
        raise _damaged(folder, ValueError(f"the checksum of {part} differs"))


# --- folders and states -------------------------------------------------------------------------


def _parts(state: Any) -> dict[str, Any]:
    """The trees of a state that hold an array: Orbax refuses empty ones."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {n: tree for n, tree in fields.items() if n not in SMALL and jax.tree.leaves(tree)}


def _header() -> dict[str, Any]:
    names = ("ldm-jax", "jax", "flax", "optax", "orbax-checkpoint")
    return {"format": FORMAT, "versions": {name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # ldm-jax, when run from a bare checkout
        return "not installed"


def _folder(source: epath.PathLike | Manager) -> epath.Path:
    if isinstance(source, Manager):
        source.settle()
        return epath.Path(source.directory)
    return absolute(source) / "checkpoints"


def _steps(folder: epath.Path) -> list[int]:
    if not folder.exists():
        return []
    return sorted(int(f.name) for f in folder.iterdir() if f.name.isdigit() and is_complete(f))


def is_complete(folder: epath.Path) -> bool:
    """True if Orbax finished the folder: its final name on disk, a marker on object stores."""
    return folder.exists() and ocp.utils.is_checkpoint_finalized(folder)


def _step_folder(folder: epath.Path, step: int | None) -> epath.Path:
    steps = _steps(folder)
    if not steps or (step is not None and step not in steps):
        asked = "any step" if step is None else f"step {step}"
        raise FileNotFoundError(f"{folder}: nothing saved of {asked}; it has {steps or 'nothing'}")
    return folder / str(steps[-1] if step is None else step)


def _unreadable(folder: epath.Path, error: Exception) -> Exception:
    """`DamagedError`, unless the storage or the memory has failed."""
    if storage.is_transient(error):
        return OSError(f"{folder}: the storage fails ({storage.reason(error)}); try again later")
    short = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
    if not short and _is_going(epath.Path(folder)):
        return FileNotFoundError(
            f"{folder}: was deleted while it was read, as a run deletes its old checkpoints: take"
            " another step, or try again for the newest"
        )
    return error if short else _damaged(folder, error)


def _is_going(folder: epath.Path) -> bool:
    """True if the folder, which was there, is gone, or will be: files are deleted one by one."""
    for _ in range(5):
        if not folder.exists():
            return True
        time.sleep(0.1)
    return False


def _damaged(folder: epath.Path, error: Exception) -> DamagedError:
    reason = storage.reason(error)
    return DamagedError(f"{folder}: cannot be read ({reason})")
