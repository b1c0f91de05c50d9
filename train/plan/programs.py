"""Compile one program for absent devices: `python -m ldm_jax.train.plan.programs DIR`.

A process of its own, because compilers crash and are killed. DIR/request.json holds the target; DIR
gets traced.json once the program is traced, then program.txt.gz and compiled.json, or failed.json.
"""

import dataclasses
import functools
import gzip
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ldm_jax import bundle, conditioning, latents, sampling, schema, shapes, sharding, train_state
from ldm_jax.cost import flops
from ldm_jax.models import attention, autoencoder, lpips
from ldm_jax.schema import serialize
from ldm_jax.train import autoencoder as first_stages
from ldm_jax.train import finetune, ldm
from ldm_jax.train.frozen import Frozen, text_encoder
from ldm_jax.train.plan import topologies


@dataclasses.dataclass(frozen=True)
class Target:
    """Program to compile, a training step or a sampler, and the devices to compile it for."""

    config: schema.TrainConfig
    topology: topologies.Topology
    first_stage: schema.FirstStageModelConfig | None = None
    """First stage of a latent diffusion model."""
    cached: bool = False
    """Training reads latents instead of images."""
    sample: bool = False
    """The sampler rather than the training step."""
    images: int = 1
    """Images of one call of the sampler."""
    height: int = 0
    width: int = 0
    """Size of these images in pixels."""
    space: int = 1
    """Devices that share an image of the sampler."""

    def to_json(self) -> dict:
        """Plain values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("config", "first_stage"):
            values[name] = values[name] and serialize.to_dict(values[name])
        return values | {"topology": dataclasses.asdict(self.topology)}

    @staticmethod
    def from_json(values: dict) -> "Target":
        """Inverse of `to_json`."""
        for name in ("config", "first_stage"):
            values[name] = values[name] and serialize.from_dict(values[name])
        topology = values["topology"]
        topology["sizes"] = tuple(topology["sizes"])
        return Target(**values | {"topology": topologies.Topology(**topology)})


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the shapes, with shardings, that it is called with."""

    jitted: Any
    arguments: tuple
    resident: dict[str, Any]
    """{name: tree} of the arrays that occupy the devices while it runs."""


def build(target: Target, mesh: Mesh) -> Program:
    """The program of a target on a mesh. ValueError for parts that do not fit each other."""
    if target.sample:
        return sampler(target, mesh)
    if isinstance(target.config, schema.AutoencoderTrainConfig):
        return first_stage_step(target.config, mesh)
    return ldm_step(target, mesh)


def make_mesh(target: Target, devices: list[Any]) -> Mesh:
    """The mesh of training, or one whose `space` devices share an image."""
    if target.space > 1:
        return sharding.spatial_mesh(target.space, devices)
    return sharding.make_mesh(target.config.mesh, devices)


# --- training -------------------------------------------------------------------------------------


def first_stage_step(config: schema.AutoencoderTrainConfig, mesh: Mesh) -> Program:
    """`train.autoencoder`'s step, its adversary and LPIPS included."""
    sharding.check_batch(config.batch_size, mesh, config.accumulate)
    perceptual = {}
    if config.loss.perceptual_weight:
        perceptual = by_rules(lpips.shapes(), mesh)
    state = sharding.with_shardings(*first_stages.abstract_state(config, mesh))
    step = first_stages.make_train_step(config, mesh, perceptual)
    image = (config.data.size, config.data.size, config.data.channels)
    batch = {"image": examples(config, mesh, image, jnp.float32)}
    resident = {**state_arrays(state), "frozen": perceptual, "batch": batch}
    return Program(step, (state, batch, root_key(mesh)), resident)


def ldm_step(target: Target, mesh: Mesh) -> Program:
    """`train.ldm`'s step or `train.finetune`'s, with the frozen parts as arguments."""
    config, recipe = target.config, ldm
    if isinstance(config, schema.AdapterTrainConfig):
        config, recipe = finetune.settled(config), finetune
        target = dataclasses.replace(target, config=config)
    sharding.check_batch(config.batch_size, mesh, config.accumulate)
    bundle.check(bundle.model_config(config, target.first_stage), config.data.channels)
    state = sharding.with_shardings(*recipe.abstract_state(config, mesh))
    frozen = abstract_frozen(target, mesh)
    step = recipe.make_train_step(finetune.widened(config), frozen, mesh)
    batch = abstract_batch(target, mesh)
    resident = {**state_arrays(state), "frozen": frozen.arguments, "batch": batch}
    return Program(step, (state, batch, root_key(mesh)), resident)


