"""What every sampling task shares: options, batches through one compiled program, files."""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import einops
import jax
import numpy as np
import tqdm
from etils import epath
from PIL import Image, ImageOps

from ldm_jax import (
    bundle,
    cli,
    conditioning,
    images,
    latents,
    loading,
    sampling,
    schema,
    sharding,
    solvers,
)
from ldm_jax.data import transforms


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every sampling task."""

    model: str
    """Run directory, diffusers folder, CompVis .ckpt or .safetensors with its .yaml beside it, or
    Stable Diffusion in a single file."""
    out: str
    """Folder for the images; made if missing."""
    num_images: int = 4
    """Images per label or prompt."""
    steps: int = 50
    """Solver steps."""
    solver: str = "ddim"
    """Name of a solver; an unknown one is answered with the list."""
    spacing: str | None = None
    """Which timesteps are visited; default: as the model's own sampler, `leading` in the reference.
    `trailing` gives any number; an unknown one is answered with the list."""
    eta: float = 0.0
    """Noise of DDIM: 0 is deterministic, 1 ancestral."""
    guidance_scale: float = 1.5
    """Classifier-free guidance; 1 samples without it, at half the cost."""
    seed: int = 0
    """Image number i depends on (seed, i) alone."""
    batch_size: int = 16
    """Most images per call of the compiled sampler, over all devices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type."""
    step: int | None = None
    """Training step of a run to take the weights of; default: the newest."""
    ema: bool = True
    """Averaged weights; --no-ema takes the raw ones."""
    config: str | None = None
    """YAML of a checkpoint file; default: NAME.yaml or config.yaml beside it."""
    variant: str | None = None
    """Variant of the weights in a diffusers folder, as `fp16`; or what a single file is, as `v2-v`,
    where its tensors do not tell."""
    tokenizer: str | None = None
    """Folder with the tokenizer's files, where the model comes without."""
    init_latents: str | None = None
    """x_T for every image, instead of seeded noise: .npy float32 [N, h, w, c], unit normal."""
    save_latents: bool = False
    """Write latents.npy: the final latents after division by the scale, what decoding takes."""
    npz: bool = False
    """Write samples.npz too: arr_0 uint8 [N, H, W, c], as evaluation suites read it."""
    overwrite: bool = False
    """Write into a folder that already holds samples."""


def open_model(options: Options) -> tuple[bundle.LatentDiffusion, Any, Any]:
    """(bundle placed on all devices, mesh, options with the model's own solver settings).

    Refuses what cannot work before weights are read.
    """
    if options.num_images < 1:
        raise ValueError(f"--num-images {options.num_images}: give at least 1")
    solvers.make(options.solver, options.eta)  # refuses an unknown one, and eta where it takes none
    mesh = sharding.make_mesh(schema.MeshConfig())
    if options.batch_size < 1 or options.batch_size % mesh.devices.size:
        raise ValueError(
            f"--batch-size {options.batch_size} is not a multiple of {mesh.devices.size} devices"
        )
    model = loading.load(
        options.model,
        step=options.step,
        ema=options.ema,
        mesh=mesh,
        dtype=options.dtype,
        config=options.config,
        variant=options.variant,
        tokenizer=options.tokenizer,
    )
    timesteps = len(model.schedule.betas)
    if not 1 <= options.steps <= timesteps:
        raise ValueError(f"--steps {options.steps} is not in 1..{timesteps}")
    sampling.levels_of(model, options.steps, options.spacing)  # refuses an unknown spacing
    spacing = options.spacing or model.config.sampling.spacing
    return model, mesh, dataclasses.replace(options, spacing=spacing)


