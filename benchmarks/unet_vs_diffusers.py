"""Times the Stable Diffusion v1 UNet here against diffusers on torch, on the machine it runs on.

    python benchmarks/unet_vs_diffusers.py --out benchmarks/results

Forward pass and training step (loss, gradients, AdamW), same parameters, inputs, shapes, type and
threads. Every measurement is a process of its own, one after the other: ours, theirs, ours, theirs,
... and the medians count. Writes OUT/unet_vs_diffusers.json and .md. See README.md beside it.
"""

import argparse
import importlib.metadata
import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

import machine as this
import numpy as np
import sides
import unet_cases

# Name of a side: its script and its setting. The first two are compared, the others stand beside.
SIDES = {
    "ldm_jax": ("unet_jax.py", "auto"),
    "diffusers": ("unet_torch.py", "contiguous"),
    "ldm_jax, plain attention": ("unet_jax.py", "xla"),
    "diffusers, channels_last": ("unet_torch.py", "channels_last"),
}
OURS, THEIRS, *BESIDE = SIDES
GROUPS = ("reduced", "full-forward", "full-training")  # cases that share a process, by prefix
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers", "numpy")


def main() -> int:
    args = arguments()
    report = {"machine": machine(args), "cases": {}, "processes": []}
    with tempfile.TemporaryDirectory() as cache:
        for group in GROUPS:
            cases = tuple(n for n in args.cases if n.startswith(group))
            if not cases:
                continue
            for i in range(args.rounds):
                # The settings that stand beside are measured once, in the middle of the rounds.
                sides = SIDES if args.beside and i == args.rounds // 2 else (OURS, THEIRS)
                for side in sides:
                    split = side in (OURS, THEIRS) and i == args.rounds - 1
                    one_process(args, side, cases, split, cache, report)
            write(args.out, report)
    return 0 if all(agree(case) for case in report["cases"].values()) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument(
        "--cases", nargs="+", choices=unet_cases.CASES, default=list(unet_cases.CASES)
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed runs, per process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--beside",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"also time {' and '.join(BESIDE)}",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def machine(args: argparse.Namespace) -> dict:
    """What a reader needs to judge the figures or to repeat them."""
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        **this.facts(),
        "threads": args.threads,
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "platform": args.platform,
        "dtype": args.dtype,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def one_process(
    args: argparse.Namespace,
    side: str,
    cases: tuple[str, ...],
    split: bool,
    cache: str,
    report: dict,
) -> None:
    """Runs `cases` on one side in a process of their own and adds the figures to the report."""
    script, variant = SIDES[side]
    job = unet_cases.Job(
        cases=cases,
        seconds=args.seconds,
        threads=args.threads,
        dtype=args.dtype,
        platform=args.platform,
        variant=variant,
        split=split,
        cache=cache,
    )
    environment = {"JAX_PLATFORMS": "cpu"} if args.platform == "cpu" else {}
    result, outputs = sides.run(script, job, **environment)
    report["processes"].append(
        {
            "side": side,
            "cases": cases,
            "peak_gib": result["peak_gib"],
            "load_before": result["load"][0],
            "load_after": result["load"][1],
        }
    )
    for name, figures in result["cases"].items():
        add(report["cases"].setdefault(name, {}), side, figures, outputs.get(name))
        print(f"{name:20} {side:26} {statistics.median(figures['runs']):9.4f} s", flush=True)


def add(case: dict, side: str, figures: dict, output: np.ndarray | None) -> None:
    """Adds one process's figures to a case, and how far its numbers are from the first's."""
    entry = case.setdefault(side, {"runs": [], "first": []})
    entry["runs"].append(figures["runs"])
    entry["first"].append(figures["first"])
    entry["median"] = statistics.median(statistics.median(runs) for runs in entry["runs"])
    if "compile" in figures:  # later processes find the program in the cache
        entry["compile"] = max(figures["compile"], entry.get("compile", 0.0))
    if "split" in figures:
        entry["split"] = figures["split"]
    numbers = output if output is not None else np.asarray(figures["losses"])
    reference = np.asarray(case.setdefault("numbers", numbers.tolist()))
    difference = float(np.abs(numbers - reference).max() / np.abs(reference).max())
    case["difference"] = max(case.get("difference", 0.0), difference)
    if output is None:
        entry["losses"] = figures["losses"]


def agree(case: dict) -> bool:
    """Whether all processes computed the same: outputs, or the losses of the first three steps."""
    return case["difference"] < case["tolerance"]


def write(folder: Path, report: dict) -> None:
    """The report as JSON and as Markdown."""
    tolerance = 1e-3 if report["machine"]["dtype"] == "float32" else 5e-2
    for case in report["cases"].values():
        case["tolerance"] = tolerance
    slim = {
        name: {k: v for k, v in case.items() if k != "numbers"}
        for name, case in report["cases"].items()
    }
    (folder / "unet_vs_diffusers.json").write_text(
        json.dumps({**report, "cases": slim}, indent=1) + "\n"
    )
    (folder / "unet_vs_diffusers.md").write_text(markdown(report))


def markdown(report: dict) -> str:
    """Tables: times and ratios, then the split by kind of operation."""
    about = ", ".join(f"{k} {v}" for k, v in report["machine"].items() if k != "command")
    sides = [s for s in SIDES if any(s in case for case in report["cases"].values())]
    lines = [
        "# Stable Diffusion v1 UNet: ldm_jax against diffusers on torch",
        "",
        f"`{report['machine']['command']}`",
        "",
        f"{about}.",
        "",
        "Seconds, medians over processes of the median run; ratio: ldm_jax over diffusers, below 1"
        " is faster here.",
        "Difference: the largest between any two processes' outputs (training: losses of the first"
        " three steps), relative to the largest output.",
        "",
        "| case | " + " | ".join(sides) + " | ratio | difference | compilation |",
        "|---|" + "---:|" * (len(sides) + 3),
    ]
    for name, case in report["cases"].items():
        times = [f"{case[s]['median']:.3f}" if s in case else "" for s in sides]
        ratio = case[OURS]["median"] / case[THEIRS]["median"]
        lines.append(
            f"| {name} | " + " | ".join(times) + f" | {ratio:.2f} | {case['difference']:.0e} |"
            f" {case[OURS]['compile']:.0f} |"
        )
    lines += ["", "Seconds of one run by kind of operation (how: README.md beside the script):", ""]
    lines += ["| case | side | " + " | ".join(unet_cases.KINDS) + " |"]
    lines += ["|---|---|" + "---:|" * len(unet_cases.KINDS)]
    for name, case in report["cases"].items():
        for side in (OURS, THEIRS):
            if split := case[side].get("split"):
                cells = " | ".join(f"{split[kind]:.3f}" for kind in unet_cases.KINDS)
                lines.append(f"| {name} | {side} | {cells} |")
    lines += ["", "| process | cases | peak memory GiB | load before | load after |"]
    lines += ["|---|---|---:|---:|---:|"]
    for p in report["processes"]:
        cases = p["cases"][0] if len(p["cases"]) == 1 else f"{len(p['cases'])} reduced"
        lines.append(
            f"| {p['side']} | {cases} | {p['peak_gib']:.1f} |"
            f" {p['load_before']:.1f} | {p['load_after']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
