"""Images through a first stage and back: `ldm-eval reconstruct --model PATH --out DIR [...]`."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ldm_jax import bundle, latents, loading, sampling, schema, seeds, sharding
from ldm_jax.convert import auxiliary
from ldm_jax.metrics import features, pixels, scores
from ldm_jax.models import autoencoder, lpips
from ldm_jax.runtime import flags, images, rundir
from ldm_jax.sample.evaluate import extraction, image_sets, report

NAME = "reconstruct"
SHOWN = 8  # images in reconstructions.png
SHARPNESS = {"gradient_energy": pixels.gradient_energy, "fine_power": pixels.fine_power}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(extraction.Options):
    """PSNR, SSIM, LPIPS, R-FID and sharpness of a data set through a first stage, and its codes'
    usage."""

    model: flags.Path
    """Run of a first stage or of a latent diffusion model, diffusers folder, or checkpoint."""
    data: flags.Path = ""
    """Run, folder of images, or .npz with arr_0; default: the data of the model's own run."""
    split: Literal["train", "eval"] = "eval"
    """Split of a run's data; held out by default."""
    count: int | None = None
    """The first so many images; default: all."""
    size: int | None = None
    """Pixels that images are resized to; default: as in the model's training."""
    crop: Literal["center", "none"] | None = None
    """Crop of images to squares; default: as in training."""
    resize: Literal["area", "bicubic"] | None = None
    """Filter; default: as in training."""
    posterior: Literal["mode", "sample"] = "mode"
    """Latent of a KL first stage that is decoded."""
    seed: int = 0
    """Seed of the posterior's samples: number i depends on (seed, i) alone."""
    lpips_vgg: flags.File = ""
    """VGG16 of torchvision, vgg16-397923af.pth; or `random`, for random features. Default: no
    LPIPS."""
    lpips_lin: flags.File = ""
    """Last layers of LPIPS 0.1, vgg.pth."""
    step: int | None = None
    """Training step of a first stage's run; default: the newest."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the first stage."""


class Stage(NamedTuple):
    """A first stage to evaluate."""

    module: Any
    params: dict
    config: schema.FirstStageModelConfig
    data: schema.DataConfig | None
    """Data config of its run."""


def main(options: Options) -> int:
    """Writes result.json, row.md and reconstructions.png."""
    seeds.checked(options.seed, "--seed")
    opened = extraction.opened(options)
    perceptual = open_lpips(options)
    stage = open_stage(options, opened.mesh)
    how = image_sets.Preparation(options.size, options.crop, options.resize)
    given = image_sets.opened(
        options.data, options.split, stage.data, how, limit=options.count, flag="--data"
    )
    check(stage, given, options)
    out = extraction.out_folder(options)
    weights = rundir.params_hash(jax.device_get(stage.params))
    settings = {
        **extraction.about(opened.network),
        "model_weights": weights,
        "images": given.about,
        "lpips": None if perceptual is None else perceptual[1],
        **{name: getattr(options, name) for name in ("posterior", "seed", "dtype")},
    }
    run = make_run(stage, opened, perceptual, options)

    def produce(first: int) -> Iterator[tuple[extraction.Outputs, int]]:
        return _batches(run, opened, given, options, first, out)

    outputs = extraction.kept(
        out / "features" / NAME, settings, given.count, produce, options, NAME
    )
    if jax.process_index() != 0:
        return 0
    figures = figures_of(opened.network, outputs)
    facts = {**settings, "name": options.model, "count": given.count, "Reference": "the originals"}
    report.write(out, NAME, options, figures, facts)
    return 0


def open_stage(options: Options, mesh: Any) -> Stage:
    """The first stage at --model, placed on the mesh. ValueError if there is none."""
    path, kind = loading.recognise(options.model)
    config = rundir.read_config(path) if kind == "run" else None
    if isinstance(config, schema.LatentDiffusionTrainConfig):
        kept = loading.kept_first_stage(path)
        if kept is None:
            raise ValueError(f"{path}: frozen/first_stage is missing: copy the whole run")
        params, model = kept
    else:
        params, model = loading.load_first_stage(path, step=options.step)
    if isinstance(model, schema.IdentityFirstStageConfig):
        raise ValueError(f"{options.model}: diffuses pixels and has no first stage to evaluate")
    kernels = bundle.kernels(mesh)
    module = autoencoder.from_config(
        model, dtype=jnp.dtype(options.dtype), attention=kernels["attention"]
    )
    whole = {"first_stage": params}
    placed = sharding.place(whole, sharding.by_rules(whole, sharding.RULES, mesh))
    return Stage(module, placed["first_stage"], model, config and config.data)


def open_lpips(options: Options) -> tuple[dict, str, str] | None:
    """(parameters, their hash, the figure's name), or None without --lpips-vgg."""
    if not options.lpips_vgg:
        return None
    if options.lpips_vgg == "random":
        params = lpips.random_params(jax.random.key(0))
        return jax.device_get(params), "random, seed 0", "lpips_random_features"
    params = auxiliary.load_lpips(options.lpips_vgg, options.lpips_lin)
    return params, rundir.params_hash(params), "lpips"


