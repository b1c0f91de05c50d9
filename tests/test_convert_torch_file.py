"""The reader of PyTorch files: against torch.save, and on pickles that want more than tensors."""

import collections
import copyreg
import io
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from ldm_jax.convert import files, tensors, torch_file, unpickle

DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    *("bool", "complex64", "complex128", "uint16", "float8_e4m3fn", "float8_e5m2"),
)


def save(path, content: bytes, storages: dict[str, bytes] | None = None, **more: bytes):
    """A zip archive as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in {**{f"data/{k}": v for k, v in (storages or {}).items()}, **more}.items():
            archive.writestr(f"archive/{name}", data)
    return path


def legacy(path, content: bytes, keys: list, data: bytes = b""):
    """A file as torch before 1.6 lays it out."""
    begin = b"".join(pickle.dumps(x, 2) for x in (torch_file.LEGACY_MAGIC, 1001, {}))
    path.write_bytes(begin + content + pickle.dumps(keys, 2) + data)
    return path


class Pickle:
    """Opcodes in a row: what a hostile writer has."""

    def __init__(self, protocol: int = 2):
        self.out = bytearray(b"\x80" + bytes([protocol]))

    def add(self, *parts) -> "Pickle":
        for part in parts:
            if isinstance(part, bytes):
                self.out += part
            elif isinstance(part, str):
                text = part.encode()
                self.out += b"X" + struct.pack("<I", len(text)) + text
            else:
                self.out += b"\x8a\x08" + struct.pack("<q", part)
        return self

    def tensor(self, shape, stride, offset=0, numel=4, key="0", kind="FloatStorage") -> "Pickle":
        self.add(b"ctorch._utils\n_rebuild_tensor_v2\n((", "storage", f"ctorch\n{kind}\n".encode())
        self.add(key, "cpu", numel, b"tQ", offset, b"(", *shape, b"t(", *stride, b"t\x89N")
        return self.add(b"tR")

    def done(self) -> bytes:
        return bytes(self.out + b".")


NUMBERS = np.arange(4, dtype=np.float32)


def one_tensor(path, *args, data: bytes = NUMBERS.tobytes(), **kwargs):
    return torch_file.read(save(path, Pickle().tensor(*args, **kwargs).done(), {"0": data}))


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


# --- hostile pickles ------------------------------------------------------------------------------


def opcodes_that_call(function: str) -> dict[str, bytes]:
    """Every way to call os.system-like `module name` in a pickle."""
    module, name = function.split()
    by_name = f"c{module}\n{name}\n".encode()
    by_stack = Pickle().add(module, name).out[2:] + b"\x93"
    arg = Pickle().add("touch /tmp/x").out[2:]
    return {
        "REDUCE": b"\x80\x02" + by_name + b"(" + arg + b"tR.",
        "REDUCE, protocol 0": by_name + b"(V" + b"touch /tmp/x\ntR.",
        "REDUCE, protocol 4": b"\x80\x04" + by_stack + arg + b"\x85R.",
        "INST": b"(" + arg + f"i{module}\n{name}\n.".encode(),
        "OBJ": b"(" + by_name + arg + b"o.",
        "NEWOBJ": b"\x80\x02" + by_name + arg + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + by_stack + arg + b"\x85}\x92.",
        "in a dict": b"\x80\x02}" + arg + by_name + arg + b"\x85Rs.",
        "popped": b"\x80\x02" + by_name + arg + b"\x85R0N.",
        "memoized": b"\x80\x02" + by_name + b"q\x000h\x00" + arg + b"\x85R.",
    }


FUNCTIONS = (
    *("os system", "posix system", "nt system", "builtins eval", "__builtin__ exec"),
    *("builtins getattr", "subprocess Popen", "subprocess check_output", "runpy run_path"),
    *("importlib import_module", "shutil rmtree", "functools reduce", "pty spawn"),
    *("torch load", "torch.hub load", "torch.storage _load_from_bytes", "numpy load"),
    *("numpy.testing._private.utils runstring", "torch._utils _rebuild_sparse_tensor"),
    *("ldm_jax.cli run", "collections OrderedDict.fromkeys", "typing get_type_hints"),
)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_calls_are_refused_by_name(tmp_path, function):
    full = function.replace(" ", ".")
    for content in opcodes_that_call(function).values():
        with pytest.raises(ValueError, match=r"a: it (calls|asks for) " + full):
            torch_file.read(save(tmp_path / "a", content))
        legacy(tmp_path / "b", content, [])
        with pytest.raises(ValueError, match=r"b: it (calls|asks for) " + full):
            torch_file.read(tmp_path / "b")


def test_a_method_had_by_getattr_is_refused_when_called(tmp_path):
    """getattr itself only names, as members of enumerations need it."""
    attribute = b"cbuiltins\ngetattr\n(cnot.here\nKind\nX\x03\0\0\0runtR"
    read = torch_file.read(save(tmp_path / "a", b"\x80\x02" + attribute + b"."))
    assert read.name == "not.here.Kind.run"
    for call in (b")R.", b")\x81."):
        with pytest.raises(ValueError, match=r"a: it calls not\.here\.Kind\.run"):
            torch_file.read(save(tmp_path / "a", b"\x80\x02" + attribute + call))


def test_a_function_that_is_not_called_is_harmless(tmp_path):
    read = torch_file.read(save(tmp_path / "a", b"\x80\x02ctorch.nn.functional\ngelu\n."))
    assert read.name == "torch.nn.functional.gelu"


class Reduced:
    """Leaves a file when it is unpickled, as all of these: a function is called."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


