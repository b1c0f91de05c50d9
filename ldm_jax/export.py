"""Sampling programs lowered ahead of time: one file for several platforms, without weights.

    model = export.portable(model, export.PLATFORMS)
    program = export.lower(run, (params, batch, keys, scale, eta), export.PLATFORMS)
    export.write("sampler.bin", program, {"model": export.identity(model)})
    run, meta = export.read("sampler.bin", model=model)

A program is code: whoever runs a file trusts the one who made it. What can be checked is checked:
it calls nothing outside of XLA but the kernels that our own programs have (CUSTOM_CALLS), and it is
not larger than it may be. The compiler that takes the rest was not written for hostile input.

The file begins with three lines: `ldm_jax program 1`, the sha256 of the rest, and `meta` as JSON;
`head -n 3` shows them. The compressed StableHLO of `jax.export` for each platform follows.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export as jax_export
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import chlo, sdy, stablehlo

from ldm_jax import schema
from ldm_jax.bundle import LatentDiffusion
from ldm_jax.models import attention, convolution
from ldm_jax.runtime import reading
from ldm_jax.schema import serialize

FORMAT = 1
MAGIC = b"ldm_jax program "
PLATFORMS = ("cpu", "cuda", "tpu")
CONSTANTS = 2**22
"""Most bytes of constant arrays in a program: room for tables of levels, not for weights."""

SQUEEZED = 64
"""Most times that a compressed program becomes longer; ours become three times as long."""
CUDNN = tuple(
    f"__cudnn$fmha{kind}"
    for kind in ("Softmax", "SoftmaxBackward", "ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward")
)
CUSTOM_CALLS = {
    "cpu": frozenset(),
    "cuda": frozenset((*CUDNN, "cu_threefry2x32_ffi")),
    "tpu": frozenset(("tpu_custom_call",)),  # kernels written with Pallas
}
"""Code outside of XLA that a program may call, by its platform, beside PLACES."""
PLACES = frozenset(
    ("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement")
)
"""Calls that only say where arrays lie."""


class Program(NamedTuple):
    """A lowered function and the arguments that it takes."""

    exported: dict[str, jax_export.Exported]
    """By platform: a kernel of one cannot be lowered into a program of several."""
    arguments: tuple[str, ...]
    """Their names."""
    inputs: tuple[dict, ...]
    """{"name", "shape", "dtype"} of every array in them; the dtype of typed keys is `key<fry>`."""


# --- before lowering ----------------------------------------------------------------------------


def portable(model: LatentDiffusion, platforms: Sequence[str] = PLATFORMS) -> LatentDiffusion:
    """`model` with the attention and the convolution of each platform, chosen when it is lowered.

    They are those of `attention.choose` and `convolution.choose`, but where this process has no
    CUDA device, `cuda` attends with `attention.xla`: cuDNN's kernel can only be traced beside one.
    ValueError for a platform that is not one of PLATFORMS.
    """
    attend = _by_platform({p: attention.choose(p, None, _attention_name(p)) for p in platforms})
    convolve = _by_platform({p: convolution.choose(p) for p in platforms})
    parts = {}
    for name in ("unet", "first_stage"):
        module = getattr(model, name)
        fields = {f.name for f in dataclasses.fields(module)}
        kernels = {"attention": attend, "convolution": convolve}
        parts[name] = module.clone(**{k: v for k, v in kernels.items() if k in fields})
    return dataclasses.replace(model, **parts)


def identity(model: LatentDiffusion) -> str:
    """Hash of all that a program takes from a model but its weights: config and latent scale.

    Only fields that differ from their defaults count: one added later changes no hash.
    """
    return _hash(json.dumps(serialize.difference_from_defaults(_without_rule(model))), model)


def _old_identity(model: LatentDiffusion) -> str:
    """`identity` as programs of November 2026 and before hold it."""
    return _hash(serialize.old_to_json(_without_rule(model)), model)


def _without_rule(model: LatentDiffusion) -> schema.LatentDiffusionConfig:
    """The config without the rule of its spacing.

    A program holds its levels, older ones those of CompVis's rule: whoever runs one compares them.
    """
    sampling = dataclasses.replace(model.config.sampling, rule="compvis")
    return dataclasses.replace(model.config, sampling=sampling)


def _hash(config: str, model: LatentDiffusion) -> str:
    text = config + repr(float(model.latent_scale))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _attention_name(platform: str) -> str:
    """Name of the attention for a platform; ValueError if it is not one of PLATFORMS."""
    if platform not in PLATFORMS:
        raise ValueError(f"platform {platform!r} is not one of {', '.join(PLATFORMS)}")
    if platform != "cuda":
        return "auto"
    try:
        return "auto" if jax.devices("cuda") else "xla"
    except RuntimeError:  # no such device here
        return "xla"


def _by_platform(functions: dict[str, Callable]) -> Callable:
    """The function of the platform that a program is lowered for; takes arrays, then others."""
    if len(set(functions.values())) == 1:
        return next(iter(functions.values()))

    def chosen(*arguments, **keywords):
        arrays = tuple(a for a in arguments if isinstance(a, jax.Array | np.ndarray))
        rest = arguments[len(arrays) :]
        bound = {p: lambda *a, f=f: f(*a, *rest, **keywords) for p, f in functions.items()}
        return jax.lax.platform_dependent(*arrays, **bound)

    return chosen


# --- lowering -----------------------------------------------------------------------------------


def lower(run: Callable, arguments: Sequence[Any], platforms: Sequence[str] = PLATFORMS) -> Program:
    """`run(*arguments)` lowered for the platforms, none of which need be here.

    arguments: pytrees of arrays, numbers, typed keys or `jax.ShapeDtypeStruct`: their values are
    not kept. What `run` returns is arrays in tuples, lists and dicts.
    ValueError if `run` holds large arrays that are not among its arguments, or calls other code
    than CUSTOM_CALLS, as LAPACK's.
    """
    leaves, tree = jax.tree.flatten(tuple(arguments))
    names = tuple(inspect.signature(run).parameters)[: len(arguments)]
    keys = [_is_key(leaf) for leaf in leaves]

    def flat(*arrays):
        wrapped = [jax.random.wrap_key_data(a) if k else a for a, k in zip(arrays, keys)]
        return run(*jax.tree.unflatten(tree, wrapped))

    plain = [jax.ShapeDtypeStruct(*_plain(leaf)) for leaf in leaves]
    jitted = jax.jit(flat)
    held = sum(np.size(c) * np.dtype(c.dtype).itemsize for c in jitted.trace(*plain).jaxpr.consts)
    if held > CONSTANTS:
        raise ValueError(
            f"the program holds {held / 2**20:.1f} MiB of arrays that are not among its arguments:"
            " pass weights as arguments"
        )
    # JAX promises stability of custom calls for some targets only; cuDNN's attention is not among
    # them, though XLA has kept it so far.
    cudnn = [jax_export.DisabledSafetyCheck.custom_call(name) for name in CUDNN]
    exported = {
        p: jax_export.export(jitted, platforms=(p,), disabled_checks=cudnn)(*plain)
        for p in platforms
    }
    for platform, one in exported.items():
        check_calls(one, platform)
    return Program(exported, names, _inputs(names, arguments))


def check_calls(exported: jax_export.Exported, platform: str) -> None:
    """ValueError if a program calls other code than its platform's CUSTOM_CALLS."""
    known, others = CUSTOM_CALLS.get(platform, frozenset()) | PLACES, set()

    def look(op: Any) -> Any:
        if op.name.endswith("custom_call"):
            others.add(ir.StringAttr(op.attributes["call_target_name"]).value)
        return ir.WalkResult.ADVANCE

    with ir.Context() as context:
        for dialect in (stablehlo, chlo, sdy):
            dialect.register_dialect(context)
        module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        module.operation.walk(look)
    if others - known:
        raise ValueError(
            f"the program for {platform} calls {', '.join(sorted(others - known))[:200]}, code that"
            f" no sampler needs; known are {', '.join(sorted(known))}"
        )


