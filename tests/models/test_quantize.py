"""Nearest codes are the nearest, losses and averages are the reference's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draw

from ldm_jax import schema, sharding
from ldm_jax.models import quantize

CODEBOOK = draw(10, 3, seed=2)
Z = draw(2, 4, 5, 3)
LEGACY = schema.AutoencoderVQConfig(beta=0.3)
CORRECTED = dataclasses.replace(LEGACY, legacy=False)


def nearest_in_float64(codebook, z):
    difference = z[..., None, :].astype(np.float64) - codebook.astype(np.float64)
    return np.argmin(np.sum(difference**2, -1), -1)


@pytest.mark.parametrize("chunk", [1, 4, 5, 2048])
@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (7, 3), (3,)])
def test_nearest_code(monkeypatch, chunk, shape):
    monkeypatch.setattr(quantize, "CHUNK", chunk)
    z = draw(*shape)
    found = quantize.nearest(CODEBOOK, z)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, nearest_in_float64(CODEBOOK, z))


@pytest.mark.parametrize("chunk", [4, 2048])
def test_of_equal_codes_the_first(monkeypatch, chunk):
    monkeypatch.setattr(quantize, "CHUNK", chunk)
    twice = np.concatenate([CODEBOOK, CODEBOOK])
    np.testing.assert_array_equal(quantize.nearest(twice, Z), nearest_in_float64(CODEBOOK, Z))
    assert int(jnp.max(quantize.nearest(np.zeros((10, 3)), Z))) == 0


def test_codes_are_compared_in_full_float32():
    program = str(jax.make_jaxpr(quantize.nearest)(CODEBOOK, Z))
    found = ("dot_general[", "(Precision.HIGHEST, Precision.HIGHEST)")
    assert [program.count(text) for text in found] == [1, 1]
    low = jnp.asarray(Z, jnp.bfloat16)
    expected = quantize.nearest(CODEBOOK, low.astype(jnp.float32))
    np.testing.assert_array_equal(quantize.nearest(CODEBOOK, low), expected)
    # codes that bfloat16 cannot tell apart
    fine = 1 + np.arange(8, dtype=np.float32)[:, None] * 2e-3
    np.testing.assert_array_equal(quantize.nearest(fine, fine), np.arange(8))


def test_quantizer_gives_codes_and_passes_gradients_by():
    module = quantize.VectorQuantizer(10, 3)
    start = module.init(jax.random.key(0), Z)["params"]["embedding"]
    assert start.shape == (10, 3)
    assert 0.05 < float(jnp.abs(start).max()) <= 0.1  # U(-1/n, 1/n)
    weights = draw(*Z.shape, seed=5)

    def loss(codebook, z):
        codes, indices = module.apply({"params": {"embedding": codebook}}, z)
        return jnp.sum(weights * codes), (codes, indices)

    (to_codebook, to_z), (codes, indices) = jax.grad(loss, (0, 1), has_aux=True)(CODEBOOK, Z)
    np.testing.assert_array_equal(codes, CODEBOOK[indices])  # to the bit
    np.testing.assert_array_equal(to_z, weights)
    assert not to_codebook.any()


@pytest.mark.torch
@pytest.mark.parametrize("config", [LEGACY, CORRECTED])
def test_loss_and_its_gradients_are_those_of_diffusers(config):
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    vae = pytest.importorskip("diffusers.models.autoencoders.vae", reason="and diffusers")
    theirs = vae.VectorQuantizer(10, 3, beta=config.beta, legacy=config.legacy)
    theirs.embedding.weight.data = torch.tensor(CODEBOOK)
    z = torch.tensor(Z, requires_grad=True)
    _, expected, (_, _, their_indices) = theirs(z.permute(0, 3, 1, 2))
    expected.backward()

    indices = quantize.nearest(CODEBOOK, Z)
    np.testing.assert_array_equal(indices.ravel(), their_indices.numpy())

    def loss(codebook, z):
        per_row = quantize.codebook_loss(config, codebook, z, indices)
        assert per_row.shape == (2,)
        return jnp.mean(per_row)

    found, grads = jax.value_and_grad(loss, (0, 1))(CODEBOOK, Z)
    assert float(found) == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(grads[0], theirs.embedding.weight.grad.numpy(), atol=1e-7)
    np.testing.assert_allclose(grads[1], z.grad.numpy(), atol=1e-7)


def test_beta_weighs_the_commitment_unless_legacy():
    indices = quantize.nearest(CODEBOOK, Z)

    def gradients(config):
        def loss(codebook, z):
            return jnp.sum(quantize.codebook_loss(config, codebook, z, indices))

        return jax.grad(loss, (0, 1))(CODEBOOK, Z)

    legacy, corrected = gradients(LEGACY), gradients(CORRECTED)
    np.testing.assert_allclose(legacy[0], 0.3 * corrected[0], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(0.3 * legacy[1], corrected[1], rtol=1e-5, atol=1e-8)
    # an averaged codebook has no gradient
    averaged = gradients(dataclasses.replace(LEGACY, codebook_decay=0.9))
    assert not averaged[0].any()
    np.testing.assert_allclose(averaged[1], corrected[1], rtol=1e-5, atol=1e-8)


def test_averages_are_those_of_the_reference():
    """`EmbeddingEMA` of taming: counts and sums decay, the codebook is their smoothed quotient."""
    decay, epsilon = 0.9, 0.1  # enough to show
    codebook = CODEBOOK
    averages = quantize.Assigned(jnp.zeros(10), codebook)  # where the reference starts
    count, total = np.zeros(10), CODEBOOK.astype(np.float64)
    for seed in range(3):
        z = draw(2, 4, 5, 3, seed=10 + seed)
        indices = quantize.nearest(codebook, z)
        batch = quantize.assigned(z, indices, 10)
        averages = quantize.update_averages(averages, batch, decay)
        codebook = quantize.codebook_from(averages, epsilon)

        one_hot = np.eye(10)[np.asarray(indices).ravel()]
        np.testing.assert_array_equal(batch.count_n, one_hot.sum(0))
        count = decay * count + (1 - decay) * one_hot.sum(0)
        total = decay * total + (1 - decay) * one_hot.T @ z.reshape(-1, 3)
        smooth = (count + epsilon) / (count.sum() + 10 * epsilon) * count.sum()
        np.testing.assert_allclose(codebook, total / smooth[:, None], rtol=1e-4)


def test_a_new_codebook_stays_where_nothing_is_assigned():
    averages = quantize.start_averages(CODEBOOK)
    np.testing.assert_allclose(quantize.codebook_from(averages), CODEBOOK, rtol=1e-5)
    z, indices = draw(40, 3, seed=3), np.zeros(40, np.int32)
    for _ in range(20):
        batch = quantize.assigned(z, indices, 10)
        averages = quantize.update_averages(averages, batch, 0.9)
    found = quantize.codebook_from(averages)
    np.testing.assert_allclose(found[1:], CODEBOOK[1:], rtol=1e-2)
    np.testing.assert_allclose(found[0], z.mean(0), atol=0.01)


def test_usage():
    alike = quantize.usage(jnp.full(8, 3.0))
    assert float(alike["perplexity"]) == pytest.approx(8, rel=1e-5)
    one = quantize.usage(jnp.array([0.0, 5.0, 0.0]))
    assert (float(one["perplexity"]), int(one["used_codes"])) == (pytest.approx(1), 1)
    z = np.repeat(CODEBOOK[:4], 5, axis=0)
    counts = quantize.assigned(z, quantize.nearest(CODEBOOK, z), 10).count_n
    some = quantize.usage(counts)
    assert (float(some["perplexity"]), int(some["used_codes"])) == (pytest.approx(4, rel=1e-5), 4)


def test_idle_codes_move_to_latents():
    idle = quantize.idle_steps(jnp.array([4, 0, 2, 9]), jnp.array([0.0, 0, 3, 0]))
    assert idle.tolist() == [5, 1, 0, 10]
    codebook, z = CODEBOOK[:4], draw(2, 3, 3, seed=7)
    revived = jax.jit(quantize.revive, static_argnums=4)(jax.random.key(0), codebook, idle, z, 5)
    assert revived.replaced_n.tolist() == [True, False, False, True]
    assert revived.idle_n.tolist() == [0, 1, 0, 0]
    np.testing.assert_array_equal(revived.codebook_nc[1:3], codebook[1:3])
    rows = [z.reshape(-1, 3).tolist().index(c) for c in revived.codebook_nc[::3].tolist()]
    assert rows[0] != rows[1]
    other = quantize.revive(jax.random.key(1), codebook, idle, z, 5)
    assert not np.array_equal(other.codebook_nc, revived.codebook_nc)
    none = quantize.revive(jax.random.key(0), codebook, idle, z, 11)
    np.testing.assert_array_equal(none.codebook_nc, codebook)
    assert none.idle_n.tolist() == idle.tolist()

    averages = quantize.Assigned(jnp.arange(4.0), jnp.asarray(codebook) * 2)
    averages = quantize.revive_averages(averages, revived)
    assert averages.count_n.tolist() == [1, 1, 2, 1]
    np.testing.assert_array_equal(averages.sum_nc[1:3], codebook[1:3] * 2)
    np.testing.assert_array_equal(averages.sum_nc[::3], revived.codebook_nc[::3])


def test_more_idle_codes_than_latents_wait():
    idle, z = jnp.full(10, 7), draw(2, 2, 3, seed=8)
    revived = quantize.revive(jax.random.key(0), CODEBOOK, idle, z, 7)
    assert revived.idle_n.tolist() == [0] * 4 + [7] * 6
    found = sorted(revived.codebook_nc[:4].tolist())
    assert found == sorted(z.reshape(-1, 3).tolist())
    np.testing.assert_array_equal(revived.codebook_nc[4:], CODEBOOK[4:])


def test_codes_are_revived_alike_on_four_devices():
    mesh = sharding.make_mesh(schema.MeshConfig(data=2, fsdp=2))
    z, idle = draw(4, 5, 3, seed=9), jnp.arange(10)
    run = jax.jit(quantize.revive, static_argnums=4)
    alone = run(jax.random.key(5), CODEBOOK, idle, z, 4)
    spread = run(
        jax.random.key(5), CODEBOOK, idle, jax.device_put(z, sharding.batch_sharding(mesh)), 4
    )
    jax.tree.map(np.testing.assert_array_equal, spread, alone)
    shards = [np.asarray(s.data) for s in spread.codebook_nc.addressable_shards]
    assert len(shards) == 4
    for shard in shards:
        np.testing.assert_array_equal(shard, alone.codebook_nc)
