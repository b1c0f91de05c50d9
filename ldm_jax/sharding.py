"""Where arrays live: a mesh, and rules from parameter names to PartitionSpecs.

Mesh axes: `data` copies the model, `fsdp` also splits the parameters, `tensor` splits attention
heads and hidden units. The batch is split over `data` and `fsdp`. A mesh for sampling large images
also has `space`, which splits their height.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_jax import schema

AXES = ("data", "fsdp", "tensor")
# A parameter with more bytes is replicated under fsdp only if its rule has no spec but P().
LARGEST_COPY = 2**20

# (pattern, specs): the pattern matches the end of a path from a whole name on, so the moments of
# Adam and the moving average follow their parameter. The first pattern that matches holds, and of
# its specs the first that names every dimension and divides it; P() fits anything.
RULES = (
    # attention: q, k, v by head; the way back sums over heads
    (r"(to_[qkv]|query|key|value|[qkv]_proj)/kernel", P("fsdp", "tensor"), P("fsdp", None), P()),
    (r"(to_out_0|proj_attn|out_proj)/kernel", P("tensor", "fsdp"), P(None, "fsdp"), P()),
    # feed-forward by hidden unit
    (r"(ff/net_0/proj|fc1)/kernel", P("fsdp", "tensor"), P("fsdp", None), P()),
    (r"(ff/net_2|fc2)/kernel", P("tensor", "fsdp"), P(None, "fsdp"), P()),
    # convolutions by output channel, by input channel where an image or a latent comes out
    (
        r"(conv\w*|quant_conv|post_quant_conv|channel_mapper|patch_embedding)/kernel",
        P(None, None, None, "fsdp"),
        P(None, None, "fsdp", None),
        P(),
    ),
    # proj_in and proj_out are 1x1 convolutions or, in Stable Diffusion 2, dense
    (r"proj_(in|out)/kernel", P(None, None, None, "fsdp"), P(None, "fsdp"), P()),
    # timestep embedding, its projections, and the embedding of a vector
    (r"(time_emb_proj|linear_[12])/kernel", P(None, "fsdp"), P("fsdp", None), P()),
    # tokens and positions of text and image encoders; their ways out, to logits or to CLIP's space
    (
        r"(token_embedding|position_embedding|embed_tokens|embed_positions)/embedding",
        P(None, "fsdp"),
        P("fsdp", None),
        P(),
    ),
    (r"(to_logits|visual_projection)/kernel", P("fsdp", None), P(None, "fsdp"), P()),
    # class ids: table of the UNet or of the conditioning stage
    (r"(class_embedding|cond_stage/embedding)/embedding", P(None, "fsdp"), P("fsdp", None), P()),
    # replicated: norms, biases, codebooks (narrow), the log-variances of the losses, counters
    (r"(scale|bias)", P()),
    (r"quantize/embedding", P()),
    (r"embeddings/class_embedding", P()),  # a vector
    (r"logvar", P()),
    (r"(mean|var|loc|initialized)", P()),  # of a discriminator's norms
    # means of logits; use of codes, and averages of what they were taken for
    (r"lecam/(real|fake)|codes/idle|averages/(count_n|sum_nc)", P()),
    (r"(step|bad_steps|count)", P()),
)


def make_mesh(config: schema.MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all) with axes `data`, `fsdp`, `tensor`.

    One size may be -1: all devices that are left. ValueError if the sizes do not use every device.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size != -1 and size < 1 for size in sizes):
        raise ValueError(f"mesh {shown}: sizes are positive, and one of them may be -1")
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {shown} does not fit {len(devices)} devices: the product of the sizes must be"
            f" {len(devices)}, or leave one size at -1"
        )
    # the default of jax.make_mesh, Explicit axes, makes plain Linen layers raise ShardingTypeError
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spatial_mesh(space: int = -1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all) with axes `data`, `fsdp`, `tensor`, `space`.

    `space` devices share an image (default: all of them), other images go over `data`. Give
    `image_sharding` to x_T or to the images of a jitted sampler, and take attention and convolution
    for this mesh (`load(path, mesh=...)` does). The compiler splits all between, exchanges the
    rows at borders that convolutions need, sums norms over all devices, and gathers only keys and
    values of self-attention. ValueError if `space` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    space = len(devices) if space == -1 else space
    if space < 1 or len(devices) % space:
        raise ValueError(f"space={space} does not divide the {len(devices)} devices of the mesh")
    sizes = (len(devices) // space, 1, 1, space)
    return jax.make_mesh(
        sizes, (*AXES, "space"), axis_types=(AxisType.Auto,) * len(sizes), devices=devices
    )


def image_sharding(mesh: Mesh) -> NamedSharding:
    """[B, h, w, c] with rows of the batch over `data` and `fsdp`, the height over `space`.

    B must be a multiple of the former, h of the latter; a multiple of `space` times the model's
    coarsest downsampling also splits its inner levels evenly.
    """
    return NamedSharding(mesh, P(("data", "fsdp"), "space"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (axis 0) over `data` and `fsdp`; replicated over `tensor`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """ValueError if the batch cannot be split evenly over devices and microbatches."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if accumulate < 1 or batch_size < 1 or batch_size % (devices * accumulate):
        raise ValueError(
            f"batch_size {batch_size} is not a positive multiple of {devices} devices (mesh data x"
            f" fsdp) x {accumulate} microbatches (accumulate): change one of them"
        )


