"""LoRA as functions on trees of parameters, and the grammar of its files, without a reference.

Expected updates are written in torch's layout, [out, in, h, w], from the definitions.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import recipes
from flax import traverse_util

from ldm_jax.adapters import lora
from ldm_jax.convert.formats import safetensors_file, torch_writer

IN, OUT, CONTEXT, R = 6, 4, 768, 2
BLOCK = "down_blocks_0/attentions_0/transformer_blocks_0"
SHAPES = {
    f"{BLOCK}/attn1/to_q/kernel": (IN, OUT),
    f"{BLOCK}/attn1/to_out_0/kernel": (IN, OUT),
    f"{BLOCK}/attn2/to_k/kernel": (CONTEXT, OUT),
    "down_blocks_0/attentions_0/proj_in/kernel": (1, 1, IN, OUT),
    "down_blocks_0/resnets_0/conv1/kernel": (3, 3, IN, OUT),
    "down_blocks_0/resnets_0/conv1/bias": (OUT,),
    "down_blocks_0/resnets_0/norm1/scale": (IN,),
    "conv_in/kernel": (3, 3, IN, OUT),
}
TEXT = {"text_model/encoder/layers/0/self_attn/q_proj/kernel": (IN, OUT)}
Q, PROJ = f"{BLOCK}/attn1/to_q/kernel", "down_blocks_0/attentions_0/proj_in/kernel"
K, CONV = f"{BLOCK}/attn2/to_k/kernel", "down_blocks_0/resnets_0/conv1/kernel"
TE = next(iter(TEXT))


class Model:
    """As much of a bundle as `lora.read` looks at."""

    def __init__(self, dtype=np.float32):
        rng = np.random.default_rng(0)
        parts = {"unet": SHAPES, "first_stage": {}, "cond_stage": TEXT}
        self.params = {
            part: traverse_util.unflatten_dict(
                {path: jnp.asarray(rng.normal(size=s), dtype) for path, s in shapes.items()},
                sep="/",
            )
            for part, shapes in parts.items()
        }


def kohya(path, part="unet"):
    return {"unet": "lora_unet_", "cond_stage": "lora_te_"}[part] + path.rpartition("/")[0].replace(
        "/", "_"
    )


def draw(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def changes(model, loras):
    """{path: what is added, in torch's layout} of the arrays that change."""
    new = lora.merged(model.params, loras)
    result = {}
    for part in ("unet", "cond_stage"):
        flat = [traverse_util.flatten_dict(tree[part], sep="/") for tree in (new, model.params)]
        for path in flat[0]:
            change = np.asarray(flat[0][path] - flat[1][path])
            if change.any():
                axes = (3, 2, 0, 1) if change.ndim == 4 else range(change.ndim)[::-1]
                result[path] = change.transpose(axes)
    return result


@pytest.fixture
def file_of(tmp_path):
    def write(tensors, metadata=None, name="x.safetensors"):
        safetensors_file.write(tmp_path / name, tensors, metadata)
        return tmp_path / name

    return write


def low_rank(name, out=OUT, fan_in=IN, r=R, window=(), **more):
    named = {
        f"{name}.lora_down.weight": draw(r, fan_in, *window),
        f"{name}.lora_up.weight": draw(out, r, *(1 for _ in window), seed=2),
    }
    return named | {f"{name}.{key}": np.float32(value) for key, value in more.items()}


def product(tensors, name):
    """up times down in float32, [out, in, ...]."""
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    return np.einsum("or,r...->o...", up.reshape(len(up), -1), down)


# --- every kind of update -------------------------------------------------------------------------


def cases():
    a, c = (draw(OUT, R, seed=seed) for seed in (3, 5))
    b, d = (draw(R, IN, seed=seed) for seed in (4, 6))
    q, conv = kohya(Q), kohya(CONV)
    plain = low_rank(q, alpha=1)
    yield "alpha", plain, {Q: product(plain, q) / R}
    yield "no alpha", low_rank(q), {Q: product(plain, q)}
    yield "alpha 0 is the rank", low_rank(q, alpha=0), {Q: product(plain, q)}
    yield "scale wins", low_rank(q, alpha=1, scale=3), {Q: 3 * product(plain, q)}
    window = low_rank(conv, window=(3, 3))
    yield "convolution", window, {CONV: product(window, conv)}
    flat = low_rank(kohya(PROJ))
    yield "dense for 1x1", flat, {PROJ: product(flat, kohya(PROJ))[..., None, None]}
    square = low_rank(q, window=(1, 1))
    yield "1x1 for dense", square, {Q: product(square, q)[..., 0, 0]}

    mid = draw(R, R, 3, 3, seed=7)
    tucker = low_rank(conv, window=(1, 1)) | {f"{conv}.lora_mid.weight": mid}
    up, down = tucker[f"{conv}.lora_up.weight"], tucker[f"{conv}.lora_down.weight"]
    core = np.einsum("op,pqkl,qi->oikl", up[..., 0, 0], mid, down[..., 0, 0])
    yield "Tucker", tucker, {CONV: core}

    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    loha = dict(zip((f"{q}.{name}" for name in names), (a, b, c, d)))
    yield "LoHa", loha | {f"{q}.alpha": np.float32(1)}, {Q: (a @ b) * (c @ d) / R}
    wide = [draw(OUT, R), draw(R, IN * 9, seed=8), draw(OUT, R, seed=9), draw(R, IN * 9, seed=10)]
    loha = dict(zip((f"{conv}.{name}" for name in names), wide))
    both = (wide[0] @ wide[1]) * (wide[2] @ wide[3])
    yield "LoHa of a convolution", loha, {CONV: both.reshape(OUT, IN, 3, 3)}
    turned = [a.T, b, c.T, d]
    cores = [draw(R, R, 3, 3, seed=seed) for seed in (11, 12)]
    loha = dict(zip((f"{conv}.{name}" for name in names), turned))
    loha |= {f"{conv}.hada_t{i + 1}": core for i, core in enumerate(cores)}
    both = [np.einsum("pqkl,po,qi->oikl", t, x, y) for t, x, y in zip(cores, turned[::2], (b, d))]
    yield "LoHa of Tucker", loha, {CONV: both[0] * both[1]}

    one, two = draw(2, 3, seed=13), draw(OUT // 2, IN // 3, seed=14)
    lokr = {f"{q}.lokr_w1": one, f"{q}.lokr_w2": two, f"{q}.alpha": np.float32(9)}
    yield "LoKr, whose alpha has no rank", lokr, {Q: np.kron(one, two)}
    wa, wb = draw(OUT // 2, 1, seed=15), draw(1, IN // 3 * 9, seed=16)
    lokr = {f"{conv}.lokr_w1": one, f"{conv}.lokr_w2_a": wa, f"{conv}.lokr_w2_b": wb}
    lokr |= {f"{conv}.alpha": np.float32(0.5)}
    kron = np.kron(one[..., None, None], (wa @ wb).reshape(OUT // 2, IN // 3, 3, 3))
    yield "LoKr of a convolution", lokr, {CONV: kron / 2}

    yield "diff", {f"{conv}.diff": draw(OUT, IN, 3, 3), f"{conv}.diff_b": draw(OUT)}, {
        CONV: draw(OUT, IN, 3, 3), CONV.replace("kernel", "bias"): draw(OUT),
    }  # fmt: skip
    norm = "down_blocks_0/resnets_0/norm1/scale"
    yield "norm", {f"{kohya(norm)}.w_norm": draw(IN)}, {norm: draw(IN)}
    text = low_rank(kohya(TE, "cond_stage"))
    yield "text", text, {TE: product(text, kohya(TE, "cond_stage"))}


@pytest.mark.parametrize(("tensors", "wanted"), [pytest.param(*c[1:], id=c[0]) for c in cases()])
def test_updates_are_those_of_their_definitions(file_of, tensors, wanted):
    model = Model()
    got = changes(model, [(lora.read(file_of(tensors), model), 1.0)])
    assert got.keys() == wanted.keys()
    for path in got:
        np.testing.assert_allclose(got[path], wanted[path], atol=1e-5, err_msg=path)


@pytest.mark.parametrize("axis", ["out", "in", "peft"])
def test_dora_gives_the_sum_the_norms_of_the_file(file_of, axis):
    model, q = Model(), kohya(Q)
    base = np.asarray(traverse_util.flatten_dict(model.params["unet"], sep="/")[Q]).T
    tensors = low_rank(q, alpha=1)
    whole = base + product(tensors, q) / R
    norms = np.abs(draw(*((1, IN) if axis == "in" else (OUT, 1)), seed=20)) + 1
    tensors[f"{q}.lora_magnitude_vector" if axis == "peft" else f"{q}.dora_scale"] = (
        norms[:, 0] if axis == "peft" else norms
    )
    wanted = whole * norms / np.linalg.norm(whole, axis=0 if axis == "in" else 1, keepdims=True)
    read = lora.read(file_of(tensors), model)
    np.testing.assert_allclose(changes(model, [(read, 1.0)])[Q], wanted - base, atol=1e-5)
    half = changes(model, [(read, 0.5)])[Q]
    np.testing.assert_allclose(half, (wanted - base) / 2, atol=1e-5)


# --- the grammar of names -------------------------------------------------------------------------

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT_0 = MODULE.replace("to_q", "to_out")


@pytest.mark.parametrize(
    ("down", "up", "path"),
    [
        (f"unet.{MODULE}.lora_A.weight", f"unet.{MODULE}.lora_B.weight", Q),
        (f"{MODULE}.lora_A.default.weight", f"{MODULE}.lora_B.default.weight", Q),
        (f"base_model.model.{MODULE}.lora_A.weight", f"base_model.model.{MODULE}.lora_B.weight", Q),
        (f"unet.{MODULE}.lora.down.weight", f"unet.{MODULE}.lora.up.weight", Q),
        (
            f"unet.{MODULE.replace('to_q', 'processor.to_q_lora')}.down.weight",
            f"unet.{MODULE.replace('to_q', 'processor.to_q_lora')}.up.weight",
            Q,
        ),
        (
            f"unet.{MODULE.replace('to_q', 'processor.to_out_lora')}.down.weight",
            f"unet.{MODULE.replace('to_q', 'processor.to_out_lora')}.up.weight",
            Q.replace("to_q", "to_out_0"),
        ),
        (f"unet.{OUT_0}.0.lora_A.weight", f"unet.{OUT_0}.0.lora_B.weight",
         Q.replace("to_q", "to_out_0")),
        (f"{kohya(Q)}.lora_down.weight", f"{kohya(Q)}.lora_up.weight", Q),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
         "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
         TE),
        ("text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight",
         "text_encoder.encoder.layers.0.self_attn.q_proj.lora_B.weight", TE),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight",
         "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight", TE),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
         "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight", TE),
        ("lora_te1_encoder_layers_0_self_attn_q_proj.lora_down.weight",
         "lora_te1_encoder_layers_0_self_attn_q_proj.lora_up.weight", TE),
    ],
)  # fmt: skip
def test_names_of_every_dialect_find_their_module(file_of, down, up, path):
    model, (a, b) = Model(), (draw(R, IN), draw(OUT, R, seed=2))
    got = changes(model, [(lora.read(file_of({down: a, up: b}), model), 1.0)])
    assert list(got) == [path]
    np.testing.assert_allclose(got[path], b @ a, atol=1e-5)


def test_alphas_of_peft_are_taken_from_the_metadata(file_of):
    tensors = {
        f"unet.{name}.lora_{part}.weight": draw(*shape)
        for name in (MODULE, OUT_0 + ".0")
        for part, shape in (("A", (R, IN)), ("B", (OUT, R)))
    }
    settings = '{"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"to_out.0": 1}%s}'
    for more, scales in (("", (3.0, 0.5)), (', "unet.use_rslora": true', (6 / 2**0.5, 2**-0.5))):
        metadata = {"lora_adapter_metadata": settings % more}
        read = lora.read(file_of(tensors, metadata), Model()).unet
        got = read[Q].scale, read[Q.replace("to_q", "to_out_0")].scale
        np.testing.assert_allclose(got, scales, rtol=1e-6)


def test_pickled_files_and_folders(tmp_path):
    model, tensors = Model(), low_rank(kohya(Q))
    torch_writer.write(tmp_path / "pytorch_lora_weights.bin", tensors)
    recipes.assert_same_bits(
        lora.read(tmp_path, model), lora.read(tmp_path / "pytorch_lora_weights.bin", model)
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds 0 files that could be an adapter"):
        lora.read(tmp_path / "empty", model)


# --- merging --------------------------------------------------------------------------------------


def test_several_are_summed_each_with_its_scales_and_order_does_not_matter(file_of):
    model = Model()
    first = lora.read(file_of(low_rank(kohya(Q)) | low_rank(kohya(TE, "cond_stage"))), model)
    second = lora.read(file_of(low_rank(kohya(Q), r=1)), model)
    alone = changes(model, [(first, 1.0)])
    got = changes(model, [(first, (0.5, 2.0)), (second, 3.0)])
    np.testing.assert_allclose(got[TE], 2 * alone[TE], atol=1e-5)
    np.testing.assert_allclose(
        got[Q], 0.5 * alone[Q] + 3 * changes(model, [(second, 1.0)])[Q], atol=1e-5
    )
    given = [(first, (0.5, 2.0)), (second, 3.0)]
    recipes.assert_same_bits(
        lora.merged(model.params, given), lora.merged(model.params, given[::-1])
    )


def test_other_scales_compile_nothing_and_gradients_reach_both_factors():
    params = Model().params
    made = lora.init(params, R, "all", jax.random.key(0), text_encoder=True)
    merge = jax.jit(lora.merged)
    for scale in (1.0, 0.3):
        merge(params, [(made, (scale, scale))])
    assert merge._cache_size() == 1

    def loss(x):
        new = lora.merged(params, [(x, 1.0)])
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(new))

    nudged = jax.tree.map(lambda x: x + 0.1, made)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(jax.grad(loss)(nudged)))


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("attention", ["to_k", "to_out_0", "to_q"]),
        ("transformer", ["proj_in", "to_k", "to_out_0", "to_q"]),
        ("all", ["conv1", "proj_in", "to_k", "to_out_0", "to_q"]),
    ],
)
@pytest.mark.parametrize("initial", ["gaussian", "kaiming"])
def test_a_new_lora_changes_nothing(targets, names, initial):
    params = Model().params
    made = lora.init(
        params, R, targets, jax.random.key(1), text_encoder=True, alpha=4, initial=initial
    )
    recipes.assert_same_bits(lora.merged(params, [(made, 1.0)]), params)
    assert sorted(path.split("/")[-2] for path in made.unet) == names
    assert list(made.cond_stage) == [TE]
    assert {update.scale for update in made.unet.values()} == {4 / R}
    down = np.asarray(made.unet[K].delta.down)
    spread = 1 / R if initial == "gaussian" else (3 * CONTEXT) ** -0.5
    error = spread * (2 * down.size) ** -0.5
    assert abs(down.std() - spread) < 4 * error


