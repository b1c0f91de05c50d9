"""Train a model, check its data or write them once, or plan its run.

`ldm-train [check | encode | pack | plan] CONFIG[:STAGE] --workdir DIR [--field.sub value ...]`
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import jax
from tyro.conf import arg

from ldm_jax import configs, data, schema
from ldm_jax.runtime import checkpoint, cli, flags
from ldm_jax.runtime.log import LOG
from ldm_jax.train.run import early, logs, next_steps, supervisor, watchdog


@dataclasses.dataclass(frozen=True)
class Train:
    """Train the model of a config in a run directory, or go on where the run stopped."""

    workdir: flags.Dir
    """Run directory, made or resumed; may be gs://..."""


@dataclasses.dataclass(frozen=True)
class Encode:
    """Write the latents of a data set once; a run reads them with --cache.path."""

    workdir: flags.Dir
    """Folder for the latents, new or to be continued; may be gs://..."""


@dataclasses.dataclass(frozen=True)
class Pack:
    """Pack a folder of images into few large files, which network storage reads faster."""

    workdir: flags.Dir
    """Folder for the packed images, new or to be continued; may be gs://..."""
    records_per_shard: int = 4096
    """Images in a file at most."""


@dataclasses.dataclass(frozen=True)
class Check:
    """Read every record of a data set once: what is broken, missing or too small, and how many."""


RECIPES = {
    schema.AutoencoderTrainConfig: "ldm_jax.train.autoencoder",
    schema.LatentDiffusionTrainConfig: "ldm_jax.train.ldm",
    schema.FinetuneTrainConfig: "ldm_jax.train.finetune.full",
    schema.LoRATrainConfig: "ldm_jax.train.finetune.loop",
    schema.DreamBoothTrainConfig: "ldm_jax.train.finetune.loop",
    schema.TextualInversionTrainConfig: "ldm_jax.train.finetune.loop",
}
"""{class of a config: the module with its `train(config, workdir, watch)`}."""


@dataclasses.dataclass(frozen=True)
class Images:
    """The folder that a config may read before its options are parsed."""

    path: Annotated[str, arg(name="data.source.path")] = ""


@dataclasses.dataclass(frozen=True)
class Base:
    """The trained model whose config is read before the options are parsed, and the run."""

    init_from: str = ""
    workdir: str = ""


def load_config(name: str, argv: Sequence[str] = ()) -> schema.TrainConfig:
    """The config of NAME[:STAGE]: a file in `configs/`, or a path to one with get_config(stage).

    A get_config(stage, facts) is given the facts of the images that --data.source.path in `argv`
    names, so that channels and classes need no options. A diffusion model takes over the config of
    the model that --init-from names, at a resume that of its run.
    """
    file, _, stage = name.partition(":")
    module = _from_path(Path(file)) if file.endswith(".py") else _by_name(file)
    given = {"stage": stage} if stage else {}
    if "facts" in inspect.signature(module.get_config).parameters:
        images, _ = flags.parse_known(argv, "ldm-train", Images)
        given |= {"facts": data.facts_of(images.path)} if images.path else {}
    config = module.get_config(**given)
    if not isinstance(config, schema.LatentDiffusionTrainConfig):
        return config
    from ldm_jax.train.ldm import initial

    base, _ = flags.parse_known(argv, "ldm-train", Base)
    return initial.adopt(config, base.init_from, base.workdir)


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


def available() -> dict[str, Path]:
    """Files of the configs that come with the package, by name."""
    paths = sorted(Path(configs.__file__).parent.glob("*.py"))
    return {path.stem: path for path in paths if path.stem != "__init__"}


def parse(config: Any, argv: Sequence[str], program: str) -> tuple[str, Any]:
    """Parse the options of a training run; return its run directory and the config with them."""
    parts = (Train, config, supervisor.Restart, flags.Process)
    run, config, *_ = flags.parse(argv, program, Train.__doc__, *parts)
    return run.workdir, config


def be_deterministic() -> None:
    """Restrict XLA to bit-reproducible algorithms, and log the cost on these devices."""
    given = os.environ.get("XLA_FLAGS", "")  # read by XLA when the first device is initialized
    os.environ["XLA_FLAGS"] = f"{given} --xla_gpu_deterministic_ops=true".strip()
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
    """Run the sub-command, or the recipe that the class of the config asks for."""
    watchdog.adopt()
    with logs.kept(), watchdog.errors_told():
        process, argv = flags.parse_known(argv, "ldm-train", flags.Process)
        does = argv[0] if argv and argv[0] in SUBCOMMANDS else ""
        name, rest = _config_first(argv[bool(does) :], does)
        if does != "plan":
            cli.start(process)
            early.install_again()
        elif process.distributed is not None:
            raise ValueError("--distributed: plan compiles in one process; leave the option out")
        elif process.compilation_cache:
            cli.enable_compilation_cache()
        return SUBCOMMANDS.get(does, _train)(name, rest)


