"""Text to image: `ldm-sample text2img --model PATH --out DIR --prompt "a red square"`."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ldm_jax import bundle, conditioning, schema
from ldm_jax.prompting import composed
from ldm_jax.runtime import flags
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import adapters, hires, prompts, styling
from ldm_jax.sample.draw import draw
from ldm_jax.sample.options import (
    Load,
    check_tokenizer,
    latent_shape,
    levels_of,
    open_model,
)
from ldm_jax.sample.request import Request

NAME = "text2img"


@dataclasses.dataclass(frozen=True)
class Options(styling.Options, hires.Options):
    """Images of a text, by a text-conditional model."""

    prompt: flags.Texts = ()
    """Texts to draw; each gets num_images images and a row of the grid."""
    prompt_file: flags.OptionalFile = None
    """Text file with one prompt per line, or .csv or .jsonl with prompt, negative_prompt, seed,
    guidance_scale and num_images for each; drawn after those of --prompt."""
    negative_prompt: flags.Text = ""
    """Text that guidance leads away from; default: the empty text."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 samples without it, at half the cost."""
    batch_size: int = 8
    """Most images per call of the compiled sampler, over all devices."""


def main(options: Options) -> int:
    """Writes num_images images of every prompt."""
    return draw(request(options))


def request(options: Options, load: Load | None = None) -> Request:
    """The request of the options; `load` as in `open_model`.

    ValueError for options that the model does not allow.
    """
    # before the model, whose weights may take minutes: a fault of the prompts is said at once
    options, larger = adapters.with_networks(styling.styled(options)), hires.asked(options)
    entries, problems = read_prompts(options)
    model, mesh, options = open_model(options, load=load)
    check_model(model, options)
    every = [entry for entry in entries for _ in range(entry.num_images)]
    texts, negatives = ([getattr(entry, name) for entry in entries] for name in prompts.COLUMNS[:2])
    counts = [entry.num_images for entry in entries]
    batch = read(model, options, texts, negatives, counts)
    shape = latent_shape(model, options.height, options.width)
    if larger:  # written down, as the picture has another size
        down = model.config.first_stage.downsample
        options = dataclasses.replace(options, height=shape[0] * down, width=shape[1] * down)
    scaled = any(entry.guidance_scale != 1 for entry in entries)
    guided = scaled or composed.needs_guidance(batch)
    if options.negative_prompt and not guided:
        LOG.info("--negative-prompt has no effect: --guidance-scale 1 samples without guidance")
    seeds, indices = numbered(entries, options)
    first = Request(
        NAME,
        options,
        model,
        mesh,
        shape=shape,
        guided=guided,
        batch=batch,
        names=[
            f"{i:05d}_{slug(entry.prompt)}_seed{seed}"
            for i, (entry, seed) in enumerate(zip(every, seeds, strict=True))
        ],
        details=[
            {
                "prompt": entry.prompt,
                "negative_prompt": entry.negative_prompt,
                "guidance_scale": entry.guidance_scale,
                "prompt_file": None,
            }
            for entry in every
        ],
        row_labels=[entry.prompt[:24] for entry in entries],
        row_lengths=[entry.num_images for entry in entries],
        seeds=np.asarray(seeds, np.uint64),
        indices=np.asarray(indices),
        scales=np.asarray([entry.guidance_scale for entry in every]),
        problems=tuple(problems),
    )
    if not larger:
        return first

    def batch_of(steps: int, before: int) -> dict[str, np.ndarray]:
        if "token_weights" not in batch:  # the same text at every step
            return batch
        return read(model, options, texts, negatives, counts, over=(steps, before))

    return hires.with_second(first, batch_of)


