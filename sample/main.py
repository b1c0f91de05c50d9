"""`ldm-sample TASK --model PATH --out DIR [...]`, `ldm-sample again IMAGE.png`."""

import sys
from collections.abc import Sequence

import tyro

from ldm_jax.runtime import cli
from ldm_jax.sample import (
    again,
    class2img,
    img2img,
    inpaint,
    invert,
    layout2img,
    megapixel,
    retrieval,
    semantic,
    superres,
    text2img,
    unconditional,
    variations,
)

TASKS = {
    "unconditional": unconditional,
    "class2img": class2img,
    "text2img": text2img,
    "img2img": img2img,
    "inpaint": inpaint,
    "superres": superres,
    "semantic": semantic,
    "layout2img": layout2img,
    "variations": variations,
    "invert": invert,
    "megapixel": megapixel,
    "retrieval": retrieval,
}


def sample(argv: Sequence[str]) -> int:
    """Runs the task that the first argument names."""
    argv = cli.join_processes(cli.enable_compilation_cache(argv))
    name, rest = cli.split_task(argv, "ldm-sample", (*TASKS, "again"))
    if name == "again":
        return again.main(tyro.cli(again.Options, args=rest, prog="ldm-sample again"), TASKS)
    task = TASKS[name]
    return task.main(tyro.cli(task.Options, args=rest, prog=f"ldm-sample {name}"))


def main() -> None:
    """Entry point of `ldm-sample`."""
    sys.exit(cli.run("ldm-sample", sample, sys.argv[1:]))


if __name__ == "__main__":
    main()
