"""LPIPS against a re-statement in torch; what has no features gives no NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draw, filled

from ldm_jax.convert import auxiliary, table
from ldm_jax.models import lpips

MODEL = lpips.LPIPS(width=4)  # enough for all that does not depend on the number of channels
A = np.tanh(draw(2, 19, 33, 3))
B = np.clip(A + 0.3 * draw(2, 19, 33, 3, seed=2), -1, 1)


@pytest.fixture(scope="module")
def params():
    return filled(lpips.shapes(4))


@jax.jit
def distance(params, a, b):
    return MODEL.apply({"params": params}, a, b)


@pytest.mark.torch
@pytest.mark.parametrize("width", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_distance_and_gradient_are_those_of_torch(width, record_property):
    torch = pytest.importorskip("torch", reason="torch is the reference")
    from torch_first_stage import LPIPS, nchw, nhwc

    params, theirs = filled(lpips.shapes(width)), LPIPS(width)
    tensors = table.to_torch(list(auxiliary.lpips_entries()), params)
    theirs.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
    b = nchw(B).requires_grad_()
    expected = theirs(nchw(A), b).flatten()
    expected.sum().backward()

    def total(b):
        per_row = lpips.LPIPS(width=width).apply({"params": params}, A, b)
        return jnp.sum(per_row), per_row

    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(B)
    assert found.shape == (2,)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4)
    limit = 1e-4 * float(b.grad.abs().max())
    record_property("gradient", float(np.abs(gradient - nhwc(b.grad)).max() / limit))
    np.testing.assert_allclose(gradient, nhwc(b.grad), rtol=0, atol=limit)


def test_no_distance_to_itself_and_symmetry(params):
    np.testing.assert_array_equal(distance(params, A, A), 0)
    np.testing.assert_allclose(distance(params, A, B), distance(params, B, A), rtol=1e-5)
    assert (np.asarray(distance(params, A, B)) > 0).all()


def test_pixels_without_features_have_a_gradient_of_zero():
    x = np.stack([np.zeros(5), draw(5)])[None, None].astype(np.float32)
    unit, pull = jax.vjp(lpips._unit, x)
    np.testing.assert_allclose(jnp.linalg.norm(unit, axis=-1), [[[0, 1]]], rtol=1e-6)
    (gradient,) = pull(np.float32(draw(*x.shape, seed=2)))
    np.testing.assert_array_equal(gradient[0, 0, 0], 0)
    assert np.abs(gradient[0, 0, 1]).max() > 0.01


def test_one_channel_is_three_alike(params):
    a, b = A[..., :1], B[..., :1]
    expected = distance(params, np.repeat(a, 3, -1), np.repeat(b, 3, -1))
    np.testing.assert_allclose(distance(params, a, b), expected, rtol=1e-5)


def test_random_features(params):
    first, second = (lpips.random_params(jax.random.key(0), 4) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, params)
    near, far = (distance(first, A, A + e * draw(*A.shape)) for e in (0.05, 0.5))
    assert (np.asarray(near) < 0.5 * np.asarray(far)).all()
    assert (np.asarray(far) < 2).all()


def test_precision_reaches_every_convolution(params):
    model = MODEL.clone(precision=jax.lax.Precision.HIGHEST)
    program = str(jax.make_jaxpr(model.apply)({"params": params}, A, B))
    high = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    assert program.count("conv_general_dilated[") == 26
    assert program.count(high) == program.count("dot_general[") + 26


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((1, 16, 16, 3), (2, 16, 16, 3), "of one shape, not"),
        ((1, 16, 16, 4), (1, 16, 16, 4), "takes 3 channels"),
        ((1, 15, 16, 3), (1, 15, 16, 3), "at least 16 pixels"),
    ],
)
def test_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lpips.LPIPS().init, jax.random.key(0), jnp.zeros(a), jnp.zeros(b))
