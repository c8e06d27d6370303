"""Sources: what a document is in each format, canonical order, held-out splits, and what is said about bad input."""

import gzip
import json
import os
import sysconfig
import tokenize
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minllm.data.sources import JSONL, TFDS, Document, Mixture, Parquet, PythonStdlib, Split, Text, survey, unit


def texts(source):
    return [document.text for document in source.documents()]


def write(folder: Path, **files: str | bytes) -> str:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


def test_python_stdlib_is_the_installed_library():
    source = PythonStdlib()
    found = {document.id: document.text for document in source.documents()}
    assert list(found) == sorted(found) and {"argparse.py", "json/decoder.py", "email/parser.py"} <= set(found)
    unwanted = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    assert not [id for id in found if unwanted & set(id.split("/")) or "_sysconfigdata" in id]
    root = sysconfig.get_path("stdlib")
    for id in list(found)[::50]:
        with tokenize.open(f"{root}/{id}") as file:  # the standard library's own way to open a source file
            assert file.read() == found[id].replace("\r\n", "\n")
    assert 5e6 < survey(source).bytes < 20e6
    assert len(PythonStdlib(tests=True).files()) > len(source.files())


def test_text_documents(tmp_path):
    folder = write(tmp_path, b_txt="one\ntwo\n\n\nthree\r\n", a_txt="\n\n  indented\nmore\n \nlast", sub__c_md="c")
    assert texts(Text(globs=(f"{folder}/*.txt",))) == ["\n\n  indented\nmore\n \nlast", "one\ntwo\n\n\nthree\r\n"]
    assert texts(Text(globs=(f"{folder}/*.txt",), document="paragraph")) == ["  indented\nmore", "last", "one\ntwo", "three"]
    assert texts(Text(globs=(f"{folder}/*.txt",), document="line")) == ["  indented", "more", " ", "last", "one", "two", "three"]
    source = Text(globs=(f"{folder}/**/*.md", f"{folder}/*.txt"))
    assert [d.id for d in source.documents()] == ["a.txt", "b.txt", "sub/c.md"]


