"""Every seed of 64 bits has a key of its own."""

import jax
import numpy as np
import pytest

from ldm_jax import seeds

EDGES = (0, 5, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**33 + 5, 2**63, 2**63 + 5, 2**64 - 1)


def data(key):
    return np.asarray(jax.random.key_data(key)).tolist()


def test_the_halves_of_a_seed_are_the_words_of_its_key():
    for seed in EDGES:
        assert data(seeds.root_key(seed)) == [seed >> 32, seed % 2**32]
        assert data(seeds.root_key(np.uint64(seed))) == [seed >> 32, seed % 2**32]


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_seeds_below_32_bits_are_as_of_jax(implementation):
    with jax.default_prng_impl(implementation):
        for seed in (0, 5, 2**31 - 1):
            assert (seeds.root_key(seed) == jax.random.key(seed)).all()
        assert len({tuple(data(seeds.root_key(seed))) for seed in EDGES}) == len(EDGES)


def test_with_64_bit_types_the_key_is_as_of_jax():
    with jax.enable_x64(True):
        for seed in (5, 2**32 + 5, 2**63 - 1):
            assert (seeds.root_key(seed) == jax.random.key(seed)).all()


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64])
def test_other_seeds_are_refused(seed):
    with pytest.raises(ValueError, match=rf"--seed {seed} is not in 0\.\.2\*\*64 - 1 \(18446744"):
        seeds.checked(seed, "--seed")
    with pytest.raises(ValueError, match="seed"):
        seeds.root_key(seed)
    with pytest.raises(TypeError, match="float"):
        seeds.checked(1.5)


def test_numbers_of_images_have_32_bits():
    seeds.check_numbers(2**32 - 2, 2)
    for first, count in ((-1, 1), (2**32, 1), (2**32 - 1, 2)):
        with pytest.raises(ValueError, match=rf"--first-index {first}: .* 0\.\.2\*\*32 - 1"):
            seeds.check_numbers(first, count, "--first-index")
