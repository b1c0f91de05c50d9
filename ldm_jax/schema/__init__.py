"""Every choice that defines a run, as frozen dataclasses that a file in `configs/` fills in.

Class names end in `Config`. A field is *identity* (model, data, objective, optimizer, batch, seed:
changing it makes another run) unless it is declared with `execution(...)` (mesh, total steps,
intervals, workers, remat, attention: may change on resume), which covers all fields inside it.
"""

from ldm_jax.schema.conds import *
from ldm_jax.schema.data import *
from ldm_jax.schema.mark import execution as execution
from ldm_jax.schema.models import *
from ldm_jax.schema.objectives import *
from ldm_jax.schema.recipes import *
