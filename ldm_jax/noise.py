"""Noise as other programs draw it, on the host: torch on a CPU, and CUDA.

An image's noise is that of a generator of its own, in torch's order of axes, as in
stable-diffusion-webui.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

Source = Literal["own", "cpu", "nv"]
"""`own`: JAX's, by key. `cpu`: torch.Generator("cpu"). `nv`: CUDA's, as webui's RNG "NV" has it."""

PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
PHILOX_WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))


def torch_cpu(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """`torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`, to 1e-6.

    For 16 numbers or more, which torch draws in blocks of 16; it takes the lower 32 bits of a seed.
    ValueError for fewer.
    """
    return _next_of_torch(_twister(seed), shape)


def _twister(seed: int) -> np.random.RandomState:
    return np.random.RandomState(seed & 0xFFFFFFFF)


def _next_of_torch(twister: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """What the next torch.randn of a generator draws."""
    count = int(np.prod(shape))
    if count < 16:
        raise ValueError(f"noise of {count} numbers: torch draws fewer than 16 in another way")

    def uniform(n: int) -> np.ndarray:
        words = twister.randint(0, 2**32, n, np.uint32)
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    values = uniform(count)
    whole = count - count % 16
    drawn = np.concatenate([_box_muller_16(values[:whole]), values[whole:]])
    if whole != count:  # the last 16 are drawn again
        drawn[-16:] = _box_muller_16(uniform(16))
    return drawn.reshape(shape)


def _box_muller_16(uniform: np.ndarray) -> np.ndarray:
    """Normal numbers of blocks of 16: the first 8 give the radius, the others the angle."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)
    radius = np.sqrt(-2 * np.log(1 - first))
    angle = np.float32(2 * np.pi) * second
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1).astype(np.float32)


def cuda(seed: int, shape: tuple[int, ...], call: int = 0) -> np.ndarray:
    """Numbers of CUDA's generator (Philox 4x32-10, Salmon et al. 2011) for torch.randn in `call`.

    call: 0 for the first of a generator, then 1, ...
    """
    count = int(np.prod(shape))
    counter = np.zeros((4, count), np.uint32)
    counter[0] = call
    counter[2] = np.arange(count, dtype=np.uint32)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)
    for _ in range(10):
        products = [m * counter[i].astype(np.uint64) for m, i in zip(PHILOX_MULTIPLIERS, (0, 2))]
        low = [product.astype(np.uint32) for product in products]
        high = [(product >> np.uint64(32)).astype(np.uint32) for product in products]
        counter = np.stack(
            [high[1] ^ counter[1] ^ key[0], low[1], high[0] ^ counter[3] ^ key[1], low[0]]
        )
        key = key + np.array(PHILOX_WEYL, np.uint32)
    # Box and Muller, on numbers in (0, 1) and (0, 2 pi)
    radius = np.sqrt(-2 * np.log(counter[0] * 2.0**-32 + 2.0**-33))
    angle = (counter[1] * 2.0**-32 + 2.0**-33) * 2 * np.pi
    return (radius * np.sin(angle)).astype(np.float32).reshape(shape)


SOURCES: dict[str, Callable[[int, tuple[int, ...]], np.ndarray]] = {"cpu": torch_cpu, "nv": cuda}


def initial(
    source: Source,
    seed: int,
    shape: tuple[int, int, int],
    *,
    subseed: int = 0,
    strength: float = 0.0,
    resized_from: tuple[int, int] | None = None,
) -> np.ndarray:
    """Noise [h, w, c] that an image starts from.

    subseed, strength: the noise is moved by part `strength`, 0..1, to that of another seed.
    resized_from: (h, w) of a latent whose noise lies in the middle of this one's, cut where it is
        larger: a composition at another size.
    """
    height, width, channels = shape
    draw = SOURCES[source]
    drawn = (channels, *(resized_from or (height, width)))
    noise = draw(seed, drawn)
    if strength:
        noise = spherical(noise, draw(subseed, drawn), strength)
    if resized_from is not None:
        noise = _in_the_middle(noise, draw(seed, (channels, height, width)))
    return np.ascontiguousarray(noise.transpose(1, 2, 0))


def of_steps(
    source: Source, seed: int, shape: tuple[int, int, int], count: int, delta: int = 0
) -> np.ndarray:
    """Noise [count, h, w, c] of as many steps: what the generator of `initial` draws next.

    delta: draw it from the beginning of another generator, of seed + delta (webui's "eta noise seed
        delta", ENSD); 0: from the same one.
    """
    height, width, channels = shape
    drawn, first = (channels, height, width), 0 if delta else 1
    if source == "cpu":
        twister = _twister(seed + delta)
        noise = [_next_of_torch(twister, drawn) for _ in range(first + count)][first:]
    else:
        noise = [cuda(seed + delta, drawn, call) for call in range(first, first + count)]
    return np.stack(noise).transpose(0, 2, 3, 1) if count else np.zeros((0, *shape), np.float32)


def spherical(low: np.ndarray, high: np.ndarray, part: float) -> np.ndarray:
    """From `low` to `high` [c, h, w] on a sphere, column by column as webui does; norms over h."""
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (low, high)]
    cosine = np.sum(units[0] * units[1], axis=1, keepdims=True)
    if cosine.mean() > 0.9995:
        return ((1 - part) * low + part * high).astype(np.float32)
    angle = np.arccos(np.clip(cosine, -1, 1))
    weights = np.sin((1 - part) * angle) / np.sin(angle), np.sin(part * angle) / np.sin(angle)
    return (weights[0] * low + weights[1] * high).astype(np.float32)


def _in_the_middle(small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """`large` [c, h, w] with `small` in its middle, which is cut where it is the larger one."""
    of_large, of_small = [slice(None)], [slice(None)]
    for inner, outer in zip(small.shape[1:], large.shape[1:], strict=True):
        beside = (outer - inner) // 2
        length = min(inner, inner + 2 * beside, outer)
        of_large.append(slice(max(beside, 0), max(beside, 0) + length))
        of_small.append(slice(max(-beside, 0), max(-beside, 0) + length))
    pasted = large.copy()
    pasted[tuple(of_large)] = small[tuple(of_small)]
    return pasted