def test_small_updates_of_bfloat16_kernels_survive(file_of):
    model = Model(ml_dtypes.bfloat16)
    tensors = {name: x * 0.05 for name, x in low_rank(kohya(Q)).items()}
    new = lora.merged(model.params, [(lora.read(file_of(tensors), model), 1.0)])
    flat, old = (traverse_util.flatten_dict(p["unet"], sep="/") for p in (new, model.params))
    assert flat[Q].dtype == np.float32
    assert flat["conv_in/kernel"] is old["conv_in/kernel"]
    change = np.asarray(flat[Q] - old[Q].astype(np.float32)).T
    np.testing.assert_allclose(change, product(tensors, kohya(Q)), rtol=1e-4, atol=1e-6)


# --- bad input ------------------------------------------------------------------------------------

WRONG_RANK = {f"{kohya(Q)}.lora_down.weight": draw(R, IN), f"{kohya(Q)}.lora_up.weight": draw(4, 3)}
NAN = {name: x * np.nan for name, x in low_rank(kohya(Q)).items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (low_rank(kohya(K), fan_in=1024), r"width 1024 \(Stable Diffusion 2\).*768"),
        (low_rank(kohya(Q), out=5), "to_q: updates a kernel of 5 x 6, here it is 4 x 6"),
        (
            low_rank(kohya(Q)) | {f"{kohya(Q)}.alpha": draw(2)},
            r"to_q: alpha has the shape \(2,\), not one number",
        ),
        (WRONG_RANK, "attn1.to_q: the ranks of its factors differ"),
        ({f"{kohya(Q)}.lora_down.weight": draw(R, IN)}, "but no lora_up"),
        ({f"{kohya(Q)}.hada_w1_a": draw(OUT, R)}, "but no hada_w1_b"),
        ({f"{kohya(Q)}.alpha": np.float32(1)}, "alpha alone is no update"),
        (low_rank(kohya(Q)) | {f"{kohya(Q)}.diff": draw(OUT, IN)}, "several kinds at once"),
        (NAN, "to_q: lora_(down|up) is not finite: "),
        ({"vae.decoder.lora_A.weight": draw(R, IN)}, "of a network that Stable Diffusion"),
        ({f"{kohya(Q)}.oft_blocks": draw(2, 2)}, "oft_blocks is of OFT, which is not read"),
        ({"weight": draw(2)}, "none of its 1 tensors belongs to this model"),
        (
            low_rank(kohya(Q)) | low_rank("lora_unet_x"),
            "2 tensors belong to no module.*lora_unet_x",
        ),
        (
            low_rank(kohya(Q)) | {f"unet.{MODULE}.lora_A.weight": draw(R, IN)},
            "to_q has lora_down twice",
        ),
    ],
)
def test_bad_files_are_refused_by_name(file_of, tensors, message):
    path = file_of(tensors)
    with pytest.raises(ValueError, match=rf"(?s){path}.*{message}"):
        lora.read(path, Model())


def test_unknown_tensors_are_left_out_on_request(file_of, caplog):
    path = file_of(low_rank(kohya(Q)) | low_rank("lora_unet_x"))
    assert list(lora.read(path, Model(), ignore_unknown=True).unet) == [Q]
    assert "2 tensors belong to no module" in caplog.text


def test_words_in_a_lora_file_are_said(file_of, caplog):
    word = {"bundle_emb.my cat.string_to_param.*": draw(2, 768)}
    path = file_of(low_rank(kohya(Q)) | word)
    assert list(lora.read(path, Model()).unet) == [Q]
    assert f'--embedding "{path}=<my_cat>" adds it' in caplog.text


def test_only_low_rank_is_written(file_of, tmp_path):
    model = Model()
    made = lora.read(file_of({f"{kohya(Q)}.diff": draw(OUT, IN)}), model)
    with pytest.raises(ValueError, match="files hold LoRA alone"):
        lora.write(tmp_path / "y.safetensors", made, "kohya")