def test_ids_do_not_depend_on_the_place(tmp_path, monkeypatch):
    for name in ("here", "there"):
        write(tmp_path / name, a_txt="x\ny\n", sub__b_txt="z")
    ids = [[d.id for d in Text(globs=(f"{tmp_path}/{n}/**/*.txt",), document="line").documents()] for n in ("here", "there")]
    monkeypatch.chdir(tmp_path / "here")
    ids.append([d.id for d in Text(globs=("**/*.txt",), document="line").documents()])
    assert ids == [["a.txt#0", "a.txt#1", "sub/b.txt#0"]] * 3


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_jsonl(tmp_path, name):
    lines = "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in ("one\n", "\u00e9\U0001f600", "")).encode() + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    source = JSONL(globs=(f"{tmp_path}/*",))
    assert list(source.documents()) == [Document(f"{name}#{i}", text) for i, text in enumerate(("one\n", "\u00e9\U0001f600", ""))]


def test_parquet(tmp_path):
    values = [f"document {i} \u00e9" for i in range(700)]
    pq.write_table(pa.table({"body": values, "n": range(700)}), tmp_path / "x.parquet", row_group_size=300)
    source = Parquet(globs=(f"{tmp_path}/*.parquet",), column="body")
    assert texts(source) == values and [d.id for d in source.documents()][699] == "x.parquet#699"
    with pytest.raises(ValueError, match=r"no column 'text': .*\['body', 'n'\]"):
        texts(Parquet(globs=source.globs))


def test_tfds_builder_written_here(tmp_path):
    """A builder of our own, written and read without TensorFlow."""
    import sys

    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        __module__ = "tiny"  # TFDS looks for the files of a builder that is part of a package
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(range(30)), "test": self._generate_examples(range(30, 34))}

        def _generate_examples(self, numbers):
            for i in numbers:
                yield i, {"text": f"text {i} \u00e9"}

    builder = Tiny(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    source = TFDS(folder=str(builder.data_path), splits=("test", "train"))
    found = list(source.documents())
    assert sorted(d.text for d in found[:4]) == [f"text {i} \u00e9" for i in range(30, 34)]
    assert sorted(d.text for d in found[4:]) == sorted(f"text {i} \u00e9" for i in range(30))
    assert found[0].id == "tiny/1.0.0/test#0" and found == list(source.documents())
    assert source.fingerprint() == source.fingerprint()
    assert texts(TFDS(name="tiny", data_dir=str(tmp_path), splits=("test", "train"))) == [d.text for d in found]
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match=r"no split 'valid': choose from \['test', 'train'\]"):
        texts(TFDS(folder=source.folder, splits=("valid",)))
    with pytest.raises(ValueError, match=r"no field 'body': choose from \['text'\]"):
        texts(TFDS(folder=source.folder, field="body"))


# ------------------------------------------------------------------------------------------------------------ bad input


def test_invalid_utf8_names_file_and_byte(tmp_path):
    folder = write(tmp_path, a_txt=b"good\n\nba\xffd\n")
    for document in ("file", "paragraph", "line"):
        with pytest.raises(ValueError, match=r"a\.txt: byte 8 \(0xff\) is not valid UTF-8: .*errors: replace"):
            texts(Text(globs=(f"{folder}/a.txt",), document=document))
    assert texts(Text(globs=(f"{folder}/a.txt",), errors="replace")) == ["good\n\nba\ufffdd\n"]
    assert texts(Text(globs=(f"{folder}/a.txt",), errors="surrogateescape"))[0].encode("utf-8", "surrogateescape") == b"good\n\nba\xffd\n"
    pq.write_table(pa.table({"text": pa.array([b"fine", b"b\xff"])}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet, row 1: byte 1 \(0xff\)"):
        texts(Parquet(globs=(f"{folder}/x.parquet",)))
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl: byte 24 \(0xff\)"):
        texts(JSONL(globs=(f"{folder}/x.jsonl",)))


@pytest.mark.parametrize(("line", "message"), [
    ("not json", "is not JSON"),
    ('{"body": "x"}', r"no string under 'text': set the source's field to one of \['body'\]"),
    ('{"text": 3}', "no string under 'text'"),
    ("[1]", "no string under 'text'"),
])  # fmt: skip
def test_bad_json_names_the_object(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        texts(JSONL(globs=(f"{tmp_path}/x.jsonl",)))
    assert "object 2 (byte 17)" in str(error.value)


def test_null_text_is_an_error(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"row 1: 'text' is null"):
        texts(Parquet(globs=(f"{tmp_path}/x.parquet",)))


def test_a_glob_without_a_match_is_named(tmp_path):
    write(tmp_path, a_txt="a")
    with pytest.raises(ValueError, match=r"no file matches '.*\*\.text'"):
        texts(Text(globs=(f"{tmp_path}/*.txt", f"{tmp_path}/*.text")))


def test_an_empty_corpus_is_an_error(tmp_path):
    write(tmp_path, a_txt="", b_txt="")
    with pytest.raises(ValueError, match=r"source 'text' is empty .*: point it at some text"):
        survey(Text(globs=(f"{tmp_path}/*.txt",)))


# ------------------------------------------------------------------------------------------------------- survey, splits


def test_survey_counts_and_hash(tmp_path):
    folder = write(tmp_path, a_txt="a\u00e9", b_txt="bcd")
    found = survey(Text(globs=(f"{folder}/*",)))
    assert (found.documents, found.characters, found.bytes) == (2, 5, 6)
    write(tmp_path, a_txt="a\u00e9b", b_txt="cd")  # the same text, cut elsewhere
    assert survey(Text(globs=(f"{folder}/*",))).hash != found.hash


def test_fingerprint_follows_the_files(tmp_path):
    folder = write(tmp_path, a_txt="a")
    source = Text(globs=(f"{folder}/*",))
    before = source.fingerprint()
    assert source.fingerprint() == before != Text(globs=(f"{folder}/*",), document="line").fingerprint()
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert source.fingerprint() != before


def test_by_document_split_is_a_fraction_and_stable():
    documents = [Document(f"file{i}", "x") for i in range(20_000)]
    held = {d.id for out, d in Split(0.05)(documents, 20_000) if out}
    assert abs(len(held) / 20_000 - 0.05) < 4 * (0.05 * 0.95 / 20_000) ** 0.5
    assert held == {d.id for out, d in Split(0.05)(documents[::-1], 20_000) if out}  # order and neighbours have no say
    assert held <= {d.id for out, d in Split(0.1)(documents, 20_000) if out}
    assert not any(out for out, _ in Split(0.0)(documents, 20_000)) and all(out for out, _ in Split(1.0)(documents, 20_000))
    assert abs(unit("argparse.py") - 0.8) < 1 and unit("argparse.py") == unit("argparse.py")


@given(st.lists(st.text(max_size=8)), st.floats(0.01, 0.99))
def test_tail_split_is_a_cut_through_the_text(texts, fraction):
    whole = "".join(texts)
    parts = list(Split(fraction, tail=True)([Document(str(i), t) for i, t in enumerate(texts)], len(whole)))
    cut = int(len(whole) * (1 - fraction))
    assert "".join(d.text for out, d in parts if not out) == whole[:cut]
    assert "".join(d.text for out, d in parts if out) == whole[cut:]
    assert {d.id for _, d in parts} >= {str(i) for i, t in enumerate(texts) if t}


def test_mixture_shares():
    leaf = Text(globs=("x",))
    assert Mixture(sources=(leaf, leaf), weights=(3, 1)).shares([1, 1]) == (3.0, 1.0)
    assert Mixture(sources=(leaf, leaf)).shares([10, 30]) == (10.0, 30.0)
    assert Mixture(sources=(leaf, leaf), temperature=2).shares([100, 900]) == pytest.approx((0.25, 0.75))
    assert Mixture(sources=(leaf, leaf), weights=(1, 4), temperature=1e9).shares([1, 1]) == pytest.approx((0.5, 0.5))
    for weights in ((1,), (1, 0), (1, -1)):
        with pytest.raises(ValueError, match="needs as many weights, all above zero"):
            Mixture(sources=(leaf, leaf), weights=weights)
