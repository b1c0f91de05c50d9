"""Programs of plans in files, without weights: --export and --from-export."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ldm_jax import cli, export
from ldm_jax.sample.generate import arguments_of, batch_of
from ldm_jax.sample.plan import Call, Plan
from ldm_jax.sample.program import program_of


def facts_of(plan: Plan) -> dict[str, Any]:
    """What a program depends on beside the model and the shapes of its arguments."""
    options = plan.options
    names = ("steps", "solver", "spacing", "guidance_rescale", "guidance_interval")
    names += ("dynamic_threshold", "quantize_x0", "dtype", "preview")
    facts = {"task": plan.task, "guided": plan.guided, "starts later": plan.start is not None}
    facts |= {name: getattr(options, name) for name in names} | plan.program
    facts["latent"] = plan.shape
    return {name: list(x) if isinstance(x, tuple) else x for name, x in facts.items()}


def write(plan: Plan) -> None:
    """The program of a plan for --batch-size rows on one device, in the file --export."""
    options, rows = plan.options, plan.options.batch_size
    platforms = options.export_platforms or export.PLATFORMS
    run = program_of(plan, export.portable(plan.model, platforms))
    call = Call(np.minimum(np.arange(rows), plan.count - 1), np.arange(1))
    cli.say(f"lowering the sampler for batches of {rows} on {', '.join(platforms)} ...")
    program = export.lower(run, arguments_of(plan, batch_of(plan), call), platforms)
    meta = {"model": export.identity(plan.model), "rows": rows, "program": facts_of(plan)}
    export.write(options.export, program, meta)
    cli.say(f"{options.export}: the program alone; --from-export takes it with the same --model")


def read(plan: Plan) -> tuple[Callable, int]:
    """(run, its rows) of the file --from-export. ValueError if it is not that of the plan."""
    path = plan.options.from_export
    run, meta = export.read(path, model=plan.model)
    there, here = meta.get("program", {}), facts_of(plan)
    for name in here | there:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"--from-export {path}: was exported with {name.replace('_', ' ')}"
                f" {there.get(name)}, and here it is {here.get(name)}: make them the same, or"
                " export it again"
            )
    return run, meta["rows"]
