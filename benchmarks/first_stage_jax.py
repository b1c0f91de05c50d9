"""The side of ldm_jax in `first_stage.py`, which starts it: a training step, the encoder.

`python first_stage_jax.py --weights JOB.json` writes what both sides start from instead.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import first_stage_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import sides
from etils import epath

from ldm_jax import diffusion, schema, sharding, train_state
from ldm_jax.configs import first_stages
from ldm_jax.convert import auxiliary, table
from ldm_jax.convert.diffusers import tables
from ldm_jax.data import cache
from ldm_jax.models import discriminator, lpips
from ldm_jax.train import autoencoder
from ldm_jax.train.autoencoder import adversary, reconstruction
from ldm_jax.train.prepare import encode

MESH = sharding.make_mesh(schema.MeshConfig(), jax.devices()[:1])
ROOT = jax.random.key(0)
OPTIMIZER = schema.OptimizerConfig(
    learning_rate=cases.LEARNING_RATE, b1=0.5, b2=0.9, eps=cases.EPSILON, weight_decay=0.0
)
DISC_OPTIMIZER = dataclasses.replace(OPTIMIZER, eps=cases.DISC_EPSILON)
ENCODED = 3  # seconds at least that records are encoded and written for


def model_config(case: cases.Case) -> schema.AutoencoderKLConfig:
    """The first stage of a case."""
    model = cases.MODELS[case.model]
    return schema.AutoencoderKLConfig(
        in_channels=model.image_channels,
        out_channels=model.image_channels,
        channels=model.channels,
        channel_mult=model.channel_mult,
        num_res_blocks=model.num_res_blocks,
        z_channels=model.z_channels,
        embed_dim=model.z_channels,
    )


def step_config(case: cases.Case) -> schema.AutoencoderTrainConfig:
    """first_stages:kl-f8 with that model, its adversary from the first step on, random LPIPS."""
    released = first_stages.get_config("kl-f8")
    loss = dataclasses.replace(released.loss, disc_start=0, perceptual_vgg="random")
    return dataclasses.replace(
        released,
        model=model_config(case),
        loss=loss,
        optimizer=OPTIMIZER,
        disc_optimizer=DISC_OPTIMIZER,
        batch_size=case.batch,
    )


def run_case(job: cases.Job, case: cases.Case) -> dict:
    """Times one case; see `first_stage_cases.serve`."""
    jax.config.update("jax_compilation_cache_dir", str(Path(job.kept) / "xla"))
    return step(job, case) if case.kind == "step" else encoding(job, case)


# --- a step --------------------------------------------------------------------------------------


def step(job: cases.Job, case: cases.Case) -> dict:
    """Figures of `autoencoder.make_train_step`, and the losses of the first steps."""
    config = step_config(case)
    perceptual = lpips.random_params(ROOT)
    state = [autoencoder.init_state(config, ROOT, MESH)[0]]
    batch = {"image": jnp.asarray(cases.images(case))}
    train_step = autoencoder.make_train_step(config, MESH, perceptual)
    lowered = train_step.func.lower(*train_step.args, state[0], batch, ROOT)
    program, compiling = sides.timed(lowered.compile)

    def run() -> list[float]:
        state[0], metrics = program(*train_step.args, state[0], batch, ROOT)
        jax.block_until_ready(state[0])
        return [float(metrics[name]) for name in cases.TERMS]

    figures, values = sides.measure(run, job.seconds, cases.COMPARED - 1)
    figures |= {"compile": compiling, "losses": cases.of_steps(values)}
    if job.pieces:
        figures["pieces"] = pieces(config, perceptual, state[0], batch["image"])
    return figures


def pieces(
    config: schema.AutoencoderTrainConfig, perceptual: dict, state: Any, image: jax.Array
) -> dict[str, float]:
    """Seconds of each part, forward and backward; what does not learn is given to it too."""
    reconstruct, judge = reconstruction.make(config, MESH), adversary.make_judge(config)
    distance, other = lpips.LPIPS(), image[:, ::-1]

    def whole(params, image, keys):
        found = reconstruct({"autoencoder": params}, image, keys, keys[0], True)
        return jnp.mean(jnp.abs(image - found.image)) + found.regularization

    def perceived(other, perceptual, image):
        return jnp.mean(distance.apply({"params": perceptual}, image, other))

    def judged(params, stats, image, other):
        real, stats = judge(params, stats, image)
        fake, _ = judge(params, stats, other)
        return jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))

    keys, stats = train_state.row_keys(ROOT, config.batch_size), state.disc_stats["batch_stats"]
    found = {}
    for name, function, arguments in (
        ("autoencoder", whole, (state.params["autoencoder"], image, keys)),
        ("LPIPS", perceived, (other, perceptual, image)),
        ("discriminator", judged, (state.disc_params, stats, image, other)),
    ):
        once = functools.partial(jax.jit(jax.value_and_grad(function)), *arguments)
        found[name] = cases.median_of(lambda once=once: jax.block_until_ready(once()))
    return found


def write_weights(job: cases.Job) -> None:
    """WEIGHTS/{autoencoder,lpips,discriminator,noise}.npz, tensors under torch's names."""
    case = cases.CASES[job.case]
    config, folder = step_config(case), cases.weights_of(job)
    folder.mkdir(parents=True, exist_ok=True)
    state = jax.device_get(autoencoder.init_state(config, ROOT, MESH)[0])
    params = state.params["autoencoder"]
    net = discriminator.from_config(config.discriminator)
    variables = {"params": state.disc_params, "batch_stats": state.disc_stats["batch_stats"]}
    side = cases.MODELS[case.model].size // config.model.downsample
    trees = {
        "autoencoder": table.to_torch(tables.rows(params), params),
        "lpips": table.to_torch(
            list(auxiliary.lpips_rows()), jax.device_get(lpips.random_params(ROOT))
        ),
        "discriminator": auxiliary.discriminator_state_dict(net, variables),
        "noise": noise(case, (side, side, config.model.embed_dim)),
    }
    for name, tensors in trees.items():
        np.savez(folder / f"{name}.npz", **{n: np.asarray(x) for n, x in tensors.items()})


