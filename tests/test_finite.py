"""What is not finite is refused by name: numbers, options, tensors."""

import dataclasses
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ldm_jax import finite, schema

TYPES = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_in_any_place_is_seen(dtype, bad):
    for shape in ((3,), (), (7, finite.BLOCK // 3)):
        x = np.full(shape, ml_dtypes.finfo(dtype).max, dtype)  # squares and sums of it overflow
        assert finite.is_finite(x)
        assert finite.is_finite(-x)
        for place in {0, x.size // 2, x.size - 1}:
            wrong = x.copy().reshape(-1)
            wrong[place] = bad
            wrong = wrong.reshape(shape)
            assert not finite.is_finite(wrong)
            assert not finite.is_finite(wrong.T)
    assert finite.is_finite(np.zeros((0, 3), dtype))
    assert finite.is_finite(np.arange(3))


def test_a_tensor_is_named_with_its_file():
    x = np.zeros((2, 3), np.float32)
    x[1, 0] = x[1, 2] = math.nan
    tree = {"unet": {"conv_in": {"kernel": np.zeros(3), "bias": x}}}
    message = (
        r"model: unet/conv_in/bias is not finite: 2 of its 6 .* float32, the first at \[1, 0\]"
    )
    with pytest.raises(ValueError, match=message):
        finite.check_tree(tree, "model")


def test_numbers():
    assert finite.checked(2, "a") == 2.0
    assert finite.checked(-1e30, "a", nonzero=True) == -1e30
    for value in (math.nan, math.inf, -math.inf, "1", True, None, [1], 10**400):
        with pytest.raises(ValueError, match=r"a .* is not a finite number"):
            finite.checked(value, "a")
    with pytest.raises(ValueError, match="a 0 is not a finite number other than 0"):
        finite.checked(0, "a", nonzero=True)
    with pytest.raises(ValueError, match="a -1 is not a finite number of at least 0"):
        finite.checked(-1, "a", least=0)


def test_known_numbers_of_a_call():
    finite.check_known(jnp.array(math.nan), "scale")  # perhaps traced: the images are looked at
    finite.check_known(np.array([1.0, 2.0]), "scale")
    for value in (math.nan, math.inf, np.float32("nan"), np.array([1.0, math.inf])):
        with pytest.raises(ValueError, match="scale"):
            finite.check_known(value, "scale")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer.learning_rate", math.nan),
        ("optimizer.learning_rate", math.inf),
        ("first_stage.scale", -math.inf),
        ("sample_guidance", math.nan),
        ("data.crop_range", (0.5, math.nan)),
    ],
)
def test_fields_are_named_as_options(path, value):
    config = schema.LatentDiffusionTrainConfig()
    finite.check_fields(config)
    outer, _, inner = path.partition(".")
    if inner:
        value = dataclasses.replace(getattr(config, outer), **{inner: value})
    option = "--" + path.replace("_", "-")
    with pytest.raises(ValueError, match=rf"{option} -?(nan|inf) is not a finite number"):
        finite.check_fields(dataclasses.replace(config, **{outer: value}))
