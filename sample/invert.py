"""From images to their noise: `ldm-sample invert --model RUN --out DIR --images a.png`.

DDIM inversion (Song et al. 2021, section 4.3; Dhariwal and Nichol 2021, appendix F), with any
solver that draws no noise. `--init-latents` of the other tasks takes `x_T.npy`; the same settings
then give the image again, another prompt or label a changed one.
"""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ldm_jax import bundle, conditioning, latents, sampling, schema, sharding, solvers
from ldm_jax.metrics import pixels
from ldm_jax.runtime import images
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import editing, write
from ldm_jax.sample.draw import draw
from ldm_jax.sample.generate import generate
from ldm_jax.sample.inputs import read_images
from ldm_jax.sample.options import latent_shape, open_model
from ldm_jax.sample.request import Request
from ldm_jax.sample.write import open_out

NAME = "invert"


@dataclasses.dataclass(frozen=True)
class Options(editing.Options):
    """Noise of images under a model of text, of classes, or of neither, and the images again."""

    num_images: int = 1
    """One: an image has one noise for each prompt or label."""
    guidance_scale: float = 1.0
    """Classifier-free guidance, both ways; 1 is without. Guidance curves the trajectory, so that
    the way back needs more steps."""


def main(options: Options) -> int:
    """Write x_T.npy, the image sampled from it, and its distance from the original.

    inversion.json has for every image `image_psnr` (against the original), `first_stage_psnr`
    (encoding and decoding alone), `latent_psnr` (inversion and sampling alone), all in dB, and mean
    and standard deviation of its noise, near 0 and 1 for images like the training data.
    """
    inversion = invert(options)
    if options.export is not None:
        return draw(inversion.request)
    draw(inversion.request)
    out = epath.Path(options.out)
    if jax.process_index() != 0:
        return 0
    with (out / "x_T.npy").open("wb") as file:
        np.save(file, inversion.request.batch["x_T"])
    errors = [
        {"image": image, "asked": detail["asked"], **error}
        for detail, error in zip(inversion.request.details, errors_of(inversion, out), strict=True)
        for image in detail["images"]
    ]
    (out / "inversion.json").write_text(json.dumps(errors, indent=2) + "\n")
    for error in errors:
        LOG.info(
            f"{error['image']}: latent {error['latent_psnr']:.1f} dB, image"
            f" {error['image_psnr']:.1f} dB (first stage alone {error['first_stage_psnr']:.1f});"
            f" noise {error['noise_mean']:+.3f} +- {error['noise_std']:.3f}"
        )
    LOG.info(f"{out / 'x_T.npy'}: for --init-latents of another task, at the same settings")
    return 0


class Inversion(NamedTuple):
    """Result of the inversion of images."""

    request: Request
    """Request that samples them again from their noise."""
    image: np.ndarray
    """float32 [N, H, W, c] in [-1, 1]."""
    alone: np.ndarray
    """Images encoded and decoded by the first stage alone."""
    z: np.ndarray
    """Their unscaled latents [N, h, w, c]."""


def request(options: Options) -> Request:
    """The request that draws the images again, from their noise. ValueError as of `invert`."""
    return invert(options).request


def invert(options: Options) -> Inversion:
    """Find the noise of the images. ValueError for options that the model does not allow."""
    check(options)
    model, mesh, options = open_model(options)
    check_model(model, options)
    what = editing.asked(model, options)
    image = read_images(options.images, editing.side(options), channels=editing.channels(model))
    shape = latent_shape(model, *image.shape[1:3], where=f"{options.images[0]}: ")
    made = editing.pairs(options, what)
    back = levels_back(model, options)
    open_out(options)

    batch = {name: x[made.asked] for name, x in what.batch.items()}
    image = image[made.image]
    z, alone = encoded(model, mesh, options, image)
    scale, guided = np.float32(model.latent_scale), what.scale != 1
    there = dataclasses.replace(options, guidance_scale=what.scale, preview=0)
    parts = generate(
        model, mesh, there, {**batch, "x_T": scale * z}, len(z), guided, shape,
        levels=back, decode=keep,
    )  # fmt: skip
    x_T = scale * np.concatenate([noise for _, noise in parts])
    refuse_overflow(x_T, options)
    again = Request(
        NAME,
        dataclasses.replace(options, guidance_scale=what.scale, save_latents=True),
        model,
        mesh,
        shape=shape,
        guided=guided,
        batch={**batch, "x_T": x_T.astype(np.float32)},
        names=made.names,
        details=made.details,
        row_labels=made.row_labels,
        left=image,
    )
    return Inversion(again, image, alone, z)


