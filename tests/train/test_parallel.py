"""Data, fsdp and tensor parallel steps: loss and gradients of one device, and what they send."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
import recipes

from ldm_jax import schema
from ldm_jax.cost import hlo, tpu_cost

# Without a clip Adam's first moment after one step is the gradient times 1 - b1.
OPTIMIZER = dataclasses.replace(recipes.OPTIMIZER, clip_norm=None)
LOSS = schema.FirstStageLossConfig(
    disc_start=0, learn_logvar=True, lecam_weight=0.1, r1_weight=0.3, r1_interval=2
)
CONFIGS = {
    "class": recipes.ldm_config(unet={"num_heads": 4}, optimizer=OPTIMIZER),
    "text": recipes.ldm_config("text", unet={"num_heads": 4}, optimizer=OPTIMIZER),
    "kl": recipes.gan_config(loss=LOSS, optimizer=OPTIMIZER),
    "vq": recipes.gan_config("vq", optimizer=OPTIMIZER),
}
for _name in ("kl", "vq"):
    _model = dataclasses.replace(CONFIGS[_name].model, mid_attention=True)
    CONFIGS[_name] = dataclasses.replace(CONFIGS[_name], model=_model)
MESHES = ({"data": 4}, {"fsdp": 4}, {"tensor": 4}, {"fsdp": 2, "tensor": 2})
TOLERANCE = 1e-5
"""Of a gradient's difference, over the largest gradient of its part."""


class Step(NamedTuple):
    """The first step of a recipe, compiled for one mesh."""

    text: str
    """Its optimized HLO."""
    metrics: dict[str, float]
    gradients: dict[str, Any]
    """Of "unet", "cond_stage", "autoencoder", "logvar", "discriminator": those that train."""
    kept: dict[str, Any]
    """Statistics of the discriminator, and codes."""
    params: Any
    """Shapes, those of frozen parts too."""


@functools.cache
def first_step(name: str, mesh: tuple = ()) -> Step:
    config = CONFIGS[name]
    mesh = recipes.mesh_of(**dict(mesh))
    state, batch = recipes.start(config, mesh), recipes.batch_of(config, mesh, 0)
    step, key = recipes.step_of(config, mesh), jax.random.key(config.seed)
    params = jax.eval_shape(lambda: (state.params, getattr(state, "disc_params", {}), step.frozen))
    compiled = step.trace(state, batch, key).lower().compile()
    state, metrics = compiled(step.frozen, state, batch, key)
    gradients = dict(_gradients(state.opt_state))
    if getattr(state, "disc_params", {}):
        gradients["discriminator"] = _gradients(state.disc_opt_state)
    kept = {n: getattr(state, n, {}) for n in ("disc_stats", "codes")}
    metrics = {n: float(x) for n, x in metrics.items()}
    return Step(compiled.as_text(), metrics, *jax.device_get((gradients, kept)), params)


def _gradients(opt_state: Any) -> Any:
    moments = optax.tree.get(opt_state, "mu")
    return jax.tree.map(lambda x: x / (1 - OPTIMIZER.b1), moments)


def differences(a: Any, b: Any) -> dict[str, float]:
    """Of every part the largest difference over the largest value."""
    largest = lambda x: max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(x))  # noqa: E731
    return {n: recipes.largest_difference(a[n], b[n]) / largest(b[n]) for n in b}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(name, mesh, record_property):
    one, found = first_step(name), first_step(name, tuple(mesh.items()))
    gaps = differences(found.gradients, one.gradients)
    record_property("gradients", gaps)
    record_property("loss", abs(found.metrics["loss"] / one.metrics["loss"] - 1))
    assert max(gaps.values()) < TOLERANCE
    assert found.metrics == pytest.approx(one.metrics, rel=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
                 found.kept, one.kept)  # fmt: skip


# --- what devices send each other ----------------------------------------------------------------

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
FEW = 128
"""Numbers that any program may sum or gather: metrics, labels, statistics of a norm."""


class Sent(NamedTuple):
    """An array that the devices of a program exchange."""

    kind: str
    dims: tuple[int, ...]
    devices: int
    """How many take part in one exchange."""
    scope: str


def devices(kind: str, op: hlo.Op) -> int:
    """How many take part in one exchange; a permutation is written as pairs."""
    return 2 if kind == "collective-permute" else tpu_cost.group_size(op.attributes)


def sent(text: str) -> list[Sent]:
    """All that a compiled program's devices exchange, beside a few numbers."""
    ops = [op for ops in hlo.parse(text).computations.values() for op in ops.values()]
    return [
        Sent(kind, array.dims, devices(kind, op), op.scope)
        for op in ops
        if (kind := op.opcode.removesuffix("-start")) in KINDS
        for array in op.shape
        if math.prod(array.dims) > FEW
    ]


def shape_of(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes that tell a kernel, also one laid out as a matrix or transposed, from activations."""
    kernel = dims if len(dims) < 4 else (math.prod(dims[:-1]), dims[-1])
    return tuple(sorted(size for size in kernel if size != 1))


def assert_only_parameters_and_gradients(text, trees):
    """Data 2 x fsdp 2: parameters are gathered along fsdp alone, gradients summed over both: whole
    ones over four devices, or scattered along fsdp and then their shards over two."""
    shapes = [x.shape for x in jax.tree.leaves(trees)]
    halves = [(*s[:i], s[i] // 2, *s[i + 1 :]) for s in shapes for i in range(len(s))]
    whole, shards = ({shape_of(s) for s in group} for group in (shapes, halves))
    found = sent(text)
    summed_shards = {one for one in found if one.kind != "all-gather" and one.devices == 2}
    known = lambda one: shape_of(one.dims) in (whole | shards if one in summed_shards else whole)  # noqa: E731
    assert not [one for one in found if not known(one)]
    gathered = [one for one in found if one.kind == "all-gather"]
    assert len(gathered) > 20
    assert {one.devices for one in gathered} == {2}
    assert {one.kind for one in found} <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_a_step_sends_parameters_and_gradients_but_no_activations():
    """The program of `test_train_ldm.py`, which is compiled once for both."""
    config = recipes.ldm_config(accumulate=2)
    mesh = recipes.mesh_of(data=2, fsdp=2)
    step, key = recipes.step_of(config, mesh), jax.random.key(config.seed)
    state, batch = recipes.start(config, mesh), recipes.batch_of(config, mesh, 0)
    text = step.trace(state, batch, key).lower().compile().as_text()
    assert_only_parameters_and_gradients(text, (state.params, step.frozen))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "kl", "vq"])
def test_text_encoders_first_stages_and_discriminators_send_none_either(name):
    found = first_step(name, (("data", 2), ("fsdp", 2)))
    assert_only_parameters_and_gradients(found.text, (found.params, found.kept))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 4}, {"fsdp": 4}], ids=str)
def test_a_first_stage_and_its_discriminator_send_no_feature_maps(mesh):
    found = sent(first_step("kl", tuple(mesh.items())).text)
    assert {one.devices for one in found} <= {2, 4}
    side = CONFIGS["kl"].data.size
    assert not [x for x in found if x.dims[1:3] == (side, side) or side**2 in x.dims]
