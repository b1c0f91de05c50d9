"""The side of ldm_jax in `unet_vs_diffusers.py`, which starts it."""

import bisect
import collections
import heapq
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sides
import unet_cases
from flax import traverse_util

from ldm_jax import schema, train_state
from ldm_jax.models import attention, convolution, unet

PROJECTIONS = (
    r"/(to_q|to_k|to_v|to_out_0|proj|query|key|value|proj_attn)/"
    r"|/(net_2|linear_1|linear_2|time_emb_proj)/"
)
CONVOLUTIONS = r"conv_general_dilated|/(conv\d?|conv_in|conv_out|conv_shortcut)/"
CONTAINERS = ("while", "call", "conditional")  # their parts are traced themselves


def parameters(net: unet.UNet) -> dict:
    """The parameters that both sides use, under our names."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), *unet.example_inputs(net))["params"]

    def fill(path: str, shape: tuple[int, ...]) -> jax.Array:
        *parents, leaf = path.split("/")
        dotted = re.sub(r"_(\d+)(?=\.)", r".\1", ".".join(parents) + ".")
        dotted = re.sub(r"linear\.(\d)", r"linear_\1", dotted)
        return jnp.array(
            unet_cases.parameter(dotted + ("bias" if leaf == "bias" else "weight"), shape)
        )

    flat = traverse_util.flatten_dict(shapes, sep="/")
    return traverse_util.unflatten_dict({p: fill(p, s.shape) for p, s in flat.items()}, sep="/")


def run_case(job: unet_cases.Job, case: unet_cases.Case) -> tuple[dict, np.ndarray | None]:
    """Figures of one case, and the output of a forward pass."""
    jax.config.update("jax_compilation_cache_dir", job.cache)
    net = unet.from_config(
        schema.UNetConfig(model_channels=case.model_channels),
        dtype=job.dtype,
        attention=attention.choose(job.platform, name=job.variant),
        convolution=convolution.choose(job.platform),
    )
    given = jax.tree.map(jnp.array, unet_cases.inputs(case))
    params = parameters(net)
    if not case.train:
        params = jax.tree.map(lambda p: p.astype(job.dtype), params)

    def forward(params, x, target, t, context):
        return net.apply({"params": params}, x, t, context)

    def loss(params, rows):
        out = forward(params, **rows)
        return jnp.mean(jnp.square(out - rows["target"])), {}

    config = schema.OptimizerConfig(learning_rate=unet_cases.LEARNING_RATE)
    tx, _ = train_state.make_optimizer(config)

    def step(state, rows):
        params, opt_state = state
        grads, metrics = train_state.gradients(loss, params, rows, 1)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), metrics["loss"]

    if case.train:
        state = [(params, tx.init(params))]
        del params
        lowered = jax.jit(step, donate_argnums=0).lower(state[0], given)
        program, compiling = sides.timed(lowered.compile)

        def run():
            state[0], value = program(state[0], given)
            jax.block_until_ready(state[0])
            return float(value)
    else:
        lowered = jax.jit(forward).lower(params, **given)
        program, compiling = sides.timed(lowered.compile)

        def run():
            return jax.block_until_ready(program(params, **given))

    figures, values = sides.measure(run, job.seconds)
    figures["compile"] = compiling
    if job.split:
        figures["split"] = split(run, program.as_text())
    if case.train:
        return figures | {"losses": values[: sides.LEAST_RUNS]}, None
    return figures, np.asarray(values[0])


def split(run, hlo: str) -> dict[str, float]:
    """Seconds by kind of operation of one run.

    From a profiler trace: an instant counts in equal parts for the operations that run then, on any
    thread. "rest" are the instants with none.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        found = intervals(jax.profiler.ProfileData.from_file(str(path)))
    seconds = shares(until_read(found, hlo))
    kinds = kinds_of(hlo)
    total = dict.fromkeys(unet_cases.KINDS, 0.0)
    for operation, value in seconds.items():
        total[kinds.get(operation, "elementwise") if operation else "rest"] += value
    return total


def intervals(data) -> list[tuple[float, float, str]]:
    """(start, end, HLO operation) in ns; one that works on other threads ends with "end: ..."."""
    starts, ends = [], {}
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    starts.append((event, stats["hlo_op"], stats.get("_p")))
                elif event.name.startswith("end: "):
                    ends[stats.get("_c")] = event.start_ns
    return [
        (e.start_ns, max(e.start_ns + e.duration_ns, ends.get(p, 0)), op) for e, op, p in starts
    ]