def by_rules(tree: Any, rules: Sequence[tuple], mesh: Mesh) -> Any:
    """The tree of NamedShardings that `rules` (laid out like `RULES`) give to a tree of arrays.

    Leaves need only `.shape` and `.dtype`. ValueError lists every path that no rule matches, that
    none of its rule's specs fits, or that is above 1 MiB and would be replicated under fsdp > 1
    although its rule has another spec first: `P()` as the only spec says that copies are meant.
    """
    refused: list[str] = []

    def choose(path: tuple, leaf: Any) -> NamedSharding:
        name = path_name(path)
        specs = next((r[1:] for r in rules if re.search(rf"(?:^|/)(?:{r[0]})$", name)), None)
        if specs is None:
            refused.append(f"{name} {tuple(leaf.shape)}: no rule matches")
            return replicated(mesh)
        spec = next((s for s in specs if _fits(s, leaf.shape, mesh)), None)
        if spec is None:
            refused.append(f"{name} {tuple(leaf.shape)}: none of {', '.join(map(str, specs))} fits")
            return replicated(mesh)
        copied = mesh.shape["fsdp"] > 1 and "fsdp" not in _axes(spec) and len(specs) > 1
        if copied and math.prod(leaf.shape) * leaf.dtype.itemsize > LARGEST_COPY:
            refused.append(f"{name} {tuple(leaf.shape)}: above 1 MiB and not split over fsdp")
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(choose, tree)
    if refused:
        more = f"; and {len(refused) - 10} more" if len(refused) > 10 else ""
        raise ValueError(
            f"sharding rules do not cover {len(refused)} arrays on mesh {dict(mesh.shape)}: "
            + "; ".join(refused[:10])
            + f"{more}. Choose mesh sizes that divide these dimensions, or add a rule"
        )
    return shardings


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The tree's shapes and dtypes with their shardings: what `checkpoint.restore` takes."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings
    )


def place(tree: Any, shardings: Any) -> Any:
    """Global arrays from host arrays that every process holds whole; no process sends anything."""
    return jax.tree.map(
        lambda leaf, s: jax.make_array_from_callback(leaf.shape, s, lambda index: leaf[index]),
        tree,
        shardings,
    )


def path_name(path: tuple) -> str:
    """`unet/conv_in/kernel` for a path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _axes(spec: P) -> list[str]:
    """Mesh axes that a spec names."""
    entries = [e if isinstance(e, tuple) else (e,) for e in spec if e is not None]
    return [axis for entry in entries for axis in entry]


def _fits(spec: P, shape: tuple[int, ...], mesh: Mesh) -> bool:
    """Whether the spec is P(), or names every dimension and divides it."""
    if len(spec) == 0:
        return True
    if len(spec) != len(shape):
        return False
    parts = [math.prod(mesh.shape[axis] for axis in _axes(P(entry))) for entry in spec]
    return all(size % part == 0 for size, part in zip(shape, parts))