def abstract_frozen(target: Target, mesh: Mesh) -> Frozen:
    """The frozen parts by shape."""
    config, model = target.config, target.first_stage
    module = autoencoder.from_config(
        model,
        dtype=jnp.dtype(config.dtype),
        attention=attention.choose(mesh.devices.flat[0].platform, mesh, config.attention),
    )
    stage = by_rules({"first_stage": shapes.first_stage(model)}, mesh)["first_stage"]
    encoder = None
    if not text_encoder.trains(config.cond):
        encoder = by_rules({"cond_stage": shapes.cond(config.cond)}, mesh)["cond_stage"]
    frozen = Frozen(module, stage, config.first_stage.scale or 1.0, model, encoder)
    if not isinstance(config, schema.AdapterTrainConfig) or not finetune.trains_adapter(config):
        return frozen
    base = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.base_dtype)),
        finetune.base_shapes(config),
    )
    base = by_rules(base, mesh)
    return dataclasses.replace(frozen, **base)


def abstract_batch(target: Target, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays that the conditioning reads, and latents or images."""
    config, model = target.config, target.first_stage
    side = config.data.size // model.downsample
    image = (config.data.size, config.data.size, config.data.channels)
    sizes = conditioning.Sizes(image, (side, side, model.embed_dim))
    shapes = conditioning.example(config.cond, sizes)
    latent = conditioning.Example(sizes.latent, jnp.float32)
    if not target.cached:
        shapes["image"] = conditioning.Example(image, jnp.float32)
    elif "image" not in shapes:
        shapes["mean"] = latent
        if isinstance(model, schema.AutoencoderKLConfig):
            shapes["logvar"] = latent
    if finetune.has_prior(config):
        for name in ("image", "tokens"):
            shapes[finetune.PRIOR + name] = shapes[name]
    return {name: examples(config, mesh, *example) for name, example in shapes.items()}


# --- sampling -------------------------------------------------------------------------------------


def sampler(target: Target, mesh: Mesh) -> Program:
    """run(params, batch, keys, guidance scale) -> images: encodes the conditioning, then DDIM."""
    config, model = target.config, target.first_stage
    model_config = bundle.model_config(config, model)
    bundle.check(model_config, config.data.channels)
    net = bundle.build(
        model_config,
        {},
        config.first_stage.scale or 1.0,
        dtype=jnp.dtype(config.dtype),
        **bundle.kernels(mesh, config.attention),
    )
    shape = (target.height // model.downsample, target.width // model.downsample)
    shape = (*shape, model.embed_dim)
    guided = config.cond is not None and config.sample_guidance != 1
    sample = sampling.make_sampler(net, config.sample_steps, shape=shape)

    def run(params: dict, batch: dict, keys: jax.Array, scale: jax.Array) -> jax.Array:
        encode = functools.partial(
            latents.encode, net.first_stage, params["first_stage"], scale=net.latent_scale
        )
        arguments = (config.cond, net.cond_stage, params["cond_stage"], batch, encode)
        cond = conditioning.from_batch(*arguments)
        null = conditioning.null_like(*arguments) if guided else None
        return sample(params, cond, keys, null, scale, 0.0, batch.get("x_T"))

    parts = {
        "unet": shapes.unet(config.unet),
        "first_stage": shapes.first_stage(model),
        "cond_stage": shapes.cond(config.cond),
    }
    params = by_rules(parts, mesh)
    # a batch of the sampler: the arrays of a training batch that the conditioning needs
    sized = dataclasses.replace(
        config,
        batch_size=target.images,
        data=dataclasses.replace(config.data, size=target.height),
    )
    given = dataclasses.replace(target, config=sized, cached=True)
    batch = {
        name: x for name, x in abstract_batch(given, mesh).items() if name not in ("mean", "logvar")
    }
    image = sharding.batch_sharding(mesh)
    if target.space > 1:
        image = sharding.image_sharding(mesh)
        noise = (target.images, *shape)
        batch["x_T"] = jax.ShapeDtypeStruct(noise, jnp.float32, sharding=image)
    keys = jax.ShapeDtypeStruct(
        (target.images,), root_key(mesh).dtype, sharding=sharding.batch_sharding(mesh)
    )
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    jitted = jax.jit(run, out_shardings=image)
    return Program(jitted, (params, batch, keys, scale), {"parameters": params, "batch": batch})


# --- shapes ---------------------------------------------------------------------------------------


def by_rules(shapes: Any, mesh: Mesh) -> Any:
    """A tree of shapes with the shardings of training."""
    return sharding.with_shardings(shapes, sharding.by_rules(shapes, sharding.RULES, mesh))


def examples(
    config: schema.BaseTrainConfig, mesh: Mesh, shape: tuple, dtype: Any
) -> jax.ShapeDtypeStruct:
    """A batch of arrays of a shape."""
    dims = (config.batch_size, *shape)
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding.batch_sharding(mesh))


def root_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The run's root key."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct((), key.dtype, sharding=sharding.replicated(mesh))


def state_arrays(state: train_state.TrainState | train_state.GanState) -> dict[str, Any]:
    """{name: tree} of the arrays of a state."""
    arrays = {
        "parameters": state.params,
        "moments": state.opt_state,
        "average": state.ema_params,
    }
    if isinstance(state, train_state.GanState):
        arrays["discriminator"] = (state.disc_params, state.disc_opt_state, state.disc_stats)
    return arrays


def bytes_of(tree: Any) -> int:
    """Bytes of a tree's arrays on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.dtype.itemsize
    )