def check(options: Options) -> None:
    """ValueError for options without meaning in an inversion, before anything is read."""
    if options.num_images != 1:
        raise ValueError(
            f"--num-images {options.num_images}: an image has one noise; give 1, or more --labels"
            " or --prompt"
        )
    if options.init_latents is not None or options.noise_source != "own":
        raise ValueError(
            "--init-latents has no use here, nor --noise-source: the noise is what is looked for"
        )
    if options.eta or solvers.make(options.solver).noisy:
        what = f"--eta {options.eta:g}" if options.eta else f"--solver {options.solver}"
        known = ", ".join(name for name in solvers.SOLVERS if not solvers.make(name).noisy)
        raise ValueError(
            f"{what} draws new noise at every step and cannot be inverted; use one of"
            f" {known}, with --eta 0"
        )


def check_model(model: bundle.LatentDiffusion, options: Options) -> None:
    """ValueError if the model needs more than text or a class."""
    cond = model.config.cond
    if not isinstance(cond, schema.ClassCondConfig | schema.TextCondConfig | None):
        raise ValueError(
            f"{options.model}: is trained with {conditioning.name_of(cond)}; {NAME} takes models"
            " of text, of classes, or without condition"
        )


def levels_back(model: bundle.LatentDiffusion, options: Options) -> solvers.Levels:
    """The sampler's levels from image to noise.

    They begin at the noise of timestep 0, also where the sampler's own end in no noise; a step
    without a change of level is left out.
    """
    own = model.config.sampling
    # as `sampling.levels_of`: the model's offset belongs to its own spacing
    offset = own.steps_offset if options.spacing == own.spacing else 1
    rule = options.spacing_rule
    if rule == "diffusers" and options.spacing in solvers.DIFFUSERS_SPACINGS:
        t = sampling.levels_of(model, options.steps, options.spacing, rule=rule).t
        now, end = model.schedule.alphas_cumprod[t], model.schedule.alphas_cumprod[0]
        table = solvers.table(model.schedule, t, now, np.append(now[1:], end))
    else:
        table = solvers.levels(
            model.schedule, options.steps, options.spacing, "alphas_cumprod_0", offset
        )
    # at timestep 0 the last step leads to itself: inverted, it would divide by a change of zero
    moves = table.alpha != table.alpha_next
    table = solvers.Levels(*(None if x is None else x[moves] for x in table))
    return solvers.inverted(table)


def keep(params: dict, z: jax.Array) -> jax.Array:
    """Replace decoding: an image of noise is of no use."""
    del params
    return z


def encoded(
    model: bundle.LatentDiffusion, mesh: Any, options: Options, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(Unscaled latents, the posterior's mode; the images decoded from them)."""

    def run(params, image):
        z = latents.encode(model.first_stage, params, image, 1.0)
        return z, latents.decode(model.first_stage, params, z, 1.0)

    run = jax.jit(run, out_shardings=sharding.replicated(mesh))
    devices, parts = mesh.shape["data"] * mesh.shape["fsdp"], []
    size = min(options.batch_size, -(-len(image) // devices) * devices)
    for first in range(0, len(image), size):
        indices = np.minimum(np.arange(first, first + size), len(image) - 1)
        given = sharding.place(image[indices], sharding.batch_sharding(mesh))
        made = run(model.params["first_stage"], given)
        parts.append([np.asarray(x)[: len(image) - first] for x in made])
    z, alone = (np.concatenate(x) for x in zip(*parts, strict=True))
    return z, alone


def refuse_overflow(x_T: np.ndarray, options: Options) -> None:
    """ValueError if the noise is not finite."""
    if not np.isfinite(x_T).all():
        raise ValueError(
            f"the noise is not finite: --solver {options.solver} does not lead back here; use ddim"
            " or more --steps"
        )


def errors_of(inversion: Inversion, out: epath.Path) -> list[dict[str, float]]:
    """Figures of every image, as in `main`, from the images and latents in the folder `out`."""
    latent, errors = np.load(out / "latents.npy"), []
    for i, name in enumerate(inversion.request.names):
        shown, again = (
            images.to_uint8(inversion.image[i]),
            write.read_picture(out, inversion.request.options, name),
        )
        noise = inversion.request.batch["x_T"][i]
        errors.append(
            {
                "image_psnr": psnr(shown, again, 255),
                "first_stage_psnr": psnr(shown, images.to_uint8(inversion.alone[i]), 255),
                "latent_psnr": psnr(inversion.z[i], latent[i], float(np.ptp(inversion.z[i]))),
                "noise_mean": float(noise.mean()),
                "noise_std": float(noise.std()),
            }
        )
    return errors


def psnr(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    """PSNR of two [h, w, c] with values in a range of `peak`; at most 100."""
    one, other = (x[None].astype(np.float32) * (pixels.RANGE / peak) for x in (a, b))
    return min(100.0, float(pixels.psnr(one, other)[0]))
