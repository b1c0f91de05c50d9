"""Programs in files: the same pixels, no weights, three platforms; what does not fit is refused."""

import dataclasses
import hashlib
import json
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import task_models
from reference import draw

from ldm_jax import export, sampling, schema
from ldm_jax.conditioning import Cond
from ldm_jax.models import attention

SHAPE, ROWS = (4, 4, 4), 2


@pytest.fixture(scope="module")
def model():
    return task_models.make(
        schema.ClassCondConfig(num_classes=4, embed_dim=32),
        **{**task_models.CONTEXT, "attention_downsample": ()},  # in the middle block alone
    )


def make_run(model):
    """run as a command's: images and latents of a batch."""
    sample = sampling.make_sampler(
        model, shape=SHAPE, steps=2, trace=lambda x, denoised: denoised.x0
    )

    def run(params, batch, keys, scale, eta, start=0):
        cond, null = Cond(context=batch["context"]), Cond(context=jnp.zeros_like(batch["context"]))
        images, previews = sample(params, cond, keys, null, scale, eta, None, start)
        return {"images": images, "previews": previews}

    return run


def arguments(model, seed=0):
    keys = sampling.keys_of(seed, range(ROWS))
    return model.params, {"context": draw(ROWS, 3, 32, seed=seed)}, keys, 3.0, 0.5, 1


@pytest.fixture(scope="module")
def program(model):
    return export.lower(make_run(export.portable(model)), arguments(model))


