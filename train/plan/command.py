"""`ldm-train plan CONFIG --topology v5e:16x16`: memory and time of a run on absent devices."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ldm_jax import schema
from ldm_jax.runtime import flags, reading
from ldm_jax.schema import serialize
from ldm_jax.train.plan import reports, topologies
from ldm_jax.train.plan.programs import Target
from ldm_jax.train.plan.reports import Result

BESIDE_THE_PROGRAM = (
    "steps",
    "intervals",
    "max_to_keep",
    "max_bad_steps",
    "eval_batches",
    "num_samples",
    "seed",
    "deterministic",
    "init_from",
    "sample_prompts",
    "keep_base",
    "class_path",
)
"""Fields of a config that change no program."""
CHILD = (sys.executable, "-m", "ldm_jax.train.plan.programs")


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Plan a run on devices that this machine does not have: memory, time, collectives."""

    topology: Annotated[str, arg(metavar="KIND:CHIPS")]
    """v5e:4x4, v5p:4x4x4, v6e:16x16: chips of a TPU slice; gpu:8: GPUs, as fake CPU devices."""
    slices: int = 1
    """TPU slices; --mesh.dcn-data and the like lay the mesh over them."""
    cached: bool = False
    """Train from cached latents, as with --cache.path."""
    first_stage_config: Annotated[str, arg(metavar="CONFIG:STAGE")] = ""
    """CONFIG:STAGE that gives the shapes of the first stage; default: CONFIG:first_stage."""
    sample: bool = False
    """Plan the sampler instead of the training step."""
    images: int = 0
    """Images in one call of the sampler; default: one for each device, or each --space of them."""
    height: int = 0
    """Height of a sample in pixels; default: that of training."""
    width: int = 0
    """Width of a sample in pixels; default: that of training."""
    space: int = 1
    """Devices that share an image of the sampler."""
    search: bool = False
    """If it does not fit, compile changed configs until one fits, the cheapest change first."""
    out: flags.Dir = ""
    """Folder for results; default: plans, beside the compilation cache."""
    again: bool = False
    """Compile again even if there is a result."""
    minutes: float = 0
    """Stop a compiler that takes longer; 0: never."""


def plan(
    argv: Sequence[str],
    name: str,
    load: Callable[[str], schema.TrainConfig],
    child: Sequence[str] = CHILD,
) -> int:
    """Runs the command for the config `name`; exit code 0 if the program fits, else 1.

    child: the command that compiles; it is given the folder of a target.
    """
    config, options = parse(load(name), argv, name)
    target = target_of(config, options, name, load)
    topologies.check_compiler(target.topology)
    root = folder(options)
    result = compiled(target, root, options, child)
    sys.stdout.write(reports.render(target, result))
    fits = reports.fits(target, result.about)
    if options.search and not fits and target.topology.chip is not None:
        fits = search(target, result, root, options, child)
    return 0 if fits else 1


def parse(
    config: schema.TrainConfig, argv: Sequence[str], name: str
) -> tuple[schema.TrainConfig, PlanOptions]:
    """Parse argv; return the config with its overrides, and the options."""
    parts = (PlanOptions, config, flags.Common)
    asked, config, _ = flags.parse(argv, f"ldm-train plan {name}", PlanOptions.__doc__, *parts)
    return config, asked


def target_of(
    config: schema.TrainConfig,
    options: PlanOptions,
    name: str,
    load: Callable[[str], schema.TrainConfig],
) -> Target:
    """The target of the options. ValueError for options that do not fit each other."""
    topology = topologies.parse(options.topology, options.slices)
    if isinstance(config, schema.AutoencoderTrainConfig):
        if options.sample or options.cached:
            raise ValueError(f"{name} trains a first stage: it has no --sample and no --cached")
        return Target(config, topology)
    model = _first_stage(config, options, name, load)
    if topology.num_devices % options.space:
        raise ValueError(f"--space {options.space} does not divide {topology.num_devices} devices")
    if not options.sample:
        return Target(config, topology, model, options.cached or bool(config.cache.path))
    size = config.data.size
    return Target(
        config,
        topology,
        model,
        sample=True,
        images=options.images or topology.num_devices // options.space,
        height=options.height or size,
        width=options.width or size,
        space=options.space,
    )


def _first_stage(
    config: schema.LatentDiffusionTrainConfig,
    options: PlanOptions,
    name: str,
    load: Callable[[str], schema.TrainConfig],
) -> schema.FirstStageModelConfig:
    if config.first_stage.path == "identity":
        return schema.IdentityFirstStageConfig(config.data.channels)
    file = re.sub(r"(?<=.):[^/:]*$", "", name)
    wanted = options.first_stage_config or f"{file}:first_stage"
    try:
        recipe = load(wanted)
    except ValueError as error:
        raise ValueError(
            f"no first stage for {name}: {error}; name one by --first-stage-config, as"
            " first_stages:kl-f8"
        ) from error
    if not isinstance(recipe, schema.AutoencoderTrainConfig):
        raise ValueError(f"--first-stage-config {wanted}: is no config of a first stage")
    return recipe.model


# --- cache ----------------------------------------------------------------------------------------


def folder(options: PlanOptions) -> Path:
    """Folder of the results."""
    if options.out:
        return Path(options.out).expanduser().absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ldm_jax" / "xla"
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache))).absolute() / "plans"


