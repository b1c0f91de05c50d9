"""Small states for tests of checkpoints, and damage done to what is saved of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from ldm_jax import schema, sharding, train_state

TX, _ = train_state.make_optimizer(schema.OptimizerConfig())


def state_of(step, width=64):
    """A state whose every value depends on `step`, sharded over all devices."""
    return _program(width)(jnp.asarray(step, jnp.int32))


@functools.cache
def _program(width):
    def init(step):
        kernel = jax.random.normal(jax.random.key(step), (3, 3, 8, width))
        params = {"unet": {"conv_in": {"kernel": kernel, "bias": kernel[0, 0, 0]}}}
        return train_state.create(params, TX, schema.EMAConfig()).replace(step=step)

    mesh = sharding.make_mesh(schema.MeshConfig(data=1, fsdp=-1))
    shapes = jax.eval_shape(init, jnp.zeros((), jnp.int32))
    return jax.jit(init, out_shardings=sharding.by_rules(shapes, sharding.RULES, mesh))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def flip(run, step, part="params"):
    """One bit of the largest file of a part."""
    files = [p for p in (run / "checkpoints" / str(step) / part).rglob("d/*") if p.is_file()]
    path = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def claim(folder, name, shape, chunks=None):
    """Let an array of a part say another shape; none of its pieces is there, so it reads as 0."""
    tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{folder}", "path": f"{name}/"},
            "metadata": {"shape": shape, "chunks": chunks or [64] * len(shape), "dtype": "<f4"},
        },
        create=True,
        delete_existing=True,
    ).result()