def _config_first(argv: Sequence[str], does: str) -> tuple[str, list[str]]:
    """Split the name of a config from its options; the help names sub-commands and configs."""

    def listed() -> dict[str, dict[str, str]]:
        commands = {f"{name} CONFIG": flags.summary(_kind(name).__doc__) for name in SUBCOMMANDS}
        trees = {name: ast.parse(path.read_text()) for name, path in available().items()}
        known = {name: flags.summary(ast.get_docstring(tree)) for name, tree in trees.items()}
        known["FILE.py"] = "A file of your own with get_config(stage)."
        return {**({} if does else {"sub-commands": commands}), "CONFIG": known}

    needed = {"plan": " --topology KIND:CHIPS", "check": ""}.get(does, " --workdir DIR")
    usage, about = f"CONFIG[:STAGE]{needed} [--field.sub value ...]", _kind(does).__doc__
    return cli.split_first(argv, f"ldm-train {does}".rstrip(), usage, about, listed)


def _kind(does: str) -> type:
    """Options of a sub-command; of training without one."""
    if does == "plan":
        from ldm_jax.train.plan.command import PlanOptions

        return PlanOptions
    return {"": Train, "check": Check, "encode": Encode, "pack": Pack}[does]


def _train(name: str, argv: Sequence[str]) -> int:
    workdir, config = parse(load_config(name, argv), argv, f"ldm-train {name}")
    if config.deterministic:
        be_deterministic()
    if type(config) not in RECIPES:
        raise ValueError(f"{name}: no recipe takes a {type(config).__name__}")
    recipe = importlib.import_module(RECIPES[type(config)])
    index, count, start = watchdog.this_start()
    with watchdog.watching(
        checkpoint.absolute(workdir), config.watch, index, count, start
    ) as watch:
        code = recipe.train(config, workdir, watch)
        watch.state = "stopped" if code == cli.INTERRUPTED else "done"
    if code == cli.INTERRUPTED:
        LOG.info(next_steps.after_stop(workdir, name, argv))
    elif code == 0:
        LOG.info(next_steps.after_last_step(workdir, _model_on(name), config))
    return code


def _model_on(name: str) -> str:
    """Name of the config of the model on the first stage `name`; CONFIG where it has none."""
    file, _, _ = name.partition(":")
    with contextlib.suppress(TypeError, ValueError):
        if isinstance(load_config(file), schema.LatentDiffusionTrainConfig):
            return file
    return "CONFIG"


def _encode(name: str, argv: Sequence[str]) -> int:
    config, program = load_config(name, argv), f"ldm-train encode {name}"
    parts = (Encode, config, supervisor.Restart, flags.Process)
    asked, config, *_ = flags.parse(argv, program, Encode.__doc__, *parts)
    if not isinstance(config, schema.LatentDiffusionTrainConfig):
        raise ValueError(
            f"{name} trains a first stage; encode takes the config of a diffusion model"
        )
    from ldm_jax.train.prepare import encode

    if config.deterministic:
        be_deterministic()
    return encode.encode(config, asked.workdir)


def _pack(name: str, argv: Sequence[str]) -> int:
    config, program = load_config(name, argv), f"ldm-train pack {name}"
    parts = (Pack, config, supervisor.Restart, flags.Process)
    asked, config, *_ = flags.parse(argv, program, Pack.__doc__, *parts)
    if asked.records_per_shard < 1:
        raise ValueError(f"--records-per-shard {asked.records_per_shard}: give at least 1")
    from ldm_jax.train.prepare import pack

    return pack.pack(config.data, asked.workdir, asked.records_per_shard)


def _check(name: str, argv: Sequence[str]) -> int:
    config, program = load_config(name, argv), f"ldm-train check {name}"
    parts = (Check, config, supervisor.Restart, flags.Process)
    _, config, *_ = flags.parse(argv, program, Check.__doc__, *parts)
    from ldm_jax.train.prepare import check

    return check.check(config)


def _plan(name: str, argv: Sequence[str]) -> int:
    from ldm_jax.train.plan import command

    return command.plan(argv, name, functools.partial(load_config, argv=argv))


SUBCOMMANDS = {"check": _check, "encode": _encode, "pack": _pack, "plan": _plan}


def restart_on_failure(argv: Sequence[str]) -> int:
    """Train in a process of its own, started again when it fails, if `--restart` asks for it."""
    restart, rest = flags.parse_known(argv, "ldm-train", supervisor.Restart)
    if not supervisor.is_asked_for(restart):
        return train(rest)
    return supervisor.supervise([sys.executable, "-m", "ldm_jax.train.entry", *rest], restart)


def main() -> None:
    """Entry point of `ldm-train`."""
    early.install()
    code = cli.run("ldm-train", restart_on_failure, sys.argv[1:])
    if code not in (0, cli.INTERRUPTED):
        # without clean-up: JAX's barrier at exit would wait for processes that never come to it,
        # and Python for threads of Orbax whose files another process has taken away
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