class Built:
    """By its state."""

    def __init__(self, path: str):
        self.path = path

    def __setstate__(self, state: dict):
        open(state["path"], "w").close()


class Constructed:
    """By `__new__`, with arguments in order."""

    def __new__(cls, path: str):
        open(path, "w").close()
        made = super().__new__(cls)
        made.path = path
        return made

    def __getnewargs__(self):
        return (self.path,)


class Named(Constructed):
    """By `__new__`, with arguments by name."""

    def __getnewargs_ex__(self):
        return (), {"path": self.path}


@pytest.mark.parametrize(
    ("kind", "protocol"),
    [(kind, n) for kind in (Reduced, Built) for n in range(6)]
    + [(kind, n) for kind in (Constructed, Named) for n in range(2, 6)],
)
def test_what_runs_under_pickle_does_not_run_here(tmp_path, kind, protocol):
    """Pickled by Python itself, which shows that the attack works."""
    trace = tmp_path / "trace"
    content = pickle.dumps(kind(str(trace)), protocol)
    trace.unlink(missing_ok=True)
    pickle.loads(content)
    assert trace.exists()
    trace.unlink()
    for path in (save(tmp_path / "a", content), legacy(tmp_path / "b", content, [])):
        if kind is Reduced:
            with pytest.raises(ValueError, match=f"{path}: it asks for (_?io|__builtin__).open"):
                torch_file.read(path)
        else:
            assert type(torch_file.read(path)) is unpickle.Opaque
        assert not trace.exists()


@pytest.mark.parametrize("opcode", [b"\x82\x07", b"\x83\x07\0", b"\x84\x07\0\0\0"])
def test_extensions_of_the_running_program_are_not_looked_up(tmp_path, opcode):
    """EXT1, EXT2 and EXT4 name what a program has registered with copyreg."""
    copyreg.add_extension("os", "system", 7)
    try:
        with pytest.raises(ValueError, match=r"a: pickle opcode EXT\d is not supported"):
            torch_file.read(save(tmp_path / "a", b"\x80\x02" + opcode + b"(" + b"K\x01tR."))
    finally:
        copyreg.remove_extension("os", "system", 7)


def test_a_name_that_stands_twice_is_refused(tmp_path):
    """Python takes the last silently: what is looked at and what is loaded could differ."""
    twice = Pickle().add(b"}(", "w", 1, "w", 2, b"u").done()
    one_by_one = Pickle().add(b"}", "w", 1, b"s", "w", 2, b"s").done()
    ordered = Pickle().add(b"ccollections\nOrderedDict\n](](", "w", 1, b"e](", "w", 2)
    ordered.add(b"ee\x85R")
    for content in (twice, one_by_one, ordered.done()):
        with pytest.raises(ValueError, match="a: 'w' stands there twice"):
            torch_file.read(save(tmp_path / "a", content))


