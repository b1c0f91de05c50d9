"""Mesh sizes, inside slices and across them, and rules that reach every parameter."""

import dataclasses
import importlib.util
import itertools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import tpu_programs
from flax import traverse_util
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_jax import schema, sharding, train_state
from ldm_jax.models import autoencoder, bert, clip, discriminator, lpips, unet

MESH = AbstractMesh((2, 8, 2), sharding.AXES)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def unet_shapes(config):
    side = 2 ** (len(config.channel_mult) - 1)
    label = None
    if config.num_classes:
        label = jax.ShapeDtypeStruct((1,), jnp.int32)
    elif config.vector_dim:
        label = shape(1, config.vector_dim)
    context = shape(1, 1, config.context_dim) if config.context_dim else None
    x = shape(1, side, side, config.in_channels)
    init = unet.from_config(config).init
    return jax.eval_shape(init, jax.random.key(0), x, shape(1), context, label)["params"]


def autoencoder_shapes(config):
    init = autoencoder.from_config(config).init
    return jax.eval_shape(init, jax.random.key(0), shape(1, 32, 32, 3))["params"]


def share_held(params, mesh):
    """The part of all parameters that one device holds."""
    shardings = sharding.by_rules({"part": params}, sharding.RULES, mesh)["part"]
    leaves = list(zip(jax.tree.leaves(params), jax.tree.leaves(shardings)))
    held = sum(math.prod(s.shard_shape(x.shape)) for x, s in leaves)
    return held / sum(math.prod(x.shape) for x, _ in leaves)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (schema.MeshConfig(), (4, 1, 1)),
        (schema.MeshConfig(data=1, fsdp=-1), (1, 4, 1)),
        (schema.MeshConfig(data=2, fsdp=1, tensor=2), (2, 1, 2)),
    ],
)
def test_make_mesh_uses_every_device(config, sizes):
    mesh = sharding.make_mesh(config)
    assert mesh.devices.shape == sizes
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_make_mesh_on_some_devices():
    chosen = jax.devices()[1:3]
    mesh = sharding.make_mesh(schema.MeshConfig(data=1, fsdp=2), devices=chosen)
    assert set(mesh.devices.flat) == set(chosen)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (schema.MeshConfig(data=-1, fsdp=-1), "data=-1, fsdp=-1, tensor=1: .*one of them may be"),
        (schema.MeshConfig(data=0), "data=0"),
        (schema.MeshConfig(data=-1, fsdp=-2), "fsdp=-2"),
        (schema.MeshConfig(data=2), "does not fit 4 devices"),
        (schema.MeshConfig(fsdp=3), "data=-1, fsdp=3, tensor=1 does not fit 4 devices"),
    ],
)
def test_make_mesh_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(config)


# --- slices --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as meshes are made of."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0


def chips(slices, *sides, kind="TPU v4"):
    """The chips of some slices, those of the last slice first; four of them make a process."""
    found, size = [], math.prod(sides)
    for slice_index in reversed(range(slices)):
        for i, place in enumerate(itertools.product(*map(range, sides[::-1]))):
            number = slice_index * size + i
            found.append(Chip(number, slice_index, number // 4, place[::-1], kind))
    return found


def slice_indices(mesh):
    """Slice of every device, in the mesh's shape."""
    return np.vectorize(lambda d: d.slice_index)(mesh.devices)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (schema.MeshConfig(), (32, 1, 1)),
        (schema.MeshConfig(fsdp=8), (4, 8, 1)),
        (schema.MeshConfig(fsdp=8, dcn_data=2), (4, 8, 1)),
        (schema.MeshConfig(data=1, fsdp=8, tensor=-1, dcn_data=2), (2, 8, 2)),
        (schema.MeshConfig(data=2, fsdp=4, tensor=2, dcn_fsdp=-1), (2, 8, 2)),
        (schema.MeshConfig(data=4, fsdp=2, tensor=2, dcn_tensor=2), (4, 2, 4)),
    ],
    ids=str,
)
def test_slices_are_the_outer_part_of_their_axis(config, sizes):
    mesh = sharding.make_mesh(config, chips(2, 4, 4, 1))
    assert mesh.devices.shape == sizes
    assert len(set(mesh.devices.flat)) == 32
    assert set(mesh.axis_types) == {AxisType.Auto}
    across = [getattr(config, f"dcn_{axis}") != 1 for axis in sharding.AXES]
    axis = across.index(True) if any(across) else 0
    first, second = np.split(slice_indices(mesh), 2, axis=axis)
    assert not first.any()
    assert second.all()


