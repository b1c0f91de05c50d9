"""An image once more, from what its PNG says: `ldm-sample again IMAGE.png --out DIR`."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import numpy as np
from etils import epath
from tyro.conf import Positional, arg

from ldm_jax.runtime import flags, storage
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import exported, generate, hosts, write
from ldm_jax.sample.request import Call


@dataclasses.dataclass(frozen=True)
class Options:
    """Repeat an image of ldm-sample, and compare the two pixel for pixel.

    Everything that it was made from must be there: the model and the files, unchanged. On the same
    kind and number of devices and with the same version of JAX the images are equal.
    """

    image: Annotated[str, Positional, arg(metavar="IMAGE.png")]
    """PNG file that ldm-sample wrote."""
    out: flags.Dir = "again"
    """Folder for the new one; made if missing."""
    model: Annotated[str | None, arg(metavar="PATH")] = None
    """Where the model is now; default: where it was."""
    overwrite: bool = False
    """Write into a folder that already holds images."""


def main(options: Options, tasks: Mapping[str, types.ModuleType]) -> int:
    """Writes the image under the same name. tasks: the modules by name."""
    kept = write.read_settings(options.image)
    task = tasks.get(kept.get("task"))
    if "grid" in kept:
        raise ValueError(f"{options.image}: is a grid; give one of its {kept['grid']} images")
    if "call" not in kept or not hasattr(task, "request"):
        raise ValueError(
            f"{options.image}: does not say how it was made (task {kept.get('task')!r});"
            " older versions and other programs leave that out"
        )
    for path, digest in kept["files"].items():
        if not epath.Path(path).exists():
            raise ValueError(f"{options.image}: was made from {path}, which does not exist here")
        if storage.sha256(path) != digest:
            raise ValueError(f"{options.image}: was made from {path}, which has changed since")
    size, index = kept["call"]
    asked = restored(task.Options, kept, options)
    if write.made_with()["device"] != kept["made_with"]["device"]:  # as many images on each
        size = -(-size // jax.device_count()) * jax.device_count()
        asked = dataclasses.replace(asked, batch_size=size)
    what = dataclasses.replace(task.request(asked), guided=kept["guided"])
    place = kept["index"] - what.options.first_index
    call = Call(np.full(size, place), np.array([index]))
    name = epath.Path(options.image).stem
    what = dataclasses.replace(what, names=[name] * what.count)
    settings = {place: kept}

    out = write.open_out(what.options)
    run = exported.read(what)[0] if what.options.from_export is not None else None
    with hosts.together():
        (made,) = generate.made(what, [call], run)
        write.part(out, what, made, settings)
    LOG.info(f"{out / name}.png: {compared(out, options.image, name, kept)}")
    return 0


def restored(kind: type, kept: dict[str, Any], options: Options) -> Any:
    """Options of a task, as they were, but for the places of model and output."""
    given = {}
    for field in dataclasses.fields(kind):
        if field.name in kept:
            value = kept[field.name]
            many = isinstance(value, list) or isinstance(field.default, tuple)
            given[field.name] = tuple(write.listed(value)) if many else value
    given["out"], given["overwrite"] = options.out, options.overwrite
    if options.model is not None:
        given["model"] = options.model
    return kind(**given)


def compared(out: epath.Path, original: str, name: str, kept: dict[str, Any]) -> str:
    """How the new image differs from the old one, for people."""
    old, new = (write.read_picture(epath.Path(f).parent, epath.Path(f).stem).astype(int)
                for f in (original, out / f"{name}.png"))  # fmt: skip
    if old.shape == new.shape and (old == new).all():
        return f"equal to {original}, pixel for pixel"
    here = write.made_with()
    changes = [
        f"{k} {v} -> {here.get(k)}" for k, v in kept["made_with"].items() if v != here.get(k)
    ]
    why = f" ({', '.join(changes)})" if changes else ""
    if old.shape != new.shape:
        return f"of another size than {original}{why}"
    differ = np.abs(old - new).max(-1)
    return (
        f"differs from {original}{why} in {(differ > 0).mean():.2%} of the pixels, by up to"
        f" {differ.max()} of 255"
    )
