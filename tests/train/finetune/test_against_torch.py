"""Training from weights beside torch: diffusers' modules, PEFT's layers, the same draws.

Draws of both sides are those of our keys; torch is given the numbers.
"""

import copy
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pipelines
import pytest
from PIL import Image

from ldm_jax import data, diffusion, loading, schema, sharding, train_state
from ldm_jax.adapters import lora
from ldm_jax.configs import finetune
from ldm_jax.convert.adapters import lora_files
from ldm_jax.train import frozen, ldm, step
from ldm_jax.train.finetune import adapter, base, inversion, loss
from ldm_jax.train.ldm import initial

pytestmark = pytest.mark.torch
BATCH, ROOT = 4, jax.random.key(23)
CLASS_PROMPT = "a disc"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    made = pipelines.stable_diffusion(folder)
    return types.SimpleNamespace(folder=folder, torch=made)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of eight pictures of noise with captions."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a disc and {i} squares")
    return folder


def configured(stage, pipeline, images, **changes):
    """finetune:STAGE on the pipeline and the pictures, in float32 on one device."""
    config = finetune.get_config(stage)
    source = schema.FolderConfig(str(images), eval_every=0, captions="sidecar")
    data_config = dataclasses.replace(config.data, source=source)
    shared = {"data": data_config, "dtype": "float32", "batch_size": BATCH}
    one_device = schema.MeshConfig(data=1)
    config = dataclasses.replace(config, **{**shared, "mesh": one_device, **changes})
    config = initial.adopt(config, str(pipeline.folder), None)
    if isinstance(config, schema.AdapterTrainConfig):
        config = adapter.settled(config)
    cond = dataclasses.replace(config.cond, dropout=0.0)
    return dataclasses.replace(config, cond=cond)


def prepared(config, tmp_path):
    """(mesh, frozen parts, stream)."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    given = frozen.find(config, tmp_path)
    stream = data.stream(config.data, batch_size=BATCH, seed=1, tokenizer=given.tokenizer)
    fixed = frozen.prepare(config, tmp_path / "run", mesh, stream, given)
    if isinstance(config, schema.AdapterTrainConfig):
        host = base.find(config, tmp_path)
        fixed = base.prepare(config, host, tmp_path / "run", fixed, mesh)
    return mesh, fixed, stream


def nchw(x):
    import torch

    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def torch_loss(torch_pipeline, unet, batch, keys, weights=None):
    """mse of eps, as diffusers' scripts compute it, with the draws of `keys`."""
    import torch

    with torch.no_grad():
        posterior = torch_pipeline.vae.encode(nchw(batch["image"])).latent_dist
        shape = np.moveaxis(np.empty(posterior.mean.shape), 1, -1).shape[1:]
        drawn = nchw(diffusion.rowwise_normal(keys["encode"], shape))
        x0 = (posterior.mean + posterior.std * drawn) * torch_pipeline.vae.config.scaling_factor
    context = torch_pipeline.text_encoder(torch.from_numpy(np.array(batch["tokens"])).long())[0]
    t = jax.vmap(lambda key: jax.random.randint(key, (), 0, 1000))(keys["t"])
    t, noise = torch.from_numpy(np.array(t)), nchw(diffusion.rowwise_normal(keys["noise"], shape))
    out = unet(torch_pipeline.scheduler.add_noise(x0, noise, t), t, context).sample
    squares = ((out - noise) ** 2).mean(dim=(1, 2, 3))
    return squares.mean() if weights is None else (squares * torch.from_numpy(weights)).sum()


def value_and_grad(made, fixed, examples):
    """The jitted function from parameters to ((loss, metrics), gradient)."""

    def of_params(params):
        return made(fixed.arguments, params, examples, True)

    return jax.jit(jax.value_and_grad(of_params, has_aux=True))


@pytest.mark.slow
def test_twenty_steps_on_a_frozen_first_stage_and_text_encoder(pipeline, images, tmp_path):
    """The loop that diffusers' users write, with AdamW at 1e-4: every loss to 1e-4."""
    import torch

    rate = schema.OptimizerConfig(learning_rate=1e-4)
    config = configured("full", pipeline, images, optimizer=rate)
    mesh, fixed, stream = prepared(config, tmp_path)
    fresh, shardings = ldm.init_state(config, jax.random.key(0), mesh)
    state = initial.begin(config, tmp_path / "run", fresh, shardings, mesh)
    train_step = ldm.make_train_step(config, fixed, mesh)

    unet = copy.deepcopy(pipeline.torch.unet).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2)
    losses = []
    for i in range(20):
        batch = data.global_batch(stream, i, sharding.batch_sharding(mesh))
        key = jax.random.fold_in(ROOT, step.TRAIN)
        examples = step.with_keys(key, i, ldm.DRAWS, batch, BATCH)
        theirs = torch_loss(pipeline.torch, unet, batch, examples["keys"])
        optimizer.zero_grad()
        theirs.backward()
        optimizer.step()
        state, metrics = train_step(state, batch, ROOT)
        losses.append((float(metrics["loss"]), float(theirs.detach())))
    ours, theirs = np.array(losses).T
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert np.ptp(theirs) > 0.01


