"""Convert a model between the formats of ldm_jax, diffusers and CompVis.

`ldm-convert SRC DST --to {ldm_jax,diffusers,compvis,peft,kohya}`
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from etils import epath
from tyro.conf import Positional, arg

from ldm_jax import bundle, loading, saving, schema
from ldm_jax.adapters import lora, runs
from ldm_jax.runtime import checkpoint, cli, flags, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import adapters


@dataclasses.dataclass(frozen=True)
class Options:
    """Convert a model. SRC is read as every command reads --model; DST is written in full."""

    source: Annotated[str, Positional, arg(metavar="SRC")]
    """Run directory, diffusers folder, CompVis .ckpt or .safetensors, or Stable Diffusion file; or
    a first stage alone in one of these forms."""
    target: Annotated[str, Positional, arg(metavar="DST")]
    """New folder; with --to compvis a new .safetensors or .ckpt file, with its YAML beside it; with
    --to peft and kohya a new .safetensors file."""
    to: saving.Format | lora.Format
    """Format of the target; `peft` and `kohya` are files of the LoRA that a run trained."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the weights written."""
    check: bool = False
    """Only check that names and shapes fit, both ways; reads no weights and writes nothing."""
    step: int | None = None
    """Training step of a run to take the weights of; default: the newest."""
    ema: bool = True
    """Averaged weights where there are both; --no-ema takes the raw ones."""
    config: flags.OptionalFile = None
    """YAML of a checkpoint file; default: NAME.yaml or config.yaml beside it."""
    variant: Annotated[str | None, arg(metavar="NAME")] = None
    """Variant of the weights in a diffusers folder, as `fp16`; or kind of a single file, as `v2-v`,
    where its tensors leave it open."""
    tokenizer: flags.OptionalDir = None
    """Folder with the tokenizer's files, where the model comes without."""
    lora: flags.Adapters = ()
    """LoRA files to add to the weights for good, as of ldm-sample: FILE:0.7."""
    ignore_unknown: bool = False
    """Leave out tensors of a --lora that belong to no module of the model."""
    overwrite: bool = False
    """Replace the target, if it is a model in the format asked for."""


def convert(argv: Sequence[str]) -> int:
    """Read the source, log what it holds, and write the target."""
    options, common = flags.parse(argv, "ldm-convert", Options.__doc__, Options, flags.Common)
    if common.compilation_cache:
        cli.enable_compilation_cache()
    source, target = checkpoint.absolute(options.source), checkpoint.absolute(options.target)
    if not options.check:
        refuse_target(options, source, target)
    if options.to in ("peft", "kohya"):
        return convert_lora(options, source, target)
    with on_host():
        model = loading.load(
            source,
            step=options.step,
            ema=options.ema,
            param_dtype="float32" if options.lora else options.dtype,  # for the sum's sake
            config=options.config,
            variant=options.variant,
            tokenizer=options.tokenizer,
            shapes_only=options.check,
        )
        if not options.check:
            model = adapters.with_loras(model, options.lora, options.ignore_unknown)
        for line in bundle.summary(model):
            LOG.info(line)
        if options.check:
            count = saving.check(model, options.to)
            LOG.info(f"{source} fits: {count} tensors would be written as {options.to}")
            return 0
        write(model, target, options)
    LOG.info(f"written: {target} ({options.to}, {options.dtype})")
    return 0


def convert_lora(options: Options, source: epath.Path, target: epath.Path) -> int:
    """Write the LoRA of a run as a file for others; the weights of its base are not read."""
    update = runs.lora_of(source, step=options.step, ema=options.ema)
    LOG.info(f"{source}: {update!r}")
    if not options.check:
        config = rundir.read_config(source)
        text = schema.text_of(getattr(config, "cond", None))
        second = text is not None and text.encoder.width == 1024
        of_second = "v2-768-v" if config.diffusion.prediction == "v" else "v2-512"
        base = of_second if second else "v1"
        lora.write(target, update, options.to, base=base, dtype=jnp.dtype(options.dtype))
        LOG.info(f"written: {target} ({options.to}, {options.dtype})")
    return 0


def refuse_target(options: Options, source: epath.Path, target: epath.Path) -> None:
    """ValueError if the target holds something, or is not named as its format asks."""
    if target == source or source in target.parents or target in source.parents:
        raise ValueError(f"{target}: source and target are the same, or one lies in the other")
    if options.to == "compvis" and target.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"{target}: --to compvis writes .safetensors or .ckpt: name it so")
    if options.to in ("peft", "kohya") and target.suffix != ".safetensors":
        raise ValueError(f"{target}: --to {options.to} writes .safetensors: name it so")
    held = [path for path in results(options, target) if path.exists() and not _empty(path)]
    if not held:
        return
    if not options.overwrite:
        raise ValueError(f"{held[0]}: exists; give another target, or --overwrite to replace it")
    kinds = {
        "ldm_jax": ("run",),
        "diffusers": ("diffusers", "first_stage"),
    }.get(options.to, ("checkpoint",))
    file = kinds == ("checkpoint",)
    if target.exists() and (target.is_dir() == file or _kind(target) not in kinds):
        raise ValueError(
            f"{target}: --overwrite replaces {loading.KINDS[kinds[0]]}, which this is not; remove"
            " it yourself"
        )


def results(options: Options, target: epath.Path) -> list[epath.Path]:
    """The paths that appear: the target, and the YAML beside a CompVis file."""
    return [target, target.with_suffix(".yaml")] if options.to == "compvis" else [target]


def write(model: bundle.LatentDiffusion, target: epath.Path, options: Options) -> None:
    """Writes under another name first, so that the target is whole or not there."""
    draft = target.parent / f".{target.name}.part"
    if draft.exists():
        draft.rmtree()
    draft.mkdir(parents=True)
    try:
        saving.save(model, draft / target.name, to=options.to, dtype=options.dtype)
        for path in results(options, target):
            if path.exists():
                path.rmtree() if path.is_dir() else path.unlink()
            (draft / path.name).rename(path)
    finally:
        draft.rmtree()


def on_host() -> Any:
    """A context in which arrays stay in the host's memory, where JAX has a CPU backend."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def _empty(path: epath.Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _kind(path: epath.Path) -> str | None:
    try:
        return loading.recognise(path)[1]
    except ValueError:
        return None


def main() -> None:
    """Entry point of `ldm-convert`."""
    sys.exit(cli.run("ldm-convert", convert, sys.argv[1:]))


if __name__ == "__main__":
    main()
