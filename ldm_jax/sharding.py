"""Meshes of devices, and rules from parameter names to PartitionSpecs.

Mesh axes: `data` copies the model, `fsdp` also splits the parameters, `tensor` splits attention
heads and hidden units. The batch is split over `data` and `fsdp`. A mesh for sampling large images
also has `space`, which splits their height. Across slices, each axis is as long as the slices along
it times the devices inside one.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from ldm_jax import schema

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
"""Axes that the batch is split over."""
# A parameter with more bytes is replicated under fsdp only if its rule has no spec but P().
LARGEST_COPY = 2**20

# (pattern, specs): the pattern matches the end of a path from a whole name on, so the moments of
# Adam and the moving average follow their parameter. The first pattern that matches holds, and of
# its specs the first that names every dimension and divides it; P() fits anything.
RULES = (
    # attention: q, k, v by head; the output projection sums over heads
    (r"(to_[qkv]|[qkv]_proj)/kernel", P("fsdp", "tensor"), P("fsdp", None), P()),
    (r"(to_out_0|out_proj)/kernel", P("tensor", "fsdp"), P(None, "fsdp"), P()),
    # attention of first stages has one head: `tensor` would split its width and send feature maps
    (r"(query|key|value)/kernel", P("fsdp", None), P()),
    (r"proj_attn/kernel", P(None, "fsdp"), P()),
    # feed-forward by hidden unit
    (r"(ff/net_0/proj|fc1)/kernel", P("fsdp", "tensor"), P("fsdp", None), P()),
    (r"(ff/net_2|fc2)/kernel", P("tensor", "fsdp"), P(None, "fsdp"), P()),
    # convolutions by output channel, by input channel where that is an image or a latent
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
    # tokens and positions of text and image encoders; their output projections, to logits or to
    # CLIP's space
    (
        r"(token_embedding|position_embedding|embed_tokens|embed_positions)/embedding",
        P(None, "fsdp"),
        P("fsdp", None),
        P(),
    ),
    (r"(to_logits|visual_projection)/kernel", P("fsdp", None), P(None, "fsdp"), P()),
    # class ids: table of the UNet or of the conditioning stage
    (r"(class_embedding|cond_stage/embedding)/embedding", P(None, "fsdp"), P("fsdp", None), P()),
    # low-rank updates: `down` by input, `up` by output
    (r"down", P(None, None, "fsdp", None), P("fsdp", None), P()),
    (r"up", P(None, "fsdp"), P()),
    (r"embedding/vectors", P()),  # of a word that textual inversion learns
    # replicated: norms, biases, codebooks (narrow), the log-variances of the losses, counters
    (r"(scale|bias)", P()),
    (r"quantize/embedding", P()),
    (r"embeddings/class_embedding", P()),  # a vector
    (r"logvar", P()),
    (r"(mean|var|loc|initialized)", P()),  # of a discriminator's norms
    # LeCam's averages of logits; use of the codes, and moving averages of the latents they stand
    # for
    (r"lecam/(real|fake)|codes/idle|averages/(count_n|sum_nc)", P()),
    (r"(step|bad_steps|count)", P()),
)


def make_mesh(config: schema.MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all) with axes `data`, `fsdp`, `tensor`.

    Across slices, the slices of an axis are its outer part: neighbours along it are in one slice
    wherever they can be. ValueError if the sizes do not use every device, or slices differ in size.
    """
    groups = slices(jax.devices() if devices is None else devices, config.process_is_slice)
    inner, outer = mesh_sizes(config, sum(map(len, groups)), len(groups))
    return _mesh(AXES, inner, outer, groups)


