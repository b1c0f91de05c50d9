"""Texts and images in CLIP's space, and the images of a folder that are nearest to them.

Retrieval of Blattmann et al. 2022 (retrieval-augmented diffusion) by exact search, the cosine of
every image of the folder, where the reference searches approximately with ScaNN.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from PIL import Image

from ldm_jax import sharding
from ldm_jax.convert.clip_folder import CLIP
from ldm_jax.data import folder as image_folder
from ldm_jax.data import transforms
from ldm_jax.models import clip
from ldm_jax.runtime import processes, progress, reading, rundir
from ldm_jax.runtime.log import LOG

BLOCK = 2**16  # embeddings whose cosines are computed in one call
SPARE = 8  # candidates beyond those asked for, which rounding may have put behind
FORMAT = 1


class Index(NamedTuple):
    """Embeddings of the images in a folder."""

    files: np.ndarray
    """Paths relative to the folder, str [N]."""
    embeddings: np.ndarray
    """float32 [N, d], of any length."""


# --- embeddings ----------------------------------------------------------------------------------


def unit(x: np.ndarray) -> np.ndarray:
    """[..., d] divided by its length."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def embed_texts(towers: CLIP, texts: Sequence[str]) -> np.ndarray:
    """Texts to float32 [N, d], of any length. ValueError without a tokenizer."""
    if towers.tokenizer is None:
        raise ValueError(
            "the CLIP model comes without a tokenizer: put its files (vocab.json and merges.txt)"
            " into its folder, or give theirs"
        )
    ids = towers.tokenizer.encode(list(texts))
    embed = functools.partial(clip.embed_text, towers.text, end_id=towers.end_id)
    return np.asarray(jax.jit(embed)(towers.params["text"], ids_bl=ids))


