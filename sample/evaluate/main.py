"""Evaluate reconstructions and samples, or write statistics to compare with.

`ldm-eval TASK --out DIR [...]`
"""

import sys
from collections.abc import Sequence

from ldm_jax.runtime import cli, flags
from ldm_jax.sample.evaluate import reconstruct, samples, statistics

TASKS = {
    "reconstruct": reconstruct,
    "samples": samples,
    "statistics": statistics,
}
USAGE = "--out DIR [options]"


def evaluate(argv: Sequence[str]) -> int:
    """Run the task that the first argument names."""
    process, argv = flags.parse_known(argv, "ldm-eval", flags.Process)
    kinds = {name: task.Options for name, task in TASKS.items()}
    name, argv = cli.split_task(argv, "ldm-eval", USAGE, flags.summary(__doc__), kinds)
    kind = kinds[name]
    asked, _ = flags.parse(argv, f"ldm-eval {name}", kind.__doc__, kind, flags.Process)
    cli.start(process)
    return TASKS[name].main(asked)


def main() -> None:
    """Entry point of `ldm-eval`."""
    sys.exit(cli.run("ldm-eval", evaluate, sys.argv[1:]))


if __name__ == "__main__":
    main()