def test_each_slice_is_ordered_as_if_it_were_alone():
    both = chips(2, 4, 4, 4)
    config = schema.MeshConfig(data=4, fsdp=16, dcn_data=2)
    mesh = sharding.make_mesh(config, both)
    for index, half in enumerate(np.split(mesh.devices, 2)):
        alone = [d for d in both if d.slice_index == index]
        expected = sharding.make_mesh(schema.MeshConfig(data=4, fsdp=16), alone).devices
        np.testing.assert_array_equal(half, expected)
        # a ring over the torus: 16 chips along fsdp are a plane
        assert {len({d.coords[0] for d in row}) for row in half[..., 0]} == {4}


def test_three_slices_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"slices hold different numbers of devices \(0: 4, 1: 8"):
        sharding.make_mesh(schema.MeshConfig(), chips(2, 4, 2, 1)[:12])


def test_an_axis_of_the_torus_is_split_where_nothing_else_fits():
    mesh = sharding.make_mesh(schema.MeshConfig(data=2, fsdp=8), chips(1, 4, 4, 1))
    assert mesh.devices.shape == (2, 8, 1)
    assert len(set(mesh.devices.flat)) == 16


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "cpu"])
def test_one_slice_is_what_jax_makes_of_it(kind):
    devices = chips(1, 4, 4, 1, kind=kind)
    mesh = sharding.make_mesh(schema.MeshConfig(fsdp=4), devices)
    expected = jax.make_mesh(
        (4, 4, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )
    assert mesh == expected


def test_processes_count_as_slices_where_asked():
    config = schema.MeshConfig(data=1, fsdp=4, dcn_data=-1, process_is_slice=True)
    mesh = sharding.make_mesh(config, chips(1, 4, 2, 1))
    assert mesh.devices.shape == (2, 4, 1)
    for process, row in enumerate(mesh.devices):
        assert {d.process_index for d in row.flat} == {process}
    config = dataclasses.replace(config, process_is_slice=False)
    with pytest.raises(ValueError, match=r"fit 8 devices"):  # one slice: dcn_data is 1
        sharding.make_mesh(config, chips(1, 4, 2, 1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dcn_data": -1}, "data=-1, .*dcn_data=-1, .*one of them may be"),
        ({"dcn_fsdp": 0}, "dcn_fsdp=0"),
        ({"data": 1, "fsdp": -1}, "the 32 devices are in 2 slices: say .* dcn_data 2, .* of 16"),
        ({"data": 2, "fsdp": 16}, "the 32 devices are in 2 slices: say .* dcn_data 2, .* of 16"),
        ({"dcn_data": 4}, "in 2 slices: the product of dcn_. must be 2"),
        ({"data": 4, "fsdp": 8, "dcn_data": 2}, "not fit 16 devices of each of 2 slices"),
        ({"fsdp": 3}, "data=-1, fsdp=3, tensor=1 does not fit 16 devices of each of 2 slices"),
    ],
    ids=str,
)
def test_make_mesh_over_slices_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(schema.MeshConfig(**config), chips(2, 4, 4, 1))


def test_slices_that_are_not_there_are_refused():
    message = r"dcn_data=2, .* 4 devices are in 1 slice: leave dcn_. at 1, or set process_is_slice"
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(schema.MeshConfig(dcn_data=2))


def test_an_image_stays_in_its_slice_where_it_fits():
    devices = chips(2, 4, 4, 1)
    for space, sizes in ((16, (2, 1, 1, 16)), (4, (8, 1, 1, 4)), (-1, (1, 1, 1, 32))):
        mesh = sharding.spatial_mesh(space, devices)
        assert mesh.devices.shape == sizes
        index = slice_indices(mesh).reshape(-1)
        np.testing.assert_array_equal(index, np.repeat([0, 1], 16))


TOPOLOGY = """
import jax
from jax.experimental import topologies
from ldm_jax import schema, sharding
devices = topologies.get_topology_desc("v5e:4x4", "tpu", num_slices=2).devices
mesh = sharding.make_mesh(schema.MeshConfig(fsdp=8, dcn_data=2), devices)
print(dict(mesh.shape), [{d.slice_index for d in part.flat} for part in mesh.devices])
x = jax.ShapeDtypeStruct((32, 128), "float32", sharding=sharding.batch_sharding(mesh))
mean = jax.jit(lambda x: x.mean(), out_shardings=sharding.replicated(mesh))
print("all-reduce" in mean.lower(x).compile().as_text())
"""


@pytest.mark.slow
def test_two_real_slices_of_tpus_make_a_mesh_that_compiles():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it compiles for TPUs")
    done = subprocess.run(
        [sys.executable, "-c", TOPOLOGY],
        env={**os.environ, **tpu_programs.ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shape = {"data": 4, "fsdp": 8, "tensor": 1}
    assert done.stdout.splitlines() == [f"{shape} [{{0}}, {{0}}, {{1}}, {{1}}]", "True"]


# --- shardings -----------------------------------------------------------------------------------


def test_spatial_mesh_splits_the_height():
    assert dict(sharding.spatial_mesh().shape) == {"data": 1, "fsdp": 1, "tensor": 1, "space": 4}
    mesh = sharding.spatial_mesh(2)
    images = jax.device_put(jnp.zeros((2, 8, 6, 3)), sharding.image_sharding(mesh))
    assert {s.data.shape for s in images.addressable_shards} == {(1, 4, 6, 3)}
    with pytest.raises(ValueError, match="space=3 does not divide the 4 devices"):
        sharding.spatial_mesh(3)


def test_batch_is_split_over_data_and_fsdp_only():
    mesh = sharding.make_mesh(schema.MeshConfig(data=1, fsdp=2, tensor=2))
    batch = jax.device_put(jnp.arange(8), sharding.batch_sharding(mesh))
    rows = {s.device: tuple(np.asarray(s.data)) for s in batch.addressable_shards}
    low, high = (0, 1, 2, 3), (4, 5, 6, 7)
    assert [rows[d] for d in mesh.devices.flat] == [low, low, high, high]


def test_check_batch():
    mesh = AbstractMesh((2, 2, 2), sharding.AXES)
    sharding.check_batch(8, mesh, accumulate=2)
    with pytest.raises(ValueError, match=r"batch_size 12 .* 4 devices .* 2 microbatches"):
        sharding.check_batch(12, mesh, accumulate=2)
    with pytest.raises(ValueError, match="batch_size 0"):
        sharding.check_batch(0, mesh)


def test_moments_and_average_follow_their_parameter():
    params = {
        "unet": {
            "conv_in": {"kernel": shape(3, 3, 4, 32), "bias": shape(32)},
            "mid_block": {"attentions_0": {"to_q": {"kernel": shape(32, 64)}}},
            "conv_norm_out": {"scale": shape(32), "bias": shape(32)},
        },
        "cond_stage": {"embedding": {"embedding": shape(11, 16)}},
        "logvar": shape(1000),
    }
    tx, _ = train_state.make_optimizer(schema.OptimizerConfig(clip_norm=1.0, warmup_steps=3))
    state = jax.eval_shape(lambda p: train_state.create(p, tx, schema.EMAConfig()), params)
    found = sharding.by_rules(state, sharding.RULES, MESH)
    expected = {
        "unet": {
            "conv_in": {"kernel": P(None, None, None, "fsdp"), "bias": P()},
            "mid_block": {"attentions_0": {"to_q": {"kernel": P("fsdp", "tensor")}}},
            "conv_norm_out": {"scale": P(), "bias": P()},
        },
        "cond_stage": {"embedding": {"embedding": P(None, "fsdp")}},
        "logvar": P(),
    }
    specs = jax.tree.map(lambda s: s.spec, found)
    assert specs.params == expected
    assert specs.ema_params == {part: expected[part] for part in ("unet", "cond_stage")}
    mu, nu = (optax.tree.get(specs.opt_state, name) for name in ("mu", "nu"))
    assert mu == nu == expected
    assert specs.step == specs.bad_steps == P()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"linear_projection": True, "vector_dim": 64},
        {
            "spatial_transformer": False,
            "context_dim": None,
            "scale_shift_norm": True,
            "resblock_updown": True,
            "num_classes": 16,
        },
    ],
)
def test_every_parameter_of_a_full_unet_has_a_rule_and_is_split(options):
    params = unet_shapes(schema.UNetConfig(**options))
    # 1/64 = 1.56 %: norms, biases and the smallest kernels are the rest
    assert share_held(params, AbstractMesh((1, 64, 1), sharding.AXES)) < 0.018


