"""The side of ldm_jax in `paired.py`: the UNet, sampling, and single operations."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sides
import xla_kinds

from ldm_jax import bundle, latents, sampling, schema, sharding, train_state
from ldm_jax.adapters import lora
from ldm_jax.conditioning import Cond
from ldm_jax.convert import diffusers
from ldm_jax.convert.adapters import lora_files
from ldm_jax.cost import flops
from ldm_jax.models import attention, unet


def keep_programs(job: sides.Job) -> None:
    """Keep compiled programs, so that a round does not compile those of another one."""
    jax.config.update("jax_compilation_cache_dir", str(Path(job.kept) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def compiled(function: Any, *args: Any) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """(program, its {"compile": seconds, tracing included, "flops"}) of a jitted function."""

    def build():
        traced = function.trace(*args)
        return traced.lower().compile(), traced.jaxpr

    (program, jaxpr), seconds = sides.timed(build)
    return program, {"compile": seconds, "flops": flops.count(jaxpr)}


# --- the UNet ------------------------------------------------------------------------------------


def time_unet(job: sides.Job, case: cases.UNet) -> tuple[dict, np.ndarray]:
    """Figures of a forward pass or a training step, and its output or losses."""
    keep_programs(job)
    dtype = "float32" if case.train else job.dtype
    params, config = diffusers.load_unet(sides.weights(job) / "unet", param_dtype=dtype)
    params = jax.tree.map(jnp.array, params)  # copies, which training can give away
    sides.forget_peak()  # of loading
    net = unet.from_config(config, dtype=job.dtype, **bundle.kernels(None, job.variant))
    start = functools.partial(training, rank=case.rank) if case.train else forward
    run, program, about = start(net, params, case.inputs())
    figures, values = sides.measure(run, job.seconds)
    figures |= about
    if job.split:
        figures["split"] = xla_kinds.split(run, program)
    return {"parts": {"run": figures}}, np.asarray(values if case.train else values[0])


def forward(net: unet.UNet, params: dict, inputs: dict) -> tuple[Callable, Any, dict]:
    """(run, program, its figures) of a forward pass."""
    given = [params, *(jnp.array(inputs[name]) for name in ("x", "t", "context"))]
    apply = jax.jit(lambda params, x, t, context: net.apply({"params": params}, x, t, context))
    program, about = compiled(apply, *given)
    return lambda: jax.block_until_ready(program(*given)), program, about


def training(
    net: unet.UNet, params: dict, inputs: dict, rank: int | None
) -> tuple[Callable, Any, dict]:
    """(run, program, its figures) of loss, gradients and AdamW, of all weights or of a LoRA."""
    batch, frozen = jax.tree.map(jnp.array, inputs), {}
    if rank is not None:
        frozen, params = {"unet": params, "cond_stage": {}}, new_lora(params, rank)
    tx, _ = train_state.make_optimizer(schema.OptimizerConfig(learning_rate=cases.LEARNING_RATE))

    def loss(params, given):
        frozen, batch = given
        if frozen:
            params = lora.merged(frozen, [(lora.from_tree(params), 1.0)])["unet"]
        out = net.apply({"params": params}, batch["x"], batch["t"], batch["context"])
        return jnp.mean(jnp.square(out - batch["target"])), {}

    def step(state, frozen, batch):
        params, opt_state = state
        grads, metrics = train_state.gradients(loss, params, (frozen, batch), 1)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), metrics["loss"]

    state = [(params, tx.init(params))]
    program, about = compiled(jax.jit(step, donate_argnums=0), state[0], frozen, batch)

    def run():
        state[0], value = program(state[0], frozen, batch)
        jax.block_until_ready(state[0])
        return float(value)

    return run, program, about


def new_lora(params: dict, rank: int) -> dict:
    """Updates of the attentions, `down` by the module's name, as on the side of torch."""
    tree = lora.to_tree(lora.init({"unet": params}, rank))

    def down(path, leaf):
        name = sharding.path_name(path)
        if not name.endswith("/down"):
            return leaf
        module = lora_files.dotted("unet", name.removeprefix("unet/").removesuffix("/down"))
        return jnp.array(cases.draw(module, leaf.shape[::-1], 1 / rank).T)

    return jax.tree_util.tree_map_with_path(down, tree)


