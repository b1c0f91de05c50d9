"""What the reference computes, from golden files, and the weights it used, by formula."""

import functools
import gzip
import json
import pathlib
import zlib

import jax
import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def case(name):
    """(description, state dict by formula, arrays with channels last) of one golden model."""
    about = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: nhwc(x) if x.ndim == 4 else x for key, x in file.items()}
    state_dict = {key: weight(key, shape) for key, shape in about["parameters"].items()}
    return about, state_dict, arrays


def weight(name, shape):
    """The parameter that belongs to a name and shape."""
    value = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    value = value.astype(np.float32)
    if len(shape) <= 1:
        return np.float32(0.1) * value + np.float32(name.endswith("weight"))
    return (value / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def nhwc(x):
    return x.transpose(0, 2, 3, 1)


@functools.cache
def released():
    """{config: (its `model` section, {parameter: ShapeDtypeStruct})} of the published models."""
    configs = json.loads(gzip.decompress((GOLDEN / "released_configs.json.gz").read_bytes()))
    shapes = json.loads(
        gzip.decompress((GOLDEN / "released_checkpoint_shapes.json.gz").read_bytes())
    )
    return {
        name: (
            configs[name],
            {k: jax.ShapeDtypeStruct(tuple(v), np.float32) for k, v in shapes[name].items()},
        )
        for name in configs
    }


def draw(*shape, seed=1):
    """float32 normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled(shapes, seed=0):
    """Parameters of these shapes, none zero, so that nothing that starts at zero hides the rest."""
    rng = np.random.default_rng(seed)

    def fill(path, x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + np.float32(0.1) * noise
        if len(x.shape) < 2:
            return np.float32(0.1) * noise
        return (noise / np.sqrt(np.prod(x.shape[:-1]))).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def max_difference(a, b):
    """Largest absolute difference over two trees of arrays of the same structure."""

    def largest(x, y):
        return float(np.abs(np.asarray(x) - np.asarray(y)).max())

    return max(jax.tree.leaves(jax.tree.map(largest, a, b)))
