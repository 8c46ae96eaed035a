"""Every kind of source gives the same rows, at random, and says where a bad one is."""

import builtins
import gzip
import json
import pathlib
import re
import subprocess
import sys
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from rljax import data
from rljax.data import sources

ROWS = [{"prompt": f"p{i} 🙂 café", "chosen": f"c{i}\r\n", "rejected": "", "n": i} for i in range(7)]


def jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tiny_pairs(tmp_path) -> pathlib.Path:
    """A TFDS data set written by TFDS itself (make_tfds_fixture.py)."""
    with zipfile.ZipFile(pathlib.Path(__file__).with_name("tiny_pairs.zip")) as file:
        file.extractall(tmp_path)
    return tmp_path / "tiny_pairs" / "1.0.0"


def fails(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet", "list"])
def test_every_source_gives_the_same_rows_in_any_order(tmp_path, name):
    path = tmp_path / name
    match name:
        case "rows.json":
            path.write_text(json.dumps(ROWS))
        case "rows.parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=3)
        case "list":
            path = ROWS
        case _:
            data.write_jsonl(path, ROWS)
    rows = data.read(path)
    assert len(rows) == 7
    assert rows[5] == ROWS[5]
    assert rows[0] == ROWS[0]
    assert rows[-1] == ROWS[-1]
    assert list(rows) == ROWS
    assert list(rows[2:5]) == ROWS[2:5]
    with pytest.raises(IndexError):
        rows[7]


def test_places(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('\n{"a": 1}\r\n   \n{"a": 2}')  # blank lines count, the last line needs no end
    rows = data.read(str(path))
    assert [rows.where(i) for i in range(2)] == ["pairs.jsonl:2", "pairs.jsonl:4"]
    assert rows[1:].where(0) == "pairs.jsonl:4"
    assert list(rows.map(lambda row: {"b": row["a"]})) == [{"b": 1}, {"b": 2}]
    assert "2 rows, from pairs.jsonl:2" in repr(rows)
    assert data.read([{"a": 1}]).where(0) == "rows[0]"
    assert data.read(rows) is rows


def test_byte_order_mark(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert data.read(tmp_path / "x.jsonl")[0] == {"a": 1}


def test_parquet_keeps_few_row_groups(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    monkeypatch.setattr("rljax.data.sources.GROUP_CACHE_BYTES", 1)
    rows = data.read(path)
    assert [rows[i]["n"] for i in (6, 0, 3, 6, 1)] == [6, 0, 3, 6, 1]
    assert rows.where(3) == "x.parquet[3]"


def test_parquet_messages_stored_as_columns_and_rows(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    table = pyarrow.Table.from_pylist([{"messages": turns, "columns": {"role": ["user"], "content": ["a"]}}])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert data.read(tmp_path / "x.parquet")[0] == {"messages": turns, "columns": turns[:1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": 1,}\n', "bad.jsonl:2: not valid JSON at column"),
        ('{"a": 1}\n[1]\n', "bad.jsonl:2: a row must be a JSON object with named fields; this is list [1]"),
        ('{"a": 1}\n\n{"a": "\udcff"}\n', "bad.jsonl:3: not UTF-8 at byte 8 of the line"),
    ],
)
def test_bad_lines(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    rows = data.read(path)
    assert rows[0] == {"a": 1}
    with fails(message):
        rows[1]
    with fails(message):
        data.check(rows, lambda row: None)


def test_bad_files(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "torn.json").write_text('[{"a": 1},\n{"a" 2}]')
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 100)[:-20])
    (tmp_path / "x.parquet").write_text("no")
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "nothing").mkdir()
    for name, message in {
        "empty.jsonl": "empty.jsonl is empty",
        "blank.jsonl": "blank.jsonl is empty",
        "object.json": "object.json: must be a list of objects; this is dict {} (JSON lines are named .jsonl)",
        "torn.json": "torn.json:2: not valid JSON at column 6",
        "torn.jsonl.gz": "torn.jsonl.gz: not a whole gzip file",
        "x.parquet": "x.parquet: not a readable Parquet file",
        "x.csv": "x.csv: unknown kind of file; rljax reads .jsonl",
        "emty.jsonl": "no such file; did you mean empty.jsonl",
        "zzzzzzzzzz": "no such file; the folder",
        "no/where.jsonl": "there is no folder",
        "nothing": "no .jsonl, .jsonl.gz, .json or .parquet file in this folder",
    }.items():
        with fails(message):
            data.read(tmp_path / name)
    with fails("the list of rows is empty"):
        data.read([])
    with fails("rows[1]: a row must be an object with named fields; this is str 'x'"):
        data.read([{}, "x"])[1]
    with fails("for a Hugging Face data set write 'hf:Owner/name'"):
        data.read("Owner/name")
    with fails("is one file and has no split 'test'"):
        data.read(tmp_path / "blank.jsonl", split="test")


def test_folder(tmp_path):
    for name, rows in {"b": ROWS[4:], "a": ROWS[:4]}.items():
        jsonl(tmp_path / f"{name}.jsonl", rows)
    rows = data.read(tmp_path)
    assert list(rows) == ROWS
    assert rows.where(5) == "b.jsonl:2"
    with fails("no file of the split 'test'; there are a.jsonl, b.jsonl"):
        data.read(tmp_path, split="test")


def test_folder_of_splits(tmp_path):
    for part in (0, 1):
        jsonl(tmp_path / f"train-0000{part}-of-00002.jsonl", ROWS[part : part + 1])
    jsonl(tmp_path / "test.jsonl", ROWS[2:3])
    assert list(data.read(tmp_path)) == ROWS[:2]
    assert list(data.read(tmp_path, split="test")) == ROWS[2:3]
    jsonl(tmp_path / "test_sft-00000-of-00001.jsonl", ROWS[:1])  # as the hub's UltraChat names its splits
    assert list(data.read(tmp_path, split="test_sft")) == ROWS[:1]


def test_tfds_records_by_folder_and_by_name(tiny_pairs, monkeypatch):
    rows = data.read(f"tfds:{tiny_pairs}")
    turns = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
    by_prompt = {row["prompt"]: row for row in rows}
    assert sorted(by_prompt) == [f"Q{i}: café 🙂?" for i in range(4)]
    assert by_prompt["Q3: café 🙂?"] == {
        "prompt": "Q3: café 🙂?",
        "chosen": " yes 3",
        "rejected": "",
        "tags": ["a", "b3"],
        "score": 0.75,
        "label": 1,
        "messages": turns,
    }
    assert type(rows[0]["label"]) is int
    assert type(rows[0]["score"]) is float
    assert rows[2] == list(rows)[2]
    assert rows.where(2) == "tfds:1.0.0 train[2]"
    assert data.read(tiny_pairs, split="test")[0]["tags"] == []  # the folder is recognised
    assert len(data.read(f"tfds:{tiny_pairs}", split="train[:50%]")) == 2
    data.check(rows, data.preference_row)
    data.check(rows, data.chat_row)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_pairs.parent.parent))
    assert list(data.read("tfds:tiny_pairs")) == list(rows)
    with fails("Unknown split 'validation'"):
        data.read("tfds:tiny_pairs", split="validation")
    with fails("tfds build nothing_like_it --file_format=array_record"):
        data.read("tfds:nothing_like_it")


def test_tfds_without_tensorflow(tiny_pairs):
    code = (
        f"import sys; from rljax import data; print(len(data.read({str(tiny_pairs)!r})[0]['chosen']))\n"
        "assert not any(name.partition('.')[0] == 'tensorflow' for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "6", done.stderr


def test_hugging_face(monkeypatch):
    class Fake:
        @staticmethod
        def load_dataset(name, config, split):
            if split == "nope":
                raise ValueError("Unknown split")
            return [{"text": f"{name} {config} {split}", "messages": {"role": ["user"], "content": ["a"]}}]

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert data.read("hf:me/things")[0]["text"] == "me/things None train"
    rows = data.read("hf:me/things:small", split="test")
    assert rows[0] == {"text": "me/things small test", "messages": [{"role": "user", "content": "a"}]}
    assert rows.where(0) == "hf:me/things:small test[0]"
    with fails("hf:me/things (split 'nope'): Unknown split"):
        data.read("hf:me/things", split="nope")


def test_hugging_face_without_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with fails('pip install "datasets'):
        data.read("hf:me/things")


@pytest.mark.parametrize("cut", [0, 40])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_file_that_becomes_shorter_is_an_error_that_names_it(tmp_path, name, cut):
    """Mapped into memory it would be a SIGBUS, or a thread that never ends."""
    path = tmp_path / name
    if name == "rows.jsonl":
        jsonl(path)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    rows = data.read(path)
    assert rows[1] == ROWS[1]
    with path.open("r+b") as file:
        file.truncate(cut)
    with fails(f"{path} is not what it was when it was opened"):
        list(rows[4:])


def test_a_file_that_is_appended_to_or_replaced_is_read_as_it_was(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl")
    rows = data.read(path)
    assert rows[0] == ROWS[0]
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "new"}) + "\n")
    assert list(rows) == ROWS
    jsonl(tmp_path / "other.jsonl", ROWS[::-1]).replace(path)
    assert list(rows) == ROWS  # it is still open
    sources._opened.cache_clear()
    with fails("rows.jsonl: "):
        list(rows)
