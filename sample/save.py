"""Arrays as files, for tasks that have them all at once."""

import dataclasses
import json
import math

import numpy as np
from etils import epath

from ldm_jax import cli, images
from ldm_jax.sample.options import Options


def save(
    out: epath.Path,
    options: Options,
    task: str,
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    names: list[str],
    details: list[dict],
    *,
    rows: list[str],
    left: np.ndarray | None = None,
) -> None:
    """What `generate` gave, as single PNGs with their settings inside, grid and arrays.

    names, details: of each image; rows: labels of the grid's rows, none for a square of images;
    left: [rows, H, W, c] in [-1, 1], images that stand in the grid before the others of their row.
    """
    pictures = images.to_uint8(np.concatenate([image for _, image, _ in parts]))
    settings = {"task": task, **dataclasses.asdict(options)}
    for name, picture, detail in zip(names, pictures, details, strict=True):
        images.save_png(out / f"{name}.png", picture, {**settings, **detail})
    columns = len(pictures) // len(rows) if rows else math.ceil(len(pictures) ** 0.5)
    labels = [row.encode("ascii", "replace").decode() for row in rows]  # what PIL's font has
    shown = pictures
    if left is not None:
        by_row = pictures.reshape(len(rows), columns, *pictures.shape[1:])
        shown = np.concatenate([images.to_uint8(left)[:, None], by_row], axis=1)
        shown, columns = shown.reshape(-1, *pictures.shape[1:]), columns + 1
    sheet = images.grid(shown, columns, scale=max(1, 48 // pictures.shape[1]), names=labels)
    images.save_png(out / "grid.png", sheet, settings)
    if options.npz:
        with (out / "samples.npz").open("wb") as file:
            np.savez(file, arr_0=pictures)
    if options.save_latents:
        z = np.concatenate([z for _, _, z in parts])
        with (out / "latents.npy").open("wb") as file:
            np.save(file, z.astype(np.float32))
    cli.say(f"{len(pictures)} images and {out / 'grid.png'}; settings: {json.dumps(settings)}")
