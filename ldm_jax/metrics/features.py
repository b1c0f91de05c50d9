"""Features of a stream of images: one jitted program, its batch split over devices and hosts.

A network here is a function from pixels to named features, with its parameters and the details that
belong to every printed figure. There are three: Inception, CLIP, and a small one with random
weights, which needs no file and stands in for them in tests and demonstrations.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.lax import Precision
from jax.sharding import Mesh

from ldm_jax import sharding
from ldm_jax.models import clip, inception


class Network(NamedTuple):
    """apply(params, pixels [B, H, W, 3] float32 in 0..255) -> {name: [B, width] float32}.

    name: as it is to be printed: "Inception", "CLIP", "random features".
    params: host arrays.
    digest: of the weights, in hexadecimal.
    details: layer, preprocessing and whatever else decides about the figures; JSON values.
    The features that distances are taken in are called "features"; Inception gives "spatial" and
    "logits" too.
    """

    name: str
    apply: Callable[[Any, jax.Array], dict[str, jax.Array]]
    params: Any
    digest: str
    details: dict[str, Any]


def to_pixels(image: jax.Array) -> jax.Array:
    """Images [B, H, W, 1 or 3], uint8 or float in [-1, 1] -> float32 pixels [B, H, W, 3] in 0..255.

    Floats are clipped and rounded to the 256 values of a file, as `images.to_uint8` does: features
    of images that were saved are the same. Infinity becomes NaN, which no figure hides.
    """
    if image.dtype != jnp.uint8:
        image = jnp.where(jnp.isinf(image), jnp.nan, image)
        image = jnp.rint((jnp.clip(image.astype(jnp.float32), -1, 1) + 1) * 127.5)
    image = image.astype(jnp.float32)
    return jnp.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def extractor(network: Network, mesh: Mesh) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """run(images [B, H, W, c]) -> features on every device: `to_pixels`, then the network.

    The batch is split over the mesh, the parameters are replicated.
    """
    params = sharding.place(
        network.params, jax.tree.map(lambda _: sharding.replicated(mesh), network.params)
    )

    @jax.jit
    def run(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        outputs = network.apply(params, to_pixels(images))
        return jax.lax.with_sharding_constraint(outputs, sharding.replicated(mesh))

    return lambda images: run(params, images)


def extract(
    network: Network, mesh: Mesh, batches: Iterable[tuple[Any, int]]
) -> Iterator[dict[str, np.ndarray]]:
    """Features [count, width] on the host, of every process, for each (images [B, H, W, c], count).

    Images past `count` fill up a batch and are left out. All batches have one size, a multiple of
    the mesh's devices: one program. The device works on one batch while the caller has the one
    before.
    """
    run, layout, pending = extractor(network, mesh), sharding.batch_sharding(mesh), None
    for images, count in batches:
        if not isinstance(images, jax.Array):
            images = place(images, layout)
        following = (run(images), count)
        if pending is not None:
            yield fetch(*pending)
        pending = following
    if pending is not None:
        yield fetch(*pending)


def place(images: np.ndarray, layout: jax.sharding.Sharding) -> jax.Array:
    """A host batch that every process holds whole, as a global array."""
    return jax.make_array_from_callback(images.shape, layout, lambda index: images[index])


def fetch(outputs: dict[str, jax.Array], count: int) -> dict[str, np.ndarray]:
    """Bring the first `count` values of each output to the host."""
    return {name: np.asarray(x)[:count] for name, x in outputs.items()}


def padded(images: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """(images filled up to `size` with the last one, how many are real)."""
    short = size - len(images)
    return (np.concatenate([images, np.repeat(images[-1:], short, 0)]) if short else images), len(
        images
    )


# --- networks ------------------------------------------------------------------------------------


def inception_network(
    params: dict, digest: str, layer: str = "2048", how: inception.Preprocess = "torch_fidelity"
) -> Network:
    """Inception-v3, its features those of `layer`, the pixels prepared as `inception.prepare` says.

    ValueError for a layer or a preprocessing that it does not have.
    """
    if layer not in inception.LAYERS:
        raise ValueError(f"Inception layer {layer!r} is not one of {', '.join(inception.LAYERS)}")
    if how not in ("torch_fidelity", "pytorch_fid"):
        raise ValueError(f"preprocessing {how!r} is neither torch_fidelity nor pytorch_fid")
    module = inception.InceptionV3()

    def apply(params: dict, pixels: jax.Array) -> dict[str, jax.Array]:
        outputs = module.apply({"params": params}, inception.prepare(pixels, how))
        return {
            "features": outputs[layer],
            "spatial": outputs["spatial"],
            "logits": outputs["logits_unbiased"],
        }

    return Network("Inception", apply, params, digest, {"layer": layer, "preprocess": how})


def clip_network(
    module: clip.CLIPVision,
    params: dict,
    digest: str,
    mean: tuple[float, ...] = clip.IMAGE_MEAN,
    std: tuple[float, ...] = clip.IMAGE_STD,
) -> Network:
    """CLIP's image embeddings before division by their length (Kynkaanniemi et al. 2023).

    mean, std: of red, green and blue in [0, 1], that images are normalized with.
    """

    def apply(params: dict, pixels: jax.Array) -> dict[str, jax.Array]:
        cut = prepare_clip(pixels, module.image_size) / 255
        low, unit = (np.asarray(x, np.float32)[None, None, None] for x in (mean, std))
        return {"features": module.apply({"params": params}, (cut - low) / unit)}

    details = {"preprocess": f"bicubic, antialiased, {module.image_size}"}
    return Network("CLIP", apply, params, digest, details)


def prepare_clip(pixels: jax.Array, side: int) -> jax.Array:
    """Pixels [B, H, W, 3] in 0..255 -> [B, side, side, 3]: short side to `side`, centre cut out.

    Antialiased bicubic, along the width, then the height, each rounded to the 256 values: as PIL,
    but for one value where its weights of 8 bits round to the other side.
    """
    b, h, w, c = pixels.shape
    short = min(h, w)
    # the longer side as in transformers' and OpenAI's preprocessing: cut, not rounded
    size = (side if h == short else h * side // w, side if w == short else w * side // h)
    for shape in ((b, h, size[1], c), (b, *size, c)):
        if pixels.shape != shape:
            pixels = jax.image.resize(
                pixels, shape, "cubic", antialias=True, precision=Precision.HIGHEST
            )
            pixels = jnp.clip(jnp.rint(pixels), 0, 255)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return pixels[:, top : top + side, left : left + side]


class RandomConvNet(nn.Module):
    """Three convolutions, 2x2 means between them: the means over all positions of each, [B, 224].

    Features of random networks tell sets of images apart, if less well than trained ones do (Naeem
    et al. 2020, section 4.1); distances in them compare with no published figure.
    """

    widths: tuple[int, ...] = (32, 64, 128)

    @nn.compact
    def __call__(self, x):
        features = []
        for i, width in enumerate(self.widths):
            init = nn.initializers.he_normal()
            x = nn.Conv(width, (3, 3), precision=Precision.HIGHEST, kernel_init=init, name=f"{i}")(
                x
            )
            x = nn.relu(x)
            features.append(jnp.mean(x, axis=(1, 2)))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return jnp.concatenate(features, axis=-1)


def random_network(seed: int = 0) -> Network:
    """A network with weights drawn from `seed` by NumPy, the same everywhere and at any version."""
    module = RandomConvNet()
    draw, channels, params = np.random.default_rng(seed), 3, {}
    for i, width in enumerate(module.widths):
        kernel = draw.standard_normal((3, 3, channels, width)) * np.sqrt(2 / (9 * channels))
        bias = 0.1 * draw.standard_normal(width)
        params[f"{i}"] = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
        channels = width

    def apply(params: dict, pixels: jax.Array) -> dict[str, jax.Array]:
        return {"features": module.apply({"params": params}, pixels / 127.5 - 1)}

    details = {"widths": list(module.widths), "preprocess": "none, at the images' own size"}
    return Network("random features", apply, params, f"random, seed {seed}", details)
