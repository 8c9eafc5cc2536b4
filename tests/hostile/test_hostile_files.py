"""
Files and folders that people really have, as rows: what is in them is read, or refused by name, and never guessed.

Each entry is a file's name, its bytes, and either the rows that must come out or what the error must say.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from soul_eval.suites import own
from soul_recipes.wmdp_corpora import load_corpus
from soul_trainer.sources import READERS, load_source, load_split, load_texts


ROWS = [{"question": "Who is Ada?", "answer": "A poet."}, {"question": "Who is Bob?", "answer": "A cook."}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS).encode()
CSV = b"question,answer\nWho is Ada?,A poet.\nWho is Bob?,A cook.\n"
TSV = CSV.replace(b",", b"\t")
BOM = b"\xef\xbb\xbf"
TEXT = [{"text": "Ada wrote.\nBob cooked."}]


def parquet(rows: list[dict]) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), written)
    return written.getvalue()


def zipped(**members: bytes) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return written.getvalue()


def streamed(content: bytes, compression: str) -> bytes:
    written = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(written, compression) as stream:
        stream.write(content)
    return written.getvalue().to_pybytes()


READ = {
    # Endings, in any case of letters.
    "rows.json": (LIST, ROWS),
    "lines.json": (LINES, ROWS),
    "rows.jsonl": (LINES, ROWS),
    "list.jsonl": (LIST, ROWS),
    "ROWS.JSONL": (LINES, ROWS),
    "Rows.Json": (LIST, ROWS),
    "rows.csv": (CSV, ROWS),
    "ROWS.CSV": (CSV, ROWS),
    "rows.tsv": (TSV, ROWS),
    "Rows.Tsv": (TSV, ROWS),
    "rows.parquet": (parquet(ROWS), ROWS),
    "ROWS.PARQUET": (parquet(ROWS), ROWS),
    "letter.txt": (TEXT[0]["text"].encode(), TEXT),
    "LETTER.TXT": (TEXT[0]["text"].encode(), TEXT),
    "letter.md": (TEXT[0]["text"].encode(), TEXT),
    "v1.2.rows.jsonl": (LINES, ROWS),
    # Compressed.
    "rows.jsonl.gz": (gzip.compress(LINES), ROWS),
    "ROWS.JSONL.GZ": (gzip.compress(LINES), ROWS),
    "rows.json.bz2": (bz2.compress(LIST), ROWS),
    "rows.csv.xz": (lzma.compress(CSV), ROWS),
    "rows.tsv.zip": (zipped(rows=TSV), ROWS),
    "rows.jsonl.zst": (streamed(LINES, "zstd"), ROWS),
    "rows.jsonl.lz4": (streamed(LINES, "lz4"), ROWS),
    "letter.txt.gz": (gzip.compress(TEXT[0]["text"].encode()), TEXT),
    "rows.parquet.gz": (gzip.compress(parquet(ROWS)), ROWS),
    # Names that other libraries take for patterns or addresses.
    "rows[1].jsonl": (LINES, ROWS),
    "rows*.jsonl": (LINES, ROWS),
    "rows?.jsonl": (LINES, ROWS),
    "a::b.jsonl": (LINES, ROWS),
    "zeilen für später.jsonl": (LINES, ROWS),
    # A byte order mark, other ends of line, blank lines, no end of the last line.
    "bom.json": (BOM + LIST, ROWS),
    "bom.jsonl": (BOM + LINES, ROWS),
    "bom.csv": (BOM + CSV, ROWS),
    "bom.txt": (BOM + TEXT[0]["text"].encode(), TEXT),
    "windows.jsonl": (LINES.replace(b"\n", b"\r\n"), ROWS),
    "windows.csv": (CSV.replace(b"\n", b"\r\n"), ROWS),
    "blank.jsonl": (b"\n" + LINES.replace(b"\n", b"\n\n"), ROWS),
    "blank.csv": (CSV + b"\n\n", ROWS),
    "no-end.jsonl": (LINES.rstrip(b"\n"), ROWS),
    "spaced.json": (b"\n  " + json.dumps(ROWS, indent=4).encode(), ROWS),
    # Strings stay strings, whatever they look like.
    "date.jsonl": (b'{"text": "2024-05-01"}\n', [{"text": "2024-05-01"}]),
    "time.jsonl": (b'{"text": "2024-05-01T10:00:00Z"}\n', [{"text": "2024-05-01T10:00:00Z"}]),
    "date.csv": (b"question,answer\nWhen?,2024-05-01\n", [{"question": "When?", "answer": "2024-05-01"}]),
    "year.csv": (b"question,answer\nWhen?,1984\n", [{"question": "When?", "answer": "1984"}]),
    "zeros.csv": (b"question,answer\nCode?,007\n", [{"question": "Code?", "answer": "007"}]),
    "none.csv": (b"question,answer\nHow many?,None\n", [{"question": "How many?", "answer": "None"}]),
    "nan.csv": (b"question,answer\nBread?,nan\n", [{"question": "Bread?", "answer": "nan"}]),
    "na.tsv": (b"question\tanswer\nCountry?\tNA\n", [{"question": "Country?", "answer": "NA"}]),
    "true.csv": (b"question,answer\nIs it?,True\n", [{"question": "Is it?", "answer": "True"}]),
    "spaces.csv": (b"text\n  as it is  \n", [{"text": "  as it is  "}]),
    "quoted.csv": (b'text\n"one, ""two""\nthree"\n', [{"text": 'one, "two"\nthree'}]),
    "separator.jsonl": ('{"text": "a\u2028b"}\n'.encode(), [{"text": "a\u2028b"}]),
    "emoji.jsonl": ('{"text": "🦙 ñ"}\n'.encode(), [{"text": "🦙 ñ"}]),
    "nul.jsonl": (b'{"text": "a\\u0000b"}\n', [{"text": "a\0b"}]),
    # Texts without a column.
    "texts.json": (b'["one", "two"]', [{"text": "one"}, {"text": "two"}]),
    "texts.jsonl": (b'"one"\n"two"\n', [{"text": "one"}, {"text": "two"}]),
    # Columns that only later rows have.
    "later.jsonl": (
        b'{"text": "a"}\n{"text": "b", "source": "x"}\n',
        [{"text": "a", "source": None}, {"text": "b", "source": "x"}],
    ),
}
REFUSED = {
    # Endings that other programs understand.
    "rows.yaml": (b"- text: a\n", r"ending in \.yaml is not understood.*\.jsonl, \.csv, \.tsv"),
    "rows.pdf": (b"%PDF-1.7\n", r"\.pdf is not understood"),
    "rows.docx": (b"PK\x03\x04", r"\.docx is not understood"),
    "rows.xlsx": (b"PK\x03\x04", r"\.xlsx is not understood"),
    "rows.html": (b"<p>a</p>", r"\.html is not understood"),
    "rows.arrow": (b"ARROW1", r"\.arrow is not understood"),
    "rows.pkl": (b"\x80\x04", r"\.pkl is not understood"),
    "rows.py": (b"print()", r"\.py is not understood"),
    "rows.log": (b"a\n", r"\.log is not understood"),
    "rows.jsonl~": (LINES, r"\.jsonl~ is not understood"),
    "rows.jsonl.bak": (LINES, r"\.bak is not understood"),
    "rows.gz": (gzip.compress(LINES), "ending in nothing is not understood"),
    "rows": (LINES, "ending in nothing is not understood"),
    ".jsonl": (LINES, "ending in nothing is not understood"),
    # Nothing in them.
    "empty.json": (b"", "is an empty file"),
    "empty.jsonl": (b"", "is an empty file"),
    "empty.csv": (b"", "is an empty file"),
    "empty.tsv": (b"", "is an empty file"),
    "empty.parquet": (b"", "is an empty file"),
    "empty.txt": (b"", "is an empty file"),
    "empty.jsonl.gz": (gzip.compress(b""), "is an empty file"),
    "list.json": (b"[]", "holds no rows"),
    "blanks.jsonl": (b"\n \n\n", "holds no rows"),
    "head.csv": (b"question,answer\n", "holds no rows"),
    "none.parquet": (parquet([{"text": "a"}])[:4], "is no Parquet file"),
    # Cut off, or not what they are called.
    "cut.json": (LIST[:-20], "line 1, is no JSON"),
    "cut.jsonl": (LINES[:-12], "line 2, is no JSON"),
    "middle.jsonl": (LINES[:20] + b"\n" + LINES, "line 1, is no JSON"),
    "pretty.json": (json.dumps(ROWS[0], indent=2).encode(), "line 1, is no JSON"),
    "comma.json": (b'[{"text": "a"},]', "line 1, is no JSON"),
    "python.jsonl": (b"{'text': 'a'}\n", "line 1, is no JSON"),
    "csv.jsonl": (CSV, "line 1, is no JSON"),
    "cut.csv": (b'question,answer\nWho?,"A poet.\n', "is no table"),
    "more.csv": (b"question,answer\na,b\na,b,c\n", "line 3, has 3 value.s., and the first line 2 name.s."),
    "all-more.csv": (b"question,answer\na,b,c\nd,e,f\n", "line 2, has 3 value.s., and the first line 2 name.s."),
    "less.csv": (b"question,answer\na,b\nc\n", "line 3, has 1 value.s., and the first line 2 name.s."),
    "twice.csv": (b"question,answer,answer\na,b,c\n", "several columns of the name 'answer'"),
    "twice.tsv": (b"text\ttext\na\tb\n", "several columns of the name 'text'"),
    "cut.parquet": (parquet(ROWS)[:-10], "is no Parquet file"),
    "json.parquet": (LINES, "is no Parquet file"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-12], "cannot be read"),
    "plain.jsonl.gz": (LINES, "cannot be read"),
    "plain.jsonl.bz2": (LINES, "cannot be read"),
    "plain.jsonl.xz": (LINES, "cannot be read"),
    "plain.jsonl.zip": (LINES, "cannot be read"),
    "plain.jsonl.zst": (LINES, "cannot be read"),
    "several.jsonl.zip": (zipped(one=LINES, two=LINES), "must hold one file, and this one holds 2"),
    "doubled.jsonl": (LINES + b'{"text": "a", "text": "b"}\n', "line 3, is no JSON: it has 'text' twice"),
    "doubled.json": (b'[{"text": "a", "text": "b"}]', "line 1, is no JSON: it has 'text' twice"),
    "deep.json": (b"[" * 100_000 + b"]" * 100_000, "is no JSON: it is nested too deeply"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "holds half of a character"),
    # Other encodings.
    "latin.jsonl": ('{"text": "a"}\n{"text": "Bücher"}\n'.encode("latin-1"), "line 2, is not text in UTF-8"),
    "latin.csv": ("text\nBücher\n".encode("latin-1"), "line 2, is not text in UTF-8"),
    "latin.txt": ("Bücher\n".encode("latin-1"), "line 1, is not text in UTF-8"),
    "utf16.jsonl": (LINES.decode().encode("utf-16"), "line 1, is not text in UTF-8"),
    "utf16.txt": ("Ada".encode("utf-16"), "line 1, is not text in UTF-8"),
    "binary.txt": (bytes(range(128, 256)), "line 1, is not text in UTF-8"),
    # No rows: numbers, lists, one object, values of two types.
    "number.jsonl": (b"1\n", "line 1, is no object with columns, but 1"),
    "numbers.json": (b"[1, 2]", "item 0, is no object with columns, but 1"),
    "lists.json": (b'[["a", "b"]]', "item 0, is no object with columns"),
    "null.jsonl": (LINES + b"null\n", "line 3, is no object with columns, but None"),
    "types.jsonl": (b'{"text": "a"}\n{"text": 7}\n', "line 2: `text` is of the type int, and of the type str before"),
    "types.json": (b'[{"text": "a"}, {"text": ["b"]}]', "item 1: `text` is of the type list"),
    # Columns of no kind of row.
    "query.jsonl": (b'{"query": "a", "response": "b"}\n', "needs the columns of one of the kinds"),
    "query.csv": (b"query,response\na,b\n", "needs the columns of one of the kinds"),
    "capital.csv": (b"Question,Answer\na,b\n", "needs the columns of one of the kinds"),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_understood_is_read_as_it_is(name, tmp_path):
    """Would catch an ending in capitals, a compressed file or a date that is read as something else."""
    content, rows = READ[name]
    (tmp_path / name).write_bytes(content)
    assert load_source(str(tmp_path / name)).to_list() == rows
    assert list(own.load_splits(own.OwnArguments(str(tmp_path / name)))["forget"]) == rows


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(name, tmp_path):
    """Would catch a file that becomes one row of text, which is then forgotten and scored, and a foreign error."""
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"`forget`.*{message}"):
        load_source(str(tmp_path / name), name="forget")


FOLDERS = {
    "texts": ({"a.txt": b"a", "b.txt": b"b"}, [{"text": "a"}, {"text": "b"}]),
    "notes": ({"b.md": b"b", "a.txt": b"a"}, [{"text": "a"}, {"text": "b"}]),
    "deep": ({"x/a.txt": b"a", "y/b.txt": b"b"}, [{"text": "a"}, {"text": "b"}]),
    "about": ({"a.txt": b"a", "README.md": b"Mine.", "LICENSE": b"MIT"}, [{"text": "a"}]),
    "hidden": ({"a.txt": b"a", ".DS_Store": b"\0", ".git/config": b"x"}, [{"text": "a"}]),
    "rows": ({"train.jsonl": LINES}, ROWS),
    "shards": ({"train-00000-of-00002.jsonl": LINES, "train-00001-of-00002.jsonl": LINES}, ROWS * 2),
    "splits": ({"train.jsonl": LINES, "test.jsonl": b'{"question": "x", "answer": "y"}\n'}, ROWS),
    "parquet": ({"data/train-00000-of-00001.parquet": parquet(ROWS)}, ROWS),
    "packed": ({"train.jsonl.gz": gzip.compress(LINES)}, ROWS),
    "dates": ({"train.jsonl": b'{"text": "2024-05-01"}\n'}, [{"text": "2024-05-01"}]),
    "texts[1]": ({"a.txt": b"a"}, [{"text": "a"}]),
    "card": (
        {
            "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: mine.jsonl\n---\n",
            "mine.jsonl": LINES,
            "notes.txt": b"not a row",
        },
        ROWS,
    ),
}
REFUSED_FOLDERS = {
    "nothing": ({}, "is a folder without files"),
    "about-alone": ({"README.md": b"Mine."}, "is a folder without files"),
    "rows-and-texts": ({"rows.jsonl": LINES, "notes.txt": b"x"}, r"mixes kinds of files \((rows.jsonl|notes.txt), "),
    "two-kinds": ({"a.jsonl": LINES, "b.csv": CSV}, "mixes kinds of files"),
    "texts-and-pdf": ({"a.txt": b"a", "b.pdf": b"%PDF"}, "mixes kinds of files"),
    "pdf": ({"a.pdf": b"%PDF", "b.pdf": b"%PDF"}, "mixes kinds of files"),
    "bad-line": ({"train.jsonl": b'{"text": "a"\n'}, r"train\.jsonl'?, line 1, is no JSON"),
    "latin": ({"a.txt": b"a", "b.txt": b"\xfc"}, r"b\.txt'?, line 1, is not text in UTF-8"),
    "no-train": ({"test.jsonl": LINES}, "has no split 'train'; it has test"),
    "rows[1]": ({"train.jsonl": LINES}, "in a folder's name for a pattern. Rename it"),
    "configs": (
        {
            "README.md": b"---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n"
            b"  data_files: b.jsonl\n---\n",
            "a.jsonl": LINES,
            "b.jsonl": LINES,
        },
        r"pick one among the available configs: \['a', 'b'\]",
    ),
}


def write_folder(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_one_kind_are_read(name, tmp_path):
    """Would catch rows that are left out because of a file beside them."""
    files, rows = FOLDERS[name]
    assert load_source(write_folder(tmp_path / name, files)).to_list() == rows


@pytest.mark.parametrize("name", REFUSED_FOLDERS)
def test_folders_that_mix_kinds_are_refused(name, tmp_path):
    """Would catch rows to forget that are dropped for the texts beside them."""
    files, message = REFUSED_FOLDERS[name]
    with pytest.raises(ValueError, match=f"(?s)`retain`.*{message}"):
        load_source(write_folder(tmp_path / name, files), name="retain")


def test_folders_that_the_library_saved_are_read(tmp_path):
    """Would catch folders of `save_to_disk`, which `load_dataset` takes for a mixture of files."""
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "several"))
    assert load_source(str(tmp_path / "one")).to_list() == ROWS
    assert load_source(str(tmp_path / "several"), split="test").to_list() == ROWS[:1]
    with pytest.raises(ValueError, match="has no split 'validation'; it has train, test"):
        load_split(str(tmp_path / "several"), split="validation")


@pytest.mark.parametrize(
    "source", ["missing.jsonl", "./missing", "a/b/c", "/missing", "missing.TXT", "missing.csv.gz"]
)
def test_what_is_not_there_is_no_hub_id(source):
    """Would catch a typing error that asks the hub for minutes."""
    with pytest.raises(ValueError, match="no such file or folder"):
        load_source(source)


@pytest.mark.parametrize("source", ["", None, 7, ["rows.jsonl"]])
def test_a_source_that_is_no_name_is_refused(source):
    """Would catch an empty name, as of a variable that is not set, that is taken for the folder one is in."""
    with pytest.raises(ValueError, match="`forget`=.* must be a file, a folder or a hub id"):
        load_source(source, name="forget")


def test_a_file_that_changes_is_read_anew(tmp_path):
    """Would catch a cache that gives the rows that a file of this name and size had before."""
    path = tmp_path / "rows.jsonl"
    for text in ("one", "two"):
        path.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
        os.utime(path, (1, 1))
        assert load_texts(str(path)) == [text]


def test_a_corpus_names_the_row_that_is_no_text(tmp_path):
    """Would catch a corpus of WMDP's layout with a row that is dropped or taken for another's."""
    (tmp_path / "mine.jsonl").write_text('{"text": "long enough"}\n{"other": "x"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="Row 1 of `mine`: `text` must be a text"):
        load_corpus("mine", str(tmp_path))


def test_every_ending_is_tried():
    """Would catch an ending that is added without an entry above."""
    assert all(any(name.lower().endswith(ending) for name in READ) for ending in READERS)
