"""Text to image: `ldm-sample text2img --model PATH --out DIR --prompt "a red square"`."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from ldm_jax import bundle, cli, schema
from ldm_jax.sample import common

NAME = "text2img"


@dataclasses.dataclass(frozen=True)
class Options(common.Options):
    """Images of a text, by a text-conditional model."""

    prompt: tuple[str, ...] = ()
    """What to draw; each gets num_images images and a row of the grid."""
    prompt_file: str | None = None
    """Text file with one prompt per line, drawn after those of --prompt."""
    negative_prompt: str = ""
    """What guidance leads away from; default: the empty text."""
    height: int | None = None
    """Pixels; default: the size the model was trained at."""
    width: int | None = None
    """Pixels; default: the size the model was trained at."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 samples without it, at half the cost."""
    batch_size: int = 8
    """Most images per call of the compiled sampler, over all devices."""


def main(options: Options) -> int:
    """Writes num_images images of every prompt."""
    prompts = read_prompts(options)
    model, mesh, options = common.open_model(options)
    check_model(model, options)
    shape = common.latent_shape(model, options.height, options.width)
    batch = tokenize(model.tokenizer, prompts, options.negative_prompt, options.num_images)
    out = common.open_out(options)
    guided = options.guidance_scale != 1
    if options.negative_prompt and not guided:
        cli.say("--negative-prompt has no effect: --guidance-scale 1 samples without guidance")

    every = [prompt for prompt in prompts for _ in range(options.num_images)]
    parts = list(common.generate(model, mesh, options, batch, len(every), guided, shape))
    names = [f"{i:05d}_{slug(text)}_seed{options.seed}" for i, text in enumerate(every)]
    details = [{"index": i, "prompt": text} for i, text in enumerate(every)]
    common.save(out, options, NAME, parts, names, details, rows=[text[:24] for text in prompts])
    return 0


def read_prompts(options: Options) -> list[str]:
    """The texts of --prompt, then the lines of --prompt-file that are not empty."""
    prompts = list(options.prompt)
    if options.prompt_file is not None:
        try:
            lines = epath.Path(options.prompt_file).read_text().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {options.prompt_file}: is not UTF-8 text") from error
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompt-file {options.prompt_file}: holds no prompt")
    if not prompts:
        raise ValueError('give --prompt "..." or --prompt-file FILE')
    return prompts


def check_model(model: bundle.LatentDiffusion, options: common.Options) -> None:
    """ValueError if the model does not draw from text alone."""
    cond = model.config.cond
    if isinstance(cond, schema.HybridCondConfig):
        raise ValueError(
            f"{options.model}: takes an image beside the text ({type(cond.concat).__name__}), which"
            " text2img does not give; use a model of text alone"
        )
    if not isinstance(cond, schema.TextCondConfig):
        kind = type(cond).__name__ if cond else "no condition"
        raise ValueError(f"{options.model}: is trained with {kind}, not with text")
    common.check_tokenizer(model, options.model)


def tokenize(
    tokenizer: Any, prompts: Sequence[str], negative: str, num_images: int
) -> dict[str, np.ndarray]:
    """`tokens` and `null_tokens`, int32 [prompts * num_images, L]; says which words do not fit."""
    for name, text in [("--negative-prompt", negative), *(("prompt", p) for p in prompts)]:
        lost = tokenizer.lost(text)
        if lost:
            cli.say(
                f"warning: {name} {text[:24]!r}... is longer than the text encoder's"
                f" {tokenizer.max_length} tokens; left out: {lost!r}"
            )
    tokens = np.repeat(tokenizer.encode(list(prompts)), num_images, axis=0)
    null_tokens = np.repeat(tokenizer.encode([negative]), len(tokens), axis=0)
    return {"tokens": tokens, "null_tokens": null_tokens}


def slug(text: str) -> str:
    """Letters and digits of a text as the part of a file name, at most 40."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40].rstrip("_") or "text"
