"""`ldm-eval TASK [...]`: figures of reconstructions and samples, and statistics to compare with."""

import sys
from collections.abc import Sequence

import tyro

from ldm_jax.runtime import cli
from ldm_jax.sample.evaluate import reconstruct, samples, statistics

TASKS = {
    "reconstruct": reconstruct,
    "samples": samples,
    "statistics": statistics,
}


def evaluate(argv: Sequence[str]) -> int:
    """Runs the task that the first argument names."""
    argv = cli.join_processes(cli.enable_compilation_cache(argv))
    name, rest = cli.split_task(argv, "ldm-eval", tuple(TASKS))
    task = TASKS[name]
    return task.main(tyro.cli(task.Options, args=rest, prog=f"ldm-eval {name}"))


def main() -> None:
    """Entry point of `ldm-eval`."""
    sys.exit(cli.run("ldm-eval", evaluate, sys.argv[1:]))


if __name__ == "__main__":
    main()