def noise(case: cases.Case, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """What the recipe draws for the posterior in the first steps: {"STEP/DRAW": [B, h, w, c]}."""
    found = {}
    for i in range(cases.COMPARED):
        key = jax.random.fold_in(ROOT, autoencoder.TRAIN)
        keys = train_state.step_keys(key, i, ("encode", "disc_encode"))
        for name, key in keys.items():
            rows = train_state.row_keys(key, case.batch)
            found[f"{i}/{name}"] = diffusion.rowwise_normal(rows, shape)
    return found


# --- encoding ------------------------------------------------------------------------------------


def encoding(job: cases.Job, case: cases.Case) -> dict:
    """Figures of the encoder alone, and of `ldm-train encode` from record to shard."""
    model = model_config(case)
    params = autoencoder.init_state(step_config(case), ROOT, MESH)[0].params["autoencoder"]
    config = encode_config(case)
    run = encode.make_encoder(config, model, MESH)
    image = cases.images(case)

    def alone() -> dict[str, jax.Array]:
        return jax.block_until_ready(run(params, image))

    _, compiling = sides.timed(alone)  # and the first run
    figures, values = sides.measure(alone, job.seconds, cases.COMPARED - 1)
    means = [float(jnp.mean(jnp.abs(values[0][name]))) for name in cache.MOMENTS]
    figures |= {"compile": compiling, "losses": [means]}
    source = encode.data.open_source(config.data, "train")
    count = max(2 * case.batch, int(ENCODED * case.batch / min(figures["runs"])))
    shard = cache.Shard(f"{job.case}.array_record", 0, min(count, len(source)))
    read = encode.Reader(config, source, True)
    found = encode.records_of(config, read, shard, lambda x: run(params, x), set())
    path = epath.Path(job.kept) / shard.name

    def written() -> int:
        return sum(1 for _ in cache.write_shard(path, found))

    number, took = sides.timed(written)
    return figures | {"path_per_second": number / took, "path_images": number}


def encode_config(case: cases.Case) -> schema.LatentDiffusionTrainConfig:
    """The digits for the demo's first stage, drawn shapes for one of real size."""
    return schema.LatentDiffusionTrainConfig(data=data_config(case), batch_size=case.batch)


def data_config(case: cases.Case) -> schema.DataConfig:
    """What `encode_config` reads."""
    model = cases.MODELS[case.model]
    if case.model == "demo":
        return schema.DataConfig(
            source=schema.TFDSConfig(name="sklearn_digits"), size=16, channels=1, crop="none"
        )
    source = schema.SyntheticConfig(num_images=16, size=model.size)
    return schema.DataConfig(source=source, size=model.size)


if __name__ == "__main__":
    cases.serve(run_case, write_weights)
