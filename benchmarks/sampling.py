"""Times sampling with Stable Diffusion v1 here against diffusers on torch, eager and compiled.

    python benchmarks/sampling.py --out benchmarks/results

From the text encoder's output to the image: DDIM steps, then the decoder; same random weights (one
folder of diffusers), inputs and threads. Every measurement is a process of its own, one after the
other: ours, eager, compiled, ours, ... and medians count. Writes OUT/sampling_PLATFORM.json and
.md; with --add to what is there. See README.md beside it.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import sampling_cases
import sampling_report
import sides
import unet_vs_diffusers

HERE = Path(__file__).parent
SIDES = sampling_report.SIDES


def main() -> int:
    args = arguments()
    name = f"sampling_{args.platform}"
    stored = args.out / f"{name}.json"
    report = {"machines": [], "cases": {}, "operations": {}}
    if args.add and stored.exists():
        report = json.loads(stored.read_text())
    report["machines"].append(unet_vs_diffusers.machine(args))

    def write() -> None:
        stored.write_text(json.dumps(report, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(sampling_report.markdown(report, args.platform))

    with contextlib.ExitStack() as stack:
        kept = args.weights or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for round_ in range(args.rounds):
            for case in args.cases:
                reference = None
                for side in args.sides:
                    last = round_ == args.rounds - 1
                    figures, image = one_process(args, side, case, kept, last and args.split)
                    reference = image if reference is None else reference
                    difference = np.abs(image - reference).max() / np.abs(reference).max()
                    add(report["cases"].setdefault(case, {}), side, figures, float(difference))
                    write()
            if args.operations:
                for side in args.sides:
                    if side != sampling_report.COMPILED:  # whose attention is that of eager torch
                        figures, _ = one_process(args, side, sampling_cases.OPERATIONS, kept, False)
                        report["operations"].setdefault(side, []).append(figures)
                write()
    return 0 if sampling_report.agree(report) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--cases", nargs="*", choices=sampling_cases.CASES)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed runs, per process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--weights", type=Path, help="folder that keeps weights and programs")
    parser.add_argument("--add", action="store_true", help="to the figures that OUT holds")
    yes_or_no = argparse.BooleanOptionalAction
    parser.add_argument("--split", action=yes_or_no, default=True, help="time by kind of operation")
    parser.add_argument(
        "--operations", action=yes_or_no, default=True, help="attention and products alone"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.dtype = args.dtype or {"cpu": "float32", "gpu": "bfloat16"}[args.platform]
    args.cases = sampling_cases.DEFAULT[args.platform] if args.cases is None else args.cases
    return args


def one_process(
    args: argparse.Namespace, side: str, name: str, kept: Path, split: bool
) -> tuple[dict, np.ndarray | None]:
    """(figures, image) of a case, or of the operations alone, in a process of its own."""
    script, variant = SIDES[side]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor")}
    if args.platform == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    weights = kept
    if name != sampling_cases.OPERATIONS:
        weights = write_weights(kept, sampling_cases.CASES[name])
    job = sampling_cases.Job(
        case=name,
        attention_of=sampling_report.attention_of(args.platform, args.cases),
        weights=str(weights),
        variant=variant,
        seconds=args.seconds,
        threads=args.threads,
        dtype=args.dtype,
        platform=args.platform,
        split=split,
        cache=str(kept / "xla"),
    )
    figures, arrays = sides.run(script, job, **environment)
    image = arrays.get("image")
    if image is not None:
        took = [statistics.median(figures[part]["runs"]) for part in ("steps", "decode")]
        print(f"{name:12} {side:22} {took[0]:8.3f} {took[1]:8.3f} s", flush=True)
    return figures, image


def write_weights(kept: Path, case: sampling_cases.Case) -> Path:
    """The folder with the weights of a case, written by a process of its own if it is not there."""
    folder = kept / f"weights_{case.model_channels}_{case.decoder_channels}"
    if not (folder / "vae" / "config.json").exists():
        widths = [str(case.model_channels), str(case.decoder_channels)]
        script = [sys.executable, str(HERE / "sampling_torch.py"), str(folder), *widths]
        subprocess.run(script, check=True)
    return folder


def add(case: dict, side: str, figures: dict, difference: float) -> None:
    """Adds one process's figures to a case."""
    entry = case.setdefault(side, {"steps": [], "decode": [], "peak_gib": [], "load": []})
    for key in ("steps", "decode"):
        entry[key].append(figures[key]["runs"])
        for one in ("compile", "flops", "split"):
            if one in figures[key]:
                before = entry.setdefault(one, {}).get(key, 0.0)
                # later processes find the program in the cache
                new = figures[key][one]
                entry[one][key] = max(new, before) if one == "compile" else new
    entry["peak_gib"].append(figures["peak_gib"])
    entry["load"].append(figures["load"])
    entry["difference"] = max(difference, entry.get("difference", 0.0))


if __name__ == "__main__":
    sys.exit(main())
