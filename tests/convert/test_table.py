"""Layouts and entries: both directions, by value and by shape, and every misfit in one error."""

import jax
import ml_dtypes
import numpy as np
import pytest
from reference import draw

from ldm_jax.convert import table

SIZES = (("n", 2), ("s", 3))
QKV = table.Layout("(n s d) i 1", "s i (n d)", SIZES)
ENTRIES = [
    table.Entry("a.weight", ("a/kernel",), table.CONV),
    table.Entry("b.qkv.weight", ("b/to_q", "b/to_k", "b/to_v"), QKV),
    table.Entry("c.bias", ("c/bias",), table.VECTOR),
]


def tensors():
    return {"a.weight": draw(6, 5, 3, 2), "b.qkv.weight": draw(12, 7, 1), "c.bias": draw(4)}


def shapes():
    shape = {"a": {"kernel": (3, 2, 5, 6)}, "c": {"bias": (4,)}}
    shape["b"] = dict.fromkeys(("to_q", "to_k", "to_v"), (7, 4))
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, np.float32), shape, is_leaf=lambda s: isinstance(s, tuple)
    )


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("a.weight", np.nan, np.float32),
        ("b.qkv.weight", -np.inf, np.float32),
        ("c.bias", 1e5, np.float16),
        ("a.weight", np.inf, ml_dtypes.bfloat16),
    ],
)
def test_a_tensor_that_is_not_finite_is_named(name, value, dtype):
    """Also one that overflows in the type asked for."""
    given = tensors()
    given[name].flat[1] = value
    with pytest.raises(
        ValueError, match=rf"unet\.bin: {name} is not finite: 1 of .*{dtype.__name__}"
    ):
        table.from_torch(ENTRIES, given, shapes(), dtype=dtype, where="unet.bin")


def test_a_tensor_that_overflows_when_written_is_named():
    given = tensors()
    given["c.bias"][2] = 1e5
    params = table.from_torch(ENTRIES, given, shapes())
    with pytest.raises(ValueError, match=r"c\.bias is not finite: 1 of its 4 .* float16"):
        table.to_torch(ENTRIES, params, dtype=np.float16)


def test_there_and_back():
    params = table.from_torch(ENTRIES, tensors(), shapes())
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes())
    back = table.to_torch(ENTRIES, params)
    assert back.keys() == tensors().keys()
    for name, x in tensors().items():
        np.testing.assert_array_equal(back[name], x)


def test_there_and_back_by_shape():
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tensors())
    params = table.from_torch(ENTRIES, structs, shapes())
    assert params == shapes()
    assert table.to_torch(ENTRIES, params) == structs


@pytest.mark.parametrize(
    ("layout", "shape", "index", "same_as"),
    [
        (table.CONV, (6, 5, 3, 2), (5, 4, 2, 1), (2, 1, 4, 5)),
        (table.DENSE, (6, 5), (5, 4), (4, 5)),
        (table.DENSE_AS_CONV1D, (6, 5, 1), (5, 4, 0), (4, 5)),
        (table.DENSE_AS_CONV2D, (6, 5, 1, 1), (5, 4, 0, 0), (4, 5)),
        (table.EMBEDDING, (6, 5), (5, 4), (5, 4)),
    ],
)
def test_layouts_move_axes(layout, shape, index, same_as):
    x = draw(*shape)
    assert layout.to_ours(x)[same_as] == x[index]
    np.testing.assert_array_equal(layout.to_torch(layout.to_ours(x)), x)


def test_each_head_keeps_its_own_query_key_and_value():
    # two heads of width 2: output channels are q0 q0 k0 k0 v0 v0 q1 q1 k1 k1 v1 v1
    params = table.from_torch(ENTRIES, tensors(), shapes())
    theirs = tensors()["b.qkv.weight"][:, :, 0]
    for part, rows in (("to_q", [0, 1, 6, 7]), ("to_k", [2, 3, 8, 9]), ("to_v", [4, 5, 10, 11])):
        np.testing.assert_array_equal(params["b"][part], theirs[rows].T)


def test_parameters_are_float32_whatever_the_file_holds():
    half = {name: x.astype(np.float16) for name, x in tensors().items()}
    params = table.from_torch(ENTRIES, half, shapes())
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), half)
    assert table.from_torch(ENTRIES, structs, shapes()) == shapes()


