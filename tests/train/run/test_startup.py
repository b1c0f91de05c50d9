"""What a run says of itself at its start."""

import dataclasses

import pytest

from ldm_jax import schema
from ldm_jax.configs import own, tiny
from ldm_jax.train.run import startup


@pytest.mark.parametrize(
    ("config", "option"),
    [
        (own.get_config("first_stage"), None),
        (own.get_config("ldm"), None),
        (tiny.get_config("first_stage"), "--model.channels 32 with --model.channel-mult 1 1"),
        (
            dataclasses.replace(own.get_config("ldm"), unet=schema.UNetConfig(model_channels=32)),
            "--unet.model-channels 32 with --unet.channel-mult 1 2 4 4",
        ),
    ],
)
def test_groups_of_one_channel_are_warned_of(config, option, caplog):
    startup.warn_of_single_channels(config)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (option is not None)
    assert all(f"warning: {option}: GroupNorm has 32 groups" in line for line in said)