@pytest.fixture(scope="module")
def file(model, program, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "sampler.bin"
    export.write(path, program, {"model": export.identity(model), "steps": 2})
    return path


@pytest.fixture(scope="module")
def run(model, file):
    return jax.jit(export.read(file, model=model)[0])


def test_the_program_in_a_file_draws_the_same_pixels(model, run):
    expected = jax.jit(make_run(model))
    for seed in (0, 1):
        given = arguments(model, seed)
        one, other = expected(*given), run(*given)
        assert one.keys() == other.keys()
        np.testing.assert_allclose(one["images"], other["images"], atol=1e-5)
        np.testing.assert_allclose(one["previews"], other["previews"], atol=1e-5)
    changed = jax.tree.map(lambda a: 0.9 * a, model.params)  # weights are an argument
    other = run(changed, *arguments(model)[1:])["images"]
    assert np.abs(other - run(*arguments(model))["images"]).max() > 1e-3


def test_a_file_holds_the_program_and_no_weights(model, file, program):
    weights = sum(a.nbytes for a in jax.tree.leaves(model.params))
    assert file.stat().st_size < weights / 2
    assert os.listdir(file.parent) == [file.name]
    head = file.read_bytes().split(b"\n")
    assert head[0] == b"ldm_jax program 1"
    meta = json.loads(head[2])
    assert meta["steps"] == 2
    assert meta["jax"] == jax.__version__
    assert meta["platforms"] == ["cpu", "cuda", "tpu"]
    inputs = {i["name"]: (i["shape"], i["dtype"]) for i in meta["inputs"]}
    assert inputs["batch/context"] == ([ROWS, 3, 32], "float32")
    assert inputs["keys"] == ([ROWS], "key<fry>")
    assert inputs["scale"] == ([], "float32")
    assert inputs["start"] == ([], "int32")
    assert "params/unet/conv_in/kernel" in inputs
    for platform, exported in program.exported.items():
        assert exported.platforms == (platform,)


def test_weights_that_are_no_arguments_are_refused(model):
    big = jnp.ones(export.CONSTANTS // 4 + 1)
    with pytest.raises(ValueError, match=r"holds 4.0 MiB .* pass weights as arguments"):
        export.lower(lambda x: x + big, (jnp.ones(1),), ("cpu",))


def test_each_platform_gets_its_own_kernels(model):
    """What only one platform can compile is in the program of that one alone."""

    def cpu(q, k, v, precision=None):
        return q + jax.lax.erf(k)

    def other(q, k, v, precision=None):
        return jax.ffi.ffi_call("kernel_of_no_cpu", jax.ShapeDtypeStruct(q.shape, q.dtype))(q, k, v)

    chosen = export._by_platform({"cpu": cpu, "cuda": other, "tpu": other})
    x = jnp.ones((1, 2, 1, 4))
    np.testing.assert_allclose(jax.jit(chosen)(x, 2 * x, x), cpu(x, 2 * x, x), rtol=1e-6)
    unstable = [jax.export.DisabledSafetyCheck.custom_call("kernel_of_no_cpu")]
    for platform in export.PLATFORMS:
        lowered = jax.export.export(
            jax.jit(chosen), platforms=[platform], disabled_checks=unstable
        )(x, x, x)
        assert ("kernel_of_no_cpu" in lowered.mlir_module()) == (platform != "cpu")
    with pytest.raises(Exception, match="kernel_of_no_cpu"):
        jax.jit(other)(x, x, x)
    assert export._by_platform({"cpu": other, "tpu": other}) is other


def test_a_program_runs_on_many_devices(model, run):
    """Lowered for one device, it takes arrays that are spread over four."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    given = jax.device_put(arguments(model), everywhere)
    found = run(*given)["images"]
    assert len(found.sharding.device_set) == 4
    np.testing.assert_allclose(found, run(*arguments(model))["images"], atol=1e-5)


def changed(path, tmp_path, edit):
    new = tmp_path / "changed.bin"
    new.write_bytes(edit(path.read_bytes()))
    return new


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: b"PNG" + data, "is not an exported sampler"),
        (lambda data: b"", "is not an exported sampler"),
        (lambda data: data[:-1], "is damaged, its hash is wrong"),
        (lambda data: data[:300] + b"0" + data[300:], "is damaged"),
        (lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], "is damaged"),
        (lambda data: data.replace(b"program 1", b"program 2", 1), "format 2 is newer than 1"),
    ],
)
def test_a_file_that_is_wrong_or_damaged_is_refused(file, tmp_path, edit, message):
    with pytest.raises(ValueError, match=rf"changed.bin: {message}"):
        export.read(changed(file, tmp_path, edit))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gone.bin: does not exist"):
        export.read(tmp_path / "gone.bin")
    with pytest.raises(ValueError, match="is a folder"):
        export.read(tmp_path)


def test_another_model_and_another_platform_are_refused(model, file):
    scaled = dataclasses.replace(model, latent_scale=0.51)
    config = dataclasses.replace(model.config, size=32)
    for other in (scaled, dataclasses.replace(model, config=config)):
        with pytest.raises(ValueError, match=r"sampler.bin: was exported from another model"):
            export.read(file, model=other)
    with pytest.raises(ValueError, match=r"lowered for cpu, cuda, tpu, not for rocm: export it"):
        export.read(file, platform="rocm")
    with pytest.raises(ValueError, match=r"'metal' is not one of cpu, cuda, tpu"):
        export.portable(model, ("cpu", "metal"))


def calling(name):
    """A program that calls code of a name."""
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((4,), jnp.float32))
    check = jax.export.DisabledSafetyCheck.custom_call(name)
    return jax.export.export(jax.jit(call), disabled_checks=[check])(jnp.ones(4))


@pytest.mark.parametrize("name", ["evil", "xla_ffi_python_cpu_callback", "lapack_ssyevd_ffi"])
def test_a_program_that_calls_other_code_is_refused(tmp_path, program, name):
    """Before, the first one ended the process with SIGSEGV."""
    path = tmp_path / "evil.bin"
    export.write(path, program._replace(exported={"cpu": calling(name)}), {})
    with pytest.raises(ValueError, match=rf"evil.bin: the program for cpu calls {name}, code that"):
        export.read(path, platform="cpu")


def test_a_function_that_calls_other_code_is_not_lowered():
    def run(x):
        return jnp.linalg.eigvalsh(x)

    with pytest.raises(ValueError, match=r"the program for cpu calls lapack_ssyevd_ffi, code that"):
        export.lower(run, (jnp.eye(2),), ("cpu",))


@pytest.mark.parametrize("platform", export.PLATFORMS)
def test_calls_of_our_own_programs_are_known(platform):
    """Beside these, cuDNN's kernels, which cannot be lowered without a CUDA device."""
    q = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    attend = attention.choose(platform, None, export._attention_name(platform))

    def run(x, key):
        y = attend(x, x, x) + jax.random.normal(jax.random.wrap_key_data(key), x.shape, x.dtype)
        return jax.lax.erf(y) + jnp.quantile(y.astype(jnp.float32), 0.9)

    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    lowered = jax.export.export(jax.jit(run), platforms=[platform])(q, key)
    assert ("tpu_custom_call" in lowered.mlir_module()) == (platform == "tpu")
    export.check_calls(lowered, platform)
    for name in export.CUSTOM_CALLS[platform]:
        export.check_calls(calling(name), platform)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(64 * 2**20), "its program is cut off, or of more than"),
        (b"from the future", "was written by jax .* export it again"),
    ],
    ids=["unpacks to too much", "of an unknown version of jax"],
)
def test_programs_that_cannot_be_read_are_refused(tmp_path, program, content, message):
    path = tmp_path / "bad.bin"
    bad = types.SimpleNamespace(serialize=lambda: content)
    export.write(path, program._replace(exported={"cpu": bad}), {})
    assert path.stat().st_size < 2**17
    with pytest.raises(ValueError, match=rf"bad.bin: {message}"):
        export.read(path)