def test_a_step_of_lora_has_the_gradients_of_peft(pipeline, images, tmp_path):
    import torch
    from peft import LoraConfig

    settings = schema.LoRAConfig(rank=3, alpha=6.0, targets="attention")
    config = configured("lora", pipeline, images, lora=settings)
    mesh, fixed, stream = prepared(config, tmp_path)
    params = adapter.init_params(config, jax.random.key(1))
    ups = iter(range(1000))
    params = jax.tree.map(  # `up` of zero would leave `down` without a gradient
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(next(ups)), x.shape), params
    )
    unet = copy.deepcopy(pipeline.torch.unet)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    theirs = {n: p for n, p in unet.named_parameters() if p.requires_grad}
    own = by_module(params)
    with torch.no_grad():
        for name, parameter in theirs.items():
            module, _, which = name.removesuffix(".default.weight").rpartition(".")
            value = getattr(own[module], "down" if which == "lora_A" else "up")
            parameter.copy_(torch.from_numpy(np.array(value).T))
    batch = data.global_batch(stream, 0, sharding.batch_sharding(mesh))
    examples = step.with_keys(ROOT, 0, ldm.DRAWS, batch, BATCH)
    value = torch_loss(pipeline.torch, unet, batch, examples["keys"])
    value.backward()
    made = loss.make_loss(config, fixed, mesh)
    (ours, _), grads = value_and_grad(made, fixed, examples)(params)
    np.testing.assert_allclose(float(ours), float(value.detach()), rtol=1e-5)
    found = by_module(grads)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(grads))
    assert len(theirs) == 2 * len(found) > 0
    for name, parameter in theirs.items():
        module, _, which = name.removesuffix(".default.weight").rpartition(".")
        ours = getattr(found[module], "down" if which == "lora_A" else "up")
        np.testing.assert_allclose(ours.T, parameter.grad.numpy(), atol=1e-4 * largest)


def by_module(params):
    """{torch's name of a module: its update}."""
    return {
        lora_files.dotted("unet", path.removesuffix("/kernel")): update.delta
        for path, update in lora.from_tree(params["lora"]).unet.items()
    }


def test_the_prior_is_a_second_half_of_the_batch_with_its_weight(pipeline, images, tmp_path):
    import copy

    config = configured(
        "dreambooth",
        pipeline,
        images,
        instance_prompt="a sks disc",
        class_prompt=CLASS_PROMPT,
        prior_weight=0.3,
    )
    mesh, fixed, stream = prepared(config, tmp_path)
    batch = dict(data.global_batch(stream, 0, sharding.batch_sharding(mesh)))
    batch |= {"prior_image": batch["image"][::-1], "prior_tokens": batch["tokens"][::-1]}
    params = loading.load(pipeline.folder).params
    examples = step.with_keys(ROOT, 0, ldm.DRAWS, batch, BATCH)
    made = loss.make_loss(config, fixed, mesh)
    (ours, metrics), grads = value_and_grad(made, fixed, examples)({"unet": params["unet"]})
    unet = copy.deepcopy(pipeline.torch.unet)
    both = loss.with_prior(examples)
    weights = np.repeat(np.float32([1 / BATCH, 0.3 / BATCH]), BATCH)
    value = torch_loss(pipeline.torch, unet, both["batch"], both["keys"], weights)
    value.backward()
    np.testing.assert_allclose(float(ours), float(value.detach()), rtol=1e-5)
    assert float(metrics["loss_subject"]) != float(metrics["loss_prior"])
    wanted = unet.conv_in.weight.grad.permute(2, 3, 1, 0).numpy()
    found = np.asarray(grads["unet"]["conv_in"]["kernel"])
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    half = {name: x[:BATCH] for name, x in both["batch"].items()}
    np.testing.assert_array_equal(half["image"], batch["image"])
    assert not np.array_equal(*(jax.random.key_data(k) for k in np.split(both["keys"]["t"], 2)))