def shaped_by(target: Target) -> dict[str, Any]:
    """All that a program depends on beside versions: shapes and kinds in the config, devices.

    The source code is not included: after a change to it, compile with --again.
    """
    values = target.to_json()
    for field in BESIDE_THE_PROGRAM:
        values["config"].pop(field, None)
    values["config"]["data"].pop("source", None)
    return json.loads(json.dumps(values | {"config": _chosen(values["config"])}))


def key(target: Target) -> str:
    """Name of a target's result: a hash of `shaped_by` and of the versions."""
    values = shaped_by(target) | {"versions": topologies.versions(target.topology)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _chosen(values: Any) -> Any:
    """The values of a config that differ from the defaults, so that a new option changes no key."""
    if not isinstance(values, dict):
        return values
    defaults = serialize.to_dict(getattr(schema, values["class"])())
    kept = {name: _chosen(x) for name, x in values.items() if x != defaults.get(name)}
    return {**kept, "class": values["class"]}


def read(path: Path) -> tuple[Target, Result]:
    """A kept result. FileNotFoundError if there is none."""
    values = reading.read_object(path / "result.json")
    target = Target.from_json(values["request"])
    text = path / "program.txt.gz"
    done = "failed" not in values["about"]
    return target, Result(
        values["about"], gzip.decompress(text.read_bytes()).decode() if done else None
    )


def compiled(
    target: Target, root: Path, options: PlanOptions, child: Sequence[str] = CHILD
) -> Result:
    """The result of a target, from `root` if it is kept there.

    A result that does not fit and a crash of the compiler are kept too; a stopped compiler is not.
    """
    path = root / key(target)
    if (path / "result.json").exists() and not options.again:
        return read(path)[1]
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=root))
    (work / "request.json").write_text(json.dumps(target.to_json()))
    sys.stderr.write(f"compiling for {target.topology} in {work}; this takes minutes ...\n")
    about = run_child(target, work, options.minutes, child)
    if about.get("failed", {}).get("kind", "") not in ("", "memory", "crashed"):
        return Result(about, None)
    if "failed" in about:
        about["failed"]["log"] = str(path / "log")
    values = {
        "request": target.to_json(),
        "versions": topologies.versions(target.topology),
        "about": about,
    }
    (work / "result.json").write_text(json.dumps(values))
    return Result(about, keep(work, path))


def keep(work: Path, path: Path) -> str | None:
    """Move a finished result to its place; returns the program's text."""
    path.mkdir(exist_ok=True)
    text = None
    if (work / "program.txt.gz").exists():
        os.replace(work / "program.txt.gz", path / "program.txt.gz")
        text = gzip.decompress((path / "program.txt.gz").read_bytes()).decode()
    os.replace(work / "log", path / "log")
    os.replace(work / "result.json", path / "result.json")  # last: it marks a complete result
    for left in work.iterdir():
        left.unlink()
    work.rmdir()
    return text


# --- the compiler's process -----------------------------------------------------------------------


def run_child(target: Target, work: Path, minutes: float, child: Sequence[str] = CHILD) -> dict:
    """traced.json and compiled.json of a target; "failed" describes a failure."""
    environment = os.environ | topologies.environment(target.topology)
    timed_out = False
    with (work / "log").open("w") as log, _ending_with_us():
        process = subprocess.Popen([*child, str(work)], env=environment, stdout=log, stderr=log)
        try:
            code = process.wait(minutes * 60 or None)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:
                process.kill()
                code = process.wait()
    about = {}
    for name in ("traced", "compiled"):
        if (work / f"{name}.json").exists():
            about |= json.loads((work / f"{name}.json").read_text())
    if timed_out:
        how = f"stopped after {minutes:g} minutes (--minutes)"
        return about | {"failed": {"kind": "timeout", "how": how}}
    if code:
        return about | {"failed": how_it_failed(code, work)}
    return about


@contextlib.contextmanager
def _ending_with_us() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the compiler's process ends too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def how_it_failed(code: int, work: Path) -> dict[str, str]:
    """{"kind", "how", "log"} of a process that ended with `code`. ValueError for an error that is
    the target's: kinds are "memory", "crashed", "killed" and "error"."""
    failure = {"log": str(work / "log")}
    if (work / "failed.json").exists():
        error = json.loads((work / "failed.json").read_text())
        message = " ".join(error["message"].split())
        if error["error"] in ("ValueError", "ImportError"):
            raise ValueError(message)
        memory = "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message
        how = f"{error['error']}: {message[:600]}"
        return failure | {"kind": "memory" if memory else "error", "how": how}
    if code < 0:
        name = signal.Signals(-code).name
        kind = "killed" if name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP") else "crashed"
        return failure | {"kind": kind, "how": f"the compiler ended by {name}"}
    lines = (work / "log").read_text(errors="replace").strip().splitlines()
    how = f"exit code {code}: {lines[-1][:300] if lines else 'it said nothing'}"
    return failure | {"kind": "error", "how": how}


def search(
    target: Target, result: Result, root: Path, options: PlanOptions, child: Sequence[str]
) -> bool:
    """Compile changed configs until one fits; returns True if one did."""
    if "resident" not in result.about:
        return False
    for fields, text in reports.changes(target, result.about):
        config = dataclasses.replace(target.config, **fields)
        other = dataclasses.replace(target, config=config)
        sys.stdout.write(f"\n--search: {text}\n")
        compiled_other = compiled(other, root, options, child)
        sys.stdout.write(reports.render(other, compiled_other))
        if reports.fits(other, compiled_other.about):
            return True
    return False
