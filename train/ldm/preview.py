"""Sample grids of a running training: the averaged weights, the same keys every time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import bundle, conditioning, data, finite, latents, sampling, schema, sharding
from ldm_jax.runtime import images, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.train.frozen import Frozen


def make(
    config: schema.LatentDiffusionTrainConfig,
    frozen: Frozen,
    mesh: Mesh,
    held_out: data.Stream,
    key: jax.Array,
    *,
    tokenizer: Any = None,
    whole: Callable[[dict, dict], dict] = lambda frozen, params: {**frozen, **params},
) -> Callable:
    """draw(params, path): writes a grid of `num_samples` images made with `params` to `path`.

    Classes take turns; captions and concat conditioning come from held-out images, captions from
    `config.sample_prompts` if it has any. They go to a text file beside the grid, one line per
    image. whole(frozen, params): the parts of the model, of gathered parameters.
    """
    if config.sample_prompts and tokenizer is None:
        raise ValueError("--sample-prompts: the model is not conditioned on text; leave it out")
    model_config = bundle.model_config(config, frozen.config)
    model = bundle.build(
        model_config,
        {},
        frozen.scale,
        dtype=jnp.dtype(config.dtype),
        **bundle.kernels(mesh, config.attention),
    )
    guided = config.cond is not None and config.cond.dropout > 0 and config.sample_guidance != 1
    if guided and config.sample_guidance == 0:
        LOG.warning(
            "sample_guidance 0 leaves out the condition in the sample grids: 1 draws with it,"
            " without guidance"
        )
    sample = sampling.make_sampler(model, config.sample_steps)
    scale = config.sample_guidance if guided else 1.0
    count = config.num_samples
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def run(params: tuple[dict, dict], batch: dict, keys: jax.Array) -> jax.Array:
        params = whole(*sharding.all_gather(params, mesh))
        encode = functools.partial(
            latents.encode, model.first_stage, params["first_stage"], scale=frozen.scale
        )
        arguments = (config.cond, model.cond_stage, params["cond_stage"], batch, encode)
        null = conditioning.null_like(*arguments) if guided else None
        cond = conditioning.from_batch(*arguments)
        return sample(params, cond, keys, null, scale)

    def draw(params: dict, path: epath.Path) -> None:
        batch, texts = _conditions(config, held_out, count, tokenizer)
        drawn = np.asarray(run((frozen.arguments, params), batch, keys))
        if not finite.is_finite(drawn):
            LOG.warning("%s is not written: its images are not finite (NaN or infinity)", path)
            return
        pictures = images.to_uint8(drawn)
        if jax.process_index() == 0:
            columns = int(np.ceil(np.sqrt(count)))
            images.save_png(
                path, images.grid(pictures, columns, scale=max(1, 64 // pictures.shape[1]))
            )
            if texts:
                lines = [" ".join(text.split()) for text in texts]
                rundir.write_text(path.with_suffix(".txt"), "".join(f"{x}\n" for x in lines))

    return draw


def _conditions(
    config: schema.LatentDiffusionTrainConfig, held_out: data.Stream, count: int, tokenizer: Any
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(batch of the grid's conditions, its texts): host arrays, the same in every process."""
    batch = conditioning.kind_of(config.cond).in_turn(config.cond, count)
    if batch is not None:
        return batch, []
    examples = data.read(held_out, range(count))
    batch = {name: np.stack([x[name] for x in examples]) for name in examples[0]}
    if "tokens" not in batch:
        return batch, []
    if not config.sample_prompts:
        return batch, [held_out.caption(i) for i in range(count)]
    texts = [config.sample_prompts[i % len(config.sample_prompts)] for i in range(count)]
    return {**batch, "tokens": tokenizer.encode(texts)}, texts
