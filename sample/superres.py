"""Super-resolution: `ldm-sample superres --model PATH --out DIR --images small.png`.

For models that see the small image beside the latent (LDM-SR), and for Stable Diffusion's x4
upscaler, which sees it with noise of a chosen level and also reads a text.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from ldm_jax import bundle, conditioning, diffusion, sampling, schema
from ldm_jax.prompting import composed
from ldm_jax.runtime import flags
from ldm_jax.sample import adapters, text2img
from ldm_jax.sample.draw import draw
from ldm_jax.sample.inputs import read_images
from ldm_jax.sample.options import Load, Options, check_tokenizer, open_model
from ldm_jax.sample.request import Request

NAME = "superres"


@dataclasses.dataclass(frozen=True)
class Options(Options):
    """Images enlarged as the model was trained to."""

    images: flags.Files = ()
    """Small images, all of one size; each gets num_images images and a row of the grid."""
    height: int | None = None
    """Pixels of the small image: it is scaled to cover height and width, and cut at its centre;
    default: as it is."""
    width: int | None = None
    """Pixels of the small image; default: as it is."""
    noise_level: int | None = None
    """Noise added to the small image, by the upscaler only: 0..350 in the published one, where more
    noise invents more detail; default: 20."""
    prompt: flags.Text = ""
    """Text on the content of the images, read by the upscaler only."""
    negative_prompt: flags.Text = ""
    """Text that guidance leads away from, in the upscaler only."""
    num_images: int = 1
    """Images per small image."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 samples without it. Default: 9 in the upscaler, otherwise 1."""
    batch_size: int = 4
    """Most images per call of the compiled sampler, over all devices."""


def main(options: Options) -> int:
    """Writes num_images enlarged images of every small one."""
    return draw(request(options))


def request(options: Options, load: Load | None = None) -> Request:
    """The request of the options; `load` as in `open_model`.

    ValueError for options that the model does not allow.
    """
    model, mesh, options = open_model(adapters.with_networks(options), load=load)
    options = with_defaults(model, options)
    channels = model.config.first_stage.in_channels
    low = read_images(options.images, (options.height, options.width), channels=channels)
    every = [path for path in options.images for _ in range(options.num_images)]
    batch = inputs(model, options, np.repeat(low, options.num_images, axis=0))
    return Request(
        NAME,
        options,
        model,
        mesh,
        shape=latent_shape(model, options, low.shape[1:3]),
        guided=options.guidance_scale != 1 or composed.needs_guidance(batch),
        batch=batch,
        names=named(every, options.seed),
        details=[{"image": path, "images": [path]} for path in every],
        row_labels=[epath.Path(path).stem[:24] for path in options.images],
    )


def named(paths: list[str], seed: int) -> list[str]:
    """File names of images that are made from files."""
    return [f"{i:05d}_{epath.Path(path).stem}_seed{seed}" for i, path in enumerate(paths)]


def upscaler(model: bundle.LatentDiffusion) -> schema.UpscaleCondConfig | None:
    """The conditioning of a model that reads a noised image and a text, or None."""
    cond = model.config.cond
    concat = cond.concat if isinstance(cond, schema.HybridCondConfig) else None
    return concat if isinstance(concat, schema.UpscaleCondConfig) else None


def with_defaults(model: bundle.LatentDiffusion, options: Options) -> Options:
    """Options with the defaults of the kind of model; ValueError for those that it cannot use."""
    concat, cond = upscaler(model), model.config.cond
    if concat is None:
        if not isinstance(cond, schema.SuperResCondConfig):
            kind = conditioning.name_of(cond)
            raise ValueError(f"{options.model}: is trained with {kind}, not for super-resolution")
        for name in ("noise_level", "prompt", "negative_prompt"):
            if getattr(options, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(options, name)!r}: {options.model} sees"
                    " the small image alone; leave it out"
                )
        scale = 1.0 if options.guidance_scale is None else options.guidance_scale
        return dataclasses.replace(options, guidance_scale=scale)
    check_tokenizer(model, options.model)
    level = 20 if options.noise_level is None else options.noise_level
    if not 0 <= level <= concat.max_noise_level:
        raise ValueError(
            f"--noise-level {level} is not in 0..{concat.max_noise_level}, the model's levels"
        )
    scale = 9.0 if options.guidance_scale is None else options.guidance_scale
    return dataclasses.replace(options, guidance_scale=scale, noise_level=level)


def latent_shape(
    model: bundle.LatentDiffusion, options: Options, side: tuple[int, int]
) -> tuple[int, int, int]:
    """(h, w, c) of the latent, which is as large as the small image.

    ValueError if the UNet cannot halve a side as often as it does.
    """
    step = 2 ** (len(model.config.unet.channel_mult) - 1)
    near = [max(1, round(pixels / step)) * step for pixels in side]
    if list(side) != near:
        raise ValueError(
            f"{options.images[0]}: is {side[0]}x{side[1]} (height x width), and the UNet needs"
            f" multiples of {step}: give --height {near[0]} --width {near[1]}"
        )
    return (*side, model.config.first_stage.embed_dim)


def inputs(model: bundle.LatentDiffusion, options: Options, low: np.ndarray) -> dict[str, Any]:
    """Input of the conditioning, from small images [N, h, w, c] in [-1, 1]."""
    count = len(low)
    if upscaler(model) is None:
        return {"low_res": low}
    text = text2img.read(model, options, [options.prompt], [options.negative_prompt], [count])
    # the sampler splits an image's key into two (folds 0 and 1), make_run folds in 2: take another
    keys = jax.vmap(jax.random.fold_in, (0, None))(
        sampling.keys_of(options.seed, options.first_index + np.arange(count)), 3
    )
    return {
        **text,
        "low_res": low,
        "noise_level": np.full(count, options.noise_level, np.int32),
        "low_res_noise": np.asarray(diffusion.rowwise_normal(keys, low.shape[1:])),
    }