def test_every_parameter_of_the_published_encoders_has_a_rule_and_is_split():
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    for model, example in (
        (clip.text_from_config(schema.CLIPTextConfig()), ids),
        (bert.from_config(schema.BERTTextConfig(num_layers=2)), ids),
        (clip.vision_from_config(schema.CLIPVisionConfig()), shape(1, 224, 224, 3)),
    ):
        params = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
        assert share_held(params, AbstractMesh((1, 64, 1), sharding.AXES)) < 0.018
        specs = traverse_util.flatten_dict(
            jax.tree.map(lambda s: s.spec, sharding.by_rules(params, sharding.RULES, MESH))
        )
        for path, spec in specs.items():  # heads and hidden units over tensor
            if path[-2] in ("q_proj", "k_proj", "v_proj", "fc1") and path[-1] == "kernel":
                assert spec == P("fsdp", "tensor"), path
            elif path[-2] in ("out_proj", "fc2") and path[-1] == "kernel":
                assert spec == P("tensor", "fsdp"), path
            else:
                assert "tensor" not in str(spec), path


@pytest.mark.parametrize("levels", [(), (4, 2)])
def test_every_parameter_of_an_autoencoder_has_a_rule(levels):
    params = autoencoder_shapes(schema.AutoencoderKLConfig(attention_downsample=levels))
    shardings = sharding.by_rules({"first_stage": params}, sharding.RULES, MESH)
    attention = shardings["first_stage"]["encoder"]["mid_block"]["attentions_0"]
    assert attention["query"]["kernel"].spec == P("fsdp", None)  # one head: nothing for tensor
    assert attention["proj_attn"]["kernel"].spec == P(None, "fsdp")
    assert attention["proj_attn"]["bias"].spec == P()


