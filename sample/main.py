"""Sample images from a model, or repeat an image from its settings.

`ldm-sample TASK --model PATH --out DIR [...]`, `ldm-sample again IMAGE.png`
"""

import sys
from collections.abc import Sequence

from ldm_jax.runtime import cli, flags
from ldm_jax.sample import (
    again,
    class2img,
    img2img,
    inpaint,
    invert,
    layout2img,
    megapixel,
    plot,
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
    "plot": plot,
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
USAGE = "--model PATH --out DIR [options]"


def sample(argv: Sequence[str]) -> int:
    """Run the task that the first argument names."""
    process, argv = flags.parse_known(argv, "ldm-sample", flags.Process)
    kinds = {name: task.Options for name, task in {**TASKS, "again": again}.items()}
    name, argv = cli.split_task(argv, "ldm-sample", USAGE, flags.summary(__doc__), kinds)
    kind = kinds[name]
    asked, _ = flags.parse(argv, f"ldm-sample {name}", kind.__doc__, kind, flags.Process)
    cli.start(process)
    return again.main(asked, TASKS) if name == "again" else TASKS[name].main(asked)


def main() -> None:
    """Entry point of `ldm-sample`."""
    sys.exit(cli.run("ldm-sample", sample, sys.argv[1:]))


if __name__ == "__main__":
    main()
