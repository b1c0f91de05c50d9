"""Paths between images, and variations of one: `ldm-sample variations --seeds 3 8 --labels 7`.

Noise, class and text are interpolated on the sphere (slerp), so that inputs between two of them
have the norm of typical ones.
"""

import dataclasses
from typing import Annotated, Any

import jax
import numpy as np
from tyro.conf import arg

from ldm_jax import bundle, conditioning, diffusion, sampling, schema, seeds, sharding, solvers
from ldm_jax.runtime import flags
from ldm_jax.sample import text2img
from ldm_jax.sample.draw import draw
from ldm_jax.sample.options import Options, label_ids, open_model
from ldm_jax.sample.request import Request

NAME = "variations"
# solvers that draw noise at every step: a path would be as rough as the noise


@dataclasses.dataclass(frozen=True)
class Options(Options):
    """Images on the way from one seed, class or prompt to the next, or near one image."""

    seeds: Annotated[tuple[int, ...], arg(metavar="SEED ...", help_behavior_hint="")] = ()
    """Seeds whose first images lie on the path; a single one is kept fixed. Default: --seed."""
    labels: flags.Classes = ()
    """Classes on the path, by id or by name; a single one is kept fixed."""
    prompt: flags.Texts = ()
    """Texts on the path; a single one is kept fixed."""
    negative_prompt: flags.Text = ""
    """Text that guidance leads away from; default: the empty text."""
    strength: float | None = None
    """Instead of a path, the first image of a seed and others near it: 0 is the image itself, 1 is
    the seed's next images. Each label or prompt is a row."""
    num_images: int = 8
    """Images in a row: from one stop of the path to the next, both included."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 samples without it. Default: 7.5 for text, 1.5 for classes."""


def main(options: Options) -> int:
    """Writes num_images images for each leg of the path, or of each variation."""
    return draw(request(options))


def request(options: Options) -> Request:
    """The request of the options. ValueError for options that the model does not allow."""
    check(options)
    model, mesh, options = open_model(options)
    scale = options.guidance_scale
    if scale is None:
        scale = {schema.TextCondConfig: 7.5, schema.ClassCondConfig: 1.5}.get(
            type(model.config.cond), 1.0
        )
    options = dataclasses.replace(
        options, guidance_scale=scale, seeds=options.seeds or (options.seed,)
    )
    if isinstance(model.config.cond, schema.ClassCondConfig):
        options = dataclasses.replace(options, labels=label_ids(model, options.labels))
    guided = scale != 1 and model.config.cond is not None
    stops, names, null = conditions(model, mesh, options, guided)
    path = legs(options, names)
    batch = batch_of(model, options, path, stops, null)
    if "embedding" in batch:
        model = conditioned_on_embeddings(model)
    places = [(row, i) for row in range(len(path)) for i in range(options.num_images)]
    t = times(options)
    return Request(
        NAME,
        options,
        model,
        mesh,
        shape=model.latent_shape,
        guided=guided,
        batch=batch,
        names=[f"{place:05d}_leg{row}_{i:03d}" for place, (row, i) in enumerate(places)],
        details=[{"from_to": path[row].name, "position": float(t[i])} for row, i in places],
        alone=False,
        row_labels=[leg.name[:24] for leg in path],
    )


@dataclasses.dataclass(frozen=True)
class Leg:
    """One row of images: seeds and numbers of the conditions at its two ends."""

    seeds: tuple[int, int]
    stops: tuple[int, int]
    name: str


def check(options: Options) -> None:
    """ValueError for options without a path, before anything is read."""
    for seed in options.seeds:
        seeds.checked(seed, "--seeds")
    if options.labels and options.prompt:
        raise ValueError("give --labels or --prompt, not both")
    if options.init_latents is not None or options.noise_source != "own":
        raise ValueError(
            "--init-latents has no use here, nor --noise-source: the noise is that of --seeds"
        )
    if options.eta or solvers.make(options.solver).noisy:
        what = f"--eta {options.eta:g}" if options.eta else f"--solver {options.solver}"
        raise ValueError(f"{what} draws new noise at every step; a path needs a solver without")
    count, stops = len(options.seeds or (0,)), len(options.labels or options.prompt or (0,))
    if options.strength is not None:
        if not 0 <= options.strength <= 1:
            raise ValueError(f"--strength {options.strength} is not in 0..1")
        if count > 1:
            raise ValueError(f"--strength varies one image: give one of --seeds, not {count}")
        return
    if options.num_images < 2:
        raise ValueError(f"--num-images {options.num_images}: a path has at least 2")
    if count == stops == 1:
        raise ValueError(
            "give two or more of --seeds, --labels or --prompt to pass from one to the next, or"
            " --strength for variations of one image"
        )
    if count > 1 and stops > 1 and count != stops:
        raise ValueError(
            f"{count} of --seeds and {stops} of --labels or --prompt: give as many of both, or one"
        )


def times(options: Options) -> np.ndarray:
    """Position of each image of a row between its ends; of a variation, how far it is moved."""
    if options.strength is None:
        return np.linspace(0, 1, options.num_images)
    return np.r_[0.0, np.full(options.num_images - 1, options.strength)]


