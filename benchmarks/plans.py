"""What the published models need on TPU slices, compiled here without them: the plan table.

    pip install --no-deps 'libtpu==0.0.42.*' # the one that belongs to jaxlib 0.10.2
    python benchmarks/plans.py --keep runs/plan # compiles what is missing, one after the other
    python benchmarks/plans.py --keep runs/plan --table # only what is there

Every row is a command of `ldm-train plan`; a compile takes 5 to 60 minutes on one core and 5 to
20 GB, and its result stays in --keep. Writes OUT/plan.md after each; rows of which nothing is in
--keep stay in it as they are.
"""

import argparse
import collections
import datetime
import platform
import sys
from pathlib import Path

from ldm_jax.cost import tpu_cost
from ldm_jax.train.main import load_config
from ldm_jax.train.plan import command, reports, topologies

SD = "stable_diffusion --cached"
CASES = {
    "SD v1 training, 512 px": (
        f"{SD} --topology v5e:4x4 --batch-size 128 --mesh.data 4 --mesh.fsdp 4"
    ),
    "SD v1 training, 512 px, the published batch": (
        f"{SD} --topology v5e:4x4 --batch-size 2048 --accumulate 16 --mesh.fsdp 16"
    ),
    "SD v1 LoRA of rank 4, 512 px": "finetune:lora --topology v5e:2x2 --dtype bfloat16",
    "SD v1 textual inversion, 512 px": (
        "finetune:textual_inversion --topology v5e:2x2 --dtype bfloat16"
    ),
    "SD v1 finetuning, 512 px": "finetune:full --topology v5e:2x2 --dtype bfloat16",
    "kl-f8 first stage with discriminator": (
        "first_stages:kl-f8 --topology v5e:4x4 --batch-size 64 --dtype bfloat16"
    ),
    "SD v1 sampling, 512 px": (
        "stable_diffusion --sample --images 64 --topology v5e:4x4 --mesh.data -1 --mesh.fsdp 1"
    ),
    "cin256-v2 training": (
        "imagenet --cached --topology v5e:4x4 --batch-size 256 --mesh.data 4 --mesh.fsdp 4"
    ),
    "SD v1 training, 512 px, 256 chips": (
        f"{SD} --topology v5e:16x16 --batch-size 2048 --mesh.data 64 --mesh.fsdp 4"
    ),
    "SD v1 training, 512 px, v5p": (
        f"{SD} --topology v5p:4x4x4 --batch-size 1024 --mesh.data 16 --mesh.fsdp 4"
    ),
    "SD v1 training, 512 px, two slices": (
        f"{SD} --topology v5e:4x4 --slices 2 --batch-size 256"
        " --mesh.data 4 --mesh.fsdp 4 --mesh.dcn-data 2"
    ),
    "SD v1 training, 512 px, two slices, a copy each": (
        f"{SD} --topology v5e:4x4 --slices 2 --batch-size 256"
        " --mesh.data 1 --mesh.fsdp 16 --mesh.dcn-data 2"
    ),
    "SD v1 sampling, 2048 px, 16 chips an image": (
        "stable_diffusion --sample --images 1 --space 16 --height 2048 --width 2048"
        " --topology v5e:4x4"
    ),
    "SD v1 training, 1024 px, remat": (
        "stable_diffusion:1024 --cached --topology v5e:4x4 --batch-size 32"
    ),
}
SMALL, LARGE = "SD v1 training, 512 px", "SD v1 training, 512 px, 256 chips"
COMPARISON = "From 16 to 256 chips"
COLUMNS = (
    "program",
    "slice",
    "per chip",
    "HBM, GB (arguments + temporary)",
    "TFLOP per chip",
    "time, ms",
    "MFU",
    "share of the time by source",
    "sent per chip, MB",
    "compiled in",
    "at",
)


def main() -> int:
    args = arguments()
    done = 0
    for title in args.only or CASES:
        line = CASES[title]
        target, options, result, _ = case(line, args.keep)
        if not args.table and result is None:
            topologies.check_compiler(target.topology)
            result = command.compiled(target, args.keep, options)
            write(args.out, args.keep)
        done += result is not None
    write(args.out, args.keep)
    return 0 if done == len(CASES) or args.only else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--keep", type=Path, default=Path("runs/plan"))
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="these rows, so")
    return parser.parse_args()


def case(line: str, keep: Path):
    """(target, options, its result or None, when it was compiled) of a row."""
    name, *argv = line.split()
    config, options = command.parse(load_config(name), [*argv, "--out", str(keep)], name)
    target = command.target_of(config, options, name, load_config)
    wanted = command.shaped_by(target)
    for path in sorted(keep.glob("*/result.json"), key=lambda p: -p.stat().st_mtime):
        kept, result = command.read(path.parent)
        if command.shaped_by(kept) == wanted:
            when = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
            return target, options, result, f"{when:%Y-%m-%d %H:%M}"
    return target, options, None, None


# --- the report ----------------------------------------------------------------------------------


def write(out: Path, keep: Path) -> None:
    """OUT/plan.md of all that is in `keep`; rows that are not stay as they are in the file, and so
    does the comparison unless both of its programs are there."""
    path = out / "plan.md"
    before = sections(path.read_text()) if path.exists() else {}
    rows, details, kept = [], [], {}
    for title, line in CASES.items():
        command_line = f"`ldm-train plan {line}`"
        target, _, result, when = case(line, keep)
        stands = next((r for r in before.get("", []) if r.startswith(f"| {title} |")), None)
        if result is not None:
            kept[title] = target, result
            rows.append(row([*table_row(title, target, result), when]))
            report = reports.render(target, result).rstrip()
            section = [f"## {title}", "", command_line, "", "```", report, "```"]
        elif stands and command_line in before.get(title, []):
            rows.append(stands)
            section = [f"## {title}", *before[title]]
        else:
            rows.append(row([title, *["not compiled yet", *[""] * (len(COLUMNS) - 2)]]))
            section = [f"## {title}", "", f"{command_line}: not compiled yet."]
        details += ["", *section]
    comparison = compared(kept) or before.get(COMPARISON, [])
    if comparison:
        comparison = ["", f"## {COMPARISON}", *comparison]
    lines = [*head(), "", row(COLUMNS), row(["---"] * len(COLUMNS)), *rows]
    path.write_text("\n".join([*lines, *comparison, *details, ""]))