def test_what_first_stages_are_judged_by_has_rules():
    """Full sizes; the rest of their states is in test_configs.py."""
    net = discriminator.PatchGAN(norm="act")
    image = discriminator.smallest_image(net, 3)
    judge = jax.eval_shape(net.init, jax.random.key(0), image)
    for tree in (lpips.shapes(), judge):
        meshes.refuse_copies(tree)
        assert share_held(tree, AbstractMesh((1, 64, 1), sharding.AXES)) < 0.018


def test_output_convolution_falls_back_to_its_input_channels():
    shardings = sharding.by_rules(
        {"conv_out": {"kernel": shape(3, 3, 320, 4)}}, sharding.RULES, MESH
    )
    assert shardings["conv_out"]["kernel"].spec == P(None, None, "fsdp", None)


def test_first_rule_wins_and_patterns_match_whole_names():
    rules = ((r"b/kernel", P("fsdp")), (r"kernel", P("data")), (r"scale", P()))
    tree = {"ab": {"kernel": shape(8)}, "b": {"kernel": shape(8)}}
    specs = jax.tree.map(lambda s: s.spec, sharding.by_rules(tree, rules, MESH))
    assert specs == {"ab": {"kernel": P("data")}, "b": {"kernel": P("fsdp")}}
    for name in ("logscale", "scales"):
        with pytest.raises(ValueError, match=f"{name} .*no rule matches"):
            sharding.by_rules({name: shape(8)}, rules, MESH)


def test_every_unmatched_path_is_listed():
    tree = {"unet": {"new": {"table": shape(3)}, "other": {"weight": shape(2)}}}
    with pytest.raises(ValueError, match=r"unet/new/table \(3,\).*unet/other/weight \(2,\)"):
        sharding.by_rules(tree, sharding.RULES, MESH)


def test_a_rule_whose_specs_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"w \(12, 4\): none of .*fsdp.* fits"):
        sharding.by_rules({"w": shape(12, 4)}, ((r"w", P("fsdp", None)),), MESH)


def test_a_large_copy_must_be_meant():
    large = {"w": shape(513, 513)}  # 8 divides neither side
    with pytest.raises(ValueError, match=r"w .*above 1 MiB"):
        sharding.by_rules(large, ((r"w", P("fsdp", None), P()),), MESH)
    meant = sharding.by_rules(large, ((r"w", P()),), MESH)
    assert meant["w"].spec == P()
    alone = AbstractMesh((4, 1, 1), sharding.AXES)
    assert sharding.by_rules(large, ((r"w", P("fsdp", None), P()),), alone)["w"].spec is not None


def test_place_and_with_shardings():
    mesh = sharding.make_mesh(schema.MeshConfig(data=1, fsdp=4))
    host = {"k": np.arange(32, dtype=np.float32).reshape(4, 8), "n": np.float32(3)}
    shardings = {"k": NamedSharding(mesh, P(None, "fsdp")), "n": sharding.replicated(mesh)}
    placed = sharding.place(host, shardings)
    np.testing.assert_array_equal(placed["k"], host["k"])
    assert placed["n"] == 3
    assert placed["k"].sharding == shardings["k"]
    assert placed["k"].addressable_shards[1].data.shape == (4, 2)
    described = sharding.with_shardings(host, shardings)
    assert described["k"] == jax.ShapeDtypeStruct((4, 8), np.float32, sharding=shardings["k"])