def check(stage: Stage, given: image_sets.ImageSet, options: Options) -> None:
    """ValueError if the first stage cannot take these images."""
    height, width, channels = given.shape
    down = stage.config.downsample
    if height % down or width % down:
        raise ValueError(
            f"the images are {height}x{width}, and the first stage of {options.model} divides by"
            f" {down}: give --size, a multiple of it"
        )
    if channels != stage.config.in_channels:
        raise ValueError(
            f"the images have {channels} channels, and the first stage of {options.model} takes"
            f" {stage.config.in_channels}"
        )
    if options.lpips_vgg:
        lpips.check((1, *given.shape), (1, *given.shape))


def make_run(
    stage: Stage, opened: extraction.Opened, perceptual: Any, options: Options
) -> Callable:
    """run(images, their numbers [B], meant [B]) -> (arrays on every device, decoded images).

    Where `meant` is 0, the codes are not counted.
    """
    num_codes = getattr(stage.config, "num_codes", 0)  # of a VQ one
    module, network = stage.module, opened.network
    everywhere = sharding.replicated(opened.mesh)
    others = {"network": network.params, "lpips": None if perceptual is None else perceptual[0]}
    others = sharding.place(others, jax.tree.map(lambda _: everywhere, others))

    def run(params, image, numbers, meant):
        stage = params["stage"]
        image = image if image.dtype != jnp.uint8 else image.astype(jnp.float32) / 127.5 - 1
        sampled = options.posterior == "sample"
        keys = sampling.keys_of(options.seed, numbers) if sampled else None
        z = latents.encode(module, stage, image, 1.0, keys)
        decoded = latents.decode(module, stage, z, 1.0)
        real, other = features.to_pixels(image), features.to_pixels(decoded)
        outputs = {f"real_{n}": x for n, x in network.apply(params["network"], real).items()}
        outputs |= {f"other_{n}": x for n, x in network.apply(params["network"], other).items()}
        outputs |= {"psnr": pixels.psnr(real, other), "ssim": pixels.ssim(real, other)}
        for name, measure in SHARPNESS.items():
            outputs |= {f"{name}_real": measure(real), f"{name}_other": measure(other)}
        if perceptual is not None:
            net = lpips.LPIPS(precision=jax.lax.Precision.HIGHEST)
            a, b = real / 127.5 - 1, other / 127.5 - 1
            outputs[perceptual[2]] = net.apply({"params": params["lpips"]}, a, b)
        if num_codes:
            _, indices = module.apply({"params": stage}, z, method="quantize")
            weight = jnp.broadcast_to(meant[:, None, None], indices.shape)
            empty = jnp.zeros(num_codes, jnp.int32)
            outputs["total_codes"] = empty.at[indices.reshape(-1)].add(weight.reshape(-1))
        return outputs, decoded

    compiled = jax.jit(run, out_shardings=everywhere)
    params = {"stage": stage.params, **others}
    return lambda *arguments: compiled(params, *arguments)


def _batches(
    run: Callable,
    opened: extraction.Opened,
    given: image_sets.ImageSet,
    options: Options,
    first: int,
    out: epath.Path,
) -> Iterator[tuple[extraction.Outputs, int]]:
    """Outputs of `run` for the batches from `first` on, on the host."""
    split, size = sharding.batch_sharding(opened.mesh), options.batch_size
    for i, (batch, count) in enumerate(given.batches(size, first, split), first):
        numbers = features.place(np.arange(i * size, (i + 1) * size, dtype=np.int32), split)
        meant = features.place((np.arange(size) < count).astype(np.int32), split)
        outputs, decoded = run(batch["image"], numbers, meant)
        outputs = jax.device_get(outputs)
        if i == 0 and jax.process_count() == 1:
            _draw(out, np.asarray(batch["image"])[:count], np.asarray(decoded)[:count])
        yield {n: x if n.startswith("total_") else x[:count] for n, x in outputs.items()}, count


def _draw(out: epath.Path, real: np.ndarray, other: np.ndarray) -> None:
    real = real if real.dtype == np.uint8 else images.to_uint8(real)
    pairs = np.concatenate([real[:SHOWN], images.to_uint8(other[:SHOWN])])
    sheet = images.grid(
        pairs, len(pairs) // 2, scale=max(1, 64 // real.shape[1]), names=("image", "decoded")
    )
    images.save_png(out / "reconstructions.png", sheet)


def figures_of(network: features.Network, outputs: extraction.Outputs) -> dict[str, float]:
    """Means over images, distances between originals and reconstructions, codes.

    Sharpness is that of all reconstructions over that of all originals: 1 is as sharp as these.
    """

    def side(name: str) -> extraction.Outputs:
        return {n.removeprefix(name): x for n, x in outputs.items() if n.startswith(name)}

    reference = report.reference_of(side("real_"))
    apart = report.distances(network, side("other_"), reference)
    figures = {f"r_{name}": x for name, x in apart.items()}
    names = [n for n in ("psnr", "ssim", "lpips", "lpips_random_features") if n in outputs]
    figures |= report.per_image(outputs, tuple(names))
    for name in SHARPNESS:
        if f"{name}_real" in outputs and np.sum(outputs[f"{name}_real"]) > 0:
            sums = [np.asarray(outputs[f"{name}_{s}"], np.float64).sum() for s in ("other", "real")]
            figures[name] = float(sums[0] / sums[1])
    if "total_codes" in outputs:
        figures |= scores.codebook(outputs["total_codes"])
    return figures