def test_more_input_channels_change_nothing_at_first(pipeline, images, tmp_path):
    """4 -> 9 channels: the output is the base's, whatever lies beside the latent."""
    config = configured("full", pipeline, images)
    wide = initial.adopt(
        dataclasses.replace(finetune.get_config("inpaint"), dtype="float32"),
        str(pipeline.folder),
        None,
    )
    assert wide.unet.in_channels == 9
    assert wide.cond.text.encoder == config.cond.encoder
    wide = dataclasses.replace(wide, mesh=schema.MeshConfig(data=1))
    mesh = sharding.make_mesh(wide.mesh, jax.devices()[:1])
    fresh, shardings = ldm.init_state(wide, jax.random.key(0), mesh)
    state = initial.begin(wide, tmp_path, fresh, shardings, mesh)
    x, beside = (jax.random.normal(jax.random.key(i), (2, 8, 8, c)) for i, c in enumerate((4, 5)))
    context = jax.random.normal(jax.random.key(2), (2, 3, config.unet.context_dim))
    t = jnp.array([3.0, 800.0])
    given = loading.load(pipeline.folder)
    wanted = jax.jit(given.unet.apply)({"params": given.params["unet"]}, x, t, context, None)
    net, _ = ldm.modules(wide)
    concatenated = jnp.concatenate([x, 50 * beside], axis=-1)
    apply = jax.jit(net.apply)
    found = apply({"params": state.params["unet"]}, concatenated, t, context, None)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.slow
def test_at_a_rate_of_zero_the_loss_is_the_base_models(pipeline, images, tmp_path):
    """Also with a text encoder that trains, at a rate of its own."""
    rate = schema.OptimizerConfig(learning_rate=0.0)
    config = configured("full", pipeline, images, optimizer=rate)
    mesh, fixed, stream = prepared(config, tmp_path)
    fresh, shardings = ldm.init_state(config, jax.random.key(0), mesh)
    state = initial.begin(config, tmp_path / "run", fresh, shardings, mesh)
    batch = data.global_batch(stream, 0, sharding.batch_sharding(mesh))
    key = jax.random.fold_in(ROOT, step.TRAIN)
    examples = step.with_keys(key, 0, ldm.DRAWS, batch, BATCH)
    wanted = torch_loss(pipeline.torch, pipeline.torch.unet, batch, examples["keys"])
    _, metrics = ldm.make_train_step(config, fixed, mesh)(state, batch, ROOT)
    np.testing.assert_allclose(float(metrics["loss"]), float(wanted.detach()), rtol=1e-5)


def test_the_text_encoder_trains_at_its_own_rate():
    config = dataclasses.replace(
        finetune.get_config("full"),
        optimizer=schema.OptimizerConfig(learning_rate=1e-2, weight_decay=0.1),
        cond_learning_rate=1e-3,
    )
    params = {part: {"w": jnp.array([2.0])} for part in ("unet", "cond_stage")}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = ldm.make_optimizer(config)
    updates, _ = tx.update(grads, tx.init(params), params)
    alone, _ = train_state.make_optimizer(dataclasses.replace(config.optimizer, learning_rate=1e-3))
    wanted, _ = alone.update(grads, alone.init(params), params)
    np.testing.assert_allclose(updates["cond_stage"]["w"], wanted["cond_stage"]["w"], rtol=1e-6)
    np.testing.assert_allclose(updates["unet"]["w"], 10 * wanted["unet"]["w"], rtol=1e-6)


def test_a_step_of_textual_inversion_has_the_gradients_of_torch(pipeline, images, tmp_path):
    """Of the rows that torch's longer table has for the word."""
    import torch

    options = {"token": "<x>", "init_word": "a", "vectors": 2}
    config = configured("textual_inversion", pipeline, images, **options)
    mesh, fixed, _ = prepared(config, tmp_path)
    given = frozen.find(config, tmp_path)
    tokenizer, vectors = inversion.find(config, given)
    captions = inversion.texts(config)
    stream = data.stream(
        config.data, batch_size=BATCH, seed=1, tokenizer=tokenizer, captions=captions
    )
    batch = data.global_batch(stream, 0, sharding.batch_sharding(mesh))
    examples = step.with_keys(ROOT, 0, ldm.DRAWS, batch, BATCH)
    wide = inversion.widened(config)
    made = loss.make_loss(wide, fixed, mesh)
    (ours, _), grads = value_and_grad(made, fixed, examples)(
        {"embedding": {"vectors": jnp.asarray(vectors)}}
    )

    known = config.cond.encoder.vocab_size
    theirs = copy.deepcopy(pipeline.torch)
    theirs.text_encoder.resize_token_embeddings(known + 2)
    table = theirs.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[known:] = torch.from_numpy(vectors.copy())
    value = torch_loss(theirs, theirs.unet, batch, examples["keys"])
    value.backward()
    np.testing.assert_allclose(float(ours), float(value.detach()), rtol=1e-5)
    wanted = table.grad[known:].numpy()
    found = np.asarray(grads["embedding"]["vectors"])
    assert np.abs(wanted).min(axis=1).all()
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
