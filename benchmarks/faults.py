"""Breaks real runs of two hosts in every way of `faults_cases.RUNS` and compares their ends.

    python benchmarks/faults.py --out benchmarks/results
    python benchmarks/faults.py --out benchmarks/results --cases kill_one sigterm

Every host is an `ldm-train` process of two CPU devices, joined by jax.distributed over Gloo on
127.0.0.1, with a supervisor of its own. The cases of one entry of `faults_cases.RUNS` are done to
one run, one after the other. A case has passed if nothing hung, if no more steps were made again
than since the last checkpoint, and if the last state has every bit of the run that was left alone.
Results are added to OUT/faults.json, and OUT/faults.md is written anew.
"""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import faults_cases
import faults_cluster
import faults_input
import faults_report
import jax
import machine
from faults_cluster import Cluster

from ldm_jax.runtime import checkpoint

SPIKES = ["--spikes.factor", "10", "--spikes.warmup", "6"]
DISK = 32  # MiB of the file system that is filled


def main() -> int:
    args = arguments()
    jax.config.update("jax_platforms", "cpu")
    stored = args.out / "faults.json"
    report = json.loads(stored.read_text()) if stored.exists() else {"cases": {}}
    report["machine"] = machine.facts() | {"load": os.getloadavg()[0], "jax": jax.__version__}
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "xla"))
        config = faults_input.prepare(work)
        for name, run in faults_cases.RUNS.items():
            cases = [case for case in run.cases if case in args.cases]
            if cases:
                report["cases"] |= one_run(work, config, name, cases)
                faults_cluster.save_json(stored, report)
                (args.out / "faults.md").write_text(faults_report.markdown(report))
    return 0 if all(case["passed"] for case in report["cases"].values()) else 1


def one_run(work: Path, config: str, name: str, cases: list[str]) -> dict:
    """{case: figures} of one run that all these cases are done to, and whether they passed."""
    run = faults_cases.RUNS[name]
    found = {case: {"what": run.cases[case][0], "passed": False} for case in cases}
    flags = ["--steps", str(run.steps)]
    if run.stage == "latents":
        flags += ["--cache.path", faults_input.latents(work, config), *SPIKES]
    stage = f"{config}:{run.stage}"
    folder = work / name
    end = {}
    try:
        undisturbed = reference(work, stage, f"{run.stage}_{run.steps}", flags)
        with contextlib.ExitStack() as stack:
            if "disk_full" in cases:
                stack.enter_context(faults_cases.small_disk(folder, DISK))
            shutil.rmtree(folder / "run", ignore_errors=True)
            folder.mkdir(exist_ok=True)
            cluster = stack.enter_context(
                Cluster(folder / "run", work / f"{name}.logs", stage, flags, run.supervised)
            )
            cluster.start()
            for case in cases:
                one_case(cluster, run.cases[case][1], run.steps, found[case])
                print(case, json.dumps(found[case]), flush=True)
            end = {"codes": cluster.codes()}
            end["differs"] = faults_cluster.differences(folder / "run", undisturbed)
    except (faults_cluster.Hung, OSError, ValueError, AssertionError) as error:
        traceback.print_exc()
        end |= {"error": str(error)[-1500:]}
    print(name, json.dumps(end), flush=True)
    passed = end.get("codes") == [0] * faults_cluster.HOSTS and end.get("differs") == []
    for case in found.values():
        again = all(n <= 2 * faults_input.SAVE for n in case.get("steps again", []))
        case |= {**end, "passed": passed and again and "error" not in case}
    return found


def one_case(
    cluster: Cluster, function: Callable[[Cluster], dict], last: int, found: dict[str, object]
) -> None:
    """Does a case to a run that has a new checkpoint since the one before, and adds the figures."""
    saved = checkpoint.latest_step(cluster.run) or 0
    cluster.at_step(min(saved + faults_input.SAVE + 2, last - 5))
    before, restarts = cluster.marks(), len(cluster.steps_again())
    try:
        found |= function(cluster)
    except (faults_cluster.Hung, OSError, AssertionError) as error:  # the others come all the same
        traceback.print_exc()
        found["error"] = str(error)[-1500:]
        if cluster.ended():
            cluster.start()
    found["said"] = cluster.said(before, *faults_cases.SAID)[:6]
    found["steps again"] = cluster.steps_again()[restarts:]


def reference(work: Path, config: str, name: str, flags: list[str]) -> Path:
    """The run of two hosts that nobody disturbs, made once."""
    run = work / "undisturbed" / name
    if not run.exists():
        draft = work / "undisturbed" / f"{name}.part"
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        with Cluster(draft, work / f"{name}.logs", config, flags, supervised=False) as cluster:
            begin = time.monotonic()
            cluster.start()
            if cluster.codes() != [0, 0]:
                raise OSError(f"the undisturbed run failed: {cluster.tail()}")
            print(f"undisturbed {name}: {time.monotonic() - begin:.0f} s", flush=True)
        draft.rename(run)
    return run


def arguments() -> argparse.Namespace:
    """Options of the command line."""
    known = [case for run in faults_cases.RUNS.values() for case in run.cases]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder to keep, with runs to go on from")
    parser.add_argument("--cases", nargs="+", default=known)
    args = parser.parse_args()
    unknown = sorted(set(args.cases) - set(known))
    if unknown:
        parser.error(f"{unknown[0]} is not one of {', '.join(known)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
