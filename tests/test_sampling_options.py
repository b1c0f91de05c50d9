"""Options of the sampler do what their functions do, and are refused where they cannot apply."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draw

from ldm_jax import bundle, denoising, diffusion, guidance, sampling, schema, solvers
from ldm_jax.conditioning import Cond
from ldm_jax.large import windows

SHAPE, STEPS, SCALE = (6, 8, 3), 5, 0.8
X_T = draw(2, *SHAPE)
KEYS = jax.random.split(jax.random.key(0), 2)
COND, NULL = Cond(label=jnp.array([0.5, 2.0])), Cond(label=jnp.array([0.1, 0.1]))


class Net:
    """A UNet in closed form, in which every input matters."""

    def apply(self, variables, x, t, context, label):
        row = jnp.sin(t / 300) + label
        near = variables["params"] * jnp.roll(x, 1, axis=2)
        return jnp.tanh(x + near) * row[:, None, None, None]


class Stage:
    """A first stage whose codes are the whole numbers."""

    def apply(self, variables, z, method):
        assert method == "quantize"
        return jnp.round(z), None


def model(first_stage=None):
    return bundle.LatentDiffusion(
        unet=Net(),
        first_stage=Stage(),
        cond_stage=None,
        params={"unet": jnp.float32(0.3), "first_stage": {}, "cond_stage": {}},
        schedule=diffusion.make_schedule("scaled_linear"),
        prediction="eps",
        latent_scale=SCALE,
        config=schema.LatentDiffusionConfig(
            first_stage or schema.AutoencoderVQConfig(), schema.UNetConfig(), None, size=32
        ),
    )


def drawn(guided=True, first_stage=None, **options):
    """Scaled latents [2, *SHAPE] of `make_sampler` with the options."""
    made = model(first_stage)
    sample = sampling.make_sampler(made, shape=SHAPE, steps=STEPS, decode=False, **options)
    arguments = (made.params, COND, KEYS, NULL if guided else None, 3.0, 0.0, X_T)
    return np.asarray(jax.jit(sample)(*arguments))


@functools.cache
def plain():
    return drawn()


def by_hand(change=lambda denoise: denoise, net=None, **how):
    """The same from the functions that the options stand for."""
    made = model()
    net = net or bundle.bind(made.unet, made.params["unet"])
    guided = guidance.classifier_free(net, COND, NULL, 3.0, **how)
    denoise = change(diffusion.denoiser(guided, "eps"))
    levels = sampling.levels_of(made, STEPS, None)
    return jax.jit(lambda x: solvers.sample(solvers.make("ddim"), denoise, levels, x, KEYS))(X_T)


def codes(x0):
    return SCALE * jnp.round(x0 / SCALE)


CASES = {
    "rescale": ({"guidance_rescale": 0.7}, {"rescale": 0.7}),
    "interval": ({"guidance_interval": (200, 500)}, {"interval": (200, 500)}),
    "threshold with a limit, then codes": (
        {"dynamic_threshold": 99.5, "threshold_limit": 2.5, "quantize_x0": True},
        {
            "change": lambda d: denoising.quantize_x0(
                denoising.dynamic_threshold(d, 0.995, 2.5), codes
            )
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_option_is_its_function(name):
    options, how = CASES[name]
    found = drawn(**options)
    np.testing.assert_allclose(found, by_hand(**how), atol=2e-5)
    assert np.abs(found - plain()).max() > 1e-2  # and it matters


def test_a_model_around_the_model_is_guided():
    def wrap_model(net):
        return windows.windowed(net, window=(6, 6), stride=(6, 2))

    made = model()
    net = wrap_model(bundle.bind(made.unet, made.params["unet"]))
    found = drawn(wrap_model=wrap_model)
    np.testing.assert_allclose(found, by_hand(net=net), atol=2e-5)
    assert np.abs(found - plain()).max() > 1e-2


def test_recomputed_steps_are_the_same_steps():
    np.testing.assert_array_equal(drawn(remat=True), plain())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_rescale": 1.5}, r"guidance_rescale=1.5 is not in 0..1"),
        ({"guidance_rescale": 0.5, "guided": False}, "guidance_rescale=0.5 changes guidance"),
        ({"guidance_interval": (0, 500), "guided": False}, r"interval=\(0, 500\) changes guidance"),
        ({"guidance_interval": (500, 200)}, r"\(500, 200\): none of the 5 timesteps 801..1 is"),
        ({"guidance_interval": (802, 999)}, "give .lowest, highest. around some"),
        ({"dynamic_threshold": 0}, r"dynamic_threshold=0 is not in \(0, 100\]"),
        ({"dynamic_threshold": 100.5}, "percentile, such as 99.5"),
        ({"dynamic_threshold": 99.5, "threshold_limit": 0}, "threshold_limit=0 is not positive"),
        ({"quantize_x0": True, "first_stage": schema.AutoencoderKLConfig()},
         "quantize_x0 needs a first stage with a codebook .VQ., and this model has another"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_apply_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        drawn(**options)


def test_the_largest_percentile_and_the_whole_interval_are_allowed():
    """Up to rounding of other programs, which 1 / alpha of the first level makes 15 times larger.

    An interval without that level is told apart by a hundred times as much.
    """
    limit = 1e-4
    loose = drawn(dynamic_threshold=100, threshold_limit=1e6, guidance_interval=(1, 801))
    np.testing.assert_allclose(loose, plain(), atol=limit)
    assert np.abs(drawn(guidance_interval=(1, 800)) - plain()).max() > 100 * limit
