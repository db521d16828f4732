"""Files as people have them: each kind is read right, or refused in one sentence that names the place."""

import json
import subprocess

import pytest
from datasets import Dataset

from hf_moecal.files import read_rows
from hf_moecal.table import read_table


ROWS = {"text": ["so, so", "NA", "né"], "label": [1, 0, 2]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n"so, so",1\nNA,0\nné,2\n'),
        ("windows.csv", 'text,label\r\n"so, so",1\r\nNA,0\r\nné,2'),
        ("semicolon.csv", "text;label\nso, so;1\nNA;0\nné;2\n"),
        ("bar.csv", "text|label\nso, so|1\nNA|0\nné|2\n"),
        ("b.tsv", "text\tlabel\nso, so\t1\n\nNA\t0\nné\t2\n"),
        ("marked.csv", '\ufefftext,label\n"so, so",1\nNA,0\nné,2\n'),
        ("c.jsonl", '{"text": "so, so", "label": 1}\n\n{"text": "NA", "label": 0}\n{"text": "né", "label": 2}\n'),
        ("d.json", json.dumps([dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True)])),
        ("E.CSV", 'text,label\n"so, so",1\nNA,0\nné,2\n'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_text_is_read_as_it_stands(tmp_path, name, content, encoding):
    path = tmp_path / name
    path.write_bytes(content.removeprefix("\ufeff" if encoding != "utf-8" else "").encode(encoding))
    assert read_rows(path)[:] == ROWS


def test_parquet_and_folders_of_it(tmp_path):
    Dataset.from_dict(ROWS).to_parquet(str(tmp_path / "1.parquet"))
    Dataset.from_dict(ROWS).to_parquet(str(tmp_path / "2.parquet"))
    assert read_rows(tmp_path / "1.parquet")[:] == ROWS
    assert read_table(tmp_path)["label"][:] == ROWS["label"] * 2


def test_types_are_those_that_all_values_have(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "id,whole,number,truth,name,big,none\n"
        "007,1,1.5,true,NA,18446744073709551616,\n"
        "008,,-2,False,,1,\n"
        '009,-3,NaN,true,"x ",2,\n'
    )
    assert read_rows(path)[:] == {
        "id": ["007", "008", "009"],
        "whole": [1, None, -3],
        "number": [1.5, -2.0, None],
        "truth": [True, False, True],
        "name": ["NA", None, "x "],
        "big": ["18446744073709551616", "1", "2"],
        "none": [None, None, None],
    }


def test_json_keeps_what_some_rows_have(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n{"a": 2.5, "probs": [1, 0]}\n{"b": "x", "probs": [0.5, 0.5]}\n')
    found = read_rows(path)[:]
    assert found == {"a": [1.0, 2.5, None], "probs": [None, [1.0, 0.0], [0.5, 0.5]], "b": [None, None, "x"]}
    path.write_text('{"id": 1}\n{"id": 18446744073709551617}\n')
    assert read_rows(path)["id"][:] == ["1", "18446744073709551617"]


REFUSED = {
    "empty.csv": (b" \n", "is empty"),
    "header.csv": (b"text,label\n", r"has a header \(text, label\) and holds no row"),
    "ragged.csv": (b'text,label\n"a",1\nb,c,2\n', r"line 3 has 3 fields, the first 2 \(separated by ','\)"),
    "quote.csv": (b'text,label\n"a,1\nb,2\n', "line 3: unexpected end of data; check the double quotes"),
    "twice.csv": (b"text,text\na,b\n", "has two columns 'text'"),
    "zero.csv": ("text,label\na,1\n".encode("utf-16-le"), "zero bytes"),
    "broken.jsonl": (b'{"a": 1}\n{"a":\n{"a": 2}\n', "line 2 is not JSON"),
    "list.jsonl": (b'{"a": 1}\n[1]\n', "line 2 holds a list, not an object"),
    "kinds.jsonl": (
        b'{"a": 1}\n{"a": null}\n{"a": "x"}\n',
        r"line 3: column 'a' holds a text here \('x'\) and a number",
    ),
    "none.jsonl": (b"[]\n", "line 1 holds a list"),
    "none.json": (b"[]", "holds no row"),
    "cut.parquet": (b"PAR1", "is not a whole Parquet file"),
    "x.xlsx": (b"PK", "a file ends in .csv, .json, .jsonl, .parquet, .tsv"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_broken_is_said_with_its_place(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def test_a_parquet_file_without_rows(tmp_path):
    Dataset.from_dict(ROWS).select([]).to_parquet(str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match="none.parquet' holds no row"):
        read_table(tmp_path / "none.parquet")


def test_the_remedy_for_another_encoding_works(tmp_path):
    path = tmp_path / "old file.csv"
    path.write_bytes("text,label\nfine,0\ncafé,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="line 3: byte 0xe9 is not utf-8") as error:
        read_rows(path)
    command = str(error.value).partition("text: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert read_rows(tmp_path / "old file.utf8.csv")["text"][:] == ["fine", "café"]


def test_a_missing_file_and_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="No file at 'nowhere.csv'"):
        read_rows("nowhere.csv")
    with pytest.raises(ValueError, match="No .parquet file in the folder"):
        read_rows(tmp_path)