@pytest.mark.parametrize(
    "facts",
    [
        b"[]",
        b"{}",
        b"{",
        b"[" * 10**5,
        b'{"bytes": [-1], "platforms": ["cpu"], "arguments": [], "inputs": [], "jax": "1"}',
        b'{"bytes": [0], "platforms": [["cpu"]], "arguments": [], "inputs": [], "jax": "1"}',
        b'{"bytes": [0], "platforms": [], "arguments": [], "inputs": [], "jax": "1"}',
        b'{"bytes": [0], "platforms": ["cpu"], "arguments": 3, "inputs": [1], "jax": "1"}',
    ],
)
def test_a_file_that_says_something_else_of_itself_is_refused(tmp_path, facts):
    body = facts + b"\n"
    digest = hashlib.sha256(body).hexdigest().encode()
    (tmp_path / "a.bin").write_bytes(b"ldm_jax program 1\n" + digest + b"\n" + body)
    with pytest.raises(ValueError, match=r"a.bin: "):
        export.read(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0], {"context": a[1]["context"][:, :2]}, *a[2:]),
         r"takes batch/context float32 \[2, 3, 32\], and was given batch/context .*\[2, 2, 32\]"),
        (lambda a: (*a[:2], jax.random.key_data(a[2]), *a[3:]), r"takes keys key<fry> \[2\]"),
        (lambda a: (*a[:5], 0.5), r"takes start int32 \[\], and was given start float32"),
        (lambda a: a[:5], "takes arguments params, batch, keys, scale, eta, start, and .* 5"),
        (lambda a: ({**a[0], "zzz": np.ones(2)}, *a[1:]), "takes no params/zzz, and was given"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(model, file, change, message):
    run, _ = export.read(file)
    with pytest.raises(ValueError, match=message):
        run(*change(arguments(model)))


def test_inputs_that_were_renamed_are_found_in_old_programs(tmp_path):
    """They come in another order too: a dict's keys are sorted."""

    def old(params, batch):
        return params * batch["hole"] - batch["init"]

    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    program = export.lower(old, (shape, {"hole": shape, "init": shape}), ("cpu",))
    export.write(tmp_path / "old.bin", program, {})
    run, _ = export.read(tmp_path / "old.bin")
    batch = {"init": jnp.array([1.0, 2.0]), "init_mask": jnp.array([3.0, 5.0])}
    np.testing.assert_array_equal(run(jnp.array([2.0, 2.0]), batch), [5.0, 8.0])
