"""The frozen parts of a run together: load them, keep them in the run, place them on the mesh."""

import dataclasses
from typing import Any, NamedTuple

from etils import epath
from jax.sharding import Mesh

from ldm_jax import schema
from ldm_jax.runtime import rundir
from ldm_jax.train.frozen import first_stage, text_encoder


class Sources(NamedTuple):
    """Frozen parts on the host, before anything of a run is written."""

    params: dict
    """Parameters of the first stage."""
    first_stage: schema.FirstStageModelConfig
    text: text_encoder.Text | None
    """Tokenizer and text encoder; None for a model without text."""

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of `data.stream`, or None."""
        return self.text and self.text.tokenizer


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A first stage that does not train, and the text encoder if that does not train either.

    Both trees of parameters are arguments of the step.
    """

    module: Any
    params: dict
    scale: float
    config: schema.FirstStageModelConfig
    cond_stage: dict | None = None
    """Parameters of a frozen text encoder."""
    unet: dict | None = None
    """Parameters of a UNet that an adapter trains beside."""

    @property
    def arguments(self) -> dict:
        """{"first_stage", "cond_stage"}: the first argument of a loss, beside the state.

        With "unet" where that does not train.
        """
        unet = {} if self.unet is None else {"unet": self.unet}
        return {"first_stage": self.params, "cond_stage": self.cond_stage or {}, **unet}


def find(config: schema.LatentDiffusionTrainConfig, workdir: epath.PathLike) -> Sources:
    """First stage, text encoder and tokenizer: from the run's `frozen/`, else from their paths.

    Only reads. ValueError names a part that is missing, does not fit, or is another one than the
    run was trained with.
    """
    text = text_encoder.find(config, workdir)
    params, model = first_stage.find(config, workdir)
    return Sources(params, model, text)


def prepare(
    config: schema.LatentDiffusionTrainConfig,
    workdir: epath.PathLike,
    mesh: Mesh,
    stream: Any,
    given: Sources | None = None,
) -> Frozen:
    """The frozen parts, kept in the run at `workdir` and placed on the mesh.

    The latent scale is measured on `stream` if neither config nor run has it. `given` is the result
    of `find`, called here by default. A run that does not exist yet is created.
    """
    given = find(config, workdir) if given is None else given
    run, _ = rundir.open_run(workdir, config)
    module, params, scale = first_stage.prepare(
        config, (given.params, given.first_stage), run, mesh, stream
    )
    cond_stage = text_encoder.prepare(config, given.text, run, mesh)
    return Frozen(module, params, scale, given.first_stage, cond_stage)
