"""The reader of PyTorch files: against torch.save, and on files made by hand."""

import collections
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
from torch_files import NUMBERS, Pickle, legacy, one_tensor, save

from ldm_jax.convert.formats import files, tensors, torch_file, unpickle

DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    *("bool", "complex64", "complex128", "uint16", "float8_e4m3fn", "float8_e5m2"),
)

# --- what torch writes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def same(ours, theirs) -> None:
    """Bit for bit, also of dtypes that NumPy lacks."""
    ours = np.asarray(ours)
    assert tuple(ours.shape) == tuple(theirs.shape)
    assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
    data = bytes(theirs.contiguous().reshape(-1).view(__import__("torch").uint8).tolist())
    assert ours.tobytes() == data


@pytest.mark.torch
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_every_dtype_and_view_is_torch_s(torch, tmp_path, new):
    base = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0)) * 100
    saved = {name: base.to(getattr(torch, name)) for name in DTYPES}
    if not new:
        del saved["uint16"]  # its storage is untyped: a separate case in torch too
    saved |= {
        "transposed": base.permute(2, 0, 1),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "part": base[1:4, ::2, 3:],
        "shares": base[2],
        "scalar": torch.tensor(0.18215),
        "empty": torch.zeros(0, 3),
        "empty part": base[5:, 1:],
        "parameter": torch.nn.Parameter(base[0]),
        "one": torch.randn(1, 4, 1).transpose(0, 2),
    }
    path = tmp_path / "a.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=new)
    read = torch_file.read(path)
    assert list(read) == list(saved)
    for name, tensor in saved.items():
        assert isinstance(read[name], tensors.LazyTensor)
        same(read[name], tensor.detach())
    assert read["one"].strides is None  # axes of one have strides that mean nothing


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_plain_containers_of_every_protocol(torch, tmp_path, protocol, new):
    plain = {
        "list": [1, -5, 2**40, 2**70, 0.5, True, None, "é", b"raw"],
        "tuple": (1, (2, 3, 4), ()),
        "set": {1, 2},
        "frozen": frozenset({"a"}),
        "ordered": collections.OrderedDict(a=1, b=[2]),
        "default": collections.defaultdict(list, {3: [4]}),
        "long": ["x" * 300, list(range(2000))],
        "size": torch.zeros(2, 3).shape,
    }
    path = tmp_path / "a.pt"
    torch.save(plain, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    read = torch_file.read(path)
    if protocol == 2:  # where bytes are a call of _codecs.encode, which is not made
        assert type(read["list"].pop()) is unpickle.Opaque
        plain["list"].pop()
    assert read == plain


@pytest.mark.torch
def test_a_state_dict_of_a_module(torch, tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    read, info = files.open_state_dict(tmp_path / "a.pt")
    assert info == files.Info("torch", {}, ())
    for name, tensor in module.state_dict().items():
        same(read[name], tensor)


@pytest.mark.torch
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_lightning_checkpoint(torch, tmp_path, new):
    """With a callback by its class, an optimizer, NumPy scalars and hyper-parameters."""
    callback = type("ModelCheckpoint", (), {"__module__": "lightning_that_is_not_here"})
    module = type(sys)("lightning_that_is_not_here")
    module.ModelCheckpoint = callback
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "global_step": 100,
        "callbacks": {callback: {"best_model_score": np.float64(0.5), "object": callback()}},
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"rng": np.arange(3), "type": int, "dtype": torch.float16},
        "state_dict": {"w": layer.weight, "scale_factor": torch.tensor(0.25)},
    }
    sys.modules["lightning_that_is_not_here"] = module
    try:
        torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=new)
    finally:
        del sys.modules["lightning_that_is_not_here"]
    read, info = files.open_state_dict(tmp_path / "a.ckpt")
    assert list(read) == ["w", "scale_factor"]
    same(read["w"], layer.weight.detach())
    assert float(np.asarray(read["scale_factor"])) == 0.25
    assert info.left == tuple(name for name in content if name != "state_dict")
    whole = torch_file.read(tmp_path / "a.ckpt")
    assert (whole["epoch"], whole["global_step"]) == (3, 100)
    (key,) = whole["callbacks"]
    assert key.name == "lightning_that_is_not_here.ModelCheckpoint"
    moments = whole["optimizer_states"][0]["state"][0]["exp_avg"]
    same(moments, optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.torch
def test_without_checksums(torch, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(3.0)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert np.array_equal(torch_file.read(tmp_path / "a.pt")["w"], [0, 1, 2])


@pytest.mark.torch
def test_a_module_saved_whole_is_refused_with_its_name(torch, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: no state dict.*torch.nn.modules.linear.Linear"):
        files.open_state_dict(tmp_path / "a.pt")


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["sparse", "conjugate", "expanded"])
def test_tensors_that_are_not_plain_are_refused(torch, tmp_path, kind):
    made = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
        "expanded": lambda: torch.ones(1).expand(1000),
    }[kind]()
    torch.save({"w": made}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: "):
        torch_file.read(tmp_path / "a.pt")


# --- files made by hand ---------------------------------------------------------------------------


def test_big_endian(tmp_path):
    content = Pickle().add(b"(").tensor((4,), (1,))
    content.tensor((2,), (1,), numel=2, key="1", kind="BFloat16Storage")
    content.tensor((1,), (1,), numel=1, key="2", kind="ComplexFloatStorage").add(b"t")
    storages = {
        "0": NUMBERS.astype(">f4").tobytes(),
        "1": np.array([1, -2], ml_dtypes.bfloat16).view(np.uint16).astype(">u2").tobytes(),
        "2": np.array([1 + 2j], ">c8").tobytes(),
    }
    read = torch_file.read(save(tmp_path / "a", content.done(), storages, byteorder=b"big"))
    assert [np.asarray(x).tolist() for x in read] == [[0, 1, 2, 3], [1, -2], [1 + 2j]]
    assert np.asarray(read[0]).dtype == np.float32  # native


def test_a_tensor_is_read_each_time_and_cast_if_asked(tmp_path):
    lazy = one_tensor(tmp_path / "a", (2, 2), (1, 2))
    assert (lazy.shape, lazy.dtype, lazy.ndim, lazy.size, lazy.nbytes) == ((2, 2), "f4", 2, 4, 16)
    assert np.array_equal(lazy, [[0, 2], [1, 3]])
    assert np.asarray(lazy, np.float16).dtype == np.float16
    assert np.asarray(lazy) is not np.asarray(lazy)


def test_a_file_that_changed_is_not_read(tmp_path):
    lazy = one_tensor(tmp_path / "a", (4,), (1,))
    one_tensor(tmp_path / "a", (4,), (1,), data=(NUMBERS + 1).tobytes())
    with pytest.raises(ValueError, match=r"a: the file changed"):
        np.asarray(lazy)


def test_damaged_data_are_noticed(tmp_path):
    path = tmp_path / "a"
    one_tensor(path, (4,), (1,))
    data = bytearray(path.read_bytes())
    data[data.index(NUMBERS.tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a: the data of a tensor of shape \(4,\) are damaged"):
        np.asarray(torch_file.read(path))


def test_storages_of_a_legacy_file(tmp_path):
    """Older torch saved views of storages; sizes and keys are said twice, and must agree."""
    content = Pickle().add(b"(").tensor((4,), (1,))
    content.add(b"ctorch._utils\n_rebuild_tensor\n((", "storage", b"ctorch\nFloatStorage\n", "0")
    content.add("cpu", 4, b"(", "view", 1, 2, b"ttQ", 0, b"(", 2, b"t(", 1, b"ttRt")
    data = struct.pack("<q", 4) + NUMBERS.tobytes()
    read = torch_file.read(legacy(tmp_path / "a", content.done(), ["0"], data))
    assert [np.asarray(x).tolist() for x in read] == [[0, 1, 2, 3], [1, 2]]
    wrong = ((["0"], b"\3" + data[1:]), (["1"], data), ([], data), (["0"], data[:-1]), (0, data))
    for keys, data in wrong:
        with pytest.raises(ValueError, match="a: "):
            torch_file.read(legacy(tmp_path / "a", content.done(), keys, data))
    outside = bytes(content.out).replace(
        struct.pack("<q", 2) + b"ttQ", struct.pack("<q", 9) + b"ttQ"
    )
    with pytest.raises(ValueError, match="a: a view beyond storage '0'"):
        torch_file.read(legacy(tmp_path / "a", outside + b".", ["0"], data))


@pytest.mark.parametrize(
    ("shape", "stride", "more"),
    [
        ((5,), (1,), {}),  # longer than the storage
        ((4,), (1,), {"offset": 1}),
        ((2, 2), (3, 1), {}),  # strides beyond it
        ((4,), (1,), {"offset": -1}),
        ((4,), (-1,), {}),
        ((-4,), (1,), {}),
        ((2**40, 2**40), (1, 1), {}),
        ((2**62, 0), (1, 1), {}),
        ((10**6,), (0,), {}),  # of 4 MB, from one number
        ((4,), (1, 1), {}),
        ((1,) * 100, (1,) * 100, {}),
        ((5,), (1,), {"numel": 5}),  # a storage longer than its record
        ((1,), (1,), {"numel": 2**60}),
        ((1,), (1,), {"numel": -1}),
        ((4,), (1,), {"key": "../0"}),
        ((4,), (1,), {"kind": "QInt8Storage"}),
        ((4,), (1,), {"kind": "load"}),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, shape, stride, more):
    with pytest.raises(ValueError, match=r"model\.ckpt: "):
        one_tensor(tmp_path / "model.ckpt", shape, stride, **more)


def test_which_dict_is_the_state_dict(tmp_path):
    """`state_dict` before all, else the only dict of tensors; two others are no guess of ours."""

    def saved(*names: str) -> str:
        content = Pickle().add(b"}", "epoch", 3, b"s")
        for name in names:
            content.add(name, b"}", "w").tensor((4,), (1,)).add(b"ss")
        return save(tmp_path / "a", content.done(), {"0": NUMBERS.tobytes()})

    for names in (("state_dict",), ("state_dict", "ema"), ("ema", "state_dict"), ("model",)):
        found, info = files.open_state_dict(saved(*names))
        assert list(found) == ["w"]
        chosen = "state_dict" if "state_dict" in names else "model"
        assert set(info.left) == {"epoch", *names} - {chosen}
    with pytest.raises(
        ValueError, match=r"a: no state dict .* a dict of epoch, params, params_ema"
    ):
        files.open_state_dict(saved("params", "params_ema"))


def test_what_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        torch_file.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "gone")
    with pytest.raises(ValueError, match="no regular file"):
        torch_file.read("/dev/zero")
