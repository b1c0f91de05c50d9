"""`ldm-train [plan | encode | pack] CONFIG[:STAGE] --workdir DIR [--field.sub value ...]`."""

import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import jax
import tyro

from ldm_jax import configs, schema
from ldm_jax.runtime import checkpoint, cli
from ldm_jax.runtime.log import LOG
from ldm_jax.train.run import logs, supervisor, watchdog


def load_config(name: str) -> schema.TrainConfig:
    """The config of NAME[:STAGE]: a file in `configs/`, or a path to one with get_config(stage)."""
    file, _, stage = name.partition(":")
    module = _from_path(Path(file)) if file.endswith(".py") else _by_name(file)
    return module.get_config(stage) if stage else module.get_config()


def _by_name(name: str) -> ModuleType:
    known = available()
    if name not in known:
        raise ValueError(
            f"config {name!r} is not one of {', '.join(known)}, nor a path to a .py file"
        )
    return importlib.import_module(f"ldm_jax.configs.{name}")


def _from_path(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no get_config(stage)")
    return module


def available() -> list[str]:
    """Names of the configs that come with the package."""
    folder = Path(configs.__file__).parent
    return sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")


def parse(config: Any, argv: Sequence[str], program: str) -> tuple[str, Any]:
    """(workdir, config with the overrides of argv); tyro refuses what it does not know."""
    command = dataclasses.make_dataclass(
        "Command",
        [
            (
                "workdir",
                Annotated[
                    str, tyro.conf.arg(help="Run directory, made or resumed; may be gs://...")
                ],
            ),
            (
                "config",
                Annotated[type(config), tyro.conf.arg(name="")],
                dataclasses.field(default=config),
            ),
        ],
    )
    options = (
        "Also: --debug (tracebacks), --no-compilation-cache (compile everything anew),"
        " --distributed ADDRESS:PORT,PROCESSES,INDEX (one process of several; Cloud TPU, SLURM,"
        " Open MPI and Kubernetes are found out without it) or off (alone), --restart on-failure"
        " [--max-restarts 5] [--restart-delay 5]"
        " (started again when it fails, so often without a new checkpoint; seconds, doubled)."
    )
    parsed = tyro.cli(
        command,
        args=list(argv),
        prog=program,
        description=options,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return parsed.workdir, parsed.config


def be_deterministic() -> None:
    """Has XLA take only what repeats bit for bit, and says what that means on these devices."""
    flags = os.environ.get("XLA_FLAGS", "")  # which XLA reads when the first device is asked for
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    platform = jax.devices()[0].platform
    if platform == "gpu":
        LOG.info(
            "deterministic: XLA leaves out faster algorithms that do not repeat bit for bit"
            " (scatter-adds, some convolutions); the cost is the steps/s that the same run"
            " without --deterministic has more"
        )
    else:
        LOG.info(
            "deterministic: costs nothing on %s, where every step repeats bit for bit", platform
        )


def train(argv: Sequence[str]) -> int:
    """Runs the recipe that the config's class asks for."""
    watchdog.adopt()
    with logs.kept(), watchdog.errors_told():
        return _train(argv)


def _train(argv: Sequence[str]) -> int:
    argv = cli.enable_compilation_cache(argv)
    if argv[:1] == ["plan"]:
        return _plan(argv[1:])
    does = argv[0] if argv[:1] in (["encode"], ["pack"]) else ""
    name, rest = cli.split_first(
        argv[bool(does) :],
        f"ldm-train {does}".rstrip(),
        "CONFIG[:STAGE]",
        f"one of {', '.join(available())}, or a .py file",
    )
    rest = cli.join_processes(rest)
    if does == "pack":
        from ldm_jax.train.prepare import pack

        per_shard, rest = pack.split_options(rest)
        workdir, config = parse(load_config(name), rest, f"ldm-train pack {name}")
        return pack.pack(config.data, workdir, per_shard)
    workdir, config = parse(load_config(name), rest, f"ldm-train {name}")
    if config.deterministic:
        be_deterministic()
    if does == "encode":
        if not isinstance(config, schema.LatentDiffusionTrainConfig):
            raise ValueError(f"{name} trains a first stage; encode takes a config of the model")
        from ldm_jax.train.prepare import encode

        return encode.encode(config, workdir)
    if isinstance(config, schema.AutoencoderTrainConfig):
        from ldm_jax.train import autoencoder as recipe
    else:
        from ldm_jax.train import ldm as recipe
    index, count, start = watchdog.this_start()
    with watchdog.watching(
        checkpoint.absolute(workdir), config.watch, index, count, start
    ) as watch:
        code = recipe.train(config, workdir, watch)
        watch.state = "stopped" if code == cli.INTERRUPTED else "done"
    return code


def _plan(argv: Sequence[str]) -> int:
    from ldm_jax.train.plan import command

    configs_known = f"one of {', '.join(available())}, or a .py file"
    name, rest = cli.split_first(argv, "ldm-train plan", "CONFIG[:STAGE]", configs_known)
    return command.plan(rest, name, load_config)


def restart_on_failure(argv: Sequence[str]) -> int:
    """Trains in a process of its own, started again when it fails, if `--restart` asks for it."""
    policy, rest = supervisor.split(argv)
    if policy is None:
        return train(rest)
    return supervisor.supervise([sys.executable, "-m", "ldm_jax.train.main", *rest], policy)


def main() -> None:
    """Entry point of `ldm-train`."""
    code = cli.run("ldm-train", restart_on_failure, sys.argv[1:])
    if code not in (0, cli.INTERRUPTED) and jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # the others come to no barrier any more
    sys.exit(code)


if __name__ == "__main__":
    main()