def legs(options: Options, names: list[str]) -> list[Leg]:
    """The rows of the grid; `names` are those of the conditions."""
    if options.strength is not None:
        seed = options.seeds[0]
        return [Leg((seed, seed), (i, i), name or f"{seed}") for i, name in enumerate(names)]
    count = max(len(options.seeds), len(names))
    noises = options.seeds * (count if len(options.seeds) == 1 else 1)
    stops = range(count) if len(names) == count else (0,) * count
    result = []
    for i in range(count - 1):
        pair, ends = (noises[i], noises[i + 1]), (stops[i], stops[i + 1])
        first = names[ends[0]] if len(names) > 1 else f"{pair[0]}"
        last = names[ends[1]] if len(names) > 1 else f"{pair[1]}"
        result.append(Leg(pair, ends, f"{first} > {last}"))
    return result


def conditions(
    model: bundle.LatentDiffusion, mesh: Any, options: Options, guided: bool
) -> tuple[np.ndarray | None, list[str], np.ndarray | None]:
    """(contexts [stops, l, c] or ids [stops], names of the stops, null context [1, l, c] or None).

    ValueError if the model is not conditioned on what is given, or its classes have no context.
    """
    cond = model.config.cond
    if cond is None and not options.labels and not options.prompt:
        return None, [""], None
    if isinstance(cond, schema.TextCondConfig) and options.prompt:
        text2img.check_model(model, options)
        if options.prompt_syntax != "plain":
            raise ValueError(
                f"--prompt-syntax {options.prompt_syntax}: {NAME} mixes whole texts; leave it out"
            )
        negatives = [options.negative_prompt] * len(options.prompt)
        batch = text2img.read_plain(model.tokenizer, options.prompt, negatives)
        names = list(options.prompt)
    elif isinstance(cond, schema.ClassCondConfig) and options.labels:
        batch = {"label": np.asarray(options.labels, np.int32)}
        names = [str(label) for label in options.labels]
        if cond.via == "label" and len(names) > 1:
            raise ValueError(f"{options.model}: adds class ids to the time; between ids is nothing")
        if cond.via == "label":
            return batch["label"], names, None
    else:
        kinds = {schema.TextCondConfig: "give --prompt", schema.ClassCondConfig: "give --labels"}
        kind = conditioning.name_of(cond)
        hint = kinds.get(type(cond), "leave out --labels and --prompt" if cond is None else "")
        raise ValueError(
            f"{options.model}: is trained with {kind}"
            + (f": {hint}" if hint else ", not with classes, text or nothing")
        )

    def encode(params, batch):
        arguments = (cond, model.cond_stage, params, batch)
        null = conditioning.null_like(*arguments).context[:1] if guided else None
        return conditioning.from_batch(*arguments).context, null

    encode = jax.jit(encode, out_shardings=sharding.replicated(mesh))
    context, null = jax.device_get(encode(model.params["cond_stage"], batch))
    return context, names, null


def batch_of(
    model: bundle.LatentDiffusion,
    options: Options,
    path: list[Leg],
    stops: np.ndarray | None,
    null: np.ndarray | None,
) -> dict[str, Any]:
    """x_T and condition of every image, row after row."""
    shape, columns = model.latent_shape, {"x_T": []}
    for leg in path:
        first = noise_of(leg.seeds[0], 0, shape)
        others = range(1) if options.strength is None else range(options.num_images)
        lasts = [noise_of(leg.seeds[1], i, shape) for i in others]
        for i, t in enumerate(times(options)):
            columns["x_T"].append(slerp(first, lasts[i % len(lasts)], t, axis=None))
            if stops is not None and stops.ndim == 1:
                columns.setdefault("label", []).append(stops[leg.stops[0]])
            elif stops is not None:
                ends = (stops[stop] for stop in leg.stops)
                columns.setdefault("embedding", []).append(slerp(*ends, t))
    batch = {name: np.stack(values) for name, values in columns.items()}
    if null is not None:
        batch["null_embedding"] = np.repeat(null, len(batch["x_T"]), axis=0)
    return batch


def conditioned_on_embeddings(model: bundle.LatentDiffusion) -> bundle.LatentDiffusion:
    """The model with its context given, not encoded."""
    _, width = conditioning.context_width(model.config.cond)
    config = dataclasses.replace(model.config, cond=schema.EmbeddingCondConfig(width))
    return dataclasses.replace(model, config=config, cond_stage=None)


def noise_of(seed: int, index: int, shape: tuple[int, int, int]) -> np.ndarray:
    """x_T [h, w, c] of image number `index` of a seed, as `sampling.make_sampler` draws it."""
    key = jax.random.split(sampling.keys_of(seed, [index])[0])[0]
    return np.asarray(diffusion.rowwise_normal(key[None], shape))[0]


def slerp(a: np.ndarray, b: np.ndarray, t: float, axis: int | None = -1) -> np.ndarray:
    """From a (t = 0) to b (t = 1) along a great circle, float32; the norm is interpolated linearly.

    axis: that of the vectors; None: each array is one. Parallel vectors are interpolated linearly.
    """
    # float64: in float32, arccos loses half of its digits for nearly parallel vectors
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    norms = [np.sqrt(np.sum(x * x, axis=axis, keepdims=True)) for x in (a64, b64)]
    one, other = (x / np.where(n > 0, n, 1) for x, n in zip((a64, b64), norms, strict=True))
    cosine = np.clip(np.sum(one * other, axis=axis, keepdims=True), -1, 1)
    angle = np.arccos(cosine)
    flat = np.sin(angle) < 1e-6  # parallel: no circle; opposite: any of many
    sine = np.where(flat, 1, np.sin(angle))
    first = np.where(flat, 1 - t, np.sin((1 - t) * angle) / sine)
    last = np.where(flat, t, np.sin(t * angle) / sine)
    norm = (1 - t) * norms[0] + t * norms[1]
    return (norm * (first * one + last * other)).astype(np.float32)