def test_one_error_lists_every_misfit():
    bad = tensors()
    del bad["c.bias"]
    bad["surprise"] = draw(1)
    bad["a.weight"] = draw(6, 5, 3, 3)
    with pytest.raises(ValueError, match="checkpoint does not fit") as error:
        table.from_torch(ENTRIES, bad, shapes())
    message = str(error.value)
    assert "missing c.bias" in message
    assert "unknown surprise" in message
    assert "a.weight is (6, 5, 3, 3), not (6, 5, 3, 2)" in message
    assert "b.qkv" not in message


def test_a_long_list_of_misfits_is_cut():
    with pytest.raises(ValueError, match=r"unknown x19, and 17 more$"):
        table.from_torch([], {f"x{i}": draw(1) for i in range(37)}, {})


def test_parameters_that_do_not_fit_are_listed():
    params = table.from_torch(ENTRIES, tensors(), shapes())
    params["d"] = {"kernel": draw(1)}
    del params["b"]["to_k"]
    with pytest.raises(ValueError, match="missing b/to_k; unknown d/kernel"):
        table.to_torch(ENTRIES, params)


class Lazy:
    """Says what it is, and tells when it is read."""

    def __init__(self, x, name, events):
        self.shape, self.dtype = x.shape, x.dtype
        self._x, self._name, self._events = x, name, events

    def __array__(self, dtype=None, copy=None):
        self._events.append(f"read {self._name}")
        return self._x


def test_lazy_tensors_are_read_one_at_a_time_and_placed():
    events = []
    lazy = {name: Lazy(x, name, events) for name, x in tensors().items()}

    def place(path, x):
        assert type(x) is np.ndarray
        events.append(f"place {path}")
        return x + 1

    params = table.from_torch(ENTRIES, lazy, shapes(), place=place)
    assert events == [
        "read a.weight",
        "place a/kernel",
        "read b.qkv.weight",
        *("place b/to_q", "place b/to_k", "place b/to_v"),
        "read c.bias",
        "place c/bias",
    ]
    np.testing.assert_array_equal(params["c"]["bias"], tensors()["c.bias"] + 1)


def test_nothing_is_read_where_something_does_not_fit():
    events = []
    lazy = {name: Lazy(x, name, events) for name, x in tensors().items()}
    with pytest.raises(ValueError, match=r"^model\.ckpt does not fit the config: unknown d$"):
        table.from_torch(ENTRIES, lazy | {"d": draw(1)}, shapes(), where="model.ckpt")
    assert events == []


def test_parameters_of_another_type():
    params = table.from_torch(ENTRIES, tensors(), shapes(), dtype=ml_dtypes.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    back = table.to_torch(ENTRIES, params, dtype=np.float32)
    rounded = tensors()["a.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(back["a.weight"], rounded)
    assert back["a.weight"].dtype == np.float32
    assert table.to_torch(ENTRIES, params)["c.bias"].dtype == ml_dtypes.bfloat16


def test_tensors_that_are_made_when_asked_for():
    params = table.from_torch(ENTRIES, tensors(), shapes())
    lazy = table.to_torch(ENTRIES, params, dtype=np.float16, lazy=True)
    for name, x in table.to_torch(ENTRIES, params, dtype=np.float16).items():
        assert type(lazy[name]) is table.Pending
        assert (lazy[name].shape, lazy[name].dtype) == (x.shape, np.float16)
        np.testing.assert_array_equal(np.asarray(lazy[name]), x)


def test_entries_that_overlap_are_refused():
    twice = [*ENTRIES, table.Entry("e.bias", ("c/bias",), table.VECTOR)]
    with pytest.raises(ValueError, match="c/bias stands 2 times"):
        table.from_torch(twice, tensors(), shapes())


def test_parts_of_a_model_get_their_prefixes():
    rows = table.prefixed(ENTRIES[1:], "part.", "ours/")
    assert [row.torch for row in rows] == ["part.b.qkv.weight", "part.c.bias"]
    assert rows[0].ours == ("ours/b/to_q", "ours/b/to_k", "ours/b/to_v")
