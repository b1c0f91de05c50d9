"""What the training loop costs beside its step: `ldm-train` on 1 and 2 processes of one core each.

    python benchmarks/overhead.py --out benchmarks/results

Each process is a whole `ldm-train`: batches read ahead, metrics, bar, log, watchdog, signals. Only
its compiled step is wrapped: after every block of steps that the loop asked for, the same program
runs as many steps on one batch that is on the device already, with nothing around it. Blocks take
turns, so what else the machine does hits both alike. Writes OUT/overhead.md and
.json; with --add the runs that are there stay, and all blocks count. See README.md beside it.
"""

import argparse
import collections
import importlib.metadata
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import machine

HERE = Path(__file__).parent
BLOCKS = {"digits": 20, "tiny:class": 100}  # steps in a block: longer than a save takes
FIRST = {"digits": "digits:first_stage", "tiny": "tiny:first_stage"}
QUIET = ["--intervals.evaluate", "0", "--intervals.sample", "0", "--intervals.snapshot", "0"]


def main() -> int:
    args = arguments()
    if args.worker:
        import overhead_worker

        return overhead_worker.main(args.worker, args.block, args.flags)
    stored = args.out / "overhead.json"
    report = json.loads(stored.read_text()) if args.add else {"runs": []}
    facts = machine.facts() | {"jax": importlib.metadata.version("jax")}
    run = {"machine": facts, "rows": []}
    report["runs"].append(run)
    with tempfile.TemporaryDirectory() as folder:
        for config in args.configs:
            stage = first_stage(config, Path(folder))
            for processes in args.processes:
                load = os.getloadavg()[0]
                figures = measure(args, config, processes, stage, Path(folder))
                row = {"config": config, "processes": processes, "load": [load], **figures}
                row["load"].append(os.getloadavg()[0])
                run["rows"].append(row)
                stored.write_text(json.dumps(report, indent=1) + "\n")
                (args.out / "overhead.md").write_text(markdown(report))
                print(line(len(report["runs"]), row), flush=True)
    return 0


def first_stage(config: str, folder: Path) -> Path:
    """A run of one step: what it has learned does not matter here."""
    name = FIRST[config.partition(":")[0]]
    run = folder / name.replace(":", "_")
    if not run.exists():
        flags = ["--workdir", str(run), "--steps", "1", *QUIET, "--intervals.snapshot", "1"]
        command = [sys.executable, "-m", "ldm_jax.train.main", name, *flags]
        subprocess.run(command, check=True, env=environment(), stderr=subprocess.DEVNULL)
    return run


