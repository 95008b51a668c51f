"""All file types give the same rows, and bad ones are named with file and line."""

import json
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.records import read

ROWS = [
    {"question": "2+2", "answer": 4, "meta": {"level": "easy", "tags": ["a", "b"]}},
    {"question": "é∑😀", "answer": 10, "meta": {"level": "hard", "tags": ["c"]}},
]
datasets.disable_progress_bars()


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def error_of(path, split="train") -> str:
    with pytest.raises(UserError) as error:
        read(path, split)
    return str(error.value)


def test_all_file_types_give_the_same_columns(tmp_path):
    jsonl(tmp_path / "rows.jsonl", *ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "parts")
    for name in ("rows.jsonl", "rows.parquet", "saved", "parts"):
        assert [record.columns for record in read(tmp_path / name, "train")] == ROWS
    assert [record.columns for record in read(tmp_path / "parts", "test")] == ROWS[1:]
    assert [r.where for r in read(tmp_path / "rows.jsonl", "")] == [f"{tmp_path}/rows.jsonl:{n}" for n in (1, 2)]
    assert read(tmp_path / "rows.parquet", "")[1].where == f"{tmp_path}/rows.parquet row 2"
    assert read(tmp_path / "saved", "train")[1].where == f"{tmp_path}/saved row 2"
    assert read(tmp_path / "parts", "test")[0].where == f"{tmp_path}/parts/test row 1"


def test_line_ends_and_byte_order_marks(tmp_path):
    """Windows line ends, a byte order mark, blank lines, no line end at the end; a line separator is no line end."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"a": 1}\r\n\r\n  \n{"a": "x\u2028y"}'.encode())
    assert [(r.where, r.columns) for r in read(path, "")] == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": "x\u2028y"})]


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{prompt: 3}", "not JSON: Expecting property name"),
        (b'{"prompt": "\xff"}', "not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "not JSON: "),
        (b"[1, 2]", "got list, want a JSON object"),
        (b"null", "got NoneType, want a JSON object"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 1}\n')
    assert error_of(path).startswith(f"{path}:2: {message}")
    assert len(error_of(path).splitlines()) == 1


def test_an_array_of_objects_is_rows(tmp_path):
    """As written by json.dump, on one line or several, in a .json or .jsonl file."""
    for name, text in (("rows.json", json.dumps(ROWS)), ("rows.jsonl", "\n" + json.dumps(ROWS, indent=2))):
        (tmp_path / name).write_text(text)
        assert [(r.where, r.columns) for r in read(tmp_path / name, "")] == [
            (f"{tmp_path / name} row {n}", row) for n, row in enumerate(ROWS, 1)
        ]
    jsonl(tmp_path / "lines.json", *ROWS)
    assert [record.columns for record in read(tmp_path / "lines.json", "")] == ROWS
    (tmp_path / "rows.json").write_text('[{"a": 1}, 2]')
    assert error_of(tmp_path / "rows.json") == f"{tmp_path}/rows.json row 2: got int, want a JSON object"


WANT = "want one JSON object per line, or one array of objects"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps({"a": 1, "b": [2, 3]}, indent=1).encode(),
            f": got no line that is a JSON object, {WANT}; the first: ",
        ),
        (b"question,answer\n1+1,2\n1+2,3\n" * 4, f": got no line that is a JSON object, {WANT}; the first: "),
        ('{"a": 1}\n{"a": 2}\n'.encode("utf-16"), f": got UTF-16 text, {WANT}"),
        (b"\x1f\x8b\x08" + b"\n" * 9, f": got a gzip file, {WANT}"),
        (b"PAR1" + b"\n" * 9, f": got a parquet file, {WANT}"),
        (b'[{"a": 1},\n{"a": }]', ": not JSON: Expecting value"),
        (b"[" * 100_000, ": not JSON: it is nested too deeply"),
        (b'{"a": ' * 100_000, ":1: not JSON: it is nested too deeply"),
        (b'{"a": 1, "a": 2}', ":1: got the key 'a' twice in one object, want it once"),
        (b'{"a": ' + b"9" * 5000 + b"}", ":1: Exceeds the limit (4300 digits)"),
    ],
    ids=range(10),
)
def test_a_file_of_another_type_gives_one_message(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert error_of(path).startswith(f"{path}{message}") and len(error_of(path).splitlines()) == 1


def test_a_path_that_is_too_long(tmp_path):
    assert error_of(tmp_path / ("x" * 5000 + ".jsonl")).endswith(": cannot be read: File name too long")


def test_the_first_five_bad_lines_are_shown_and_the_rest_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(['{"a": 1}'] + ["{"] * 8))
    lines = error_of(path).splitlines()
    assert [line.split(": ")[0] for line in lines[:5]] == [f"{path}:{n}" for n in range(2, 7)]
    assert lines[5:] == ["... and 3 more"]


def test_paths_without_rows(tmp_path):
    assert error_of(tmp_path / "no.jsonl") == f"{tmp_path}/no.jsonl: cannot be read: No such file or directory"
    assert error_of(tmp_path / "no.csv").startswith(
        f"{tmp_path}/no.csv: got .csv, want a .jsonl, .json or .parquet file, or"
    )
    assert error_of(tmp_path / "no").startswith(f"{tmp_path}/no: got no suffix, want a .jsonl, .json or .parquet file")
    for content in ("", "\n\n"):
        (tmp_path / "empty.jsonl").write_text(content)
        assert error_of(tmp_path / "empty.jsonl") == f"{tmp_path}/empty.jsonl: got no rows, want one or more"


def test_broken_parquet(tmp_path):
    assert error_of(tmp_path / "no.parquet").startswith(f"{tmp_path}/no.parquet: cannot be read: ")
    (tmp_path / "bad.parquet").write_text("not parquet at all")
    assert error_of(tmp_path / "bad.parquet").startswith(f"{tmp_path}/bad.parquet: cannot be read: ")
    assert len(error_of(tmp_path / "bad.parquet").splitlines()) == 1


def test_a_directory_without_a_dataset(tmp_path):
    message = error_of(tmp_path)
    assert message.startswith(f"{tmp_path}: cannot be read as a directory written by datasets.save_to_disk: ")
    assert len(message.splitlines()) == 1


def test_a_missing_split(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path)
    assert error_of(tmp_path, "test") == f"{tmp_path}: got no split 'test', want one of train"


@pytest.mark.parametrize("library, name", [("pyarrow", "rows.parquet"), ("datasets", "saved")])
def test_the_message_of_a_missing_extra_names_it(tmp_path, monkeypatch, library, name):
    (tmp_path / "saved").mkdir()
    for module in (library, f"{library}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    assert error_of(tmp_path / name).endswith(f"needs {library}: pip install 'jaxrl-llm[data]'")
