"""Options of every sampling task, and the checks of a model before it samples."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
from tyro.conf import arg

from ldm_jax import (
    bundle,
    conditioning,
    export,
    loading,
    noise,
    sampling,
    schema,
    seeds,
    sharding,
    solvers,
)
from ldm_jax.prompting import clip_skip, composed
from ldm_jax.runtime import checkpoint, flags
from ldm_jax.sample import adapters


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every sampling task."""

    model: flags.Path
    """Run directory, diffusers folder, CompVis .ckpt or .safetensors with its .yaml beside it, or
    Stable Diffusion in a single file."""
    out: flags.Dir
    """Folder for the images; made if missing."""
    num_images: int = 4
    """Images per label or prompt."""
    steps: int = 50
    """Solver steps."""
    solver: Annotated[str, arg(metavar="NAME")] = "ddim"
    """Name of a solver; an unknown one is answered with the list."""
    spacing: Annotated[str | None, arg(metavar="NAME")] = None
    """Spacing of the timesteps; default: that of the model's own sampler, `leading` in the
    reference. `trailing` gives any number; an unknown one is answered with the list."""
    spacing_rule: Literal["compvis", "diffusers"] | None = None
    """Whose steps a spacing makes: 30 steps of `leading` are 31 in CompVis's samplers, and 30 in
    diffusers, whose levels depend on the solver too. Default: the model's own, which for a
    diffusers folder is diffusers'."""
    eta: float = 0.0
    """Noise of DDIM: 0 is deterministic, 1 ancestral."""
    guidance_scale: float = 1.5
    """Classifier-free guidance; 1 samples without it, at half the cost."""
    guidance_rescale: float = 0.0
    """Part of 0..1 by which the guided prediction is brought back to the contrast of the one
    without guidance (Lin et al. 2023); 0.7 where colours are burnt at a high guidance scale."""
    guidance_interval: Annotated[tuple[float, float] | None, arg(metavar="LOWEST HIGHEST")] = None
    """Lowest and highest timestep with guidance (Kynkäänniemi et al. 2024); the others cost half.
    Default: all of them."""
    dynamic_threshold: float | None = None
    """Percentile, as 99.5, beyond which the predicted x0 is clipped (Saharia et al. 2022); for
    models of pixels, or high guidance scales. Default: no clipping."""
    quantize_x0: bool = False
    """The predicted x0 becomes codes of the first stage at every step; VQ models only."""
    seed: int = 0
    """0 to 2**64 - 1. Image number i depends on (seed, i) alone."""
    first_index: int = 0
    """Number of the first image: 8 continues after 8 images of the same seed."""
    batch_size: int = 16
    """Most images per call of the compiled sampler, over all devices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type."""
    step: int | None = None
    """Training step of a run to take the weights of; default: the newest."""
    ema: bool = True
    """Averaged weights; --no-ema takes the raw ones."""
    config: flags.OptionalFile = None
    """YAML of a checkpoint file; default: NAME.yaml or config.yaml beside it."""
    variant: Annotated[str | None, arg(metavar="NAME")] = None
    """Variant of the weights in a diffusers folder, as `fp16`; or kind of a single file, as `v2-v`,
    where its tensors leave it open."""
    tokenizer: flags.OptionalDir = None
    """Folder with the tokenizer's files, where the model comes without."""
    lora: flags.Adapters = ()
    """LoRA files or folders of diffusers, kohya or LyCORIS, each with the scale of its half for the
    UNet and of that for the text encoder: FILE, FILE:0.8 (both), FILE:0.8:0.5. Their sum is
    added."""
    ignore_unknown: bool = False
    """Leave out tensors of a --lora that belong to no module of the model."""
    embedding: flags.Embeddings = ()
    """Words learned by textual inversion, of diffusers or stable-diffusion-webui, which prompts
    then hold as <NAME>: FILE, named by its content or itself, or "FILE=<NAME>"."""
    clip_skip: int = 1
    """Layer of CLIP that the text is read from: 1 is the model's own, 2 the one before. Counted so
    for Stable Diffusion 2 too, where stable-diffusion-webui ignores it."""
    prompt_syntax: composed.Syntax = "plain"
    """`plain` reads a prompt as it is; `webui` as stable-diffusion-webui does: (x:1.2), [x], BREAK,
    [a:b:0.5], [a|b], AND, <lora:NAME:0.8>."""
    emphasis: composed.Emphasis = "original"
    """What the weights of `webui` do: `original` keeps the mean of the text, `no-norm` does not,
    `ignore` leaves them out, `none` reads their brackets as text."""
    lora_dir: flags.OptionalDir = None
    """Folder of the files that <lora:NAME> in a prompt of `webui` names."""
    noise_source: noise.Source = "own"
    """Who draws the noise of image number i and of its steps, of seed + i: `own` (of seed and i),
    `cpu` as torch does, or `nv` as CUDA does, as stable-diffusion-webui."""
    eta_noise_seed_delta: int = 0
    """With `cpu` or `nv`: the noise of steps is of seed + i and so much more (webui's ENSD)."""
    subseed: int = 0
    """With `cpu` or `nv`: another seed, towards whose noise an image is varied."""
    subseed_strength: float = 0.0
    """Part of 0..1 by which it is; then image i is of seed and subseed + i."""
    seed_resize_from: Annotated[tuple[int, int] | None, arg(metavar="HEIGHT WIDTH")] = None
    """With `cpu` or `nv`: pixels of an image whose noise lies in the middle of this one's."""
    init_latents: flags.OptionalFile = None
    """x_T for every image, instead of seeded noise: .npy float32 [N, h, w, c], unit normal; image i
    starts from latent i."""
    save_latents: bool = False
    """Write latents.npy: the final latents divided by the latent scale, as the first stage
    decodes."""
    npz: bool = False
    """Write samples.npz too: arr_0 uint8 [N, H, W, c], as evaluation suites read it."""
    preview: int = 0
    """Pictures of the predicted x0 at so many levels, from noise to image: previews/NAME.png."""
    image_format: Literal["png", "jpeg", "webp"] = "png"
    """Of the image files; `jpeg` and `webp` lose a little, and keep their settings in the EXIF."""
    image_quality: int = 95
    """1 to 100, of `jpeg` and `webp`."""
    overwrite: bool = False
    """Write into a folder that already holds samples."""
    resume: bool = False
    """Continue an interrupted list: keep its finished images, if their settings are the same."""
    progress: Literal["auto", "steps", "images", "none"] = "auto"
    """Unit of the progress bars. A program that reports its steps is not kept in the compilation
    cache: auto is steps on a CPU, where compiling is the smaller part, else images; none without
    a terminal."""
    export: flags.OptionalFile = None
    """File for the compiled sampler's program without weights, for batches of --batch-size. Draws
    nothing then."""
    export_platforms: Annotated[
        tuple[str, ...], arg(metavar="PLATFORM ...", help_behavior_hint="")
    ] = ()
    """Platforms that the file is for, of cpu, cuda, tpu; default: all."""
    from_export: flags.OptionalFile = None
    """Sample with the program of such a file; --model still gives the weights."""


