"""Evaluation of a first stage on held-out images: metrics and pictures."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import data, finite, schema, sharding
from ldm_jax.models import quantize
from ldm_jax.runtime import images
from ldm_jax.runtime.log import LOG
from ldm_jax.train.autoencoder import reconstruction


def make_evaluate(
    config: schema.AutoencoderTrainConfig, mesh: Mesh, evaluate_batch: Callable, held_out: Any
) -> Callable:
    """evaluate(params, suffix) -> {"eval/NAME" + suffix: mean over `eval_batches`}.

    The use of the codebook is measured over all these batches together.
    """
    batch_sharding = sharding.batch_sharding(mesh)

    def evaluate(params: dict, suffix: str) -> dict[str, float]:
        by_batch = [
            jax.device_get(evaluate_batch(params, data.global_batch(held_out, i, batch_sharding)))
            for i in range(config.eval_batches)
        ]
        counts = [f.pop("count_n") for f in by_batch if "count_n" in f]
        values = {name: np.mean([f[name] for f in by_batch]) for name in by_batch[0]}
        if counts:
            used = quantize.usage(np.sum(counts, axis=0))
            values |= {**used, "code_usage": used["used_codes"] / config.model.num_codes}
        return {f"eval/{name}{suffix}": float(value) for name, value in values.items()}

    return evaluate


def make_preview(config: schema.AutoencoderTrainConfig, mesh: Mesh, held_out: Any) -> Callable:
    """draw(params, path): writes held-out images above their reconstructions."""
    net = reconstruction.module(config, mesh)
    examples = data.read(held_out, range(config.num_samples))
    image = np.stack([example["image"] for example in examples])

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def reconstruct(params: dict, image: jax.Array) -> jax.Array:
        variables = {"params": sharding.all_gather(params["autoencoder"], mesh)}
        encoded = net.apply(variables, image, method="encode")
        z = encoded[0] if isinstance(encoded, tuple) else encoded  # the mode of a posterior
        return net.apply(variables, z, method="decode")

    def draw(params: dict, path: epath.Path) -> None:
        pictures = np.concatenate([image, np.asarray(reconstruct(params, image), np.float32)])
        if not finite.is_finite(pictures):
            LOG.warning("%s is not written: its images are not finite (NaN or infinity)", path)
        elif jax.process_index() == 0:
            sheet = images.grid(
                images.to_uint8(pictures),
                config.num_samples,
                scale=max(1, 64 // image.shape[1]),
                names=("image", "decoded"),
            )
            images.save_png(path, sheet)

    return draw
