"""Initial noise of torch and CUDA, and what webui does with it."""

import numpy as np
import pytest

from ldm_jax import noise


def test_philox_gives_the_recorded_numbers():
    """Of webui's RNG "NV", seed 0."""
    found = noise.cuda(0, (3, 4)).ravel()
    expected = [-0.9246624, -0.42534396, -2.6438458, 0.14518388, -0.12086651]
    np.testing.assert_allclose(found[:5], expected, atol=1e-6)
    assert not np.allclose(noise.cuda(0, (3, 4), call=1), noise.cuda(0, (3, 4)))
    assert not np.allclose(noise.cuda(2**32, (3, 4)), noise.cuda(0, (3, 4)))


@pytest.mark.torch
@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5])
@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 5, 7), (16,), (17,)])
def test_torchs_numbers(seed, shape):
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    np.testing.assert_allclose(noise.torch_cpu(seed, shape), expected.numpy(), atol=2e-6)


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(8, 8, 4), (5, 7, 4)])
def test_steps_draw_on_from_the_generator(shape):
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    height, width, channels = shape
    for delta in (0, 5):
        generator = torch.Generator("cpu").manual_seed(7 + delta)
        drawn = [torch.randn((channels, height, width), generator=generator) for _ in range(4)]
        expected = np.stack(drawn)[0 if delta else 1 :][:3].transpose(0, 2, 3, 1)
        found = noise.of_steps("cpu", 7, shape, 3, delta)
        np.testing.assert_allclose(found, expected, atol=2e-6)
    of_cuda = noise.of_steps("nv", 7, shape, 2)
    second = noise.cuda(7, (channels, height, width), call=2).transpose(1, 2, 0)
    np.testing.assert_array_equal(of_cuda[1], second)
    other = noise.of_steps("nv", 7, shape, 1, delta=5)
    np.testing.assert_array_equal(other[0], noise.initial("nv", 12, shape))
    assert noise.of_steps("nv", 7, shape, 0).shape == (0, *shape)


def test_a_variation_moves_from_one_noise_to_the_other():
    one, other = (noise.initial("cpu", seed, (8, 6, 4)) for seed in (1, 2))
    given = {"subseed": 2, "strength": 0.0}
    np.testing.assert_array_equal(noise.initial("cpu", 1, (8, 6, 4), **given), one)
    given["strength"] = 1.0
    np.testing.assert_allclose(noise.initial("cpu", 1, (8, 6, 4), **given), other, atol=1e-6)
    given["strength"] = 0.5
    half = noise.initial("cpu", 1, (8, 6, 4), **given)
    # a quarter of the plane's angle from each: the same cosine with both
    cosines = [
        np.sum(half * x, 0) / np.linalg.norm(half, axis=0) / np.linalg.norm(x, axis=0)
        for x in (one, other)
    ]
    assert half.std() == pytest.approx(1, abs=0.15)
    assert np.corrcoef(half.ravel(), one.ravel())[0, 1] > 0.5
    assert np.corrcoef(half.ravel(), other.ravel())[0, 1] > 0.5
    assert np.mean(cosines[0]) == pytest.approx(np.mean(cosines[1]), abs=0.1)


@pytest.mark.parametrize("small", [(4, 6), (12, 4), (7, 9)])
def test_noise_of_another_size_lies_in_the_middle(small):
    found = noise.initial("nv", 3, (8, 8, 4), resized_from=small)
    own = noise.initial("nv", 3, (8, 8, 4))
    inner = noise.initial("nv", 3, (*small, 4))
    shared = [min(n, 8) for n in small]
    begin = [(8 - n) // 2 for n in small]
    here = tuple(
        slice(max(b, 0), max(b, 0) + min(n + 2 * min(b, 0), 8)) for b, n in zip(begin, small)
    )
    there = tuple(slice(max(-b, 0), max(-b, 0) + (h.stop - h.start)) for b, h in zip(begin, here))
    assert min(shared) > 0
    np.testing.assert_array_equal(found[here], inner[there])
    outside = np.ones((8, 8), bool)
    outside[here] = False
    np.testing.assert_array_equal(found[outside], own[outside])


def test_too_few_numbers_are_refused():
    with pytest.raises(ValueError, match="noise of 15 numbers"):
        noise.torch_cpu(0, (15,))
