"""Programs of requests in files, without weights: --export and --from-export."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ldm_jax import export
from ldm_jax.runtime.log import LOG
from ldm_jax.sample.generate import arguments_of, batch_of, step_noise_of
from ldm_jax.sample.program import program_of
from ldm_jax.sample.request import Call, Request


def facts_of(request: Request) -> dict[str, Any]:
    """Facts that a program depends on beside the model and the shapes of its arguments."""
    options = request.options
    names = ("steps", "solver", "spacing", "spacing_rule", "guidance_rescale", "guidance_interval")
    names += ("dynamic_threshold", "quantize_x0", "dtype", "preview")
    facts = {
        "task": request.task,
        "guided": request.guided,
        "starts later": request.start is not None,
    }
    facts |= {name: getattr(options, name) for name in names} | request.program
    facts["latent"] = request.shape
    if step_noise_of(request, np.zeros(0, int)) is not None:
        facts["step noise"] = True
    return {name: list(x) if isinstance(x, tuple) else x for name, x in facts.items()}


def write(request: Request) -> None:
    """The program of a request for --batch-size images on one device, in the file --export."""
    options, size = request.options, request.options.batch_size
    platforms = options.export_platforms or export.PLATFORMS
    run = program_of(request, export.portable(request.model, platforms))
    call = Call(np.minimum(np.arange(size), request.count - 1), np.arange(1))
    LOG.info(f"lowering the sampler for batches of {size} on {', '.join(platforms)} ...")
    program = export.lower(run, arguments_of(request, batch_of(request), call), platforms)
    meta = {"model": export.identity(request.model), "rows": size, "program": facts_of(request)}
    export.write(options.export, program, meta)
    LOG.info(f"{options.export}: the program alone; --from-export takes it with the same --model")


def read(request: Request) -> tuple[Callable, int]:
    """(run, batch size) of the file --from-export. ValueError if it is of another request."""
    path = request.options.from_export
    run, meta = export.read(path, model=request.model)
    there, here = {"spacing_rule": "compvis", **meta.get("program", {})}, facts_of(request)
    for name in here | there:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"--from-export {path}: was exported with {name.replace('_', ' ')}"
                f" {there.get(name)}, and here it is {here.get(name)}: make them the same, or"
                " export it again"
            )
    return run, meta["rows"]