def _inputs(names: Sequence[str], arguments: Sequence[Any]) -> tuple[dict, ...]:
    def described(name, leaf):
        shape, dtype = (leaf.shape, leaf.dtype) if _is_key(leaf) else _plain(leaf)
        return {"name": name, "shape": list(shape), "dtype": str(dtype)}

    return tuple(described(*leaf) for leaf in _named(names, arguments))


def _named(names: Sequence[str], arguments: Sequence[Any]) -> list[tuple[str, Any]]:
    """(path, leaf) of the arguments, sorted by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(dict(zip(names, arguments, strict=True)))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a leaf in the program, where keys are their data."""
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return np.shape(leaf), jax.dtypes.result_type(leaf)


# --- the file -----------------------------------------------------------------------------------


def write(path: epath.PathLike, program: Program, meta: dict[str, Any]) -> None:
    """One file of the program; `meta` (JSON values) says what it samples with.

    `meta["model"]`, from `identity`, is what `read` compares. The file also holds "platforms",
    the "bytes" of each, "arguments", "inputs" and "jax", the version that wrote it.
    """
    blobs = {p: zlib.compress(bytes(e.serialize())) for p, e in program.exported.items()}
    facts = {
        **meta,
        "jax": jax.__version__,
        "platforms": list(blobs),
        "bytes": [len(blob) for blob in blobs.values()],
        "arguments": list(program.arguments),
        "inputs": list(program.inputs),
    }
    body = json.dumps(facts).encode() + b"\n" + b"".join(blobs.values())
    head = MAGIC + b"%d\n" % FORMAT + hashlib.sha256(body).hexdigest().encode() + b"\n"
    path = epath.Path(path)
    part = path.parent / f"{path.name}.part"  # never half a file under this name
    part.write_bytes(head + body)
    part.rename(path)


