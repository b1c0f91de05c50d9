"""Files of prompts: text, tables, JSON; what is wrong with a line is said with its number."""

import json

import pytest

from ldm_jax.sample import prompts

DEFAULT = prompts.Prompt("", "blurry", None, 7.5, 4)


def read(folder, name, content):
    """(rows, problems without the folder) of a file."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows, problems = prompts.read(str(path), DEFAULT)
    return rows, [problem.removeprefix(f"{folder}/") for problem in problems]


def test_lines_of_text(tmp_path):
    rows, problems = read(tmp_path, "a.txt", b'\xef\xbb\xbfa disc\r\n\n  "a", ring\n\xff\xfe\n')
    assert rows == [DEFAULT._replace(prompt="a disc"), DEFAULT._replace(prompt='"a", ring')]
    assert problems == ["a.txt:4: is not UTF-8 text"]


def test_a_table(tmp_path):
    table = 'seed, prompt ,num_images\n3,"a disc,\nred",\n, a ring,2\n,,\n\n'
    rows, problems = read(tmp_path, "a.csv", table)
    first = prompts.Prompt("a disc,\nred", "blurry", 3, 7.5, 4)
    assert (rows, problems) == ([first, prompts.Prompt("a ring", "blurry", None, 7.5, 2)], [])


def test_lines_of_json(tmp_path):
    every = prompts.Prompt("a", "b", 2**64 - 1, 1.0, 1)
    lines = [json.dumps(every._asdict()), "", '{"prompt": "größer", "seed": null}']
    rows, problems = read(tmp_path, "a.JSONL", "\n".join(lines))
    assert (rows, problems) == ([every, DEFAULT._replace(prompt="größer")], [])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (",1,1", "has no prompt"),
        ("x,1.5,1", "seed '1.5' is not a whole number"),
        (f"x,{2**64},1", "seed 18446744073709551616 is not in 0..2**64 - 1"),
        ("x,-1,1", "seed -1 is not in 0..2**64 - 1"),
        (f"x,{'7' * 5000},1", "seed '777"),
        ("x,1e999999999,1", "seed '1e999999999' is not a whole number"),
        ("x,nan,1", "seed 'nan' is not a whole number"),
        ("x,1,0", "num_images 0: give at least 1"),
        ("x,1,1,1", "has 4 cells, the header 3"),
        ('x,1,"1"2', "is not CSV ("),
    ],
)
def test_bad_lines_of_a_table(tmp_path, line, problem):
    rows, (found,) = read(tmp_path, "a.csv", f"prompt,seed,num_images\na,,\n{line}\nb,2,\n")
    assert [row.prompt for row in rows] == ["a", "b"]
    assert found.startswith("a.csv:3: ")
    assert problem in found


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "x"', "is not JSON (Expecting ',' delimiter at column 15)"),
        ('["x"]', 'is ["x"], not {"prompt": ...}'),
        ('{"prompt": 3}', "prompt 3 is not text"),
        ('{"prompt": " "}', "has no prompt"),
        ('{"prompt": "x", "steps": 3}', "'steps' is not one of prompt, negative_prompt, seed"),
        ('{"prompt": "x", "seed": true}', "seed True is not a whole number"),
        ('{"prompt": "x", "seed": 0.5}', "seed 0.5 is not a whole number"),
        ('{"prompt": "x", "seed": %s}' % ("7" * 5000), "seed 777"),
        ('{"prompt": "x", "seed": 1e999999999}', "seed 1E+999999999 is not a whole number"),
        ('{"prompt": "x", "seed": -1}', "seed -1 is not in 0..2**64 - 1"),
        ('{"prompt": "x", "guidance_scale": 1e400}', "guidance_scale 1E+400 is not a number"),
        ('{"prompt": "x", "guidance_scale": NaN}', "guidance_scale nan is not a number"),
        ('{"prompt": "x", "num_images": [1]}', "num_images [1] is not a whole number"),
    ],
)
def test_bad_lines_of_json(tmp_path, line, problem):
    rows, (found,) = read(tmp_path, "a.jsonl", '{"prompt": "a"}\n' + line)
    assert [row.prompt for row in rows] == ["a"]
    assert found.startswith("a.jsonl:2: ")
    assert problem in found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "a.txt: holds no prompt"),
        ("a.csv", "text\nx\n", r"a.csv:1: the first line names columns of prompt, .* it is 'text'"),
        ("a.csv", "prompt,prompt\n", "a.csv:1: the first line names columns"),
        ("a.csv", 'prompt\n"x\ny\n', r"a.csv:2: is not CSV \(unexpected end of data\)"),
        ("a.jsonl", "x", r"a.jsonl:1: is not JSON"),
        ("a.json", "[]", r"a.json: give .csv, .jsonl, or text"),
    ],
)
def test_files_without_prompts(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, content)


@pytest.mark.parametrize("seed", [2**53 + 1, 2**63 + 1, 2**64 - 1])
def test_seeds_of_a_table_are_exact(tmp_path, seed):
    """A float of 53 bits has lost the last digits of each."""
    lines = f'{{"prompt": "a", "seed": {seed}}}\n{{"prompt": "a", "seed": {seed}.0}}'
    for name, content in (("a.jsonl", lines), ("a.csv", f"prompt,seed\na,{seed}\na,{seed}.0")):
        rows, problems = read(tmp_path, name, content)
        assert ([row.seed for row in rows], problems) == ([seed, seed], [])
