"""Times first stages: a step of generator and discriminator, encoding, training from a cache.

    python benchmarks/first_stage.py --out benchmarks/results

A step and the encoder against eager torch with the same weights, images and noise; a latent
diffusion step from images against the same from a cache. Every measurement is a process of its own,
one after the other, the two sides in turn; medians count. Writes OUT/first_stage.json and .md; with
--add to what is there. See README.md beside it.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import first_stage_cases as cases
import first_stage_report as reporting
import sides
import unet_vs_diffusers


def main() -> int:
    args = arguments()
    stored = args.out / "first_stage.json"
    report = {"machines": [], "cases": {}}
    if args.add and stored.exists():
        report = json.loads(stored.read_text())
    report["machines"].append(unet_vs_diffusers.machine(args))
    with contextlib.ExitStack() as stack:
        kept = args.weights or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in args.cases:
            for i in range(args.rounds):
                for side in cases.SIDES[cases.CASES[name].kind]:
                    pieces = args.pieces and i == args.rounds - 1
                    figures = one_process(args, name, side, kept.absolute(), pieces)
                    add(report["cases"].setdefault(name, {}), side, figures)
            stored.write_text(json.dumps(report, indent=1) + "\n")
            (args.out / "first_stage.md").write_text(reporting.markdown(report))
    bad = [n for n in args.cases if not reporting.agrees(report["cases"][n])]
    print("all sides agree" if not bad else f"sides disagree in {', '.join(bad)}")
    return 1 if bad else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--cases", nargs="+", choices=cases.CASES, default=list(cases.CASES))
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed runs, per process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--weights", type=Path, help="folder that keeps weights and programs")
    parser.add_argument("--add", action="store_true", help="to the figures that OUT holds")
    yes_or_no = argparse.BooleanOptionalAction
    parser.add_argument("--pieces", action=yes_or_no, default=True, help="parts of a step alone")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.platform, args.dtype = "cpu", "float32"
    return args


def one_process(args: argparse.Namespace, name: str, side: str, kept: Path, pieces: bool) -> dict:
    """Figures of one side of a case, from a process of its own."""
    kind = cases.CASES[name].kind
    job = cases.Job(name, side, args.seconds, args.threads, pieces, str(kept))
    scripts = cases.SIDES[kind]
    done = cases.weights_of(job) / "done"
    if not done.exists():
        first = next(iter(scripts.values()))
        sides.run(first, dataclasses.replace(job, side=cases.WEIGHTS), JAX_PLATFORMS="cpu")
        done.touch()
    figures, _ = sides.run(scripts[side], job, JAX_PLATFORMS="cpu")
    print(f"{name:18} {side:14} {statistics.median(figures['runs']):9.4f} s", flush=True)
    return figures


def add(case: dict, side: str, figures: dict) -> None:
    """Adds one process's figures to a case, and how far its numbers are from the first's."""
    entry = case.setdefault(side, {"runs": [], "first": [], "load": [], "peak_gib": []})
    for key in ("runs", "first", "load", "peak_gib"):
        entry[key].append(figures[key])
    for key in ("pieces", "path_images"):
        if key in figures:
            entry[key] = figures[key]
    # of later processes: programs come from the cache, files may lie in memory
    for key in ("compile", "path_per_second"):
        if key in figures:
            entry[key] = max(figures[key], entry.get(key, 0.0))
    entry["losses"] = figures["losses"]
    reference = case.setdefault("losses", figures["losses"])
    apart = reporting.difference(reference, figures["losses"])
    entry["difference"] = max(apart, entry.get("difference", 0.0))


if __name__ == "__main__":
    sys.exit(main())