def latent_shape(
    model: bundle.LatentDiffusion, height: int | None, width: int | None, where: str = "--"
) -> tuple[int, int, int]:
    """(h, w, c) of the latent of an image; None is the training size.

    ValueError if the first stage and the UNet cannot halve a side as often as they do; it begins
    with `where` the side comes from.
    """
    config = model.config
    down = config.first_stage.downsample
    step = down * 2 ** (len(config.unet.channel_mult) - 1)
    sides = []
    for name, given in (("height", height), ("width", width)):
        side = config.size if given is None else given
        if side < step or side % step:
            below, above = side // step * step, (side // step + 1) * step
            nearest = f"{below} or {above}" if below > 0 else f"{max(above, step)}"
            raise ValueError(
                f"{where}{name} {side} is not a multiple of {step}, by which the first stage and"
                f" the UNet downsample: take {nearest}"
            )
        sides.append(side // down)
    return (*sides, config.first_stage.embed_dim)


def read_images(
    paths: Sequence[str],
    side: tuple[int | None, int | None] = (None, None),
    *,
    channels: int = 3,
    flag: str = "--images",
) -> np.ndarray:
    """Image files as float32 [N, H, W, channels] in [-1, 1], all of one size.

    side: (height, width) in pixels, of which one may be None: each image is scaled to cover it and
    cut at the centre. With neither the images stay as they are, and must agree.
    ValueError names the file that is missing, is no image, or has another size than the first.
    """
    if not paths:
        raise ValueError(f"give {flag} FILE [FILE ...]")
    read = [resized(open_image(path, channels), side) for path in paths]
    for path, image in zip(paths, read, strict=True):
        if image.size != read[0].size:
            raise ValueError(
                f"{path}: is {size_of(image)} (height x width), but {paths[0]} is"
                f" {size_of(read[0])}: give images of one size, or --height and --width"
            )
    stacked = np.stack([np.asarray(image, np.float32) for image in read])
    return stacked.reshape(*stacked.shape[:3], channels) / 127.5 - 1


def open_image(path: str, channels: int) -> Image.Image:
    """An image file, grey or RGB by its channels. ValueError as in `read_images`."""
    if epath.Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; give image files")
    try:
        return transforms.decode_image(epath.Path(path).read_bytes(), channels)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: does not exist; give an image file") from error
    except transforms.UndecodableError as error:
        raise ValueError(f"{path}: is not an image, or a broken one ({error})") from error


def resized(
    image: Image.Image, side: tuple[int | None, int | None], how: Any = Image.Resampling.BICUBIC
) -> Image.Image:
    """`image` scaled and cut as in `read_images`."""
    if side == (None, None):
        return image
    for flag, pixels in zip(("--height", "--width"), side, strict=True):
        if pixels is not None and pixels < 1:
            raise ValueError(f"{flag} {pixels}: give at least 1 pixel")
    ratio = image.height / image.width
    height = side[0] or max(1, round(side[1] * ratio))
    width = side[1] or max(1, round(height / ratio))
    return ImageOps.fit(image, (width, height), how)


def size_of(image: Image.Image) -> str:
    """`HEIGHTxWIDTH`."""
    return f"{image.height}x{image.width}"


def check_labels(cond: schema.ClassCondConfig, labels: Sequence[int]) -> None:
    """ValueError for a label that the model does not know."""
    for label in labels:
        if not 0 <= label < cond.num_classes:
            raise ValueError(
                f"--labels {label} is not in 0..{cond.num_classes - 1}, the model's classes"
            )


def open_out(options: Options) -> epath.Path:
    """The output folder, writable and without samples in it unless --overwrite."""
    out = epath.Path(options.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if out.exists() and not options.overwrite and any(out.glob("*.png")):
        raise ValueError(f"--out {out} already holds images; give another folder or --overwrite")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be made: {error.strerror}") from error
    probe = out / ".writable"  # permissions say too little: of root, of file systems, of buckets
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--out {out} cannot be written: {error.strerror}; give another folder"
        ) from error
    return out


def null_batch(model: bundle.LatentDiffusion, path: str) -> dict[str, np.ndarray]:
    """One row of what `conditioning.from_batch` reads that asks for nothing in particular.

    The null class or the empty text, nothing for an unconditional model. ValueError, naming the
    path of the model, if it knows none of these.
    """
    match model.config.cond:
        case None:
            return {}
        case schema.ClassCondConfig(null_class=True, num_classes=count):
            return {"label": np.array([count], np.int32)}
        case schema.ClassCondConfig(num_classes=count):
            raise ValueError(f"{path}: has no null class; give --labels, each in 0..{count - 1}")
        case schema.TextCondConfig() | schema.HybridCondConfig():
            check_tokenizer(model, path)
            tokens = model.tokenizer.encode([""])
            return {"tokens": tokens, "null_tokens": tokens}
    kind = type(model.config.cond).__name__
    raise ValueError(
        f"{path}: is trained with {kind} and draws nothing without; see the other tasks"
    )


def check_tokenizer(model: bundle.LatentDiffusion, path: str) -> None:
    """ValueError if a model of text has come without its tokenizer."""
    if model.tokenizer is None:
        raise ValueError(
            f"{path}: comes without a tokenizer; give --tokenizer FOLDER with its files"
            " (vocab.json and merges.txt for CLIP, vocab.txt for BERT), such as tokenizer/ of a"
            " diffusers folder"
        )


def start_latents(options: Options, count: int, shape: tuple[int, int, int]) -> np.ndarray | None:
    """--init-latents as float32 [count, h, w, c]; ValueError if the file holds another shape."""
    if options.init_latents is None:
        return None
    x_T = np.load(options.init_latents)
    if x_T.shape != (count, *shape):
        raise ValueError(
            f"--init-latents {options.init_latents} holds {x_T.shape}, needed is {(count, *shape)}"
        )
    return x_T.astype(np.float32)


def generate(
    model: bundle.LatentDiffusion,
    mesh: Any,
    options: Options,
    batch: dict[str, np.ndarray],
    count: int,
    guided: bool,
    shape: tuple[int, int, int] | None = None,
    start: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (indices, images float32, unscaled latents) of each batch; one program for all.

    batch: what `conditioning.from_batch` and `make_run` read, host arrays with `count` rows. They
    are arguments of the program, as are seed, scale, eta and start: others compile nothing anew.
    shape: (h, w, c) of the latent; default: the model's.
    start: first level that runs; None is all of them, in a program that cannot skip any.
    The last batch is filled up by repeating its last image, and cut.
    """
    shape = model.latent_shape if shape is None else shape
    x_T = start_latents(options, count, shape)
    run = jax.jit(make_run(model, options, guided, shape), out_shardings=sharding.replicated(mesh))
    rows, devices = sharding.batch_sharding(mesh), mesh.devices.size
    size, compiled = min(options.batch_size, -(-count // devices) * devices), None
    with tqdm.tqdm(total=count, unit="image", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, count, size):
            real = np.arange(first, min(first + size, count))
            indices = np.minimum(np.arange(first, first + size), count - 1)
            given = {**batch, "x_T": x_T} if x_T is not None else batch
            given = {name: jax.device_put(x[indices], rows) for name, x in given.items()}
            keys = jax.device_put(sampling.keys_of(options.seed, indices), rows)
            arguments = (model.params, given, keys, options.guidance_scale, options.eta)
            arguments += () if start is None else (start,)
            if compiled is None:
                cli.say(f"compiling the sampler for batches of {size} ...")
                began = time.perf_counter()
                compiled = run.lower(*arguments).compile()
                cli.say(f"compiled in {time.perf_counter() - began:.1f} s")
            image, z = compiled(*arguments)
            bar.update(len(real))
            yield real, np.asarray(image)[: len(real)], np.asarray(z)[: len(real)]


def make_run(
    model: bundle.LatentDiffusion, options: Options, guided: bool, shape: tuple[int, int, int]
) -> Any:
    """run(params, batch, keys, scale, eta, start=0) -> (images, unscaled latents), to be jitted.

    The conditioning is encoded once, before the scan over the levels. Beside it `batch` may hold
    x_T: [B, h, w, c], the noise to start from.
    init: [B, H, W, c], an image in [-1, 1] to start from, noised to the level `start`.
    hole: [B, H, W, 1], 1 where `init` is drawn anew; elsewhere it is kept.
    """
    sample = sampling.make_sampler(
        model,
        shape=shape,
        steps=options.steps,
        solver=options.solver,
        spacing=options.spacing,
        guided=guided,
        decode=False,
    )

    def run(params, batch, keys, scale, eta, start=0):
        stage = params["first_stage"]
        encode = functools.partial(
            latents.encode, model.first_stage, stage, scale=model.latent_scale
        )
        arguments = (model.config.cond, model.cond_stage, params["cond_stage"], batch, encode)
        cond = conditioning.from_batch(*arguments)
        null = conditioning.null_like(*arguments) if guided else None
        init, hole = batch.get("init"), batch.get("hole")
        if init is not None:
            # a sample of the posterior, as in the reference; what is kept is its mode
            draws = jax.vmap(jax.random.fold_in, (0, None))(keys, 2) if hole is None else None
            init = encode(init, keys=draws)
        if hole is not None:  # a latent pixel is kept if all that it stands for is
            hole = einops.reduce(hole, "b (h y) (w x) c -> b h w c", "max", h=shape[0], w=shape[1])
        z = sample(params, cond, null, keys, scale, eta, batch.get("x_T"), start, init, hole)
        image = model.first_stage.apply({"params": stage}, z, method="decode")
        return image.astype("float32"), z

    return run


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
