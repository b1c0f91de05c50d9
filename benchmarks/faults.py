"""Breaks real runs of two hosts in every way of `faults_cases.CASES` and compares their ends.

    python benchmarks/faults.py --out benchmarks/results
    python benchmarks/faults.py --out benchmarks/results --cases kill_one sigterm

Every host is an `ldm-train` process of two CPU devices, joined by jax.distributed over Gloo on
127.0.0.1, with a supervisor of its own. A case has passed if nothing hung, if no more steps were
made again than since the last checkpoint, and if the last state has every bit of the run that was
left alone. Results are added to OUT/faults.json, and OUT/faults.md is written anew.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import tempfile
import time
import traceback
from pathlib import Path

import faults_cases
import faults_cluster
import faults_input
import faults_report
import jax
from faults_cluster import Cluster

SPIKES = ["--spikes.factor", "10", "--spikes.warmup", "20"]
LONG = 600  # steps of the run with many kills
DISK = 24  # MiB of the file system that is filled


def main() -> int:
    args = arguments()
    jax.config.update("jax_platforms", "cpu")
    stored = args.out / "faults.json"
    report = json.loads(stored.read_text()) if stored.exists() else {"cases": {}}
    report["machine"] = machine()
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "xla"))
        config = faults_input.prepare(work)
        for name in args.cases:
            report["cases"][name] = one_case(work, config, name)
            faults_cluster.save_json(stored, report)
            (args.out / "faults.md").write_text(faults_report.markdown(report))
            print(name, json.dumps(report["cases"][name]), flush=True)
    return 0 if all(case["passed"] for case in report["cases"].values()) else 1


def one_case(work: Path, config: str, name: str) -> dict:
    """Figures of a case, and whether it passed."""
    what, stage, supervised, case = faults_cases.CASES[name]
    flags = flags_of(work, config, stage)
    stage_config = f"{config}:{'clean' if stage == 'long' else stage}"
    begin, found = time.time(), {"what": what}
    try:
        undisturbed = reference(work, stage_config, stage, flags)
        folder = work / name
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.ExitStack() as stack:
            if name == "disk_full":
                stack.enter_context(faults_cases.small_disk(folder, DISK))
            folder.mkdir(exist_ok=True)
            with Cluster(folder / "run", stage_config, flags, supervised) as cluster:
                try:
                    found |= case(cluster)
                finally:
                    found["said"] = cluster.said(*faults_cases.GONE)[:6]
                    found["steps again"] = cluster.steps_again()
                    for log in cluster.logs:
                        shutil.copy(log, work / f"{name}.{log.name}")
            found["differs"] = faults_cluster.differences(folder / "run", undisturbed)
        found["passed"] = not found["differs"] and found["codes"] == [0, 0]
        found["passed"] &= all(n <= 2 * faults_input.SAVE for n in found["steps again"])
    except (faults_cluster.Hung, OSError, ValueError, AssertionError) as error:
        traceback.print_exc()
        found |= {"passed": False, "error": str(error)[-1500:]}
    return {**found, "took": time.time() - begin}


def flags_of(work: Path, config: str, stage: str) -> list[str]:
    """Flags of a stage's runs."""
    if stage in ("nan", "spike"):
        flags = ["--cache.path", faults_input.latents(work, config, stage)]
        return [*flags, *(SPIKES if stage == "spike" else [])]
    return ["--steps", str(LONG)] if stage == "long" else []


def reference(work: Path, config: str, stage: str, flags: list[str]) -> Path:
    """The run of two hosts that nobody disturbs, made once."""
    run = work / "undisturbed" / stage
    if not run.exists():
        draft = work / "undisturbed" / f"{stage}.part"
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        with Cluster(draft, config, flags, supervised=False) as cluster:
            begin = time.monotonic()
            cluster.start()
            if cluster.codes() != [0, 0]:
                raise OSError(f"the undisturbed run failed: {cluster.tail()}")
            print(f"undisturbed {stage}: {time.monotonic() - begin:.0f} s", flush=True)
        draft.rename(run)
    return run


def machine() -> dict:
    """What the figures were taken on."""
    return {
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder to keep, with runs to go on from")
    parser.add_argument("--cases", nargs="+", default=list(faults_cases.CASES))
    args = parser.parse_args()
    unknown = sorted(set(args.cases) - set(faults_cases.CASES))
    if unknown:
        parser.error(f"{unknown[0]} is not one of {', '.join(faults_cases.CASES)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