def read_meta(path: epath.PathLike) -> dict[str, Any]:
    """The description in a file of `write`; ValueError if it is none."""
    return _split(path)[0]


def read(
    path: epath.PathLike, *, model: LatentDiffusion | None = None, platform: str | None = None
) -> tuple[Callable, dict[str, Any]]:
    """(run, meta) of a file of `write`; `run` takes the arguments that were lowered, to be jitted.

    model: the bundle that is to run; one of another config or latent scale is refused.
    platform: cpu, cuda or tpu; default: that of this process.
    ValueError, naming the file, if it is no program, damaged, of a newer format or unknown to this
    version of JAX, or not for this model or platform; `run` refuses arguments of other shapes.
    """
    meta, blobs = _split(path)
    if model is not None and meta.get("model") not in (identity(model), _old_identity(model)):
        raise ValueError(
            f"{path}: was exported from another model (config and latent scale have the hash"
            f" {meta.get('model')}, here {identity(model)}): give that one, or export again"
        )
    platform = _platform() if platform is None else platform
    if platform not in meta["platforms"]:
        raise ValueError(
            f"{path}: was lowered for {', '.join(meta['platforms'])}, not for {platform}: export it"
            " again for this platform"
        )
    number = meta["platforms"].index(platform)
    first = sum(meta["bytes"][:number])
    blob = _unpacked(blobs[first : first + meta["bytes"][number]], path)
    try:
        exported = jax_export.deserialize(bytearray(blob))
    except Exception as error:  # whatever a reader of another version raises
        raise ValueError(
            f"{path}: was written by jax {meta['jax']} and cannot be read by {jax.__version__}"
            f" ({error}): export it again"
        ) from error
    with reading.refusals(path, "export it again"):
        check_calls(exported, platform)
    return functools.partial(_call, str(path), exported, meta), meta


