"""One `ldm-train` of `overhead.py`: its compiled step also runs bare, between the loop's blocks."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.runtime import checkpoint, cli
from ldm_jax.train import main as train_main
from ldm_jax.train.run import loop, startup
from ldm_jax.train.run.monitor import compile_step


class Paired:
    """A compiled step that counts: every `block` steps it runs as many bare ones and notes both.

    The first block of the loop is not counted.
    """

    def __init__(self, step: Callable, block: int) -> None:
        self.step, self.block, self.calls = step, block, 0
        self.loop: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self.saves: list[bool] = []
        self.own: tuple | None = None
        self.since: tuple[float, float] | None = None

    def __call__(self, state: Any, batch: Any, root: jax.Array) -> tuple:
        if self.own is None:
            copied = jax.tree.map(jnp.copy, (state, batch))
            self.own, self.mib = copied, sum(startup.bytes_per_device(state).values()) / 2**20
        state, metrics = self.step(state, batch, root)
        self.calls += 1
        if self.calls % self.block == 0:
            jax.block_until_ready((state, metrics))
            if self.since is not None:
                self.loop.append(passed(self.since))
                # the save after a block's last step falls into the next one
                self.saves.append((self.calls // self.block) % 2 == 1)
            time.sleep(0.3)  # batches are read ahead again, a checkpoint gets written
            self.run_bare(root)
            self.since = now()
        return state, metrics

    def run_bare(self, root: jax.Array) -> None:
        state, batch = self.own
        jax.block_until_ready(state)
        start = now()
        for _ in range(self.block):
            state, metrics = self.step(state, batch, root)
        jax.block_until_ready((state, metrics))
        self.bare.append(passed(start))
        self.own = (state, batch)


def now() -> tuple[float, float]:
    """Seconds of the clock, and of this process on its core."""
    return time.perf_counter(), time.process_time()


def passed(since: tuple[float, float]) -> tuple[float, float]:
    """Both since then."""
    return tuple(a - b for a, b in zip(now(), since))


def main(out: Path, block: int, flags: list[str]) -> int:
    """Trains with `flags`, and writes what was measured to `out`."""
    made: list[Paired] = []
    stood: list[float] = []

    def compile_paired(*args: Any, **options: Any) -> tuple:
        step, work = compile_step(*args, **options)
        made.append(Paired(step, block))
        return made[0], work

    save = checkpoint.save

    def timed_save(*args: Any, **options: Any) -> bool:
        start = time.perf_counter()
        saved = save(*args, **options)
        stood.append(time.perf_counter() - start)
        return saved

    loop.compile_step, checkpoint.save = compile_paired, timed_save
    code = cli.run("ldm-train", train_main.train, [*flags, "--debug"])
    paired = made[0]
    config = train_main.load_config(flags[0])
    found = {"block": block, "loop": paired.loop, "bare": paired.bare, "saves": paired.saves}
    found |= {"stood": stood[:-1], "state_mib": paired.mib, "config_save": config.intervals.save}
    out.write_text(json.dumps(found))
    return code
