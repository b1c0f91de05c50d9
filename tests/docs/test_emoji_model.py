"""The text model of emoji that lies beside the docs."""

import hashlib
import pathlib

import jax
import pytest

import ldm_jax
from ldm_jax import schema
from ldm_jax.data import emoji
from ldm_jax.metrics import icons
from ldm_jax.runtime import images

MODEL = pathlib.Path(__file__).parents[2] / "docs" / "models" / "emoji"
PAIRS = (("frog", "hat"), ("house", "pineapple"), ("rocket", "fox"), ("pear", "penguin"))


def test_its_files_are_those_of_the_sums():
    for line in (MODEL / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        assert hashlib.sha256((MODEL / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.slow
@pytest.mark.skipif(
    not pathlib.Path(schema.EmojiConfig.font).exists(),
    reason=f"{schema.EmojiConfig.font} is not there: apt install {emoji.PACKAGE}",
)
def test_it_draws_pairs_that_training_never_showed():
    model = ldm_jax.load(MODEL)
    assert all(emoji.is_held_out(*pair) for pair in PAIRS)
    cond, null = model.encode(ldm_jax.prompts(model, [emoji.caption(*pair) for pair in PAIRS]))
    sample = jax.jit(ldm_jax.make_sampler(model, steps=10))
    drawn = sample(model.params, cond, ldm_jax.keys(0, len(PAIRS)), null, guidance_scale=3.0)
    assert icons.read(images.to_uint8(drawn)) == [*PAIRS]