def _unpacked(blob: bytes, path: epath.PathLike) -> bytes:
    """A program's bytes. ValueError if they are many more than a program's, or damaged."""
    most = SQUEEZED * len(blob) + CONSTANTS
    with reading.refusals(path, "export it again"):
        machine = zlib.decompressobj()
        unpacked = machine.decompress(blob, most)
        if not machine.eof:
            raise ValueError(f"its program is cut off, or of more than {most} bytes")
    return unpacked


def _call(where: str, exported: jax_export.Exported, meta: dict, *arguments: Any) -> Any:
    names, expected = meta["arguments"], meta["inputs"]
    if len(arguments) != len(names):
        raise ValueError(
            f"{where}: takes arguments {', '.join(names)}, and was given {len(arguments)}"
        )
    given = _inputs(names, arguments)
    known = {RENAMED.get(i["name"], i["name"]): i | {"name": ""} for i in expected}
    given_specs = {i["name"]: i | {"name": ""} for i in given}
    for name in [*known, *given_specs]:
        if known.get(name) != given_specs.get(name):
            raise ValueError(
                f"{where}: takes {_text(known, name)}, and was given {_text(given_specs, name)}:"
                " give that, or export it again for this"
            )
    leaves = dict(_named(names, arguments))
    # in the order they were lowered in: by argument, then by the names they had then
    in_order = [leaves[n] for n in sorted(known, key=lambda n: names.index(n.partition("/")[0]))]
    data = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in in_order]
    return exported.call(*(jnp.asarray(leaf, _plain(leaf)[1]) for leaf in data))


RENAMED = {"batch/hole": "batch/init_mask"}
"""Old name of an input, in programs exported before it was renamed, and its present name."""


def _text(arrays: dict[str, dict], name: str) -> str:
    if name not in arrays:
        return f"no {name}"
    return f"{name} {arrays[name]['dtype']} {arrays[name]['shape']}"


def _split(path: epath.PathLike) -> tuple[dict[str, Any], bytes]:
    """Read the header of a file, and its compressed programs."""
    try:
        data = reading.read_bytes(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: does not exist; give a file that was exported") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path}: is a folder; give a file that was exported") from error
    first, _, rest = data.partition(b"\n")
    number = first.removeprefix(MAGIC)
    if first == number or not number.isdigit():
        raise ValueError(f"{path}: is not an exported sampler")
    if int(number) > FORMAT:
        raise ValueError(
            f"{path}: format {int(number)} is newer than {FORMAT}; install a newer ldm_jax"
        )
    digest, _, body = rest.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(f"{path}: is damaged, its hash is wrong: copy it or export it again")
    line, _, blobs = body.partition(b"\n")
    facts = reading.parse_json(line, os.fspath(path))
    with reading.refusals(path, "export it again"):
        _check_facts(facts, len(blobs))
    return facts, blobs


def _check_facts(facts: Any, count: int) -> None:
    """ValueError or another of `reading.DAMAGE` if types or sizes are not those of `write`."""
    sizes, inputs = facts["bytes"], facts["inputs"]
    if any(type(size) is not int or size < 0 for size in sizes) or sum(sizes) != count:
        raise ValueError(f"its programs have {count} bytes, other than it says")
    texts = [*facts["platforms"], *facts["arguments"], facts["jax"], *(i["name"] for i in inputs)]
    texts += [i["dtype"] for i in inputs]
    if len(sizes) != len(facts["platforms"]) or any(type(text) is not str for text in texts):
        raise ValueError("what it says of its platforms and arguments are no names")
    if any(type(i["shape"]) is not list for i in inputs):
        raise ValueError("what it says of its inputs has no shapes")


def _platform() -> str:
    """cpu, tpu, cuda or rocm."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"
