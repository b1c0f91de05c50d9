"""What every sampling task shares: options, batches through one compiled program, files."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
import tqdm
from etils import epath

from ldm_jax import bundle, cli, images, loading, sampling, schema, sharding
from ldm_jax.conditioning import Cond


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every sampling task."""

    model: str
    """Run directory of a latent diffusion model."""
    out: str
    """Folder for the images; made if missing."""
    num_images: int = 4
    """Images per label."""
    steps: int = 50
    """Solver steps."""
    solver: Literal["ddim", "ddpm"] = "ddim"
    spacing: Literal["leading", "trailing", "linspace", "quadratic", "time_uniform"] = "leading"
    """Which timesteps are visited: `leading` is the reference's; `trailing` gives any number."""
    eta: float = 0.0
    """Noise of DDIM: 0 is deterministic, 1 ancestral."""
    guidance_scale: float = 1.5
    """Classifier-free guidance; 1 samples without it, at half the cost."""
    seed: int = 0
    """Image number i depends on (seed, i) alone."""
    batch_size: int = 16
    """Images per call of the compiled sampler, over all devices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type."""
    step: int | None = None
    """Training step to take the weights of; default: the newest."""
    ema: bool = True
    """Averaged weights; --no-ema takes the raw ones."""
    init_latents: str | None = None
    """x_T for every image, instead of seeded noise: .npy float32 [N, h, w, c], unit normal."""
    save_latents: bool = False
    """Write latents.npy: the final latents after division by the scale, what decoding takes."""
    npz: bool = False
    """Write samples.npz too: arr_0 uint8 [N, H, W, c], as evaluation suites read it."""
    overwrite: bool = False
    """Write into a folder that already holds samples."""


def open_model(options: Options) -> tuple[bundle.LatentDiffusion, Any]:
    """(bundle placed on all devices, mesh); refuses what cannot work before loading weights."""
    if options.num_images < 1:
        raise ValueError(f"--num-images {options.num_images}: give at least 1")
    mesh = sharding.make_mesh(schema.MeshConfig())
    if options.batch_size < 1 or options.batch_size % mesh.devices.size:
        raise ValueError(
            f"--batch-size {options.batch_size} is not a multiple of {mesh.devices.size} devices"
        )
    model = loading.load(
        options.model, step=options.step, ema=options.ema, mesh=mesh, dtype=options.dtype
    )
    timesteps = len(model.schedule.betas)
    if not 1 <= options.steps <= timesteps:
        raise ValueError(f"--steps {options.steps} is not in 1..{timesteps}")
    return model, mesh


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
    if not str(out).startswith("gs://") and not os.access(out, os.W_OK):
        raise ValueError(f"--out {out} is not writable")
    return out


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
    count: int,
    condition: Callable[[dict, np.ndarray], tuple[Cond, Cond]],
    guided: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (indices, images float32, unscaled latents) of each batch; one program for all.

    `condition(params, indices)` gives (cond, null) of the images with these indices; it is traced.
    The last batch is filled up by repeating its last image, and cut.
    """
    shape = model.latent_shape
    x_T = start_latents(options, count, shape)
    sample = sampling.make_sampler(
        model,
        shape=shape,
        steps=options.steps,
        solver=options.solver,
        spacing=options.spacing,
        guided=guided,
        decode=False,
    )
    rows = sharding.batch_sharding(mesh)

    def run(params, keys, indices, x_T, scale, eta):
        cond, null = condition(params, indices)
        z = sample(params, cond, null, keys, scale, eta, x_T)
        decode = model.first_stage.apply({"params": params["first_stage"]}, z, method="decode")
        return decode.astype("float32"), z

    run = jax.jit(run, out_shardings=sharding.replicated(mesh))
    size, compiled = options.batch_size, None
    with tqdm.tqdm(total=count, unit="image", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, count, size):
            real = np.arange(first, min(first + size, count))
            indices = np.minimum(np.arange(first, first + size), count - 1)
            keys = jax.device_put(sampling.keys_of(options.seed, indices), rows)
            given = None if x_T is None else jax.device_put(x_T[indices], rows)
            eta = options.eta if options.solver == "ddim" else 0.0
            arguments = (model.params, keys, indices, given, options.guidance_scale, eta)
            if compiled is None:
                cli.say(f"compiling the sampler for batches of {size} ...")
                began = time.perf_counter()
                compiled = run.lower(*arguments).compile()
                cli.say(f"compiled in {time.perf_counter() - began:.1f} s")
            image, z = compiled(*arguments)
            bar.update(len(real))
            yield real, np.asarray(image)[: len(real)], np.asarray(z)[: len(real)]


def save(
    out: epath.Path, options: Options, task: str, pictures: np.ndarray, names: list[str],
    details: list[dict], z: np.ndarray, rows: list[str],
) -> None:  # fmt: skip
    """Single PNGs with their settings inside, the grid with one row per name in `rows`, arrays."""
    settings = {"task": task, **dataclasses.asdict(options)}
    for name, picture, detail in zip(names, pictures, details, strict=True):
        images.save_png(out / f"{name}.png", picture, {**settings, **detail})
    columns = len(pictures) // len(rows)
    sheet = images.grid(pictures, columns, scale=max(1, 48 // pictures.shape[1]), names=rows)
    images.save_png(out / "grid.png", sheet, settings)
    if options.npz:
        with (out / "samples.npz").open("wb") as file:
            np.savez(file, arr_0=pictures)
    if options.save_latents:
        with (out / "latents.npy").open("wb") as file:
            np.save(file, z.astype(np.float32))
    cli.say(f"{len(pictures)} images and {out / 'grid.png'}; settings: {json.dumps(settings)}")