def embed_images(
    towers: CLIP, paths: Sequence[epath.PathLike], *, batch_size: int = 32, mesh: Mesh | None = None
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """(float32 [N, d] of any length, (number, reason) of the images that cannot be decoded).

    The embeddings of the latter are 0. Images are read ahead of the batch that runs, on threads;
    with `mesh` a batch is split over its devices, and `towers.params` lie on them.
    """
    embeddings = np.zeros((len(paths), towers.width), np.float32)
    layout = None if mesh is None else sharding.batch_sharding(mesh)
    split = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-min(batch_size, max(1, len(paths))) // split) * split
    embed = jax.jit(
        lambda params, x: towers.vision.apply({"params": params}, x),
        out_shardings=None if mesh is None else sharding.replicated(mesh),
    )
    broken = []
    hidden = not progress.is_watched() or len(paths) <= size
    with progress.Bar(len(paths), unit="image", does="embedding", hidden=hidden) as bar:
        for first, images in _read_ahead(functools.partial(_prepared, towers), paths, size):
            reasons = [(first + i, x) for i, x in enumerate(images) if isinstance(x, str)]
            blank = np.zeros((towers.vision.image_size,) * 2 + (3,), np.float32)
            batch = [blank if isinstance(x, str) else x for x in images]
            batch = np.stack([*batch, *[blank] * (size - len(batch))])
            batch = batch if layout is None else sharding.place(batch, layout)
            made = embed(towers.params["vision"], batch)
            embeddings[first : first + len(images)] = np.asarray(made)[: len(images)]
            broken += reasons
            bar.update(len(images))
    embeddings[[i for i, _ in broken]] = 0
    return embeddings, broken


def prepared(
    image: Image.Image, side: int, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """An RGB image as CLIP's: shorter side scaled to `side`, bicubic; centre cut; normalized.

    float32 [side, side, 3], as transformers' CLIPImageProcessor makes it.
    """
    short = min(image.size)
    size = tuple(side if n == short else int(side * n / short) for n in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((n - side) // 2 for n in size)
    image = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(image, np.float32) / 255
    return (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _prepared(towers: CLIP, path: epath.PathLike) -> np.ndarray | str:
    """A file `prepared`, or the reason why it cannot be read."""
    try:
        image = transforms.decode_image(reading.read_bytes(path), 3)
    except ValueError as error:  # undecodable, or no regular file
        return str(error)
    return prepared(image, towers.vision.image_size, towers.mean, towers.std)


def _read_ahead(
    read: Callable, paths: Sequence[epath.PathLike], size: int
) -> Iterator[tuple[int, list]]:
    """(First number, results of `read`) of each batch; the next is read while one is used."""
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: list[tuple[int, list]] = []
        for first in range(0, len(paths), size):
            batch = [pool.submit(read, path) for path in paths[first : first + size]]
            waiting.append((first, batch))
            if len(waiting) == 2:
                begun, ready = waiting.pop(0)
                yield begun, [x.result() for x in ready]
        for begun, ready in waiting:
            yield begun, [x.result() for x in ready]


# --- the index -----------------------------------------------------------------------------------


def open_index(
    folder: str,
    path: epath.PathLike,
    towers: CLIP,
    *,
    rebuild: bool = False,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> Index:
    """The index of the images below `folder`, from the file `path`, or built and written there.

    rebuild: build it again. Raises ValueError for a file that belongs to other images or another
    CLIP model, or is no index; FileNotFoundError for a folder without images.
    """
    path = epath.Path(path)
    every = image_folder.find_files(folder)
    files = sorted(f for f in every if os.path.splitext(f)[1].lower() in image_folder.SUFFIXES)
    if not files:
        known = " ".join(sorted(image_folder.SUFFIXES))
        raise FileNotFoundError(f"no image in {folder} (looked for {known})")
    mark = fingerprint(folder, files, towers)
    there = path.exists() and not rebuild
    processes.barrier("index_looked")  # process 0 writes next: all have looked by now
    if there:
        return _read(path, mark, folder)
    LOG.info(f"embedding {len(files)} images of {folder} ...")
    paths = [os.path.join(folder, file) for file in files]
    embeddings, broken = embed_images(towers, paths, batch_size=batch_size, mesh=mesh)
    for i, reason in broken:
        LOG.warning(f"{paths[i]}: is not an image, or a broken one ({reason}); left out")
    kept = np.setdiff1d(np.arange(len(files)), [i for i, _ in broken])
    if not len(kept):
        raise ValueError(f"none of the {len(files)} images in {folder} can be decoded")
    index = Index(np.asarray(files)[kept], embeddings[kept])
    _write(path, index, mark)
    LOG.info(f"{path}: index of {len(kept)} images")
    return index


def fingerprint(folder: str, files: Sequence[str], towers: CLIP) -> dict[str, str]:
    """Hashes of what an index depends on: the files, by path, size and time, and the CLIP model."""
    listed = hashlib.sha256()
    for file in files:
        status = os.stat(os.path.join(folder, file))
        listed.update(json.dumps([file, status.st_size, status.st_mtime_ns]).encode())
    vision = towers.vision
    shape = (vision.image_size, vision.patch_size, vision.num_heads, vision.activation)
    model = hashlib.sha256(json.dumps([shape, towers.mean, towers.std]).encode())
    model.update(rundir.params_hash(jax.device_get(towers.params["vision"])).encode())
    return {"images": listed.hexdigest(), "CLIP model": model.hexdigest()}


def _write(path: epath.Path, index: Index, mark: dict[str, str]) -> None:
    if jax.process_index() != 0:
        return
    meta = json.dumps({"format": FORMAT, **mark})
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, files=index.files, embeddings=index.embeddings, meta=np.array(meta))
        part.replace(path)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written: {error.strerror}; give another --index-file FILE"
        ) from error


def _read(path: epath.Path, mark: dict[str, str], folder: str) -> Index:
    try:
        with reading.refusals(path):
            arrays = reading.read_npz(path)
            meta = reading.parse_json(str(arrays["meta"]), "its meta")
            index = Index(arrays["files"], arrays["embeddings"])
            if not isinstance(meta, dict) or index.files.shape != index.embeddings.shape[:1]:
                raise ValueError("its names and embeddings do not fit")
    except ValueError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: is no index of images ({why}); rebuild it") from error
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{path}: is of format {meta.get('format')}, known is {FORMAT}; rebuild it"
        )
    stale = [name for name, value in mark.items() if meta.get(name) != value]
    if stale:
        raise ValueError(
            f"{path}: was built from other {' and another '.join(stale)} than {folder} now has;"
            " rebuild it (--rebuild), or give another --index-file FILE"
        )
    return index


# --- search --------------------------------------------------------------------------------------


def nearest(queries: np.ndarray, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(int [Q, k], float32 [Q, k]): the k embeddings with the largest cosine, and these, in order.

    queries [Q, d], embeddings [N, d], of any length. Ties keep the order of the embeddings.
    ValueError if k is not in 1..N.
    """
    if not 1 <= k <= len(embeddings):
        raise ValueError(f"{k} neighbours of {len(embeddings)} images: give 1..{len(embeddings)}")
    kept = min(k + SPARE, len(embeddings))
    queries = unit(queries)
    best = np.zeros((len(queries), 0), np.float32)
    where = np.zeros((len(queries), 0), np.int64)
    for first in range(0, len(embeddings), BLOCK):
        part = unit(embeddings[first : first + BLOCK])
        cosines, indices = _top(queries, part, min(kept, len(part)))
        best = np.concatenate([best, cosines], axis=1)
        where = np.concatenate([where, np.asarray(indices) + first], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :kept]
        best, where = (np.take_along_axis(x, order, axis=1) for x in (best, where))
    # float32 sums depend on where an embedding stands in its block: what is equal is so in float64
    near = unit(embeddings[where].astype(np.float64))
    exact = np.einsum("qd,qkd->qk", unit(queries.astype(np.float64)), near)
    order = np.lexsort((where, -exact), axis=1)[:, :k]
    where, exact = (np.take_along_axis(x, order, axis=1) for x in (where, exact))
    return where, exact.astype(np.float32)


@functools.partial(jax.jit, static_argnums=2)
def _top(queries: jax.Array, embeddings: jax.Array, k: int) -> tuple[Any, Any]:
    cosines = jnp.matmul(queries, embeddings.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(cosines, k)
