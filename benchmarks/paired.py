"""Times ldm_jax against torch on the machine it runs on: the UNet, sampling, first stages.

    python benchmarks/paired.py unet
    python benchmarks/paired.py sampling --platform gpu
    python benchmarks/paired.py first_stage --cases step-reduced-1 --rounds 1

Every measurement is a process of its own, one after the other, the sides in turn; medians count.
All sides of a case start from the same numbers and must agree. Writes OUT/REPORT.json and .md.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import cases
import machine
import numpy as np
import paired_report
import sides

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers", "numpy")
RUN = ("n", "first", "median", "least")
TOLERANCE = {"float32": 1e-3}  # of the largest value; first stages: of 1, or of a larger value
ROUGH = {"unet": 5e-2}  # in other types; there images are not compared


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    stem = args.out / cases.REPORTS.get(args.family, args.family).format(platform=args.platform)
    stored, report = stem.with_suffix(".json"), {"machines": [], "processes": [], "cases": {}}
    if args.add and stored.exists():
        report = json.loads(stored.read_text())
    report["machines"].append(about(args))
    with contextlib.ExitStack() as stack:
        kept = args.weights or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in args.cases:
            for side, split in turns(args, cases.SIDES[type(cases.CASES[name])]):
                one_process(args, name, side, split, kept.absolute(), report)
                stored.write_text(json.dumps(report, indent=1) + "\n")
            stem.with_suffix(".md").write_text(paired_report.PAGES[args.family](report))
    tolerance = TOLERANCE.get(args.dtype, ROUGH.get(args.family, math.inf))
    entries = [(n, e) for n in args.cases for e in report["cases"].get(n, {}).values()]
    bad = {name for name, entry in entries if not entry.get("difference", 0.0) < tolerance}
    print(f"sides disagree in {', '.join(sorted(bad))}" if bad else "all sides agree")
    return 1 if bad else 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, yes_or_no = parser.add_argument, argparse.BooleanOptionalAction
    add("family", choices=cases.FAMILIES)
    add("--cases", nargs="+", choices=cases.CASES, metavar="CASE", help="see cases.py")
    every = list(dict.fromkeys(side for some in cases.SIDES.values() for side in some))
    add("--sides", nargs="+", choices=every, default=every, metavar="SIDE", help=", ".join(every))
    add("--platform", choices=("cpu", "gpu"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on a GPU")
    add("--rounds", type=int, default=2, help="processes of each side")
    add("--seconds", type=float, default=3.0, help="of timed runs, per process")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--split", action=yes_or_no, default=True, help="also where the time goes, in one process")
    add("--weights", type=Path, help="folder that keeps weights and compiled programs")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="for the report")
    add("--add", action="store_true", help="to the figures that OUT holds")
    args = parser.parse_args(argv)
    family = cases.FAMILIES[args.family]
    args.cases = args.cases or cases.DEFAULT.get((args.family, args.platform), tuple(family))
    args.dtype = args.dtype or {"cpu": "float32", "gpu": "bfloat16"}[args.platform]
    if other := set(args.cases) - set(family):
        parser.error(f"no cases of {args.family}: {', '.join(sorted(other))}")
    if args.family == "first_stage" and (args.platform, args.dtype) != ("cpu", "float32"):
        parser.error("first stages are measured on CPUs in float32")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def about(args: argparse.Namespace) -> dict:
    """The machine, the command and the versions, with which a reader can judge or repeat it."""
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        **machine.facts(),
        "threads": args.threads,
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "platform": args.platform,
        "dtype": args.dtype,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def turns(args: argparse.Namespace, scripts: dict) -> Iterator[tuple[str, bool]]:
    """(side, whether it also measures where the time goes) of a case's processes, in order."""
    for i in range(args.rounds):
        for side in (s for s in scripts if s in args.sides):
            beside = side in cases.BESIDE
            if not beside or i == args.rounds // 2:
                yield side, args.split and i == args.rounds - 1 and not beside


def one_process(
    args: argparse.Namespace, name: str, side: str, split: bool, kept: Path, report: dict
) -> None:
    """Run one side of a case in a process of its own and add its figures to the report."""
    kind, figures_of = type(cases.CASES[name]), report["cases"].setdefault(name, {})
    script, variant = cases.SIDES[kind][side]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor")}
    environment |= {"JAX_PLATFORMS": "cpu"} if args.platform == "cpu" else {}
    how = (args.seconds, args.threads, args.dtype, args.platform)
    job = sides.Job(name, variant, *how, split, str(kept))
    done = sides.weights(job) / "done"
    if kind in cases.WEIGHTS and not done.exists():
        sides.run(cases.WEIGHTS[kind], dataclasses.replace(job, prepare=True), **environment)
        done.touch()
    figures, numbers = sides.run(script, job, **environment)
    process = {key: figures[key] for key in ("peak_gib", "load")}
    report["processes"].append({"case": name, "side": side, **process})
    entry = figures_of.setdefault(side, {"parts": {}})
    for part, new in figures["parts"].items():
        add(entry["parts"].setdefault(part, {"runs": []}), new)
    if numbers is not None:
        reference = kept / f"numbers_{name}_{args.platform}_{args.dtype}.npy"
        if not reference.exists():
            np.save(reference, numbers)
        apart = difference(args.family, np.load(reference), numbers)
        entry["difference"] = max(apart, entry.get("difference", 0.0))
    took = " ".join(f"{x['median']:9.4f}" for x in list(figures["parts"].values())[:2])
    print(f"{name:20} {side:26} {took} s", flush=True)


def add(part: dict, new: dict) -> None:
    """Add the figures of one process to those of a part; a process is kept as its medians."""
    part["runs"].append({key: new[key] for key in RUN})
    if "compile" in new:  # later processes find the program in the cache
        new["compile"] = max(new["compile"], part.get("compile", 0.0))
    part |= {key: value for key, value in new.items() if key not in RUN}


def difference(family: str, reference: np.ndarray, numbers: np.ndarray) -> float:
    """The largest difference, relative to the largest value; of losses: to each, or to 1."""
    size = np.abs(reference)
    size = np.maximum(size, 1.0) if family == "first_stage" else size.max()
    return float((np.abs(numbers - reference) / size).max())


if __name__ == "__main__":
    sys.exit(main())
