"""The side of ldm_jax in `sampling.py`, which starts it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import sampling_cases
import sides
import unet_cases
import unet_jax

from ldm_jax import bundle, latents, sampling, schema
from ldm_jax.conditioning import Cond
from ldm_jax.convert import diffusers
from ldm_jax.cost import flops
from ldm_jax.models import attention


def load(job: sampling_cases.Job) -> bundle.LatentDiffusion:
    """The model of the folder that both sides read, with what `load` would choose for the device.

    Without text encoder: both sides start from what it gives.
    """
    unet, unet_config = diffusers.load_unet(f"{job.weights}/unet", param_dtype=job.dtype)
    stage, stage_config = diffusers.load_first_stage(f"{job.weights}/vae", param_dtype=job.dtype)
    return bundle.build(
        schema.LatentDiffusionConfig(first_stage=stage_config, unet=unet_config, cond=None),
        {"unet": jax.device_put(unet), "first_stage": jax.device_put(stage), "cond_stage": {}},
        sampling_cases.SCALE,
        dtype=job.dtype,
        **bundle.kernels(None, job.variant),
    )


def run_case(job: sampling_cases.Job, case: sampling_cases.Case) -> tuple[dict, np.ndarray]:
    """Times one case; see `sampling_cases.serve`."""
    jax.config.update("jax_compilation_cache_dir", job.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    model = load(job)
    params = model.params
    inputs = sampling_cases.inputs(case)
    given = [jnp.asarray(inputs[name]) for name in ("x_T", "context", "null")]
    keys = sampling.keys_of(0, np.arange(case.batch))
    sampler = sampling.make_sampler(
        model,
        shape=(case.size, case.size, 4),
        steps=case.steps,
        guided=case.guided,
        decode=False,
    )

    def sample(params, x_T, context, null):
        cond, null = Cond(context=context), Cond(context=null)
        return sampler(params, cond, null, keys, sampling_cases.GUIDANCE, x_T=x_T)

    def decode(params, z):
        return latents.decode(model.first_stage, params["first_stage"], z, 1.0)

    def program(function, *args):
        """(compiled program, seconds, operations) of a function."""
        traced, tracing = sides.timed(lambda: jax.jit(function).trace(*args))
        compiled, compiling = sides.timed(lambda: traced.lower().compile())
        return compiled, tracing + compiling, flops.count(traced.jaxpr)

    sample_program, sample_compile, sample_flops = program(sample, params, *given)
    z = jax.ShapeDtypeStruct(given[0].shape, jnp.float32)
    decode_program, decode_compile, decode_flops = program(decode, params, z)
    steps = lambda: jax.block_until_ready(sample_program(params, *given))  # noqa: E731
    one = lambda z: jax.block_until_ready(decode_program(params, z))  # noqa: E731
    figures, image = sampling_cases.parts(job, case, steps, one)
    figures["steps"] |= {"compile": sample_compile, "flops": sample_flops}
    figures["decode"] |= {"compile": decode_compile, "flops": decode_flops}
    if job.platform == "gpu":
        figures["peak_gib"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
    if job.split:
        latent = steps()
        figures["steps"]["split"] = split(steps, sample_program)
        figures["decode"]["split"] = split(lambda: one(latent), decode_program)
    return figures, np.asarray(image, np.float32)


def split(run, program) -> dict[str, float]:
    """As `unet_jax.split`; what belongs to no network is the solver's."""
    seconds = unet_jax.split(run, program.as_text())
    return {k: seconds["AdamW" if k == "solver" else k] for k in sampling_cases.KINDS}


def run_operations(job: sampling_cases.Job) -> dict:
    """Seconds of attention at the shapes of the cases, and operations per second of a product."""
    attend = jax.jit(attention.choose(job.platform, name=job.variant))

    @jax.jit
    def row(q, k, v):
        for _ in range(sampling_cases.IN_A_ROW):
            q = attend(q, k, v)
        return q

    def wait(function, qkv):
        return function(*qkv).block_until_ready()

    found = {}
    for case in job.attention_of:
        for where, shape in sampling_cases.attention_shapes(case).items():
            batch, queries, keys, heads, width = shape
            qkv = [
                jnp.asarray(unet_cases.draw(name, (batch, tokens, heads, width)), job.dtype)
                for name, tokens in (("q", queries), ("k", keys), ("v", keys))
            ]
            found[where] = {
                name: sides.measure(functools.partial(wait, function, qkv), job.seconds / 4)[0]
                for name, function in (("one", attend), ("row", row))
            }
    side = sampling_cases.matrix_side(job.platform)
    a = jnp.asarray(unet_cases.draw("a", (side, side)), job.dtype)
    product = jax.jit(jnp.dot)
    figures, _ = sides.measure(lambda: product(a, a).block_until_ready(), job.seconds)
    return {"attention": found, "product": figures | {"flops": 2.0 * side**3}}


if __name__ == "__main__":
    sampling_cases.serve(run_case, run_operations)
