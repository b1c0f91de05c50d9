"""The feature networks of `ldm-eval`, and features kept in parts, so that a run can go on."""

import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ldm_jax import schema, seeds, sharding
from ldm_jax.convert import clip_folder, inception
from ldm_jax.metrics import features, gaussian
from ldm_jax.runtime import checkpoint, flags, progress, reading, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import write
from ldm_jax.sample.evaluate.image_sets import OUTPUTS, ImageSet

PART = 1024  # images of a part at least, which an interrupted run may lose
Outputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every `ldm-eval` task."""

    out: flags.Dir
    """Folder for result.json, row.md, and the features it goes on from when run again."""
    features: Literal["inception", "clip", "random"] = "inception"
    """Network that distances are taken in. `random` needs no weights and compares with nothing
    published: for tests, demonstrations, and runs among each other."""
    inception: flags.File = ""
    """Inception weights: pt_inception-2015-12-05-6726825d.pth of pytorch-fid."""
    layer: str = "2048"
    """Inception layer of FID, KID, precision and recall: 64, 192, 768 or 2048."""
    preprocess: Literal["torch_fidelity", "pytorch_fid"] = "torch_fidelity"
    """Preprocessing for Inception: both resize to 299 without antialiasing, pytorch_fid with pixel
    centres aligned."""
    clip: flags.Dir = ""
    """Folder of a CLIPModel of transformers: FD in CLIP features, CLIP score."""
    random_seed: int = 0
    """Seed of the weights of random features."""
    batch_size: int = 32
    """Images per call, over all devices."""
    overwrite: bool = False
    """Start again where --out holds features of other settings."""


class Opened(NamedTuple):
    """The networks of the options, and the mesh."""

    network: features.Network
    mesh: Any
    clip: clip_folder.CLIP | None


def opened(options: Options) -> Opened:
    """The feature network and a mesh of all devices.

    ValueError and FileNotFoundError name the file that is needed, with its checksum.
    """
    mesh = sharding.make_mesh(schema.MeshConfig())
    if options.batch_size < 1 or options.batch_size % mesh.devices.size:
        raise ValueError(
            f"--batch-size {options.batch_size} is not a multiple of {mesh.devices.size} devices"
        )
    if options.features == "random":
        seed = seeds.checked(options.random_seed, "--random-seed")
        return Opened(features.random_network(seed), mesh, None)
    if options.features == "inception":
        if not options.inception:
            raise ValueError(
                f"--features inception takes --inception FILE, {inception.PUBLISHED}; or take"
                " --features clip, or random where no published figure is compared with"
            )
        params, digest = inception.load(options.inception)
        network = features.inception_network(params, digest, options.layer, options.preprocess)
        return Opened(network, mesh, None)
    if not options.clip:
        raise ValueError(
            "--features clip takes --clip FOLDER, of a CLIPModel of transformers, as"
            " openai/clip-vit-large-patch14: config.json and model.safetensors"
        )
    model = clip_folder.load(options.clip, place=lambda path, x: x)
    params = model.params["vision"]
    digest = rundir.params_hash(params)
    network = features.clip_network(model.vision, params, digest, model.mean, model.std)
    return Opened(network, mesh, model)


def about(network: features.Network) -> dict[str, Any]:
    """Facts of a network that repeat a figure."""
    return {"features": network.name, "feature_weights": network.digest, **network.details}


def out_folder(options: Options) -> epath.Path:
    """--out, made and writable. ValueError otherwise."""
    out = checkpoint.absolute(options.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    write.refuse_foreign(out, depth=0, own=OUTPUTS)  # samples of others may lie in folders below
    try:
        out.mkdir(parents=True, exist_ok=True)
        rundir.write_text(out / ".writable", "")
        if jax.process_index() == 0:
            (out / ".writable").unlink()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--out {out} cannot be written: {reason}; give another folder") from error
    return out


# --- parts ---------------------------------------------------------------------------------------


def image_features(
    folder: epath.Path, opened: Opened, images: ImageSet, options: Options, what: str
) -> Outputs:
    """Features of a set, those in `folder` read and the others computed and kept there."""

    def produce(first: int) -> Iterator[tuple[Outputs, int]]:
        split = sharding.batch_sharding(opened.mesh)
        batches = ((r["image"], n) for r, n in images.batches(options.batch_size, first, split))
        for outputs in features.extract(opened.network, opened.mesh, batches):
            yield outputs, len(outputs["features"])

    settings = {**about(opened.network), "images": images.about}
    return kept(folder, settings, images.count, produce, options, what)


def kept(
    folder: epath.Path,
    settings: dict[str, Any],
    count: int,
    produce: Callable[[int], Iterator[tuple[Outputs, int]]],
    options: Options,
    what: str,
) -> Outputs:
    """Outputs of `produce` for `count` images, kept in parts so that a later run can go on.

    produce(first) yields (arrays of a batch, its number of images) from batch `first` on; arrays
    whose name begins with "total_" are summed, the others have a value for each image. They must be
    the same in every process, of which the first writes; in the others the result is {}.
    ValueError if the folder holds the parts of other `settings`, naming what differs.
    """
    settings = {**settings, "batch_size": options.batch_size, "count": count}
    first = _begin(folder, json.loads(json.dumps(settings)), options)
    done = first * options.batch_size
    hidden = not progress.is_watched()
    with progress.Bar(count, unit="image", does=what, initial=done, hidden=hidden) as bar:
        batches: list[Outputs] = []
        part = done
        for outputs, number in produce(first) if done < count else ():
            for x in outputs.values():
                if x.ndim == 2:
                    gaussian.check_finite(x, done)
            batches.append(outputs)
            done += number
            bar.update(number)
            if done - part >= PART or done >= count:
                _write_part(folder / f"{part:08d}.npz", _joined(batches))
                batches, part = [], done
    if jax.process_index() != 0:
        return {}
    return _joined([_read_part(path) for path in _parts(folder)])


def _begin(folder: epath.Path, settings: dict[str, Any], options: Options) -> int:
    """The first batch that is missing; the same in every process."""
    first, refused = 0, None
    if jax.process_index() == 0:
        try:
            first = _prepare_folder(folder, settings, options)
        except ValueError as error:
            first, refused = -1, error
    if jax.process_count() > 1:  # also when refused: the others would wait for ever
        first = int(multihost_utils.broadcast_one_to_all(np.int32(first)))
    if first < 0:
        raise refused or ValueError(f"{folder}: the first process refuses it")
    return first


def _prepare_folder(folder: epath.Path, settings: dict[str, Any], options: Options) -> int:
    """Prepare the folder; returns the first batch that is missing in it."""
    meta, done = folder / "settings.json", 0
    if meta.exists():
        before = reading.read_object(meta, "remove it and run again")
        names = sorted(n for n in before | settings if before.get(n) != settings.get(n))
        if names and not options.overwrite:
            pairs = [(n, _short(before.get(n)), _short(settings.get(n))) for n in names]
            shown = "; ".join(f"{n}: {old} -> {new}" for n, old, new in pairs)
            raise ValueError(
                f"{folder}: holds features of other settings ({shown}); give another --out, or"
                " --overwrite to start again"
            )
        if names:
            folder.rmtree()
    folder.mkdir(parents=True, exist_ok=True)
    rundir.write_text(meta, json.dumps(settings, indent=2) + "\n")
    for path in _parts(folder):
        done = int(path.stem) + _count(_read_part(path))
    if 0 < done < settings["count"]:
        LOG.info(f"{folder}: goes on after {done} of {settings['count']} images")
    return -(-done // options.batch_size)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else f"{text[:117]}..."


def _parts(folder: epath.Path) -> list[epath.Path]:
    return sorted(p for p in folder.iterdir() if p.suffix == ".npz" and p.stem.isdigit())


def _write_part(path: epath.Path, outputs: Outputs) -> None:
    """Write a part under another name first, so that it is whole or missing."""
    if jax.process_index() != 0:
        return
    buffer = io.BytesIO()
    np.savez(buffer, **outputs)
    draft = path.parent / f".{path.name}"
    draft.write_bytes(buffer.getvalue())
    draft.replace(path)


def _read_part(path: epath.Path) -> Outputs:
    return reading.read_npz(path, "remove it and run again")


def _count(outputs: Outputs) -> int:
    return next(len(x) for name, x in outputs.items() if not name.startswith("total_"))


def _joined(batches: list[Outputs]) -> Outputs:
    return {
        name: sum(b[name] for b in batches)
        if name.startswith("total_")
        else np.concatenate([b[name] for b in batches])
        for name in batches[0]
    }
