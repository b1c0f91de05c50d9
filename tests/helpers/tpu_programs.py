"""Small programs compiled for TPU v5e 4x4 ahead of time: what `tpu_cost` is tested on.

    python tests/tpu_programs.py FOLDER # needs libtpu; writes FOLDER/tpu_NAME.txt

The committed texts in tests/golden/ are made so, by jaxlib 0.10.2 and libtpu 0.0.42.1.
"""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
TURNS = 10


def matmul(a, b):
    return a @ b


def scan(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=TURNS)[0]


def kernel(x, w):
    """Blocks of 128 rows; 40 columns, which a TPU pads to 128."""

    def product(x_ref, w_ref, out_ref):
        out = jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32)
        out_ref[...] = out.astype(out_ref.dtype)

    (rows, depth), columns = x.shape, w.shape[1]
    return pl.pallas_call(
        product,
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid=(rows // 128,),
        in_specs=[
            pl.BlockSpec((128, depth), lambda i: (i, 0)),
            pl.BlockSpec((depth, columns), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((128, columns), lambda i: (i, 0)),
        name="product",
    )(x, w)


PROGRAMS = {
    "matmul": (matmul, ((1024, 1024), ()), ((1024, 1024), ())),
    "scan": (scan, ((256, 512), ()), ((512, 512), ())),
    "kernel": (kernel, ((8192, 1024), ()), ((1024, 40), ())),
    "all_reduce": (matmul, ((256, 512), (None, "data")), ((512, 512), ("data",))),
}
"""Function, then (shape, sharding over 16 chips) of each bfloat16 argument."""


SLICES = 2


def two_layers(w, v, x):
    """One step of gradient descent; parameters split inside a slice, the batch over slices too."""
    g, h = jax.grad(lambda w, v: jnp.mean((jnp.tanh(x @ w) @ v) ** 2), (0, 1))(w, v)
    return w - g, v - h


def shapes(name: str) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(dims, jnp.bfloat16) for dims, _ in PROGRAMS[name][1:]]


def write(folder: Path) -> None:
    """Compiles every program."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    for name, (function, *given) in PROGRAMS.items():
        chips = 16 if any(axes for _, axes in given) else 1
        mesh = Mesh(np.array(topology.devices[:chips]), ("data",))
        arguments = [
            jax.ShapeDtypeStruct(
                dims, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes))
            )
            for dims, axes in given
        ]
        save(folder, name, jax.jit(function).lower(*arguments).compile())
    several = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:4x4", num_slices=SLICES
    )
    mesh = Mesh(np.array(several.devices).reshape(SLICES, 16), ("data", "fsdp"))
    arguments = [
        jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for dims, axes in (
            ((1024, 4096), ("fsdp",)),
            ((4096, 1024), (None, "fsdp")),
            ((4096, 1024), (("data", "fsdp"),)),
        )
    ]
    step = jax.jit(two_layers, donate_argnums=(0, 1))
    save(folder, "slices", step.lower(*arguments).compile())


def save(folder: Path, name: str, compiled) -> None:
    """The program's text without the names of source files."""
    text = re.sub(r"\nFileNames\n.*?\n(?=%|ENTRY)", "\n", compiled.as_text(), flags=re.DOTALL)
    (folder / f"tpu_{name}.txt").write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
