"""Training that starts from a trained model: all of it, a LoRA, DreamBooth, textual inversion.

`full` trains as `train.ldm` does. `adapter` says what trains and how it joins the frozen base,
`dreambooth` adds pictures of the class, `inversion` a word; `loop` is the recipe of all three.
"""

from ldm_jax.adapters.runs import base_shapes, trains_adapter
from ldm_jax.train.finetune.adapter import abstract_state, settled
from ldm_jax.train.finetune.inversion import widened
from ldm_jax.train.finetune.loss import PRIOR, has_prior, make_loss, make_train_step

__all__ = [
    "PRIOR",
    "abstract_state",
    "base_shapes",
    "has_prior",
    "make_loss",
    "make_train_step",
    "settled",
    "trains_adapter",
    "widened",
]
