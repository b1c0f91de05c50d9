"""`--lora FILE[:UNET[:TEXT]]`: the file and its scales."""

import pytest

from ldm_jax.sample import adapters


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x.safetensors", ("x.safetensors", (1.0, 1.0))),
        ("x.safetensors:0.7", ("x.safetensors", (0.7, 0.7))),
        ("x.safetensors:0.7:-0.2", ("x.safetensors", (0.7, -0.2))),
        ("gs://b/x:1:y.safetensors:1e-1", ("gs://b/x:1:y.safetensors", (0.1, 0.1))),
        ("C:2:3:4", ("C:2", (3.0, 4.0))),
        ("0.5", ("0.5", (1.0, 1.0))),
    ],
)
def test_the_last_numbers_are_scales(text, wanted):
    assert adapters.file_and_scales(text) == wanted


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_scale_that_is_not_finite_is_refused(number):
    with pytest.raises(ValueError, match=f"--lora x:{number}: the scale {number} is not"):
        adapters.file_and_scales(f"x:{number}")