def read_prompts(options: Options) -> tuple[list[prompts.Prompt], list[str]]:
    """(prompts of --prompt and --prompt-file, faults of lines of the latter)."""
    default = prompts.Prompt(
        "", options.negative_prompt, None, options.guidance_scale, options.num_images
    )
    entries, problems = [default._replace(prompt=text) for text in options.prompt], []
    if options.prompt_file is not None:
        from_file, problems = prompts.read(options.prompt_file, default)
        entries += from_file
        for problem in problems:
            LOG.warning(f"{problem}; goes on without")
    if not entries:
        raise ValueError('give --prompt "..." or --prompt-file FILE')
    if options.init_latents is not None and any(entry.seed is not None for entry in entries):
        raise ValueError("--init-latents replaces the noise of all seeds, also of --prompt-file's")
    return entries, problems


def numbered(entries: list[prompts.Prompt], options: Options) -> tuple[list[int], list[int]]:
    """Seed of each image, and its number under it."""
    seeds, indices = [], []
    for entry in entries:
        # a line with a seed of its own gives the same images wherever it stands in the file
        first = options.first_index + len(seeds) if entry.seed is None else 0
        seeds += [options.seed if entry.seed is None else entry.seed] * entry.num_images
        indices += range(first, first + entry.num_images)
    return seeds, indices


def check_model(model: bundle.LatentDiffusion, options: Options) -> None:
    """ValueError if the model does not draw from text alone."""
    cond = model.config.cond
    if isinstance(cond, schema.HybridCondConfig):
        raise ValueError(
            f"{options.model}: takes an image beside the text"
            f" ({conditioning.name_of(cond.concat)}), which text2img does not give; use a model of"
            " text alone"
        )
    if not isinstance(cond, schema.TextCondConfig):
        kind = conditioning.name_of(cond)
        raise ValueError(f"{options.model}: is trained with {kind}, not with text")
    check_tokenizer(model, options.model)


def read(
    model: bundle.LatentDiffusion,
    options: Options,
    texts: Sequence[str],
    negatives: Sequence[str],
    counts: Sequence[int] | None = None,
    *,
    over: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Input of `conditioning.from_batch` for texts and as many negative ones, in --prompt-syntax.

    counts: images of each, one by default. A plain text that is too long is read in chunks where
    the text encoder is CLIP; of others the log says which words are left out.
    over: steps of a schedule, and those of a pass before; default: those of the options.
    """
    long = [text for text in dict.fromkeys([*texts, *negatives]) if model.tokenizer.lost(text)]
    if options.prompt_syntax == "webui" or (long and composed.reads_chunks(model)):
        steps, before = over or (len(levels_of(model, options).t), 0)
        named = {"syntax": options.prompt_syntax, "mode": options.emphasis}
        batch = composed.batch(model, texts, negatives, steps=steps, before=before, **named)
        number = batch["tokens"].shape[3]
        if number > 1 and over is None:
            LOG.info(f"the longest prompt has {number} chunks of {model.tokenizer.max_length - 2}")
    else:
        batch = read_plain(model.tokenizer, texts, negatives)
    if counts is None:
        return batch
    return {name: np.repeat(array, counts, axis=0) for name, array in batch.items()}


def read_plain(
    tokenizer: Any, texts: Sequence[str], negatives: Sequence[str]
) -> dict[str, np.ndarray]:
    """`tokens` and `null_tokens`, int32 [N, L]; says which words do not fit."""
    say_lost(tokenizer, texts, dict.fromkeys(negatives))
    named = {"tokens": texts, "null_tokens": negatives}
    return {name: tokenizer.encode(list(given)) for name, given in named.items()}


def say_lost(tokenizer: Any, texts: Iterable[str], negatives: Iterable[str]) -> None:
    """Warns of words that the text encoder has no room for."""
    named = [("--negative-prompt", text) for text in negatives] + [("prompt", t) for t in texts]
    for name, text in named:
        lost = tokenizer.lost(text)
        if lost:
            LOG.info(
                f"warning: {name} {text[:24]!r}... is longer than the text encoder's"
                f" {tokenizer.max_length} tokens; left out: {lost!r}"
            )


def slug(text: str) -> str:
    """Letters and digits of a text as the part of a file name, at most 40."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40].rstrip("_") or "text"
