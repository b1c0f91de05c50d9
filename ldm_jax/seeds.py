"""Seeds of 64 bits as JAX's keys."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

COUNT = 2**64
"""Seeds that there are: 0 to COUNT - 1."""
NUMBERS = 2**32
"""Images of a seed: number 0 to NUMBERS - 1."""


def checked(seed: Any, name: str = "seed") -> int:
    """Return a seed as an int; ValueError that begins with its `name` if it is not in range."""
    number = operator.index(seed)
    if not 0 <= number < COUNT:
        raise ValueError(f"{name} {number} is not in 0..2**64 - 1 ({COUNT - 1})")
    return number


def check_numbers(first: int, count: int, name: str = "first") -> None:
    """ValueError, beginning with `name`, unless `count` numbers from `first` on are below 2**32."""
    if first < 0 or count < 0 or first + count > NUMBERS:
        raise ValueError(
            f"{name} {first}: image numbers {first} to {first + count - 1} are not all in"
            f" 0..2**32 - 1 ({NUMBERS - 1}), the range for one seed"
        )


def root_key(seed: Any) -> jax.Array:
    """The typed key of a seed in 0..2**64 - 1: its two halves are the two words of the key's data.

    No two seeds share a key. `jax.random.key(seed)` is the same below 2**32, and leaves the upper
    half out where JAX has no types of 64 bits. ValueError for other seeds.
    """
    return root_keys([seed])[0]


def root_keys(given: Sequence[Any]) -> jax.Array:
    """`root_key` of some seeds, [n]."""
    numbers = [checked(seed) for seed in given]
    width = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).size
    # two words, which "rbg" and "unsafe_rbg" have twice, as in `jax.random.key`
    words = [np.resize(np.array([n >> 32, n % 2**32], np.uint32), width) for n in numbers]
    return jax.random.wrap_key_data(np.stack(words))
