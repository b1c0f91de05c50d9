"""Plain files of a run directory, written whole or in numbered parts, so that it may be on gs://.

    config.json  data.json  latents.json  frozen/NAME/
    metrics/000123.jsonl  samples/STEP.png (STEP.txt)

Process 0 writes; every process calls.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import finite, schema, seeds, sharding
from ldm_jax.runtime import checkpoint, processes, reading, storage
from ldm_jax.schema import serialize

FORMAT = 1  # of latents.json and data.json; a reader refuses a newer one


def is_run(path: epath.PathLike) -> bool:
    """True if a run was started there (config.json of a diffusers folder has no format number)."""
    try:
        values = reading.read_json(epath.Path(path) / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "format" in values and "config" in values


def open_run(workdir: epath.PathLike, config: schema.TrainConfig) -> tuple[epath.Path, list[str]]:
    """(run, changed execution fields as "field: old -> new"): creates the run or goes on in it.

    ValueError if the directory holds something else, or a run whose identity fields differ; OSError
    if it cannot be written. config.json always holds the config of the latest start.
    """
    run = checkpoint.absolute(workdir)
    changed: list[str] = []
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run}: is a file; --workdir takes a directory")
    if (run / "config.json").exists():
        identity, changed = serialize.difference(read_config(run), config)
        if identity:
            raise ValueError(
                f"{run}: holds another run, of which these differ: {'; '.join(identity)}."
                " Use its config, or another --workdir"
            )
    elif run.exists() and any(not entry.name.startswith(".") for entry in run.iterdir()):
        raise ValueError(
            f"{run}: is not a run (files, but no config.json); --workdir takes a run, or a new or"
            " empty directory"
        )
    processes.barrier("looked")  # process 0 writes next: all have looked by now
    try:
        write_text(
            run / "config.json", serialize.to_json(config, seed_bits=_seed_bits(run, config))
        )
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{run}: cannot be written ({reason}); choose another --workdir") from error
    processes.barrier("opened")
    return run, changed


def read_config(run: epath.PathLike) -> schema.TrainConfig:
    """The config of a run. ValueError if the file is not one, or of a newer format."""
    path = epath.Path(run) / "config.json"
    with reading.refusals(path):
        return serialize.from_json(reading.read_text(path), str(path))


def root_key(workdir: epath.PathLike, config: schema.TrainConfig) -> jax.Array:
    """The typed key that every draw of a run follows from, but for the order of its data.

    A run that was begun before December 2026 goes on with the key that it had, of the lower 32 bits
    of its seed. ValueError for a seed that is not in 0..2**64 - 1.
    """
    run, seed = checkpoint.absolute(workdir), seeds.checked(config.seed)
    return seeds.root_key(seed % 2 ** _seed_bits(run, config))


def _seed_bits(run: epath.Path, config: schema.TrainConfig) -> int:
    """Bits of the seed that count in a run: "seed_bits" of its config.json, 64 in a new one.

    32 is written nowhere: seeds that have no more bits need no mark, and older runs have none.
    """
    if config.seed < 2**32:
        return 32
    path = run / "config.json"
    bits = reading.read_object(path).get("seed_bits", 32) if path.exists() else 64
    if bits not in (32, 64):
        raise ValueError(f"{path}: seed_bits {bits!r:.40} is neither 32 nor 64")
    return bits


def meta(config: schema.TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """Meta of a checkpoint about its run: mesh and its slices, hash of the config.

    "mesh" has the whole length of each axis; how it lies over slices is in the run's config.json.
    """
    digest = hashlib.sha256(serialize.to_json(config).encode()).hexdigest()
    slices = sharding.slices(mesh.devices.flat, config.mesh.process_is_slice)
    return {
        "mesh": dict(mesh.shape),
        "slices": len(slices),
        "processes": jax.process_count(),
        "config": digest[:16],
    }


def sample_path(run: epath.PathLike, step: int) -> epath.Path:
    """File of the pictures drawn at `step`."""
    return epath.Path(run) / "samples" / f"{step:06d}.png"


# --- latents.json and frozen/ -------------------------------------------------------------------


def write_latents(run: epath.PathLike, latents: Mapping[str, Any]) -> None:
    """Writes {"scale": from latent to diffusion space, "how": how it was found}."""
    values = {"format": FORMAT, **latents}
    _write_for_all(epath.Path(run) / "latents.json", json.dumps(values, indent=2) + "\n")


def read_latents(run: epath.PathLike) -> dict[str, Any] | None:
    """Content of latents.json, or None. ValueError if it is damaged or of a newer format."""
    path = epath.Path(run) / "latents.json"
    if not path.exists():
        return None
    with reading.refusals(path, "copy it from the run again"):
        values = reading.read_object(path, "copy it from the run again")
        reading.check_format(values.pop("format"), FORMAT, str(path))
        finite.checked(values["scale"], f"{path}: scale", nonzero=True)
    return values


def write_data(run: epath.PathLike, values: Mapping[str, Any]) -> None:
    """Write data.json: {"classes": names by label or None, "records": {split: count}}."""
    text = json.dumps({"format": FORMAT, **values}, indent=2, ensure_ascii=False) + "\n"
    _write_for_all(epath.Path(run) / "data.json", text)


def read_data(run: epath.PathLike) -> dict[str, Any] | None:
    """Content of data.json, or None. ValueError if it is damaged or of a newer format."""
    path = epath.Path(run) / "data.json"
    if not path.exists():
        return None
    with reading.refusals(path, "remove it"):
        values = reading.read_object(path, "remove it")
        reading.check_format(values.pop("format"), FORMAT, str(path))
        classes = values["classes"]
        if classes is not None and not all(isinstance(name, str) for name in classes):
            raise ValueError(f"classes are {classes!r:.80}, not names")
    return values


def write_frozen(run: epath.PathLike, name: str, params: dict, config: Any) -> None:
    """Keeps a part that does not train: host arrays, their hash, and the part's config (or None).

    Written once: ValueError if the run already holds other weights under that name.
    """
    folder = _frozen(run, name)
    digest = params_hash(params)
    if checkpoint.is_complete(folder):
        kept = checkpoint.read_meta(folder)["hash"]
        if kept != digest:
            raise ValueError(f"{folder}: holds other weights ({kept}, not {digest}); use a new run")
        return
    processes.barrier(f"frozen_{name}")
    values = {"hash": digest, "config": serialize.to_dict(config)}
    checkpoint.write_folder(folder, params, values)


def read_frozen(
    run: epath.PathLike, name: str, shapes: Callable[[Any], dict] | None = None
) -> tuple[dict, Any] | None:
    """(host arrays, config) of a frozen part, or None if the run has none of that name.

    shapes: the arrays that a config asks for. ValueError if there are others, or damaged ones.
    """
    folder = _frozen(run, name)
    if not checkpoint.is_complete(folder):
        return None
    meta = checkpoint.read_meta(folder)
    with reading.refusals(folder):
        config = (
            None if meta["config"] is None else serialize.from_dict(meta["config"], str(folder))
        )
        wanted = None if shapes is None else shapes(config)
    params = checkpoint.read_tree(folder, "params", meta, wanted) if meta["checksums"] else {}
    return params, config


def has_frozen(run: epath.PathLike, name: str) -> bool:
    """True if the run keeps a frozen part of that name."""
    return checkpoint.is_complete(_frozen(run, name))


def write_base(run: epath.PathLike, values: Mapping[str, Any]) -> None:
    """Write frozen/base.json: {"path", "hash", "dtype"} of a UNet that the run does not keep."""
    path = _frozen(run, "base.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_for_all(path, json.dumps({"format": FORMAT, **values}, indent=2) + "\n")


def read_base(run: epath.PathLike) -> dict[str, Any] | None:
    """Content of frozen/base.json, or None. ValueError if it is damaged or of a newer format."""
    path = _frozen(run, "base.json")
    if not path.exists():
        return None
    with reading.refusals(path, "copy it from the run again"):
        values = reading.read_object(path, "copy it from the run again")
        reading.check_format(values.pop("format"), FORMAT, str(path))
        return {name: str(values[name]) for name in ("path", "hash", "dtype")}


def write_frozen_files(
    run: epath.PathLike, name: str, save: Callable[[epath.PathLike], None]
) -> None:
    """Keep the files that `save(folder)` writes; written once, existing files stay."""
    folder = _frozen(run, name)
    if jax.process_index() == 0 and not folder.exists():
        draft = folder.parent / f".{name}.part"
        if draft.exists():
            draft.rmtree()
        draft.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as local:
            save(local)
            for path in epath.Path(local).iterdir():
                (draft / path.name).write_bytes(path.read_bytes())
        draft.replace(folder)
    processes.barrier(f"frozen_{name}")


@contextlib.contextmanager
def frozen_files(run: epath.PathLike, name: str) -> Iterator[str | None]:
    """A local folder with the files of `write_frozen_files`, or None if the run has none."""
    folder = _frozen(run, name)
    if not folder.exists():
        yield None
        return
    with tempfile.TemporaryDirectory() as local:  # readers of such files know no gs://
        for path in folder.iterdir():
            (epath.Path(local) / path.name).write_bytes(reading.read_bytes(path))
        yield local


def params_hash(params: dict) -> str:
    """sha256 over paths, dtypes, shapes and bytes of a tree of host arrays."""
    digest = hashlib.sha256()
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in sorted((sharding.path_name(p), np.asarray(x)) for p, x in flat):
        digest.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
        # as bytes: bfloat16 has no buffer of its own
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _frozen(run: epath.PathLike, name: str) -> epath.Path:
    return checkpoint.absolute(run) / "frozen" / name


# --- metrics ------------------------------------------------------------------------------------


def write_metrics(run: epath.PathLike, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes records, each with its "step" (steps finished), as one part named by the first step.

    The same first step replaces its part. A number that is not finite becomes null: JSON has none.
    """
    if not records:
        return
    path = epath.Path(run) / "metrics" / f"{int(records[0]['step']):06d}.jsonl"
    write_text(path, _lines(records))


