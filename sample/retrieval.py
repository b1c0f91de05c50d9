"""Neighbours to image: `ldm-sample retrieval --model PATH --out DIR --clip FOLDER --prompt "..."`.

Retrieval-augmented diffusion (Blattmann et al. 2022; the reference's `knn2img.py`): the model is
conditioned on the CLIP embedding of a text or an image, and on those of the images of a folder that
are nearest to it. All embeddings are divided by their length, and guidance leads away from zeros.
"""

import dataclasses
import os
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from PIL import Image

from ldm_jax import bundle, conditioning, neighbours, schema, sharding
from ldm_jax.convert import clip_folder
from ldm_jax.runtime import flags
from ldm_jax.sample import editing, text2img
from ldm_jax.sample.draw import draw
from ldm_jax.sample.inputs import open_image, resized
from ldm_jax.sample.options import Options, latent_shape, open_model
from ldm_jax.sample.request import Request

NAME = "retrieval"
NEIGHBOURS = 10  # the reference's --knn
INDEX = ".ldm_jax_clip.npz"  # hidden: not listed among the folder's images


@dataclasses.dataclass(frozen=True)
class Options(Options):
    """Images of texts or images and of their neighbours, by a model of CLIP embeddings."""

    clip: flags.Dir = ""
    """Folder of transformers' CLIPModel that the model was trained with (config.json,
    model.safetensors, tokenizer); ViT-L/14 for the published one."""
    clip_tokenizer: flags.OptionalDir = None
    """Folder with CLIP's tokenizer, where --clip has none."""
    prompt: flags.Texts = ()
    """Texts to draw; each gets num_images images and a row of the grid."""
    query_image: flags.Files = ()
    """Images to draw others of, after the texts."""
    database: flags.OptionalDir = None
    """Folder of images, with all folders below, whose nearest ones are found."""
    neighbours: int | None = None
    """Images of --database beside the text or image itself; default: 10, or 0 without a folder."""
    include_query: bool = True
    """Put the embedding of the text or image before those of its neighbours; --no-include-query
    leaves it out."""
    index_file: flags.OptionalFile = None
    """File with the embeddings of --database, made where there is none; default: a hidden file in
    that folder."""
    rebuild: bool = False
    """Make the index again; one of other images or another CLIP model is refused otherwise."""
    index_batch: int = 32
    """Images of --database that are embedded at a time, over all devices."""
    height: int | None = None
    """Pixels; default: the size the model was trained at."""
    width: int | None = None
    """Pixels; default: the size the model was trained at."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; 1 samples without it, at half the cost."""
    batch_size: int = 8
    """Most images per call of the compiled sampler, over all devices."""


def writing_below(options: Options, out: str) -> Options:
    """Options that write an index only below `out`; the folder's own is read if it exists."""
    if options.database is None or epath.Path(options.database, INDEX).exists():
        return options
    return dataclasses.replace(options, index_file=os.path.join(out, INDEX))


class Neighbours(NamedTuple):
    """Condition of the model for each text or image, Q of them."""

    context: np.ndarray
    """Embeddings of length 1, float32 [Q, tokens, d]."""
    files: list[list[str]]
    """Neighbours, the nearest first."""
    cosines: np.ndarray
    """Cosines of the neighbours, [Q, k]."""


def main(options: Options) -> int:
    """Writes num_images images of every text and image."""
    return draw(request(options))


def request(options: Options) -> Request:
    """The request of the options. ValueError for options that model or folder do not allow."""
    options = check(options)
    model, mesh, options = open_model(options)
    towers = load_clip(options, mesh)
    check_model(model, options, towers)
    shape = latent_shape(model, options.height, options.width)
    nearest = find(towers, options, mesh)
    down = model.config.first_stage.downsample
    side = (shape[0] * down, shape[1] * down)
    return Request(
        NAME,
        options,
        model,
        mesh,
        shape=shape,
        guided=options.guidance_scale != 1,
        batch={"embedding": np.repeat(nearest.context, options.num_images, axis=0)},
        names=files_of(options),
        details=details_of(options, nearest),
        row_labels=[name[:24] for name in names_of(options)],
        left=shown(options, nearest, editing.channels(model), side),
    )


def check(options: Options) -> Options:
    """Options with the number of neighbours; ValueError for impossible options, before anything
    is read."""
    if not options.clip:
        raise ValueError("give --clip FOLDER, the CLIP model that the model was trained with")
    if not options.prompt and not options.query_image:
        raise ValueError('give --prompt "..." or --query-image FILE')
    count = options.neighbours
    if count is None:
        count = 0 if options.database is None else NEIGHBOURS
    if count < 0:
        raise ValueError(f"--neighbours {count}: give 0 or more")
    if count and options.database is None:
        raise ValueError(f"--neighbours {count}: give --database FOLDER to find them in")
    if not count and not options.include_query:
        raise ValueError("--no-include-query with no neighbours leaves nothing to draw")
    if options.index_batch < 1:
        raise ValueError(f"--index-batch {options.index_batch}: give at least 1")
    return dataclasses.replace(options, neighbours=count)