def measure(
    args: argparse.Namespace, config: str, processes: int, stage: Path, folder: Path
) -> dict:
    """Figures of process 0; the others run in step with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = folder / f"{config.replace(':', '_')}_{processes}"
    block = args.block or BLOCKS[config]
    steps = block * (2 * args.rounds + 2)
    flags = ["--workdir", str(run), "--first-stage.path", str(stage), "--steps", str(steps), *QUIET]
    flags += ["--intervals.save", str(2 * block)]
    started = []
    for i in range(processes):
        place = f"127.0.0.1:{port},{processes},{i}" if processes > 1 else "off"
        command = [sys.executable, __file__, "--block", str(block), "--worker"]
        command += [str(folder / f"{run.name}.{i}.json"), "--", config, *flags]
        with (folder / f"{run.name}.{i}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [*command, "--distributed", place],
                    env=environment(),
                    stderr=log,
                    preexec_fn=lambda core=i: os.sched_setaffinity(0, {core}),
                )
            )
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit((folder / f"{run.name}.0.log").read_text()[-3000:])
    return summary(json.loads((folder / f"{run.name}.0.json").read_text()))


def summary(found: dict) -> dict:
    """Medians over blocks, each against the bare blocks before and after it.

    found: {"block": steps, "loop": [(s, CPU s)], "bare": [(s, CPU s)], "saves": [in the loop's
    block], "stood": [s], "config_save": steps, "state_mib"}; bare[i] comes before loop[i].
    """
    block, saves = found["block"], found["saves"]
    bare, extra = block_seconds(found, 0)
    without, with_save = split(extra, saves)
    plain, cpu = shares(found, 0), shares(found, 1)
    step = statistics.median(bare) / block
    save = statistics.median(with_save) - statistics.median(without)
    return {
        "bare_step_ms": 1e3 * step,
        "overhead": statistics.median(plain),
        "quartiles": statistics.quantiles(plain, n=4)[::2],
        "overhead_cpu": statistics.median(cpu),
        "quartiles_cpu": statistics.quantiles(cpu, n=4)[::2],
        "overhead_step_ms": 1e3 * statistics.median(without) / block,
        "save_ms": 1e3 * save,
        "stood_ms": 1e3 * statistics.median(found["stood"]),
        "save_interval": found["config_save"],
        "save_share": save / (found["config_save"] * step),
        "state_mib": found["state_mib"],
        "blocks": len(plain),
        "block": block,
        "raw": found,
    }


def shares(found: dict, clock: int) -> list[float]:
    """What each block of the loop without a save took more, over the bare blocks around it."""
    without, _ = split([e / b for b, e in zip(*block_seconds(found, clock))], found["saves"])
    return without


def block_seconds(found: dict, clock: int) -> tuple[list[float], list[float]]:
    """(bare blocks around each of the loop's, what that took more), s of `passed`'s clock."""
    bare, loop = ([block[clock] for block in found[kind]] for kind in ("bare", "loop"))
    around = [(a + b) / 2 for a, b in itertools.pairwise(bare)]
    return around, [a - b for a, b in zip(loop, around)]


def split(values: list[float], saves: list[bool]) -> tuple[list[float], list[float]]:
    """(those of blocks without a save, those with one)."""
    return [[v for v, s in zip(values, saves) if s is which] for which in (False, True)]


def line(run: int, row: dict) -> str:
    """A row of the table."""
    cells = (
        run,
        f"`{row['config']}`",
        row["processes"],
        f"{row['bare_step_ms']:.1f}",
        share(row["overhead"], row["quartiles"]),
        share(row["overhead_cpu"], row["quartiles_cpu"]),
        f"{row['overhead_step_ms']:.2f}",
        f"{row['state_mib']:.0f}",
        f"{row['save_ms']:.0f}",
        f"{row['stood_ms']:.0f}",
        f"{100 * row['save_share']:.2f} % ({row['save_interval']} steps)",
        f"{row['load'][0]:.1f}, {row['load'][1]:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def share(median: float, quartiles: list[float]) -> str:
    low, high = (f"{100 * q:+.1f}" for q in quartiles)
    return f"{100 * median:+.1f} % ({low} to {high})"


def together(runs: list[dict]) -> list[str]:
    """Rows of all blocks of all runs, with what the median may be by chance."""
    raw = collections.defaultdict(list)
    for row in (row for run in runs for row in run["rows"]):
        raw[row["config"], row["processes"]].append(row["raw"])
    lines = []
    for (config, processes), found in raw.items():
        cells = [f"`{config}`", processes]
        for clock in (0, 1):
            values = [value for one in found for value in shares(one, clock)]
            draws = random.Random(0)
            medians = [statistics.median(draws.choices(values, k=len(values))) for _ in range(4000)]
            low, *_, high = statistics.quantiles(medians, n=40)
            quartiles = statistics.quantiles(values, n=4)[::2]
            cells += [share(statistics.median(values), quartiles)]
            cells += [f"{100 * low:+.1f} to {100 * high:+.1f} %"]
        lines.append(f"| {' | '.join(map(str, [*cells, len(values)]))} |")
    return lines


def table(heads: tuple[str, ...], rows: list[str]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads), *rows]


def markdown(report: dict) -> str:
    runs = list(enumerate(report["runs"], 1))
    m = report["runs"][-1]["machine"]
    heads = (
        *("run", "config", "processes", "bare step, ms", "loop without saving", "in CPU time"),
        *("ms per step", "state, MiB", "one save, ms", "of it the loop stands, ms"),
        *("share of saving", "load before, after"),
    )
    all_heads = ("config", "processes", "loop without saving", "the median, 95 %")
    all_heads += ("in CPU time", "the median, 95 %", "blocks")
    commands = (
        f"- run {i}: {r['machine']['date']}, commit {r['machine']['commit']}:"
        f" `{r['machine']['command']}`"
        for i, r in runs
    )
    return "\n".join(
        (
            "# Overhead of the training loop",
            "",
            f"{m['cpu']}, {m['cores']} cores; Python {m['python']}, jax {m['jax']}. One core per"
            " process.",
            "",
            *table(heads, [line(i, row) for i, run in runs for row in run["rows"]]),
            "",
            *commands,
            "",
            "`loop without saving`: median over blocks (and quartiles) of what the loop takes more"
            " than the same compiled step on a batch that is on the device, blocks of both taking"
            " turns; beside it the same in the CPU time of the process. `one save`: what a block"
            " with an asynchronous checkpoint takes more than one without, so writing in the"
            " background counts too; `share of saving`: that, at the interval of the config."
            " Goal: at most 3 % without saving. Rows of `tiny` are for the milliseconds: nobody"
            " trains with so short a step.",
            "",
            "All blocks of all runs together, and where the median lies if blocks are drawn again"
            " (4000 draws):",
            "",
            *table(all_heads, together(report["runs"])),
            "",
        )
    )


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--configs", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--processes", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--block", type=int, help="steps in a block instead of the config's")
    parser.add_argument("--rounds", type=int, default=12, help="blocks with and without a save")
    parser.add_argument("--add", action="store_true", help="to the runs that are in OUT")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
