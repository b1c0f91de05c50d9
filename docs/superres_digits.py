"""Super-resolution of digits, from 4x4 to 16x16 pixels, on the first stage of the demo.

ldm-train docs/superres_digits.py --workdir runs/superres --first-stage.path runs/demo/first_stage
"""

import dataclasses

from ldm_jax import schema
from ldm_jax.configs import digits


def get_config(stage: str = "ldm") -> schema.LatentDiffusionTrainConfig:
    """The demo's model with the small image as a fifth channel of its input, and no class."""
    if stage != "ldm":
        raise ValueError(f"superres_digits has no stage {stage!r}; it has ldm")
    base = digits.get_config("ldm")
    unet = dataclasses.replace(
        base.unet,
        in_channels=base.unet.in_channels + 1,
        spatial_transformer=False,
        context_dim=None,
    )
    return dataclasses.replace(base, unet=unet, cond=schema.SuperResCondConfig(factor=4))
