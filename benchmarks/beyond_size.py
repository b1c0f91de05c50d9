"""Peak memory of each way to work on an image larger than the training size.

    python benchmarks/beyond_size.py --out benchmarks/results

Stable Diffusion v1 (or a narrower one, `--width`) is compiled by shape alone, nothing runs and no
parameter exists: what is reported is what the compiler plans for one device, from
`compiled.memory_analysis()`. The workspace of convolution libraries is not in it.
"""

import argparse
import dataclasses
import datetime
import os
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp

from ldm_jax import bundle, guidance, latents, schema, sharding
from ldm_jax.conditioning import Cond
from ldm_jax.large import tiling, windows
from ldm_jax.models import attention, autoencoder, unet

WINDOW, STRIDE = (64, 64), (32, 32)  # of the latent: windows as large as in training
QUICK = {"xla_backend_optimization_level": 0}  # machine code that never runs


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--out", type=Path, required=True)
    flags.add_argument("--side", type=int, default=2048, help="side of the image in pixels")
    flags.add_argument("--width", type=int, default=320, help="channels of the UNet's first level")
    flags.add_argument("--channels", type=int, default=128, help="and of the first stage's")
    options = flags.parse_args()
    began = time.perf_counter()
    rows = [*unet_rows(options), *decoder_rows(options), *encoder_rows(options)]
    write(options, rows, time.perf_counter() - began)


def unet_rows(options: argparse.Namespace) -> list[tuple]:
    """One guided step of one image."""
    config = dataclasses.replace(schema.UNetConfig(), model_channels=options.width)
    side = options.side // 8
    x = jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    context = jax.ShapeDtypeStruct((1, 77, 768), jnp.float32)

    def step(around, mesh=None):
        net = unet.from_config(config, attention=attention.choose("cpu", mesh, "chunked"))

        def run(params, x, t, context):
            cond, null = Cond(context=context), Cond(context=jnp.zeros_like(context))
            model = around(bundle.bind(net, params))
            return guidance.classifier_free(model, cond, null, 7.5)(x, t)

        params = shapes_of(net, unet.example_inputs(net))
        return planned(run, params, x, t, context, mesh=mesh)

    def cut(at_once):
        how = {"window": WINDOW, "stride": STRIDE, "at_once": at_once}
        return lambda model: windows.windowed(model, **how)

    every = windows.count(side, side, WINDOW, STRIDE)
    mesh = sharding.spatial_mesh(4)
    return [
        ("UNet, whole", *step(lambda model: model)),
        (f"UNet, {every} windows in one batch", *step(cut(None))),
        ("UNet, 8 windows at a time", *step(cut(8))),
        ("UNet, 1 window at a time", *step(cut(1))),
        ("UNet, over 4 devices, of each", *step(lambda model: model, mesh)),
    ]


def decoder_rows(options: argparse.Namespace) -> list[tuple]:
    z = jax.ShapeDtypeStruct((1, options.side // 8, options.side // 8, 4), jnp.float32)
    mesh = sharding.spatial_mesh(4)
    rows = [("decode, whole", *stage(options, latents.decode, z))]
    for levels in (1, 2, 3):
        rows.append(
            (f"decode, {levels} of 4 levels in tiles", *stage(options, tiling.decode, z, levels))
        )
    return [
        *rows,
        ("decode, over 4 devices, of each", *stage(options, latents.decode, z, mesh=mesh)),
    ]


def encoder_rows(options: argparse.Namespace) -> list[tuple]:
    image = jax.ShapeDtypeStruct((1, options.side, options.side, 3), jnp.float32)
    rows = [("encode, whole", *stage(options, latents.encode, image))]
    for levels in (1, 2, 3):
        rows.append(
            (
                f"encode, {levels} of 4 levels in tiles",
                *stage(options, tiling.encode, image, levels),
            )
        )
    return rows


def stage(options, function, x, levels=None, mesh=None) -> tuple:
    config = dataclasses.replace(schema.AutoencoderKLConfig(), channels=options.channels)
    how = attention.choose("cpu", mesh, "chunked")
    module = autoencoder.from_config(config, attention=how)
    arguments = {} if levels is None else {"levels": levels}
    run = lambda params, x: function(module, params, x, 0.18215, **arguments)  # noqa: E731
    return planned(run, shapes_of(module, autoencoder.example_inputs(module)), x, mesh=mesh)


def shapes_of(module, example):
    return jax.eval_shape(module.init, jax.random.key(0), *example)["params"]


def planned(run, params, x, *rest, mesh=None) -> tuple[int, int, float]:
    """(Bytes of temporaries and result, bytes of parameters, seconds of compilation)."""
    began, shardings = time.perf_counter(), {}
    if mesh is not None:
        split, whole = sharding.image_sharding(mesh), sharding.replicated(mesh)
        inputs = (whole, split, *(whole for _ in rest))
        shardings = {"in_shardings": inputs, "out_shardings": split}
    compiled = jax.jit(run, compiler_options=QUICK, **shardings).lower(params, x, *rest).compile()
    memory = compiled.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
    print(f"{peak / 1e9:8.3f} GB, {time.perf_counter() - began:.0f} s", flush=True)
    weights = sum(p.size * 4 for p in jax.tree.leaves(params))
    return peak, weights, time.perf_counter() - began


def write(options: argparse.Namespace, rows: list[tuple], seconds: float) -> None:
    size = f"{options.side}x{options.side}"
    narrow = f", narrower (UNet from {options.width} channels, first stage from {options.channels})"
    real = (options.width, options.channels) == (320, 128)
    lines = [
        "# Memory beyond the training size",
        "",
        f"`python benchmarks/beyond_size.py --out benchmarks/results --side {options.side}"
        f" --width {options.width} --channels {options.channels}`, {datetime.date.today()},"
        f" jax {jax.__version__}, {seconds:.0f} s.",
        "",
        f"An image of {size} with Stable Diffusion v1{'' if real else narrow}"
        ", float32, attention in chunks, compiled by shape for CPUs. Memory is what the compiler"
        " plans on one device for temporaries and the result, without parameters; a UNet step is"
        " guided (two rows). Windows are 64x64 pixels of the latent every 32; tiles are 512x512"
        " pixels of the image.",
        "",
        "| | memory, GB | of the whole | parameters, GB | compile, s |",
        "| --- | --- | --- | --- | --- |",
    ]
    whole = 1.0
    for name, peak, weights, took in rows:
        whole = peak if name.endswith("whole") else whole
        lines.append(
            f"| {name} | {peak / 1e9:.3f} | {peak / whole:.3f} | {weights / 1e9:.2f} | {took:.0f} |"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "beyond_size.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
