"""Checkpoints that resume a run and snapshots that sample, written by Orbax: whole or not at all.

    RUN/checkpoints/STEP/{params, ema_params, opt_state, ..., meta}    each part restorable alone
    RUN/snapshots/STEP/{params, meta}                                  weights to sample with

Every process of a run calls these functions together.
"""

import dataclasses
import importlib.metadata
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ldm_jax import sharding

FORMAT = 1  # of checkpoints, snapshots and frozen parts; a reader refuses a newer one
SMALL = ("step", "bad_steps", "skips")  # fields of a state that are kept in its meta


def manager(run: epath.PathLike, max_to_keep: int | None = None) -> ocp.CheckpointManager:
    """Writer of RUN/checkpoints, in the background; `close()` waits for what is under way."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        create=True,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(absolute(run) / "checkpoints", options=options)


def saved_steps(source: epath.PathLike | ocp.CheckpointManager) -> list[int]:
    """Steps of a run (or its manager) with a complete checkpoint, oldest first."""
    return _steps(_folder(source))


def latest_step(source: epath.PathLike | ocp.CheckpointManager) -> int | None:
    """Step of the newest checkpoint, or None."""
    return max(saved_steps(source), default=None)


def save(manager: ocp.CheckpointManager, state: Any, meta: Mapping[str, Any]) -> bool:
    """Saves a state dataclass with `meta` (JSON values); False if its step is saved already.

    Returns when the arrays are copied off the device, so the state may be donated. ValueError if
    a number is not finite, naming its part: nothing is written then.
    """
    step = int(state.step)
    if step in saved_steps(manager):
        return False
    parts = _parts(state)
    checksums = _checksums(parts, f"{manager.directory}/{step}")
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in parts.items()}
    small = {n: jax.tree.map(lambda x: np.asarray(x).tolist(), getattr(state, n)) for n in SMALL}
    header = {**_header(), **meta, **small, "checksums": checksums}
    args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(header))
    return manager.save(step, args=args, force=True)


def restore(
    source: epath.PathLike | ocp.CheckpointManager, abstract: Any, step: int | None = None
) -> Any:
    """The state of `step` (default: the newest), every array as `abstract` has it sharded.

    `abstract` is a state of arrays or of ShapeDtypeStructs with shardings; the mesh may differ
    from that of the run that saved. FileNotFoundError if there is no such checkpoint, ValueError if
    it is damaged, incomplete, from a newer version, or of another model: both name its folder.
    """
    folder = _step_folder(_folder(source), step)
    meta = read_meta(folder)
    wanted = _parts(abstract)
    if str(meta["step"]) != folder.name:
        raise _damaged(folder, ValueError(f"its meta is that of step {meta['step']}"))
    if sorted(wanted) != sorted(meta["checksums"]):
        raise ValueError(
            f"{folder}: holds {', '.join(sorted(meta['checksums']))}, but this configuration has"
            f" {', '.join(sorted(wanted))}: resume with the config that the run was started with"
        )
    restored = {name: read_tree(folder, name, meta, tree) for name, tree in wanted.items()}
    for name in SMALL:
        like = getattr(abstract, name)
        if name in meta:
            restored[name] = jax.tree.map(_placed, like, meta[name])
        else:  # of a version that did not have it
            restored[name] = jax.tree.map(lambda x: _placed(x, np.zeros(x.shape)), like)
    return dataclasses.replace(abstract, **restored)


def _placed(like: Any, value: Any) -> jax.Array:
    value = np.asarray(value, like.dtype).reshape(like.shape)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda i: value[i])


def restore_parts(
    source: epath.PathLike | ocp.CheckpointManager, step: int | None, parts: Sequence[str]
) -> dict[str, Any]:
    """{part: tree of host arrays}; a part that the state held empty comes back as {}."""
    folder = _step_folder(_folder(source), step)
    meta = read_meta(folder)
    held = meta["checksums"]
    return {name: read_tree(folder, name, meta) if name in held else {} for name in parts}


# --- snapshots ----------------------------------------------------------------------------------


def save_snapshot(
    run: epath.PathLike, step: int, params: dict, model: Mapping[str, Any]
) -> epath.Path:
    """Writes weights and the model section of the config (as JSON values) to RUN/snapshots/STEP.

    A snapshot that is there already stays: a run that resumes makes the same one again. ValueError
    if a weight is not finite.
    """
    folder = absolute(run) / "snapshots" / str(step)
    if not is_complete(folder):
        write_folder(folder, params, {"step": step, "model": model})
    return folder


def snapshot_steps(run: epath.PathLike) -> list[int]:
    """Steps of a run with a snapshot, oldest first."""
    return _steps(absolute(run) / "snapshots")


def load_snapshot(run: epath.PathLike, step: int | None = None) -> tuple[dict, dict]:
    """(parameters as host arrays, meta with "step" and "model") of `step` (default: the newest)."""
    folder = _step_folder(absolute(run) / "snapshots", step)
    meta = read_meta(folder)
    return read_tree(folder, "params", meta), meta


# --- folders ------------------------------------------------------------------------------------


def absolute(path: epath.PathLike) -> epath.Path:
    """The path with `~` expanded and made absolute, as Orbax asks for; gs:// stays what it is."""
    path = epath.Path(path).expanduser()
    return path if path.is_absolute() else path.absolute()  # absolute() would break gs://