# --- sampling ------------------------------------------------------------------------------------


def time_sampling(job: sides.Job, case: cases.Sampling) -> tuple[dict, np.ndarray]:
    """Figures of the steps and of the decoder, each as one program, and the image."""
    keep_programs(job)
    model = load(job)
    given = [jnp.asarray(case.inputs()[name]) for name in ("x_T", "context", "null")]

    def decode(params, z):
        return latents.decode(model.first_stage, params["first_stage"], z, 1.0)

    steps_program, steps_about = compiled(jax.jit(sampler(model, case)), model.params, *given)
    z = jax.ShapeDtypeStruct(given[0].shape, jnp.float32)
    decode_program, decode_about = compiled(jax.jit(decode), model.params, z)
    steps = lambda: jax.block_until_ready(steps_program(model.params, *given))  # noqa: E731
    draw = lambda z: jax.block_until_ready(decode_program(model.params, z))  # noqa: E731
    figures, latent, image = sides.measure_sampling(job, steps, draw)
    figures["parts"]["steps"] |= steps_about
    figures["parts"]["decode"] |= decode_about
    if job.platform == "gpu":
        figures["peak_gib"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
    if job.split:
        figures["parts"]["steps"]["split"] = xla_kinds.split(steps, steps_program)
        figures["parts"]["decode"]["split"] = xla_kinds.split(lambda: draw(latent), decode_program)
    return figures, np.asarray(image, np.float32)


def sampler(model: bundle.LatentDiffusion, case: cases.Sampling) -> Callable:
    """sample(params, x_T, context, null) -> unscaled latents; all calls of our sampler are here."""
    keys = sampling.keys_of(0, np.arange(case.batch))
    sample = sampling.make_sampler(
        model,
        shape=(case.size, case.size, 4),
        steps=case.steps,
        decode=False,
    )

    def from_arrays(params, x_T, context, null):
        cond, null = Cond(context=context), Cond(context=null) if case.guided else None
        scale = cases.GUIDANCE if case.guided else 1.0
        return sample(params, cond, keys, null, scale, x_T=x_T) / model.latent_scale

    return from_arrays


def load(job: sides.Job) -> bundle.LatentDiffusion:
    """The model of the folder that both sides read, with the kernels that `load` would choose.

    Without text encoder: both sides start from its output.
    """
    folder = sides.weights(job)
    unet, unet_config = diffusers.load_unet(f"{folder}/unet", param_dtype=job.dtype)
    stage, stage_config = diffusers.load_first_stage(f"{folder}/vae", param_dtype=job.dtype)
    return bundle.build(
        schema.LatentDiffusionConfig(first_stage=stage_config, unet=unet_config, cond=None),
        {"unet": jax.device_put(unet), "first_stage": jax.device_put(stage), "cond_stage": {}},
        cases.SCALE,
        dtype=job.dtype,
        **bundle.kernels(None, job.variant),
    )


# --- single operations ---------------------------------------------------------------------------


def time_operations(job: sides.Job, case: cases.Operations) -> tuple[dict, None]:
    """Figures of attention at the shapes of the cases, and of a product."""
    kernel = attention.choose(job.platform, name=job.variant)

    @functools.partial(jax.jit, static_argnums=0)
    def attend(times, q, k, v):
        for _ in range(times):
            q = kernel(q, k, v)
        return q

    put = functools.partial(jnp.asarray, dtype=job.dtype)
    waiting = lambda function: lambda *args: function(*args).block_until_ready()  # noqa: E731
    programs = waiting(attend), waiting(jax.jit(jnp.dot))
    return sides.measure_operations(job, case, put, *programs), None


TIMES = {
    cases.UNet: time_unet,
    cases.Sampling: time_sampling,
    cases.Operations: time_operations,
}

if __name__ == "__main__":
    sides.serve(TIMES, {})