def mesh_sizes(
    config: schema.MeshConfig, num_devices: int, num_slices: int = 1
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(devices inside a slice, slices) along each of `AXES`, without any -1.

    ValueError names the sizes and counts that do not fit each other.
    """
    inner = [getattr(config, axis) for axis in AXES]
    outer = [getattr(config, f"dcn_{axis}") for axis in AXES]
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, inner))
    if outer != [1, 1, 1]:
        shown += "".join(f", dcn_{axis}={size}" for axis, size in zip(AXES, outer))
    sizes = inner + outer
    if sizes.count(-1) > 1 or any(size != -1 and size < 1 for size in sizes):
        raise ValueError(f"mesh {shown}: sizes are positive, and one of them may be -1")
    if config.data == -1 and outer == [1, 1, 1]:
        outer[0] = num_slices
    each = num_devices // num_slices
    outer, inner = _filled(outer, num_slices), _filled(inner, each)
    if math.prod(outer) != num_slices:
        raise ValueError(_wrong_slices(shown, math.prod(outer), num_devices, num_slices))
    if math.prod(inner) != each:
        where = f"{each} devices" + (f" of each of {num_slices} slices" if num_slices > 1 else "")
        raise ValueError(
            f"mesh {shown} does not fit {where}: the product of the sizes"
            f"{' without dcn_' if num_slices > 1 else ''} must be {each}, or leave one size at -1"
        )
    return (inner[0], inner[1], inner[2]), (outer[0], outer[1], outer[2])


def slices(devices: Iterable[jax.Device], process_is_slice: bool = False) -> list[list[jax.Device]]:
    """The devices of each slice, by the slices' indices; one list where devices have none.

    ValueError for slices of different sizes.
    """
    by_slice: dict[int, list[jax.Device]] = {}
    for device in devices:
        index = device.process_index if process_is_slice else getattr(device, "slice_index", 0)
        by_slice.setdefault(index, []).append(device)
    if len({len(group) for group in by_slice.values()}) > 1:
        kind = "processes" if process_is_slice else "slices"
        counts = ", ".join(f"{i}: {len(by_slice[i])}" for i in sorted(by_slice))
        raise ValueError(f"{kind} hold different numbers of devices ({counts}): use equal ones")
    return [by_slice[i] for i in sorted(by_slice)]


def _filled(sizes: list[int], total: int) -> list[int]:
    """Replace -1 by the rest of `total`, if that is a whole number."""
    given = math.prod(size for size in sizes if size != -1)
    return [total // given if size == -1 and total % given == 0 else size for size in sizes]


def _wrong_slices(shown: str, asked: int, num_devices: int, num_slices: int) -> str:
    present = f"the {num_devices} devices are in {num_slices} slice{'s' * (num_slices > 1)}"
    if num_slices == 1:
        remedy = "leave dcn_* at 1, or set process_is_slice to take every process for a slice"
    elif asked == 1:
        remedy = (
            "say which axis crosses them, as dcn_data"
            f" {num_slices}, beside the sizes inside a slice of {num_devices // num_slices}"
        )
    else:
        remedy = f"the product of dcn_* must be {num_slices}, or set one of them to -1"
    return f"mesh {shown}: {present}: {remedy}"


def _mesh(
    axes: Sequence[str],
    inner: Sequence[int],
    outer: Sequence[int],
    groups: Sequence[Sequence[jax.Device]],
) -> Mesh:
    """Mesh of `outer` slices of `inner` devices, slices outermost along every axis."""
    # the default of jax.make_mesh, Explicit axes, makes plain Linen layers raise ShardingTypeError
    types = (AxisType.Auto,) * len(axes)
    if len(groups) == 1:
        return Mesh(_ordered(inner, groups[0]), axes, axis_types=types)
    blocks = np.stack([_ordered(inner, group) for group in groups]).reshape(*outer, *inner)
    rank = len(axes)
    paired = blocks.transpose([i for axis in range(rank) for i in (axis, rank + axis)])
    return Mesh(paired.reshape([o * i for o, i in zip(outer, inner)]), axes, axis_types=types)


def _ordered(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of one slice as an array of `sizes`, neighbours on its network side by side."""
    names = tuple(str(i) for i in range(len(sizes)))
    types = (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(tuple(sizes), names, axis_types=types, devices=devices).devices
    except NotImplementedError:  # no axis is made of whole axes of the torus: split those
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def spatial_mesh(space: int = -1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all) with axes `data`, `fsdp`, `tensor`, `space`.

    `space` devices share an image (default: all of them), other images go over `data`. Give
    `image_sharding` to x_T or to the images of a jitted sampler, and take attention and convolution
    for this mesh (`load(path, mesh=...)` does). The compiler splits all between, exchanges the rows
    of pixels at borders that convolutions need, sums norms over all devices, and gathers only keys
    and values of self-attention. An image crosses slices only if one has too few devices.
    ValueError if `space` does not divide the number of devices.
    """
    groups = slices(jax.devices() if devices is None else devices)
    count = sum(map(len, groups))
    space = count if space == -1 else space
    if space < 1 or count % space:
        raise ValueError(f"space={space} does not divide the {count} devices of the mesh")
    inside = math.gcd(space, len(groups[0]))
    across = space // inside
    inner = (len(groups[0]) // inside, 1, 1, inside)
    return _mesh((*AXES, "space"), inner, (len(groups) // across, 1, 1, across), groups)


def image_sharding(mesh: Mesh) -> NamedSharding:
    """[B, h, w, c] with the batch over `data` and `fsdp`, the height over `space`.

    B must be a multiple of the former, h of the latter; a multiple of `space` times the model's
    coarsest downsampling also splits its inner levels evenly.
    """
    return NamedSharding(mesh, P(BATCH, "space"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The batch (axis 0) over `data` and `fsdp`; replicated over `tensor`."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """ValueError if the batch cannot be split evenly over devices and microbatches."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if accumulate < 1 or batch_size < 1 or batch_size % (devices * accumulate):
        raise ValueError(
            f"batch_size {batch_size} is not a positive multiple of {devices} devices (mesh data x"
            f" fsdp) x {accumulate} microbatches (accumulate): change one of them; a run that goes"
            " on keeps its batch_size, so choose another mesh (devices beyond the batch go to"
            " tensor), accumulate, or number of devices"
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


def abstract(init: Callable[[jax.Array], Any], mesh: Mesh) -> tuple[Any, Any]:
    """(shapes, shardings) of the result of `init(key)`, without computing anything."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    return shapes, by_rules(shapes, RULES, mesh)


def init_sharded(init: Callable[[jax.Array], Any], key: jax.Array, mesh: Mesh) -> tuple[Any, Any]:
    """(init(key), its shardings); every array is created sharded, never whole on one device."""
    _, shardings = abstract(init, mesh)
    return jax.jit(init, out_shardings=shardings)(key), shardings


def all_gather(params: Any, mesh: Mesh) -> Any:
    """Gather traced parameters along fsdp before a model uses them, in training and sampling.

    A device then computes its own examples, and only parameters and gradients travel. Left to
    itself, XLA partitions a layer as its kernel is partitioned: it sends the examples of the whole
    batch to the shards (for a text encoder), or passes feature maps around in rings;
    benchmarks/README.md has the cost on TPUs.
    """
    if mesh.shape["fsdp"] == 1:
        return params

    def whole(leaf: Any, s: NamedSharding) -> Any:
        spec = P(*(None if axis == "fsdp" else axis for axis in s.spec))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(whole, params, by_rules(params, RULES, mesh))


def data_parallel_gradients(
    gradients: Callable[..., tuple[Any, Any]], mesh: Mesh, dtype: DTypeLike = "float32"
) -> Callable[..., tuple[Any, Any]]:
    """Run `gradients(frozen, params, examples) -> (mean gradient, mean metrics)` per device.

    Every device gets whole parameters and its part of the batch, and sums with the others only at
    the end: parameters are gathered once and gradients, in `dtype`, reduced once, however many
    microbatches there are; XLA left to itself reduces gradients after every microbatch.
    A device receives only the shards that it keeps (reduce-scatter), half the traffic of an
    all-reduce, except where a TPU compiler turns it back into one (for all devices of a program).
    The price: each device holds whole gradients.

    No draw and no normalization of an example may depend on examples of other devices. `frozen`
    and `params` are laid out by `RULES`, and so is the gradient; `tensor` is left to the compiler.
    """
    devices = math.prod(mesh.shape[axis] for axis in BATCH)
    if devices == 1:
        return gradients

    def sharded(frozen: Any, params: Any, examples: Any) -> tuple[Any, Any]:
        given = (frozen, params)
        cuts = jax.tree.map(lambda s: _cut(s.spec), by_rules(given, RULES, mesh))
        specs = jax.tree.map(lambda cut: P(*[None] * cut, "fsdp") if cut >= 0 else P(), cuts)
        split = jax.shard_map(
            functools.partial(per_device, cuts),
            mesh=mesh,
            in_specs=(specs, P(BATCH)),
            out_specs=(specs[1], P()),
            axis_names=set(BATCH),
            check_vma=False,
        )
        return split(given, examples)

    def per_device(cuts: Any, given: Any, examples: Any) -> tuple[Any, Any]:
        grads, metrics = gradients(*jax.tree.map(whole, given, cuts), examples)
        return jax.tree.map(mean, grads, cuts[1]), jax.lax.pmean(metrics, BATCH)

    def whole(shard: jax.Array, cut: int) -> jax.Array:
        return shard if cut < 0 else jax.lax.all_gather(shard, "fsdp", axis=cut, tiled=True)

    def mean(grad: jax.Array, cut: int) -> jax.Array:
        if cut < 0:
            return jax.lax.pmean(grad, BATCH)
        sent = grad.astype(dtype)
        # first within fsdp: the sum over `data`, which may cross slices, is then of shards only
        shard = jax.lax.psum_scatter(sent, "fsdp", scatter_dimension=cut, tiled=True)
        return jax.lax.psum(shard, "data").astype(grad.dtype) / devices

    return sharded


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The tree's shapes and dtypes with their shardings, as `checkpoint.restore` takes them."""
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


def _cut(spec: P) -> int:
    """The dimension that is split over fsdp, or -1."""
    return list(spec).index("fsdp") if "fsdp" in spec else -1


def _fits(spec: P, shape: tuple[int, ...], mesh: Mesh) -> bool:
    """True if the spec is P(), or names every dimension and divides it."""
    if len(spec) == 0:
        return True
    if len(spec) != len(shape):
        return False
    parts = [math.prod(mesh.shape[axis] for axis in _axes(P(entry))) for entry in spec]
    return all(size % part == 0 for size, part in zip(shape, parts))
