"""Tiled encoding and decoding of images too large for one pass.

The levels at low resolution, with all attention, run whole; they are a small part of the memory.
Each level at high resolution runs in overlapping tiles. A tile has a halo of at least the receptive
field of the level's convolutions around the pixels that it outputs, so these pixels are exact:
nothing is blended and there is no seam. GroupNorm takes its mean and variance over the whole image,
as a decoder in one pass does: they are measured over all tiles, norm by norm, each time running the
level up to that norm. So the result is that of a single pass up to rounding, at five to six times
the arithmetic of these levels. Activations between levels are held whole, at the lower resolution.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ldm_jax import latents
from ldm_jax.models import autoencoder
from ldm_jax.models.blocks import GROUPS, GroupNorm

Pair = tuple[int, int]


def decode(
    first_stage: autoencoder.FirstStage,
    params: dict,
    latent: jax.Array,
    scale: Any,
    *,
    tile: Pair = (512, 512),
    levels: int = 2,
) -> jax.Array:
    """As `latents.decode`: scaled latent [B, h, w, z] -> image [B, H, W, c], not clipped.

    tile: height and width of a tile in pixels of the image, overlaps included. An image within one
    tile is decoded in one pass.
    levels: how many of the highest resolutions are tiled; fewer where there is attention.
    ValueError for tiles within their overlap, or attention at the full resolution.
    """
    if isinstance(first_stage, autoencoder.IdentityFirstStage):
        return latents.decode(first_stage, params, latent, scale)
    depth = len(first_stage.channel_mult)
    height, width = (n * 2 ** (depth - 1) for n in latent.shape[1:3])
    if height <= tile[0] and width <= tile[1]:
        return latents.decode(first_stage, params, latent, scale)
    variables, start = {"params": params}, depth - _tiled_levels(first_stage, levels, depth)
    z = latent / scale
    if isinstance(first_stage, autoencoder.AutoencoderVQ):  # which `decode` does first
        z, _ = first_stage.apply(variables, z, method="quantize")
    h = first_stage.apply(
        variables, z, method=lambda m, z: m.decoder(m.post_quant_conv(z), stop=start)
    )
    for i in range(start, depth):
        stop = i + 1 if i + 1 < depth else None

        def run(h, i=i, stop=stop):
            method = lambda m, h: m.decoder(h, start=i, stop=stop)  # noqa: E731
            return first_stage.apply(variables, h, method=method)

        # two 3x3 convolutions a residual block, a pixel each, and conv_out after the last level
        halo = 2 * (first_stage.num_res_blocks + 1) + (stop is None)
        zoom = 1
        if i > 0:  # the convolution after upsampling
            halo, zoom = -(-(halo + 1) // 2), 2
        factor = 2 ** (depth - 1 - i) * zoom
        h = _run_tiled(run, h, _tiles((height, width), tile, factor, halo), 1, zoom)
    return h.astype(jnp.float32)


def encode(
    first_stage: autoencoder.FirstStage,
    params: dict,
    image: jax.Array,
    scale: Any,
    keys: jax.Array | None = None,
    *,
    tile: Pair = (512, 512),
    levels: int = 2,
) -> jax.Array:
    """As `latents.encode`: image [B, H, W, c] in [-1, 1] -> scaled latent [B, h, w, z].

    The other arguments are those of `decode`.
    """
    size = image.shape[1:3]
    identity = isinstance(first_stage, autoencoder.IdentityFirstStage)
    if identity or (size[0] <= tile[0] and size[1] <= tile[1]):
        return latents.encode(first_stage, params, image, scale, keys)
    autoencoder.check_images(first_stage, image)
    levels = _tiled_levels(first_stage, levels, len(first_stage.channel_mult) - 1)
    variables, h = {"params": params}, image
    for i in range(levels):

        def run(h, i=i):
            method = lambda m, h: m.encoder(h, start=i or None, stop=i + 1)  # noqa: E731
            return first_stage.apply(variables, h, method=method)

        # conv_in; the convolution that halves the sides sees one pixel more, on the right
        halo = -(-(2 * first_stage.num_res_blocks + 1 + (i == 0)) // 2)
        h = _run_tiled(run, h, _tiles(size, tile, 2 ** (i + 1), halo), 2, 1)
    encoded = first_stage.apply(
        variables, h, method=lambda m, h: m.posterior(m.encoder(h, start=levels))
    )
    return latents.draw(encoded, scale, keys)


def _tiled_levels(first_stage, levels: int, most: int) -> int:
    attention = (i for i in range(most) if 2**i in first_stage.attention_downsample)
    tiled = min(levels, most, next(attention, most))
    if tiled < 1:
        raise ValueError(
            f"levels={levels} of a first stage with {len(first_stage.channel_mult)} levels and"
            f" attention_downsample={first_stage.attention_downsample}: there is no level to tile;"
            " levels must be positive, and the highest resolution without attention"
        )
    return tiled


# --- positions of the tiles
# -------------------------------------------------------------------------


class Tile(NamedTuple):
    """Positions of tiles, in pixels of the lower resolution of a level; arrays [tiles]."""

    top: np.ndarray
    left: np.ndarray
    rows: np.ndarray
    """[tiles, 2]: first and end row of the image that this tile outputs."""
    columns: np.ndarray


class Tiles(NamedTuple):
    size: Pair
    shape: Pair
    places: Tile


def _tiles(image: Pair, tile: Pair, factor: int, halo: int) -> Tiles:
    """Tiles over an image, both in its pixels; a pixel of the level is `factor` of them.

    halo: pixels of the level on each side of those that a tile outputs.
    """
    size = tuple(n // factor for n in image)
    shape = tuple(min(n, t // factor) for n, t in zip(size, tile))
    if any(s < n and s <= 2 * halo for s, n in zip(shape, size)):
        least = (2 * halo + 1) * factor
        raise ValueError(
            f"tile {tile}: tiles reach {halo * factor} pixels beyond their output, so their sides"
            f" are at least {least}; or tile fewer levels"
        )
    (tops, rows), (lefts, columns) = (_cuts(n, t, halo) for n, t in zip(size, shape))
    y, x = np.indices((len(tops), len(lefts))).reshape(2, -1)
    return Tiles(size, shape, Tile(tops[y], lefts[x], rows[y], columns[x]))


def _cuts(size: int, tile: int, halo: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts [n] of tiles along a side, and [n, 2] the first and end pixel that each outputs."""
    count = 1 if size <= tile else -(-(size - 2 * halo) // (tile - 2 * halo))
    starts = np.minimum(np.arange(count) * (tile - 2 * halo), size - tile).astype(np.int32)
    ends = np.append(starts[:-1] + tile - halo, size)
    return starts, np.stack([np.append(0, ends[:-1]), ends], axis=-1).astype(np.int32)


# --- running them --------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Mean and squares of every channel, over the pixels of one tile or of all."""

    count: jax.Array
    mean: jax.Array
    """[B, C]"""
    squares: jax.Array
    """[B, C]: sum of squared differences from the mean."""


def _run_tiled(run: Callable, x: jax.Array, tiles: Tiles, zoom_in: int, zoom_out: int) -> jax.Array:
    """`run` on x; pixels of x, and of the result, per pixel of `tiles`: `zoom_in`, `zoom_out`."""
    statistics: dict[str, Moments] = {}

    def run_tile(place):
        """(Output of `run`, moments of this tile at every norm)."""
        start = (0, place.top * zoom_in, place.left * zoom_in, 0)
        sides = (n * zoom_in for n in tiles.shape)
        measured: dict[str, Moments] = {}
        with nn.intercept_methods(_shared_norms(statistics, place, tiles.shape, measured)):
            out = run(jax.lax.dynamic_slice(x, start, (len(x), *sides, x.shape[-1])))
        return out, measured

    def measure(name):
        # XLA removes the layers after the norm as dead code: only its moments leave the loop
        _, parts = jax.lax.scan(lambda _, p: (None, run_tile(p)[1][name]), None, tiles.places)
        return _merge(parts)

    def write(canvas, place):
        out, _ = run_tile(place)
        at = (0, place.top * zoom_out, place.left * zoom_out, 0)
        old = jax.lax.dynamic_slice(canvas, at, out.shape)
        out = jnp.where(_owned(place, tiles.shape, out), out, old)
        return jax.lax.dynamic_update_slice(canvas, out, at), None

    out, measured = _outline(run_tile, tiles)
    for name in measured:  # in order: the input of a norm depends on the statistics of those before
        statistics[name] = measure(name)
    shape = (len(x), *(n * zoom_out for n in tiles.size), out.shape[-1])
    return jax.lax.scan(write, jnp.zeros(shape, out.dtype), tiles.places)[0]


def _outline(run_tile: Callable, tiles: Tiles) -> tuple[jax.ShapeDtypeStruct, list[str]]:
    """(Shape of a tile's output, names of the norms in it, in order)."""
    names: list[str] = []

    def once(place):
        out, measured = run_tile(place)
        names.extend(measured)
        return out

    return jax.eval_shape(once, jax.tree.map(lambda a: a[0], tiles.places)), names


def _shared_norms(statistics: dict, place: Tile, shape: Pair, measured: dict) -> Callable:
    """Makes GroupNorms use the `statistics` of their path, if any; `measured` gets the tile's."""

    def intercept(call, args, kwargs, context):
        norm = context.module
        if not isinstance(norm, GroupNorm):
            return call(*args, **kwargs)
        x = args[0].astype(jnp.float32)
        name = "/".join(norm.path)
        measured[name] = _measure(x, _owned(place, shape, x))
        mean, variance = _group_statistics(statistics.get(name, measured[name]))
        factor = jax.lax.rsqrt(variance + norm.epsilon) * norm.get_variable("params", "scale")[None]
        y = (x - mean[:, None, None]) * factor[:, None, None]
        return (y + norm.get_variable("params", "bias")[None, None, None]).astype(norm.dtype)

    return intercept


def _owned(place: Tile, shape: Pair, x: jax.Array) -> jax.Array:
    """[1, h, w, 1]: True at the pixels of a tile, at any resolution, that it outputs."""

    def inside(start, limits, side, size):
        first = jnp.arange(size) * side // size + start  # sizes are multiples of sides or parts
        return (first >= limits[0]) & (first < limits[1])

    rows = inside(place.top, place.rows, shape[0], x.shape[1])
    columns = inside(place.left, place.columns, shape[1], x.shape[2])
    return (rows[:, None] & columns[None])[None, :, :, None]


def _measure(x: jax.Array, owned: jax.Array) -> Moments:
    count = jnp.sum(owned, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(owned, x, 0), axis=(1, 2)) / count
    centred = jnp.where(owned, x - mean[:, None, None], 0)
    return Moments(count, mean, jnp.sum(jnp.square(centred), axis=(1, 2)))


def _merge(parts: Moments) -> Moments:
    """Moments of all tiles from those of each, [tiles, ...] (Chan et al. 1979)."""
    share = (parts.count / jnp.sum(parts.count))[:, None, None]
    mean = jnp.sum(share * parts.mean, axis=0)
    between = parts.count[:, None, None] * jnp.square(parts.mean - mean[None])
    return Moments(jnp.sum(parts.count), mean, jnp.sum(parts.squares + between, axis=0))


def _group_statistics(moments: Moments) -> tuple[jax.Array, jax.Array]:
    """Mean and variance [B, C] of each channel's group."""

    def mean_of_groups(a):
        groups = jnp.mean(a.reshape(len(a), GROUPS, -1), axis=-1)
        return jnp.repeat(groups, a.shape[1] // GROUPS, axis=-1)

    mean = mean_of_groups(moments.mean)
    within = moments.squares / moments.count + jnp.square(moments.mean - mean)
    return mean, mean_of_groups(within)
