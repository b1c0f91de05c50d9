"""The side of ldm_jax in `paired.py` for first stages: a step, encoding, latent training."""

import dataclasses
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import sides
from etils import epath
from side_jax import compiled, keep_programs

from ldm_jax import data, diffusion, schema, sharding, train_state
from ldm_jax.configs import digits, first_stages, folder
from ldm_jax.convert import auxiliary, table
from ldm_jax.convert.diffusers import tables
from ldm_jax.data import cache
from ldm_jax.models import discriminator, lpips
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.schema import serialize
from ldm_jax.train import autoencoder, frozen, ldm, step
from ldm_jax.train.autoencoder import adversary, reconstruction
from ldm_jax.train.prepare import encode

MESH = sharding.make_mesh(schema.MeshConfig(), jax.devices()[:1])
ROOT = jax.random.key(0)
OPTIMIZER = schema.OptimizerConfig(
    learning_rate=cases.LEARNING_RATE, b1=0.5, b2=0.9, eps=cases.EPSILON, weight_decay=0.0
)
DISC_OPTIMIZER = dataclasses.replace(OPTIMIZER, eps=cases.DISC_EPSILON)
ENCODED = 3  # seconds at least that records are encoded and written for
LEAST = cases.COMPARED - 1  # timed runs


def step_config(case: cases.FirstStage) -> schema.AutoencoderTrainConfig:
    """first_stages:kl-f8 with the case's model, random LPIPS, the adversary from step 0 on."""
    released = first_stages.get_config("kl-f8")
    return dataclasses.replace(
        released,
        model=case.config,
        loss=dataclasses.replace(released.loss, disc_start=0, perceptual_vgg="random"),
        optimizer=OPTIMIZER,
        disc_optimizer=DISC_OPTIMIZER,
        batch_size=case.batch,
    )


def data_config(case: cases.FirstStage) -> schema.DataConfig:
    """The digits for the demo's first stage, drawn shapes for one of real size."""
    if case.model == "demo":
        source = schema.TFDSConfig(name="sklearn_digits")
        return schema.DataConfig(source=source, size=16, channels=1, crop="none")
    source = schema.SyntheticConfig(num_images=16, size=case.size)
    return schema.DataConfig(source=source, size=case.size)


# --- a training step -----------------------------------------------------------------------------


def time_step(job: sides.Job, case: cases.TrainStep) -> tuple[dict, np.ndarray]:
    """Figures of `autoencoder.make_train_step`, and the losses of the first steps."""
    keep_programs(job)
    config = step_config(case)
    perceptual = lpips.random_params(ROOT)
    state = [autoencoder.init_state(config, ROOT, MESH)[0]]
    batch = {"image": jnp.asarray(case.images())}
    train_step = autoencoder.make_train_step(config, MESH, perceptual)
    program, about = compiled(train_step, state[0], batch, ROOT)

    def run() -> list[float]:
        state[0], metrics = program(train_step.frozen, state[0], batch, ROOT)
        jax.block_until_ready(state[0])
        return [float(metrics[name]) for name in cases.TERMS]

    figures, values = sides.measure(run, job.seconds, LEAST)
    parts = {"run": figures | about}
    if job.split:
        parts |= time_pieces(config, perceptual, state[0], batch["image"])
    return {"parts": parts}, cases.compared_losses(values)


def time_pieces(
    config: schema.AutoencoderTrainConfig, perceptual: dict, state: Any, image: jax.Array
) -> dict[str, dict]:
    """Figures of each piece, forward and backward; frozen parameters are arguments of it too."""
    reconstruct, judge = reconstruction.make(config, MESH), adversary.make_judge(config)
    distance, other = lpips.LPIPS(), image[:, ::-1]

    def whole(params, image, keys):
        made = reconstruct({"autoencoder": params}, image, keys, keys[0], True)
        return jnp.mean(jnp.abs(image - made.image)) + made.regularization

    def perceived(other, perceptual, image):
        return jnp.mean(distance.apply({"params": perceptual}, image, other))

    def judged(params, stats, image, other):
        real, stats = judge(params, stats, image)
        fake, _ = judge(params, stats, other)
        return jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))

    def measured(function, *args):
        once = jax.jit(jax.value_and_grad(function))
        return sides.measure(lambda: jax.block_until_ready(once(*args)), 0.0)[0]

    keys, stats = train_state.example_keys(ROOT, config.batch_size), state.disc_stats["batch_stats"]
    figures = (
        measured(whole, state.params["autoencoder"], image, keys),
        measured(perceived, other, perceptual, image),
        measured(judged, state.disc_params, stats, image, other),
    )
    return dict(zip(cases.PIECES, figures, strict=True))


def write_tensors(job: sides.Job, case: cases.TrainStep | cases.Encode) -> None:
    """{autoencoder,lpips,discriminator,noise}.npz, tensors under torch's names."""
    config, target = step_config(case), sides.weights(job)
    target.mkdir(parents=True, exist_ok=True)
    state = jax.device_get(autoencoder.init_state(config, ROOT, MESH)[0])
    params, features = state.params["autoencoder"], jax.device_get(lpips.random_params(ROOT))
    net = discriminator.from_config(config.discriminator)
    variables = {"params": state.disc_params, "batch_stats": state.disc_stats["batch_stats"]}
    side = case.size // case.config.downsample
    trees = {
        "autoencoder": table.to_torch(tables.entries(params), params),
        "lpips": table.to_torch(list(auxiliary.lpips_entries()), features),
        "discriminator": auxiliary.discriminator_state_dict(net, variables),
        "noise": posterior_noise(case.batch, (side, side, case.config.embed_dim)),
    }
    for name, tensors in trees.items():
        np.savez(target / f"{name}.npz", **{n: np.asarray(x) for n, x in tensors.items()})


