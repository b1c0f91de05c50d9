"""Meshes by their sizes alone, on which no large parameter may be copied."""

from jax.sharding import AbstractMesh

from ldm_jax import schema, sharding

SIZES = (  # inside a slice, and across slices
    sharding.mesh_sizes(schema.MeshConfig(data=1, fsdp=8), 8),
    sharding.mesh_sizes(schema.MeshConfig(data=1, fsdp=4, tensor=2), 8),
    sharding.mesh_sizes(schema.MeshConfig(fsdp=4, dcn_data=2), 8, 2),
)
MESHES = [AbstractMesh(tuple(i * o for i, o in zip(*sizes)), sharding.AXES) for sizes in SIZES]


def refuse_copies(tree):
    """ValueError if the rules copy a large parameter of a tree of shapes, or do not know one."""
    for mesh in MESHES:
        sharding.by_rules(tree, sharding.RULES, mesh)