def test_a_class_that_is_not_known_runs_nothing(tmp_path):
    """`__setstate__`, `__new__` and `__init__` of importable classes too."""
    state = b"}X\x01\x00\x00\x00aK\x01s"
    for cls in (b"torch.nn Module", b"flax.linen Dense", b"pathlib PosixPath", b"not.here Thing"):
        name = b"c" + cls.replace(b" ", b"\n") + b"\n"
        for content in (name + b")R" + state + b"b.", name + b")\x81" + state + b"b."):
            read = torch_file.read(save(tmp_path / "a", content))
            assert type(read) is unpickle.Opaque
            assert read.name == cls.decode().replace(" ", ".")


BOMBS = {
    "nested tuples as a key": b"\x80\x02" + b")" + b"2\x86" * 60 + b"}q\x000h\x00\x85.",
    "steps": b"\x80\x02" + b"]" * 20_001 + b".",
    "memo index": b"\x80\x02Nr\xff\xff\xff\x7f0K\x01K\x02.",
    "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "LONG4, negative": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "BINUNICODE": b"\x80\x02X\xff\xff\xff\xff.",
    "BINUNICODE8": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
    "BINBYTES8": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "BYTEARRAY8": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "copies": b"\x80\x02" + b"](" + b"K\x01" * 500 + b"eq\x000"
    + b"cbuiltins\nset\nh\x00\x85R0" * 100 + b"N.",
    "BINBYTES": b"\x80\x03B\xff\xff\xff\xff.",
    "large number as a key": b"\x80\x02}\x8b\x00\x00\x10\x00" + b"\x7f" * 2**20 + b"Ns.",
    "wide tuple as a key": b"\x80\x02}(" + b"K\x01" * 17 + b"tNs.",
    "key of its own tuple": b"\x80\x02}" + b")" + b"\x85" * 40 + b"Ns.",
    "extension": b"\x80\x02\x82\x01.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "persistent id as text": b"Pos.system\n.",
    "persistent id of a list": b"\x80\x02]Q.",
    "unknown opcode": b"\x80\x02\xfe.",
    "underflow": b"\x80\x02000.",
    "no mark": b"\x80\x02t.",
    "no STOP": b"\x80\x02N",
    "two results": b"\x80\x02NN.",
    "nothing": b"",
    "unhashable key": b"\x80\x02}]Ns.",
    "odd items": b"\x80\x02}(NNNu.",
    "append to a dict": b"\x80\x02}Na.",
    "items of a list": b"\x80\x02]NNs.",
    "call of a number": b"\x80\x02K\x01)R.",
    "call with no tuple": b"\x80\x02ccollections\nOrderedDict\n]R.",
    "state of nothing": b"\x80\x02}b.",
    "missing memo": b"\x80\x02h\x05.",
    "name of no class": b"\x80\x02cos; import sys\nx y\n.",
    "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_and_damage_are_refused(tmp_path, monkeypatch, bomb):
    monkeypatch.setattr(unpickle, "MAX_STEPS", 20_000)
    for path in (
        save(tmp_path / "model.ckpt", BOMBS[bomb]),
        legacy(tmp_path / "b", BOMBS[bomb], []),
    ):
        tracemalloc.start()
        with pytest.raises(ValueError, match=str(path)):
            torch_file.read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 * 2**20


def test_deep_nesting_is_no_recursion(tmp_path):
    read = torch_file.read(save(tmp_path / "a", b"\x80\x02N" + b"\x85" * 200_000 + b"."))
    depth = 0
    while read is not None:
        (read,), depth = read, depth + 1
    assert depth == 200_000


def test_itself_as_its_state_dict(tmp_path):
    content = Pickle().add(b"}q\x00", "state_dict", b"h\x00s").done()
    with pytest.raises(ValueError, match="no state dict"):
        files.open_state_dict(save(tmp_path / "a", content))


# --- the archive ----------------------------------------------------------------------------------


def good(path) -> bytes:
    one_tensor(path, (4,), (1,))
    return path.read_bytes()


def test_every_truncation_is_refused(tmp_path):
    whole = good(tmp_path / "a")
    for length in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a: "):
            torch_file.read(tmp_path / "a")


def test_zip64_as_large_files_have_it(tmp_path):
    path = tmp_path / "a"
    content = Pickle().tensor((4,), (1,)).done()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", content), ("data/0", NUMBERS.tobytes())):
            with archive.open(f"archive/{name}", "w", force_zip64=True) as entry:
                entry.write(data)
    assert np.array_equal(torch_file.read(path), NUMBERS)
    data = path.read_bytes()  # the directory's own sizes as 64 bits too
    at = data.rindex(b"PK\5\6")
    _, _, _, here, count, size, start, _ = struct.unpack_from("<4s4H2IH", data, at)
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, here, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(data[:at] + end64 + locator + end)
    assert np.array_equal(torch_file.read(path), NUMBERS)
    path.write_bytes(data[:at] + end64 + end)
    with pytest.raises(ValueError, match="a: a zip64 archive without its locator"):
        torch_file.read(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_does_not_write(tmp_path):
    content = Pickle().tensor((4,), (1,)).done()
    path = tmp_path / "a"

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match="a: .*" + match):
            torch_file.read(path)

    with zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("archive/data.pkl", content)
    refused("stands twice")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", content * 100)
    refused("with compression")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.ckpt", content * 100)
    refused(r"unpack it .* it holds model\.ckpt")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "text")
    refused("0 data.pkl")
    save(path, content, {}, **{"constants.pkl": b"", "code/x.py": b""})
    refused("TorchScript")
    save(path, content, {})
    refused("storage '0' is missing")
    save(path, content, {"0": NUMBERS.tobytes()}, byteorder=b"middle")
    refused("byte order 'middle'")
    path.write_bytes(b"x" * 257 + b"ustar" + b"x" * 500)
    refused("tar archive")
    path.write_bytes(pickle.dumps({"w": 1}))
    refused("torch.save did not write")


