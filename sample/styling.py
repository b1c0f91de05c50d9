"""Styles of prompts: --styles and --style."""

import dataclasses
from typing import Annotated, Any

from tyro.conf import arg

from ldm_jax.prompting import styles
from ldm_jax.runtime import flags


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of tasks whose prompts have styles; no task by itself."""

    style: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """Styles of --styles to draw in, one after the other: `{prompt}` in the text of one is the
    prompt, others go behind it."""
    styles: flags.OptionalFile = None
    """CSV file of styles with the columns name, prompt and negative_prompt, as
    stable-diffusion-webui's."""


def styled(options: Any) -> Any:
    """Options whose prompts are in their styles, which these then no longer name.

    ValueError for a style that there is not, or whose file is none.
    """
    if not options.style:
        return dataclasses.replace(options, styles=None)
    if options.styles is None:
        raise ValueError(f"--style {options.style[0]}: give --styles, the file that it is in")
    if getattr(options, "prompt_file", None) is not None:
        raise ValueError("--style is for --prompt: write it into the lines of --prompt-file")
    prompts, away = options.prompt or ("",), options.negative_prompt
    for style in styles.chosen(styles.read(options.styles), options.style, "--style"):
        around = [style.around(prompt, away) for prompt in prompts]
        prompts, away = tuple(prompt for prompt, _ in around), around[0][1]
    return dataclasses.replace(options, prompt=prompts, negative_prompt=away, style=(), styles=None)