Load = Callable[[Any, Any], bundle.LatentDiffusion]
"""load(options, mesh) -> model, as `load_model`."""


def open_model(
    options: Options, mesh: Any = None, load: Load | None = None
) -> tuple[bundle.LatentDiffusion, Any, Any]:
    """(bundle placed on all devices, mesh, options with the model's own solver settings).

    mesh: default: one that splits batches over all devices.
    load: default: `load_model`; a server hands in models that it keeps.
    Refuses impossible options before weights are read.
    """
    if options.num_images < 1:
        raise ValueError(f"--num-images {options.num_images}: give at least 1")
    seeds.checked(options.seed, "--seed")
    seeds.check_numbers(options.first_index, 1, "--first-index")
    solvers.make(options.solver, options.eta)  # refuses an unknown one, and eta where it takes none
    if options.export is not None or options.from_export is not None:
        if jax.process_count() > 1:
            raise ValueError("--export and --from-export are for one process: start a single one")
        if mesh is not None and mesh.devices.size > 1:
            raise ValueError("--export and --from-export are for one device; leave out --space")
        mesh = sharding.make_mesh(schema.MeshConfig(), jax.devices()[:1])
    mesh = sharding.make_mesh(schema.MeshConfig()) if mesh is None else mesh
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if options.batch_size < 1 or options.batch_size % split:
        raise ValueError(f"--batch-size {options.batch_size} is not a multiple of {split} devices")
    if options.step is None:
        options = dataclasses.replace(options, step=newest_step(options))
    model = (load or load_model)(options, mesh)
    timesteps = len(model.schedule.betas)
    if not 1 <= options.steps <= timesteps:
        raise ValueError(f"--steps {options.steps} is not in 1..{timesteps}")
    if not 0 <= options.preview <= options.steps:
        raise ValueError(f"--preview {options.preview} is not in 0..{options.steps}, the --steps")
    own, rule = model.config.sampling, options.spacing_rule
    if rule is None and options.from_export is not None:  # the levels are those of the program
        facts = export.read_meta(options.from_export).get("program", {})
        rule = facts.get("spacing_rule", "compvis")
    options = dataclasses.replace(
        options, spacing=options.spacing or own.spacing, spacing_rule=rule or own.rule
    )
    levels_of(model, options)  # refuses an unknown spacing
    return model, mesh, options