def check_model(model: bundle.LatentDiffusion, options: Options, towers: clip_folder.CLIP) -> None:
    """ValueError if the model does not draw from embeddings of this CLIP."""
    cond = model.config.cond
    if not isinstance(cond, schema.EmbeddingCondConfig):
        kind = conditioning.name_of(cond)
        raise ValueError(f"{options.model}: is trained with {kind}, not with CLIP embeddings")
    if cond.width != towers.width:
        raise ValueError(
            f"--clip {options.clip}: its embeddings have {towers.width} numbers, and those that"
            f" {options.model} is trained with have {cond.width}: give its own CLIP model"
        )


def find(towers: clip_folder.CLIP, options: Options, mesh: jax.sharding.Mesh) -> Neighbours:
    """Embeddings of the texts and images, and of the images of the folder nearest to them."""
    queries = []
    if options.prompt:
        queries.append(neighbours.embed_texts(towers, options.prompt))
        text2img.say_lost(towers.tokenizer, options.prompt, ())
    if options.query_image:
        for path in options.query_image:
            open_image(path, 3)  # refuses files that are no images
        made, _ = neighbours.embed_images(
            towers, options.query_image, batch_size=options.index_batch, mesh=mesh
        )
        queries.append(made)
    queries = neighbours.unit(np.concatenate(queries))
    count = options.neighbours
    if not count:
        none = np.zeros((len(queries), 0), np.float32)
        return Neighbours(queries[:, None], [[]] * len(queries), none)
    path = options.index_file or os.path.join(options.database, INDEX)
    how = {"rebuild": options.rebuild, "batch_size": options.index_batch, "mesh": mesh}
    index = neighbours.open_index(options.database, path, towers, **how)
    if count > len(index.files):
        raise ValueError(
            f"--neighbours {count}: {options.database} has {len(index.files)} images; give at most"
            " as many"
        )
    where, cosines = neighbours.nearest(queries, index.embeddings, count)
    context = neighbours.unit(index.embeddings[where])
    if options.include_query:
        context = np.concatenate([queries[:, None], context], axis=1)
    files = [[os.path.join(options.database, index.files[i]) for i in row] for row in where]
    return Neighbours(context.astype(np.float32), files, cosines)


def load_clip(options: Options, mesh: jax.sharding.Mesh) -> clip_folder.CLIP:
    """The CLIP model, a copy on every device."""
    everywhere = sharding.replicated(mesh)
    towers = clip_folder.load(
        options.clip,
        tokenizer=options.clip_tokenizer,
        place=lambda path, x: sharding.place(x, everywhere),
    )
    if options.prompt and towers.tokenizer is None:
        raise ValueError(
            f"--clip {options.clip}: comes without a tokenizer (vocab.json and merges.txt); give"
            " --clip-tokenizer FOLDER"
        )
    return towers


def shown(
    options: Options, nearest: Neighbours, channels: int, side: tuple[int, int]
) -> np.ndarray:
    """Pictures before the images in the grid: float32 [Q, n, H, W, c] in [-1, 1].

    The image asked for, white for a text, where there is any image; then the neighbours.
    """
    blank = np.ones((*side, channels), np.float32)
    rows = []
    for i, files in enumerate(nearest.files):
        number = i - len(options.prompt)
        asked = [blank] if number < 0 else [picture(options.query_image[number], channels, side)]
        asked = asked if options.query_image else []
        rows.append([*asked, *(picture(file, channels, side) for file in files)])
    return np.asarray(rows, np.float32).reshape(len(rows), -1, *side, channels)


def picture(path: str, channels: int, side: tuple[int, int]) -> np.ndarray:
    """An image file, scaled and cut to `side`: float32 [H, W, c] in [-1, 1]."""
    image: Image.Image = resized(open_image(path, channels), side)
    return np.asarray(image, np.float32).reshape(*side, channels) / 127.5 - 1


def names_of(options: Options) -> list[str]:
    """Label of every text and image in the grid."""
    return [*options.prompt, *(epath.Path(path).name for path in options.query_image)]


def details_of(options: Options, nearest: Neighbours) -> list[dict]:
    """Settings of every image for its PNG."""
    alone = [{"prompt": [text], "query_image": []} for text in options.prompt]
    alone += [{"prompt": [], "query_image": [path]} for path in options.query_image]
    details = []
    for row, name in enumerate(names_of(options)):
        near = [
            {"file": file, "cosine": round(float(cosine), 4)}
            for file, cosine in zip(nearest.files[row], nearest.cosines[row], strict=True)
        ]
        details += [{"asked": name, "nearest": near, **alone[row]}] * options.num_images
    return details


def files_of(options: Options) -> list[str]:
    """File name of every image, without ending."""
    stems = [*options.prompt, *(epath.Path(path).stem for path in options.query_image)]
    every = [stem for stem in stems for _ in range(options.num_images)]
    return [f"{i:05d}_{text2img.slug(x)}_seed{options.seed}" for i, x in enumerate(every)]
