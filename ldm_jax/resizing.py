"""Latents at another size, with the numbers of torch.nn.functional.interpolate."""

from typing import Any, Literal, get_args

import numpy as np

Mode = Literal[
    "latent",
    "latent-antialiased",
    "latent-bicubic",
    "latent-bicubic-antialiased",
    "latent-nearest",
    "latent-nearest-exact",
]
"""`latent` is bilinear; the names are those of stable-diffusion-webui."""
MODES: tuple[Mode, ...] = get_args(Mode)


def resized(latent: Any, size: tuple[int, int], mode: Mode = "latent") -> Any:
    """[B, h, w, c] of NumPy or JAX at a size (h, w), in float32.

    torch.nn.functional.interpolate(x, size, mode=..., antialias=...) without align_corners, to
    rounding. ValueError for an unknown mode.
    """
    for axis, length in ((1, size[0]), (2, size[1])):
        table = weights(latent.shape[axis], length, mode).astype(np.float32)
        # one axis after the other, each as a product with a small matrix
        moved = latent.swapaxes(axis, -1) @ table.T
        latent = moved.swapaxes(axis, -1)
    return latent


def weights(old: int, new: int, mode: Mode = "latent") -> np.ndarray:
    """Share of each of `old` values in each of `new` ones, float64 [new, old]."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    if mode.startswith("latent-nearest"):
        shift = np.float32(0.5 if mode.endswith("exact") else 0)
        ratio = np.float32(old) / np.float32(new)  # torch rounds down a float32
        nearest = np.floor((np.arange(new, dtype=np.float32) + shift) * ratio)
        return np.eye(old)[np.minimum(nearest.astype(int), old - 1)]
    ratio, cubic = old / new, "bicubic" in mode
    centre = (np.arange(new)[:, None] + 0.5) * ratio
    if mode.endswith("antialiased"):
        wide = max(ratio, 1.0)  # the filter covers what becomes one value
        distance = (np.arange(old) + 0.5 - centre) / wide
        found = _cubic(distance, -0.5) if cubic else _triangle(distance)
        return found / found.sum(axis=1, keepdims=True)
    # beyond the edges lies the value at the edge
    around = np.arange(-2, old + 2)
    distance = around + 0.5 - centre
    found = _cubic(distance, -0.75) if cubic else _triangle(distance)
    table = found[:, 2:-2].copy()
    table[:, 0] += found[:, :2].sum(axis=1)
    table[:, -1] += found[:, -2:].sum(axis=1)
    return table


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys's kernel (1981), whose slope at 1 is `a`."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