# --- the child ------------------------------------------------------------------------------------


def plain(target: Target) -> Target:
    """The target without remat and kernels: its operations are those of the model."""
    how = {"attention": "xla"}
    if not target.sample:
        how |= {"remat": False, "accumulate": 1}
    return dataclasses.replace(target, config=dataclasses.replace(target.config, **how))


def facts(target: Target, mesh: Mesh, program: Program, traced: Any) -> dict:
    """Facts of the traced program before it is compiled."""
    ideal = build(plain(target), mesh)
    operations = flops.count(ideal.jitted.trace(*ideal.arguments).jaxpr)
    kernels = [
        [name, shapes, n]
        for name, calls in flops.kernels(traced.jaxpr).items()
        for shapes, n in calls.items()
    ]
    arrays = jax.tree.leaves([tree for n, tree in program.resident.items() if n != "batch"])
    sizes = {(x.shape, x.sharding.shard_shape(x.shape)) for x in arrays}
    return {
        "mesh": dict(mesh.shape),
        "operations": operations / mesh.devices.size,
        "kernels": kernels,
        "largest_logits": flops.largest_batched(traced.jaxpr),
        "resident": {name: bytes_of(tree) for name, tree in program.resident.items()},
        "whole": sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        "parameters": sorted(sizes),
    }


def compile_target(folder: Path) -> None:
    """Compile the target in DIR/request.json."""
    target = Target.from_json(json.loads((folder / "request.json").read_text()))
    began = time.perf_counter()
    mesh = make_mesh(target, topologies.devices(target.topology))
    program = build(target, mesh)
    traced = program.jitted.trace(*program.arguments)
    traced_facts = facts(target, mesh, program, traced)
    traced_facts["trace_seconds"] = time.perf_counter() - began
    (folder / "traced.json").write_text(json.dumps(traced_facts))
    began = time.perf_counter()
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    about = {name: getattr(memory, f"{name}_size_in_bytes") for name in names}
    about |= {
        "peak": getattr(memory, "peak_memory_in_bytes", 0),
        "seconds": time.perf_counter() - began,
    }
    (folder / "program.txt.gz").write_bytes(gzip.compress(compiled.as_text().encode()))
    (folder / "compiled.json").write_text(json.dumps(about))


def main(argv: list[str], work: Callable[[Path], None] = compile_target) -> int:
    """Entry point of the process; an error goes to DIR/failed.json."""
    folder = Path(argv[0])
    try:
        work(folder)
    except Exception as error:
        traceback.print_exc()
        about = {"error": type(error).__name__, "message": str(error)[:4000]}
        (folder / "failed.json").write_text(json.dumps(about))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