def sections(text: str) -> dict[str, list[str]]:
    """{heading: its lines} of a report; what is before the first heading under ""."""
    found: dict[str, list[str]] = {"": []}
    heading = ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
            found[heading] = []
        else:
            found[heading].append(line)
    return {name: "\n".join(lines).rstrip().split("\n") for name, lines in found.items()}


def compared(kept: dict) -> list[str]:
    """What a chip sends at 16 and at 256 chips, by kind of collective and what it moves."""
    small, large = (kept.get(title) for title in (SMALL, LARGE))
    if small is None or large is None or "failed" in {**small[1].about, **large[1].about}:
        return []
    columns = [sent_by_kind(*one) for one in (small, large)]
    lines = [
        "",
        "Both split parameters over 4 chips, and hold 4 and 64 copies of them. MB sent by a chip in"
        " a step, and how many chips take part together. A ring of n sends (n - 1) / n of an array,"
        f" an all-reduce twice that: from 4 to 64 chips {63 / 64 / (3 / 4):.2f} times as much.",
        "",
        row(["collective", "moves", "16 chips", "256 chips", "ratio"]),
        row(["---"] * 5),
    ]
    for name in sorted({*columns[0], *columns[1]}, key=lambda n: -sum(columns[1][n].values())):
        before, after = (sum(column[name].values()) for column in columns)
        ratio = f"{after / before:.2f}" if before else "new"
        cells = [
            f"{sum(column[name].values()) / 1e6:.1f} ({', '.join(map(str, sorted(column[name])))})"
            for column in columns
        ]
        lines.append(row([*name, *cells, ratio]))
    return lines


def sent_by_kind(target, result) -> dict[tuple, dict[int, float]]:
    """{(kind, parameters or activations): {chips that take part together: bytes}}."""
    found: dict[tuple, dict[int, float]] = collections.defaultdict(dict)
    for transfer in reports.estimate(target, result).transfers:
        groups = found[transfer.kind, reports.kind_of(transfer, result.about)]
        sent = transfer.runs * transfer.moved
        groups[transfer.group] = groups.get(transfer.group, 0.0) + sent
    return found


def head() -> list[str]:
    packages = ("jax", "jaxlib", "flax", "optax")
    versions = ", ".join(f"{name} {topologies.version(name)}" for name in packages)
    versions += f", {topologies.wanted_libtpu()}"
    chips = "; ".join(
        f"{name} {c.operations / 1e12:.0f} TFLOP/s, {c.memory_bandwidth / 1e9:.0f} GB/s,"
        f" {c.memory / 1e9:.2f} GB, {c.clock / 1e9} GHz, {c.link_bandwidth / 1e9:.0f} GB/s a link,"
        f" {c.network_bandwidth / 1e9:.3f} GB/s between slices"
        for name, c in tpu_cost.CHIPS.items()
    )
    return [
        "# Plans: programs compiled for TPU slices without them",
        "",
        f"`python benchmarks/plans.py`. {datetime.date.today()}, Python"
        f" {platform.python_version()}, {versions}. No TPU took part: memory and programs are the"
        " compiler's, times are estimates.",
        "",
        f"A chip: {chips}.",
        "",
        "FLOPs: of the jaxpr with plain attention and without remat, 2 per multiply-add. Time:"
        " `estimated_cycles` of every op over the clock, loop bodies as often as they run; ops"
        " without (kernels, sentinels, copies) at the larger of executed operations and bytes, over"
        f" {tpu_cost.EFFICIENCY}; collectives at a ring over one link, hidden by nothing. How to"
        " read it: docs/planning.md.",
    ]


def table_row(title: str, target, result) -> list[str]:
    about, chip = result.about, target.topology.chip
    rows = target.images if target.sample else target.config.batch_size
    devices = target.topology.num_devices
    each = f"{rows // devices} images" if rows >= devices else f"1/{devices // rows} image"
    if not target.sample and target.config.accumulate > 1:
        each += f", {rows // devices // target.config.accumulate} at a time"
    start = [title, str(target.topology), each]
    if "failed" in about:
        how = about["failed"]["how"][:200].replace("|", "/")
        return [*start, how, *[""] * (len(COLUMNS) - 5)]
    found = reports.estimate(target, result)
    shares = found.shares()
    sent = {
        "slice": sum(t.moved for t in found.collectives.values()),
        "between slices": sum(t.moved for t in found.across_slices.values()),
    }
    return [
        *start,
        f"{reports.needed(about) / 1e9:.2f} ({about['argument'] / 1e9:.2f}"
        f" + {about['temp'] / 1e9:.2f})",
        f"{about['operations'] / 1e12:.2f}",
        f"{1e3 * found.seconds:.0f}",
        f"{100 * found.utilization(about['operations'], chip):.1f} %",
        ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items() if share > 0.005),
        ", ".join(f"{where} {size / 1e6:.0f}" for where, size in sent.items() if size),
        f"{about['seconds'] / 60:.0f} min",
    ]


def row(cells) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