def read_metrics(run: epath.PathLike) -> list[dict[str, Any]]:
    """All records of a run, by step."""
    records = [record for _, part in _parts(run) for record in part]
    return sorted(records, key=lambda record: record["step"])


def drop_metrics_after(run: epath.PathLike, step: int) -> None:
    """Drops records of later steps than `step`: the run resumes from there and makes them again."""
    if jax.process_index() == 0:
        for path, records in _parts(run):
            kept = [r for r in records if r["step"] <= step]
            if not kept:
                path.unlink()
            elif len(kept) < len(records):
                write_text(path, _lines(kept))
    processes.barrier("dropped")


def _parts(run: epath.PathLike) -> list[tuple[epath.Path, list[dict[str, Any]]]]:
    folder = epath.Path(run) / "metrics"
    if not folder.exists():
        return []
    paths = sorted(p for p in folder.iterdir() if p.suffix == ".jsonl" and p.stem.isdigit())
    lines = {p: reading.read_text(p).split("\n") for p in paths}
    return [(p, [_record(p, line) for line in lines[p] if line]) for p in paths]


def _record(path: epath.Path, line: str) -> dict[str, Any]:
    record = reading.parse_json(line, os.fspath(path), "remove that part")
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError(f"{path}: is damaged (a line without a step); remove that part")
    return record


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    plains = [{name: plain(value) for name, value in record.items()} for record in records]
    return "".join(json.dumps(record) + "\n" for record in plains)


# --- files --------------------------------------------------------------------------------------


def _write_for_all(path: epath.Path, text: str) -> None:
    """Write a file that every process has looked for: none finds it too early, none too late."""
    processes.barrier(f"looked for {path.name}")
    write_text(path, text)
    processes.barrier(path.name)


def write_text(path: epath.Path, text: str) -> None:
    """Process 0 writes the file: readers see all of it or the old one."""
    if jax.process_index() == 0:
        storage.retried(str(path), lambda: storage.write_whole(path, text.encode()))
