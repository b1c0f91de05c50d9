"""Pickles that want more than tensors: refused by name, without running anything."""

import copyreg
import subprocess
import sys
import tracemalloc

import pytest
from torch_files import Pickle, legacy, save

from ldm_jax.convert.formats import files, torch_file, unpickle


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
    content = BOMBS[bomb]
    for path in (save(tmp_path / "model.ckpt", content), legacy(tmp_path / "b", content, [])):
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


def test_no_module_is_imported_for_a_name_in_a_pickle(tmp_path):
    """In a fresh process: a name in a file must not even load its module."""
    content = b"(ctorch.nn\nModule\n)\x81cantigravity_not\nThing\nt."
    path = save(tmp_path / "a", content)
    code = "import sys; from ldm_jax.convert.formats import torch_file; " \
        f"torch_file.read({str(path)!r}); assert 'torch' not in sys.modules"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