@pytest.mark.parametrize("field", [16, 20, 24, 42])  # CRC, sizes, place of the directory's entry
def test_a_directory_that_lies(tmp_path, field):
    path = tmp_path / "a"
    whole = good(path)
    for entry in (whole.index(b"PK\1\2"), whole.rindex(b"PK\1\2")):
        for value in (0, 1, 7, 10**6, 2**32 - 2, 2**32 - 1):
            data = bytearray(whole)
            struct.pack_into("<I", data, entry + field, value)
            path.write_bytes(data)
            if data == whole or (field, value) == (16, 0):  # the truth, or no checksum
                assert np.array_equal(torch_file.read(path), NUMBERS)
            else:
                with pytest.raises(ValueError, match="a: "):
                    np.asarray(torch_file.read(path))


def test_a_directory_that_swaps_two_storages(tmp_path):
    content = Pickle().add(b"(").tensor((4,), (1,)).tensor((4,), (1,), key="1").add(b"t").done()
    path = save(tmp_path / "a", content, dict.fromkeys("01", NUMBERS.tobytes()))
    data = bytearray(path.read_bytes())
    ends = [data.rindex(f"archive/data/{key}".encode()) - 46 + 42 for key in "01"]
    first, second = (bytes(data[at : at + 4]) for at in ends)
    data[ends[0] : ends[0] + 4], data[ends[1] : ends[1] + 4] = second, first
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"a: entry 'archive/data/0' .* is not where the directory"
    ):
        torch_file.read(path)


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


def test_no_module_is_imported_for_a_name_in_a_pickle(tmp_path):
    """In a fresh process: a name in a file must not even load its module."""
    content = b"(ctorch.nn\nModule\n)\x81cantigravity_not\nThing\nt."
    path = save(tmp_path / "a", content)
    code = "import sys; from ldm_jax.convert import torch_file; " \
        f"torch_file.read({str(path)!r}); assert 'torch' not in sys.modules"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_from_memory_is_not_promised():
    with pytest.raises(TypeError):
        torch_file.read(io.BytesIO(b""))