def load_model(options: Options, mesh: Any) -> bundle.LatentDiffusion:
    """The model that the options name, with their adapters, on the mesh. ValueError if none is."""
    return adapted(load_base(options, mesh), options)


def load_base(options: Options, mesh: Any) -> bundle.LatentDiffusion:
    """The model that the options name, on the mesh. ValueError if it is none that samples."""
    model = loading.load(
        options.model,
        step=options.step,
        ema=options.ema,
        mesh=mesh,
        dtype=options.dtype,
        config=options.config,
        variant=options.variant,
        tokenizer=options.tokenizer,
    )
    if model.unet is None:
        raise ValueError(
            f"{options.model}: is a first stage alone, which encodes and decodes but cannot sample;"
            " --model takes a latent diffusion model"
        )
    return model


def adapted(model: bundle.LatentDiffusion, options: Options) -> bundle.LatentDiffusion:
    """`model` with the adapters of the options. ValueError for one that does not fit."""
    model = adapters.with_loras(model, options.lora, options.ignore_unknown)
    model = adapters.with_embeddings(model, options.embedding)
    return clip_skip.with_clip_skip(model, options.clip_skip)


def levels_of(model: bundle.LatentDiffusion, options: Options) -> solvers.Levels:
    """The levels that the options of `open_model` ask for."""
    return sampling.levels_of(
        model, options.steps, options.spacing, options.solver, options.spacing_rule
    )


def newest_step(options: Options) -> int | None:
    """Training step of a run that is loaded without --step; None for other models."""
    path, kind = loading.recognise(options.model)
    if kind != "run":
        return None
    snapshots = checkpoint.snapshot_steps(path) if options.ema else []
    return max([*snapshots, *checkpoint.saved_steps(path)], default=None)