def write_folder(folder: epath.Path, params: dict, meta: Mapping[str, Any]) -> None:
    """Writes {params, meta} to a new folder, which appears when it is complete.

    Without parameters only meta. ValueError if a number is not finite.
    """
    parts = {"params": params} if jax.tree.leaves(params) else {}  # Orbax refuses empty trees
    header = {**_header(), **meta, "checksums": _checksums(parts, str(folder))}
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in parts.items()}
    args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(header))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(folder, args=args)


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """The meta of a checkpoint, snapshot or frozen part. ValueError if damaged or newer."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(folder / "meta")
        version, _ = int(meta["format"]), dict(meta["checksums"])
    except Exception as error:  # Orbax has no common class for what a damaged file raises
        raise _damaged(folder, error) from error
    if version > FORMAT:
        raise ValueError(
            f"{folder}: format {version} is newer than {FORMAT}; install a newer ldm_jax"
        )
    return meta


def read_tree(folder: epath.Path, part: str, meta: Mapping[str, Any], abstract: Any = None) -> Any:
    """One part of a folder, like `abstract` in structure and sharding; without it host arrays.

    `meta` is that of the folder. ValueError if the part is damaged, or has other paths, shapes or
    dtypes than `abstract`.
    """
    handler = ocp.PyTreeCheckpointHandler()
    try:
        saved = handler.metadata(folder / part).tree
    except Exception as error:  # as above
        raise _damaged(folder, error) from error
    if abstract is None:
        args = ocp.args.PyTreeRestore(
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        )
    else:
        _check_fit(folder / part, saved, abstract)
        like = jax.tree.map(
            lambda x: ocp.ArrayRestoreArgs(
                sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
            ),
            abstract,
        )
        args = ocp.args.PyTreeRestore(abstract, restore_args=like)
    try:
        with ocp.Checkpointer(handler) as reader:
            tree = reader.restore(folder / part, args=args)
    except Exception as error:  # as above
        raise _damaged(folder, error) from error
    if _checksum(tree) != meta["checksums"][part]:
        raise _damaged(folder, ValueError(f"the checksum of {part} differs"))
    return tree


# --- checks -------------------------------------------------------------------------------------


def _checksums(parts: Mapping[str, Any], what: str) -> dict[str, int]:
    """{part: checksum}. ValueError names the parts and paths that hold a NaN or an infinity."""
    sums: dict[str, int] = {}
    bad: list[str] = []
    for part, tree in parts.items():
        facts = _facts(tree)
        sums[part] = _total(facts)
        bad += [f"{part}/{name}" for name, (count, _) in facts.items() if count]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"{what}: not written, because not finite: {', '.join(bad[:3])}{more}; go on from the"
            " last one, with a lower learning rate or a clipped gradient"
        )
    return sums


def _checksum(tree: Any) -> int:
    """The same number for a tree on any mesh or on the host; another one if any one bit differs.

    Orbax's files carry no checksum of array data: a flipped bit would go unnoticed.
    """
    return _total(_facts(tree))


def _total(facts: Mapping[str, tuple[int, int]]) -> int:
    return sum((zlib.crc32(n.encode()) | 1) * bits for n, (_, bits) in facts.items()) % 2**32


def _facts(tree: Any) -> dict[str, tuple[int, int]]:
    """{path: (how many values are not finite, sum of the values' bits modulo 2**32)}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    # leaf by leaf: one program over all leaves of a large model compiles for half a minute
    found = []
    for _, x in flat:
        found.append(_host_facts(x) if isinstance(x, np.ndarray) else _device_facts(x))
        # CPU devices share their threads: sums over devices that do not wait for each other
        # can take all of them and then wait for ever
        if isinstance(x, jax.Array) and next(iter(x.sharding.device_set)).platform == "cpu":
            found[-1].block_until_ready()
    found = jax.device_get(found)
    return {sharding.path_name(p): (int(f[0]), int(f[1])) for (p, _), f in zip(flat, found)}


@jax.jit
def _device_facts(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x  # whose bits XLA does not give
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    bad = jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32)
    return jnp.stack([bad, jnp.sum(bits, dtype=jnp.uint32)])


def _host_facts(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}")
    bad = np.sum(~np.isfinite(x), dtype=np.uint32)
    return np.stack([bad, np.sum(bits, dtype=np.uint32)])


def _parts(state: Any) -> dict[str, Any]:
    """The trees of a state that hold any array: Orbax refuses empty ones."""
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


def _folder(source: epath.PathLike | ocp.CheckpointManager) -> epath.Path:
    if isinstance(source, ocp.CheckpointManager):
        source.wait_until_finished()
        return epath.Path(source.directory)
    return absolute(source) / "checkpoints"


def _steps(folder: epath.Path) -> list[int]:
    if not folder.exists():
        return []
    return sorted(int(f.name) for f in folder.iterdir() if f.name.isdigit() and is_complete(f))


def is_complete(folder: epath.Path) -> bool:
    """Whether Orbax finished the folder: its final name on disk, a marker on object stores."""
    return folder.exists() and ocp.utils.is_checkpoint_finalized(folder)


def _step_folder(folder: epath.Path, step: int | None) -> epath.Path:
    steps = _steps(folder)
    if not steps or (step is not None and step not in steps):
        asked = "any step" if step is None else f"step {step}"
        raise FileNotFoundError(f"{folder}: nothing saved of {asked}; it has {steps or 'nothing'}")
    return folder / str(steps[-1] if step is None else step)


def _check_fit(folder: epath.Path, saved: Any, abstract: Any) -> None:
    def described(tree: Any) -> dict[str, str]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {sharding.path_name(p): f"{x.dtype}{list(x.shape)}" for p, x in flat}

    old, new = described(saved), described(abstract)
    odd = [n for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n)]
    if odd:
        lines = [f"{n}: saved {old.get(n, 'not')}, expected {new.get(n, 'not')}" for n in odd[:3]]
        raise ValueError(
            f"{folder}: is of another model, {len(odd)} arrays differ ({'; '.join(lines)}): use"
            " the config that the run was started with, or another workdir"
        )


def _damaged(folder: epath.Path, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ValueError(
        f"{folder}: cannot be read ({reason}); remove that folder to go on from an older one"
    )
