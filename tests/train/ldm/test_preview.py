"""Sample grids of a training: every kind of condition, the same picture for the same weights."""

import jax
import numpy as np
import pytest
import recipes
from PIL import Image

from ldm_jax import data
from ldm_jax.train.ldm import preview


@pytest.mark.parametrize(
    "condition",
    [
        pytest.param("unconditional", marks=pytest.mark.slow),
        pytest.param("inpaint", marks=pytest.mark.slow),
        pytest.param("superres", marks=pytest.mark.slow),
        "semantic",
    ],
)
def test_a_grid_of_any_condition(condition, tmp_path):
    config, mesh = recipes.ldm_config(condition), recipes.mesh_of()
    held_out = data.stream(config.data, batch_size=8, seed=0, split="eval")
    draw = preview.make(config, recipes.frozen(mesh), mesh, held_out, jax.random.key(0))
    params = recipes.start(config, mesh).params
    drawn = []
    for name, weights in (("a", params), ("b", params), ("c", jax.tree.map(np.negative, params))):
        draw(weights, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as sheet:
            drawn.append(np.asarray(sheet))
    first, again, other = drawn
    scale = 64 // config.data.size
    side = scale * config.data.size + 2
    assert first.shape == (2 + 2 * side, 2 + 2 * side, 3)  # num_samples 4, two in a row
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).max() > 8
    corners = [(y, x) for y in (2, 2 + side) for x in (2, 2 + side)]
    assert len({first[y : y + side - 2, x : x + side - 2].tobytes() for y, x in corners}) == 4
