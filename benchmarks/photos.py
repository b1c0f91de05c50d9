"""First stages on photos with and without the GAN term, and a diffusion model on one of them.

    pip install -e '.[demo]'
    python benchmarks/photos.py --work runs/photos --out benchmarks/results --docs docs/pictures
    python benchmarks/photos.py ... --cases vq_f8             # a part; what is there is kept
    python benchmarks/photos.py ... --cases                   # only the report, of what is there

Everything goes through `ldm-train` and `ldm-eval`. A first stage is trained to `disc_start`, where
both ways are the same to the bit; its run is then copied, and goes on once with the discriminator
and once without. `ldm` trains on the latents of `kl_f4`, from images and from a cache. Runs stay in
WORK and go on where they were stopped. Writes OUT/photos.md, OUT/photos.json and pictures in DOCS.
"""

import argparse
import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import machine
import photos_report

from ldm_jax.configs import photos
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.sample.evaluate import report
from ldm_jax.schema import serialize

STAGES = photos_report.STAGES
WAYS = photos_report.WAYS
SEEDS = (0, 1, 2)  # of the diffusion model


def main() -> int:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    started = machine.facts() | report.versions()
    for case in args.cases:
        if case == "ldm":
            ldm(args)
        else:
            stage(args, case)
        note(args, started)
    photos_report.write(args.work, args.out, args.docs)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--docs", type=Path, required=True, help="folder for the pictures")
    cases = (*STAGES, "ldm")
    parser.add_argument("--cases", nargs="*", choices=cases, default=list(cases))
    parser.add_argument("--steps", type=int, help="of a first stage; default: as in the config")
    parser.add_argument("--ldm-steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=512, help="of each diffusion model")
    parser.add_argument("--extra", default="", help="more flags of every first stage's training")
    return parser.parse_args()


# --- first stages --------------------------------------------------------------------------------


def stage(args: argparse.Namespace, name: str) -> None:
    """Trains `name` to disc_start, copies the run, trains both ways on, and measures both."""
    steps, start = budget(args, name)
    shared, copied = (args.work / f"{name}_{way}" for way in ("gan", "plain"))
    if not finished(shared, start):
        train(args, name, shared, start)
    if not finished(copied, start):
        fork(shared, copied)
    for way in WAYS:
        run = args.work / f"{name}_{way}"
        if not finished(run, steps):
            train(args, name, run, steps)
        measure(args, run, steps)


def budget(args: argparse.Namespace, name: str) -> tuple[int, int]:
    """(steps, disc_start) of a first stage."""
    config = photos.get_config(name)
    if args.steps is None:
        return config.steps, config.loss.disc_start
    return args.steps, args.steps * config.loss.disc_start // config.steps


def train(args: argparse.Namespace, name: str, run: Path, until: int) -> None:
    steps, start = budget(args, name)
    factor = 0.0 if run.name.endswith("plain") else 1.0
    command(
        args.work,
        run.name,
        *("train.main", f"photos:{name}", "--workdir", run, "--steps", until),
        *("--optimizer.decay-steps", steps),
        *("--loss.disc-start", start, "--loss.disc-factor", factor),
        *("--intervals.evaluate", max(1, steps // 10), "--intervals.save", max(1, steps // 4)),
        *args.extra.split(),
    )


def fork(source: Path, run: Path) -> None:
    """Copies a run that stands at disc_start, without the GAN term from there on.

    Until then its factor is 0 in both. `ldm-train` would refuse another factor for the same run.
    """
    steps = checkpoint.saved_steps(source)
    config = rundir.read_config(source)
    if steps[-1] != config.loss.disc_start:
        raise ValueError(f"{source}: stands at {steps[-1]}; remove it, or copy it at disc_start")
    draft = run.with_name(f".{run.name}")  # under its own name it is whole
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    loss = dataclasses.replace(config.loss, disc_factor=0.0)
    (draft / "config.json").write_text(serialize.to_json(dataclasses.replace(config, loss=loss)))
    draft.rename(run)


def finished(run: Path, steps: int) -> bool:
    return run.exists() and max(checkpoint.snapshot_steps(run), default=0) >= steps


def measure(args: argparse.Namespace, run: Path, steps: int) -> None:
    """What `ldm-eval reconstruct` says of all held-out crops."""
    out = args.work / "eval" / run.name
    if not (out / "result.json").exists():
        command(
            args.work,
            f"eval/{run.name}",
            *("sample.evaluate.main", "reconstruct", "--model", run, "--out", out, "--step", steps),
            *("--features", "random", "--lpips-vgg", "random"),
        )


# --- diffusion model -----------------------------------------------------------------------------


def ldm(args: argparse.Namespace) -> None:
    """The same budget from images and from a cache, three seeds each, and samples of all."""
    data = ("--data.source.stride", 24)
    shared = (
        *("--first-stage.path", args.work / "kl_f4_gan", "--first-stage.scale-images", 256, *data),
        *("--unet.model-channels", 32, "--batch-size", 16, "--eval-batches", 8),
    )
    cache = args.work / "cache"
    if not cache_complete(cache):
        flags = ("--batch-size", 32, "--first-stage.path", args.work / "kl_f4_gan", *data)
        command(args.work, "encode", "train.main", "encode", "photos", "--workdir", cache, *flags)
    for seed in SEEDS:
        for way in photos_report.SOURCES:
            run = args.work / f"ldm_{way}_{seed}"
            steps = args.ldm_steps
            if not finished(run, steps):
                command(
                    args.work,
                    run.name,
                    *("train.main", "photos", "--workdir", run, "--seed", seed, *shared),
                    *(("--cache.path", cache) if way == "cache" else ()),
                    *("--steps", steps, "--optimizer.decay-steps", steps),
                    *("--intervals.sample", 0, "--intervals.save", steps),
                    *("--intervals.evaluate", max(1, steps // 4)),
                )
            draw(args, run)


def cache_complete(path: Path) -> bool:
    about = path / "cache.json"
    return about.exists() and json.loads(about.read_text())["complete"]


def draw(args: argparse.Namespace, run: Path) -> None:
    """Samples of a run against the crops that it was trained on."""
    out = args.work / "eval" / run.name
    if not (out / "result.json").exists():
        command(
            args.work,
            f"eval/{run.name}",
            *("sample.evaluate.main", "samples", "--model", run, "--out", out),
            *("--count", args.samples, "--steps", 25, "--features", "random", "--batch-size", 64),
            "--npz",
        )


# --- processes -----------------------------------------------------------------------------------


def command(work: Path, name: str, module: str, *flags: object) -> None:
    """Runs a command of the package and adds its seconds to WORK/seconds.json under `name`.

    RuntimeError if it fails; what it says is in WORK/NAME.log.
    """
    line = [sys.executable, "-m", f"ldm_jax.{module}", *map(str, flags)]
    log = work / "logs" / f"{name.replace('/', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(time.strftime("%H:%M:%S"), " ".join(line[2:]), flush=True)
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("a") as file:
        code = subprocess.run(line, stdout=file, stderr=file, check=False).returncode
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime,
    }
    path = work / "seconds.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    before = kept.get(name, {})
    kept[name] = {key: round(before.get(key, 0) + x, 1) for key, x in spent.items()}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    if code:
        raise RuntimeError(f"{name}: ended with {code}; see {log}")


def note(args: argparse.Namespace, started: dict) -> None:
    """Keeps where and by which commands the runs were made, for the report."""
    path = args.work / "machines.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    if started not in kept:
        path.write_text(json.dumps([*kept, started], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