def until_read(found: list[tuple[float, float, str]], hlo: str) -> list[tuple[float, float, str]]:
    """The intervals, each over at the latest when an operation starts that reads its result.

    On CPUs an operation in several parts starts the next ones from within the last part, so that
    in the trace they lie in it.
    """
    readers = readers_of(hlo, {operation for _, _, operation in found})
    starts = collections.defaultdict(list)
    for start, _, operation in sorted(found):
        starts[operation].append(start)

    def over(start: float, end: float, operation: str) -> float:
        for reader in readers[operation]:
            later = starts[reader][bisect.bisect_right(starts[reader], start) :][:1]
            end = min([end, *later])
        return end

    return [(start, over(start, end, operation), operation) for start, end, operation in found]


def readers_of(hlo: str, traced: set[str]) -> dict[str, set[str]]:
    """{operation: those of `traced` that read its result}, also through operations without a trace,
    as tuples and bitcasts are."""
    direct = collections.defaultdict(set)
    for line in hlo.splitlines():
        if found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = .*?\s[\w-]+\((.*?)\)(?:, |$)", line):
            for operand in re.findall(r"%([\w.-]+)", found[2]):
                direct[operand].add(found[1])

    def reached(operation: str) -> set[str]:
        seen, todo = set(), list(direct[operation])
        while todo:
            reader = todo.pop()
            if reader not in seen:
                seen.add(reader)
                todo += [] if reader in traced else direct[reader]
        return seen & traced

    return {operation: reached(operation) for operation in traced}


def shares(found: list[tuple[float, float, str]]) -> dict[str | None, float]:
    """Seconds of each operation, and None: of none, between the first start and the last end."""
    found = sorted(found)
    seconds = collections.defaultdict(float)
    running: list[tuple[float, str]] = []
    now = found[0][0]

    def advance(until: float):
        nonlocal now
        while now < until:
            stop = min(until, running[0][0]) if running else until
            for _, operation in running or [(0, None)]:
                seconds[operation] += (stop - now) / max(1, len(running)) / 1e9
            now = stop
            while running and running[0][0] <= now:
                heapq.heappop(running)

    for start, end, operation in found:
        advance(start)
        if not operation.startswith(CONTAINERS):
            heapq.heappush(running, (end, operation))
    while running:
        advance(running[0][0])
    return seconds


def kinds_of(hlo: str) -> dict[str, str]:
    """{HLO operation: kind}, by the convolution or matrix product in it, else by its origin."""
    computations, name = collections.defaultdict(list), None
    for line in hlo.splitlines():
        if opening := re.match(r"(?:ENTRY )?%?([\w.-]+) (?:\(.*)?.*\{$", line):
            name = opening[1]
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = .*?\s([\w-]+)\(", line):
            source = re.search(r'op_name="([^"]*)"', line)
            calls = re.search(r"calls=%?([\w.-]+)", line)
            entry = (found[1], found[2], source and source[1], calls and calls[1])
            computations[name].append(entry)

    def inside(opcode: str, source: str | None, calls: str | None) -> list[tuple[str, str]]:
        """(opcode, source) of all that a fusion computes."""
        parts = [(opcode, source or "")]
        for _, *part in computations.get(calls, ()):
            parts += inside(*part)
        return parts

    return {
        name: kind_of(inside(*rest)) for entries in computations.values() for name, *rest in entries
    }


def kind_of(parts: list[tuple[str, str]]) -> str:
    """Kind of a fusion of (opcode, source); the first part is the whole."""
    opcode, source = parts[0]
    for inner, where in parts:
        if inner in ("convolution", "dot", "custom-call"):
            if re.search(CONVOLUTIONS, where):
                return "convolution"
            return "dense" if re.search(PROJECTIONS, where) else "attention"
    source = source or next((where for _, where in parts if where), "")
    if "UNet" not in source and "Autoencoder" not in source:
        return "AdamW" if source else "copies"
    if opcode in ("copy", "transpose", "concatenate", "slice", "pad", "broadcast", "bitcast"):
        return "copies"
    if re.search(r"/(norm\d?|group_norm|conv_norm_out)/", source):
        return "norms"
    own = r"/attn\d/" if "UNet" in source else r"/attentions_\d/"
    if re.search(own, source) and not re.search(PROJECTIONS, source):
        return "attention"
    return "elementwise"


if __name__ == "__main__":
    unet_cases.serve(run_case)