def posterior_noise(batch: int, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """The recipe's noise of the posterior in the first steps: {"STEP/DRAW": [B, h, w, c]}."""
    root = jax.random.fold_in(ROOT, step.TRAIN)
    return {
        f"{i}/{name}": diffusion.rowwise_normal(train_state.example_keys(key, batch), shape)
        for i in range(cases.COMPARED)
        for name, key in train_state.step_keys(root, i, ("encode", "disc_encode")).items()
    }


# --- encoding ------------------------------------------------------------------------------------


def time_encoding(job: sides.Job, case: cases.Encode) -> tuple[dict, np.ndarray]:
    """Figures of the encoder alone, and of an image from record to shard with `encode`."""
    keep_programs(job)
    stage = step_config(case)
    params = autoencoder.init_state(stage, ROOT, MESH)[0].params["autoencoder"]
    config = schema.LatentDiffusionTrainConfig(data=data_config(case), batch_size=case.batch)
    run, image = encode.make_encoder(config, stage.model, MESH), case.images()
    alone = lambda: jax.block_until_ready(run(params, image))  # noqa: E731
    figures, (moments, *_) = sides.measure(alone, job.seconds, LEAST)
    figures["compile"] = figures["first"]

    source = encode.data.open_source(config.data, "train")
    count = max(2 * case.batch, int(ENCODED * case.batch / figures["least"]))
    shard = cache.Shard(f"{job.case}.array_record", 0, min(count, len(source)))
    read = encode.Reader(config, source, True)
    records = encode.records_of(config, read, shard, lambda x: run(params, x), set())
    written = cache.write_shard(epath.Path(job.kept) / shard.name, records)
    number, took = sides.timed(lambda: sum(1 for _ in written))
    image_seconds = took / number
    path = {"first": image_seconds, "n": number, "median": image_seconds, "least": image_seconds}
    means = np.array([float(jnp.mean(jnp.abs(moments[name]))) for name in cache.MOMENTS])
    return {"parts": {"run": figures, "path": path}}, means


# --- latent diffusion from images and from a cache -----------------------------------------------


def ldm_config(
    job: sides.Job, case: cases.LatentTraining, cached: bool
) -> schema.LatentDiffusionTrainConfig:
    """`digits`, or `folder:ldm` (LDM-4 of the paper) on drawn shapes; no image is mirrored."""
    kept = sides.weights(job)
    return dataclasses.replace(
        digits.ldm() if case.model == "demo" else folder.ldm(),
        data=data_config(case),
        batch_size=case.batch,
        first_stage=schema.FirstStageConfig(path=str(kept / "first_stage"), scale=1.0),
        cache=schema.LatentCacheConfig(path=str(kept / "cache") if cached else ""),
    )


def write_cache(job: sides.Job, case: cases.LatentTraining) -> None:
    """A first stage of random weights as a run, and the cache that it makes of the data."""
    stage, kept = step_config(case), sides.weights(job)
    run, _ = rundir.open_run(kept / "first_stage", stage)
    state = jax.device_get(autoencoder.init_state(stage, ROOT, MESH)[0])
    checkpoint.save_snapshot(run, 1, state.params, serialize.to_dict(stage.model))
    encode.encode(ldm_config(job, case, cached=False), kept / "cache")


def time_latent_training(job: sides.Job, case: cases.LatentTraining) -> tuple[dict, np.ndarray]:
    """Figures of the recipe's step with all that feeds it, and the first losses."""
    keep_programs(job)
    config = ldm_config(job, case, cached=job.variant == "cache")
    rows = sharding.batch_sharding(MESH)
    stream = data.stream(
        config.data, batch_size=case.batch, seed=config.seed, cached=config.cache.path
    )
    run = sides.weights(job) / f"run_{job.variant}"
    fixed = frozen.prepare(config, run, MESH, stream)
    state = [ldm.init_state(config, ROOT, MESH)[0]]
    train_step = ldm.make_train_step(config, fixed, MESH)
    given = (state[0], data.global_batch(stream, 0, rows), ROOT)
    program, about = compiled(train_step, *given)
    with data.prefetch(stream, 0, rows) as batches:

        def one_step() -> float:
            _, batch = next(batches)
            state[0], metrics = program(train_step.frozen, state[0], batch, ROOT)
            return float(metrics["loss"])  # waits

        figures, losses = sides.measure(one_step, job.seconds, LEAST)
    return {"parts": {"run": figures | about}}, np.array(losses)


TIMES = {
    cases.TrainStep: time_step,
    cases.Encode: time_encoding,
    cases.LatentTraining: time_latent_training,
}
PREPARES = {
    cases.TrainStep: write_tensors,
    cases.Encode: write_tensors,
    cases.LatentTraining: write_cache,
}

if __name__ == "__main__":
    sides.serve(TIMES, PREPARES)