def latent_shape(
    model: bundle.LatentDiffusion, height: int | None, width: int | None, where: str = "--"
) -> tuple[int, int, int]:
    """(h, w, c) of the latent of an image; None is the training size.

    ValueError if the first stage and the UNet cannot halve a side as often as they do; it begins
    with `where` the side comes from.
    """
    config = model.config
    down = config.first_stage.downsample
    step = down * 2 ** (len(config.unet.channel_mult) - 1)
    sides = []
    for name, given in (("height", height), ("width", width)):
        side = config.size if given is None else given
        if side < step or side % step:
            below, above = side // step * step, (side // step + 1) * step
            nearest = f"{below} or {above}" if below > 0 else f"{max(above, step)}"
            raise ValueError(
                f"{where}{name} {side} is not a multiple of {step}, by which the first stage and"
                f" the UNet downsample: take {nearest}"
            )
        sides.append(side // down)
    return (*sides, config.first_stage.embed_dim)


def label_ids(model: bundle.LatentDiffusion, labels: Sequence[str | int]) -> tuple[int, ...]:
    """Ids of --labels, which are ids or names of classes that the run keeps.

    ValueError for a class that the model does not know, and for a number that is the id of one
    class and the name of another (`id:3` and `name:3` are clear).
    """
    return tuple(_label_id(model, label) for label in labels)


def _label_id(model: bundle.LatentDiffusion, label: str | int) -> int:
    count, names = model.config.cond.num_classes, model.classes or ()
    how, colon, text = str(label).partition(":")
    if how not in ("id", "name") or not colon:
        how, text = "", str(label)
    number = int(text) if text.lstrip("+-").isdecimal() and how != "name" else None
    named = names.index(text) if text in names and how != "id" else None
    if isinstance(label, str) and None not in (number, named) and number != named:
        raise ValueError(
            f"--labels {label}: is the id of {label_name(model, number)!r}, and the name of class"
            f" {named}: give id:{label} or name:{label}"
        )
    index = named if number is None else number
    if index is not None and 0 <= index < count:
        return index
    if number is not None or how == "id":
        raise ValueError(f"--labels {label} is not in 0..{count - 1}, the model's classes")
    if not names:
        raise ValueError(
            f"--labels {label}: the model keeps no names of its classes: give ids of 0..{count - 1}"
        )
    close = difflib.get_close_matches(text, names, 1)
    hint = f"is {close[0]!r} meant? " if close else ""
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:20]))
    more = ", ..." if len(names) > 20 else ""
    raise ValueError(f"--labels {label}: is no class of the model; {hint}it has {shown}{more}")


def label_name(model: bundle.LatentDiffusion, label: int) -> str:
    """Name of a class, or its id if it has none."""
    names = model.classes or ()
    return names[label] if 0 <= label < len(names) else str(label)


def label_text(model: bundle.LatentDiffusion, label: int) -> str:
    """Id and name of a class, for pictures and messages."""
    name = label_name(model, label)
    return name if name == str(label) else f"{label} {name}"


def null_batch(model: bundle.LatentDiffusion, path: str) -> dict[str, np.ndarray]:
    """Input of `conditioning.from_batch` for one image that asks for nothing in particular.

    The null class or the empty text, nothing for an unconditional model. ValueError, naming the
    path of the model, if it knows none of these.
    """
    match model.config.cond:
        case None:
            return {}
        case schema.ClassCondConfig(null_class=True, num_classes=count):
            return {"label": np.array([count], np.int32)}
        case schema.ClassCondConfig(num_classes=count):
            raise ValueError(f"{path}: has no null class; give --labels, each in 0..{count - 1}")
        case schema.TextCondConfig() | schema.HybridCondConfig():
            check_tokenizer(model, path)
            tokens = model.tokenizer.encode([""])
            return {"tokens": tokens, "null_tokens": tokens}
    kind = conditioning.name_of(model.config.cond)
    raise ValueError(
        f"{path}: is trained with {kind} and draws nothing without; see the other tasks"
    )


def check_tokenizer(model: bundle.LatentDiffusion, path: str) -> None:
    """ValueError if a model of text has come without its tokenizer."""
    if model.tokenizer is None:
        raise ValueError(
            f"{path}: comes without a tokenizer; give --tokenizer FOLDER with its files"
            " (vocab.json and merges.txt for CLIP, vocab.txt for BERT), such as tokenizer/ of a"
            " diffusers folder"
        )
