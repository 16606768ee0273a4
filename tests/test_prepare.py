"""What is prepared is read back by name: TFDS sets and token files."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bigjax import UsageError
from bigjax.data import sources, text, tokens
from bigjax.tools import prepare as module
from bigjax.tools.prepare import prepare

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 5, 5), dtype=np.uint8)


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Twelve images; TFDS finds it by its name, tiny_pictures."""

    VERSION = tfds.core.Version("1.0.0")
    trouble: Exception | str | None = None  # what happens instead: an exception, or a download from this address

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(shape=(5, 5, 1)), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict:
        if isinstance(self.trouble, str):
            dl_manager.download(self.trouble)
        elif self.trouble:
            raise self.trouble
        return {"train": self._generate_examples(range(8)), "test": self._generate_examples(range(8, 12))}

    def _generate_examples(self, rows: range):
        for row in rows:
            buffer = io.BytesIO()
            Image.fromarray(IMAGES[row]).save(buffer, format="PNG")
            yield row, {"image": io.BytesIO(buffer.getvalue()), "label": row % 3}


def refused(*said: str, name: str, to: Path | str, **how: Any) -> None:
    with pytest.raises(UsageError) as error:
        prepare(name, str(to), **how)
    for part in said:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


# ---- TFDS


def test_a_tfds_set_from_its_builder_to_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = prepare("tiny_pictures", str(tmp_path))
    assert told == f"read it by --data tfds:tiny_pictures, with TFDS_DATA_DIR={tmp_path}"
    assert list(tmp_path.glob("tiny_pictures/1.0.0/*.array_record*"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    data = sources.load("tfds:tiny_pictures")
    images = np.concatenate([data.train["image"], data.test["image"]])[..., 0]
    assert sorted(i.tobytes() for i in images) == sorted(i.tobytes() for i in IMAGES) and data.classes == 3
    refused("has the TFDS set tiny_pictures already", name="tfds:tiny_pictures", to=tmp_path)


def test_tfds_sets_that_cannot_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("TFDS knows no set called 'mnits' (did you mean tfds:mnist?)", name="mnits", to=tmp_path)
    refused("tiny_pictures:9.9.9", "version", name="tiny_pictures:9.9.9", to=tmp_path)
    refused("--tokenizer is for text", name="tiny_pictures", to=tmp_path, tokenizer="bytes")
    missing = ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
    monkeypatch.setattr(TinyPictures, "trouble", missing)
    refused('needs tensorflow: pip install -e ".[prepare]" and run', name="tiny_pictures", to=tmp_path)
    monkeypatch.setattr(TinyPictures, "trouble", ValueError("broken\nindeed"))
    refused("tiny_pictures cannot be built (ValueError: broken)", name="tiny_pictures", to=tmp_path)


def test_an_image_set_without_tensorflow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real: arrays, which stock builders give, are encoded by TensorFlow."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    arrays = lambda self, rows: ((r, {"image": IMAGES[r][..., None], "label": 0}) for r in rows)  # noqa: E731
    monkeypatch.setattr(TinyPictures, "_generate_examples", arrays)
    refused('needs tensorflow: pip install -e ".[prepare]" and run', name="tiny_pictures", to=tmp_path)


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib3.util.Retry.sleep", lambda self, response=None: None)  # ten times, minutes in all
    monkeypatch.setattr(TinyPictures, "trouble", "http://127.0.0.1:9/pictures.zip")
    said = "tiny_pictures cannot be downloaded, for 127.0.0.1 cannot be reached (ConnectionError): run this on"
    refused(said, name="tiny_pictures", to=tmp_path)


# ---- text


LINES = [f"line {n}: ünïcödé, def f(x): return {n}\u2028\n" for n in range(40)]


def test_bytes_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(LINES), encoding="utf-8")
    told = prepare(str(tmp_path / "a.txt"), str(tmp_path / "out"))
    assert told.endswith(f"tokens of 256: read them by --data tokens:{tmp_path / 'out'}")
    data = tokens.load(f"tokens:{tmp_path / 'out'}")
    train, test = "".join(LINES[:36]).encode(), "".join(LINES[36:]).encode()
    assert bytes(data.train[:].astype(np.uint8)) == train and bytes(data.test[:].astype(np.uint8)) == test
    facts = [data.facts[k] for k in ("vocabulary", "before", "tokenizer", "bytes_a_token")]
    assert facts == [256, 10, None, 1.0]
    reader, expected = (
        tokens.Windows(data.test, length=32, before=10),
        text.byte_windows(test, length=32),
    )
    np.testing.assert_array_equal([reader[n]["tokens"] for n in range(len(reader))], expected["tokens"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["test.bin", "tokens.json", "train.bin"]
    about = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert about["dtype"] == "uint16" and about["splits"]["test"] == {"tokens": len(test), "bytes": len(test)}
    refused("out holds a train.bin already", name="python", to=tmp_path / "out")


def test_a_folder_of_texts(tmp_path: Path) -> None:
    """Its files one after the other, in the order of their names; other files are no text of it."""
    for n in (1, 0):
        one(tmp_path / "books", "".join(LINES[20 * n : 20 * n + 20]).rstrip("\n"), f"{n}.txt")
    one(tmp_path / "books", "no text", "notes.md")
    prepare(str(tmp_path / "books"), str(tmp_path / "out"))
    data = tokens.load(f"tokens:{tmp_path / 'out'}")
    assert bytes([*data.train[:], *data.test[:]]).decode() == "".join(LINES)
    (tmp_path / "empty").mkdir()
    said = "empty is neither text nor a TFDS set: give a .txt, a folder of them, a .jsonl, python, or the set's name"
    refused(said, name=str(tmp_path / "empty"), to=tmp_path / "b")


def test_bpe_and_a_given_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 100)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n\n" for line in LINES))
    flags = {"tokenizer": "bpe", "vocabulary": 300, "separator": "<|>"}
    prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "out"), **flags)
    data = tokens.load(f"tokens:{tmp_path / 'out'}")
    coder = text.load_tokenizer(data.facts["tokenizer"])
    assert data.facts["vocabulary"] == coder.get_vocab_size() == 300
    written = "".join(line + "<|>" for line in LINES[36:])
    assert coder.decode(list(data.test[:])) == written and len(data.test) < len(written.encode())
    assert data.facts["bytes_a_token"] == len(written.encode()) / len(data.test)
    assert data.facts["before"] == coder.encode("<|>").ids[-1]
    again = tmp_path / "again"
    prepare(str(tmp_path / "a.jsonl"), str(again), tokenizer=data.facts["tokenizer"], separator="<|>")
    for file in ("train.bin", "test.bin", "tokenizer.json"):
        assert (again / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    refused("has 1 lines of text", name=one(tmp_path, "only\n"), to=tmp_path / "new")


def one(folder: Path, content: str | bytes, name: str = "one.txt") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder / name)


def test_large_vocabularies_take_uint32(tmp_path: Path) -> None:
    import tokenizers

    words = {f"w{n}": n for n in range(70000)}
    coder = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    coder.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    coder.save(str(tmp_path / "tokenizer.json"))
    name = one(tmp_path, "w1 w69999\nw65536\n")
    prepare(name, str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer.json"))
    data = tokens.load(f"tokens:{tmp_path / 'out'}")
    assert list(data.train[:]) == [1, 69999] and list(data.test[:]) == [65536] and data.facts["vocabulary"] == 70000
    refused(
        "the test part of", "has no tokens", name=one(tmp_path, "w1\n\n"), to=tmp_path / "b", tokenizer=str(tmp_path)
    )


def test_the_command_writes_the_python_corpus(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bigjax", "prepare", "python", "--to", str(tmp_path / "python")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "read them by --data tokens:" in done.stdout, done.stderr
    corpus, data = text.python_corpus(), tokens.load(f"tokens:{tmp_path / 'python'}")
    assert bytes(data.test[:].astype(np.uint8)) == corpus.test
    assert data.facts["corpus_sha256"] == corpus.facts["corpus_sha256"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and "holds a train.bin already" in done.stderr


def test_texts_that_cannot_be_prepared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused("no.txt cannot be read (No such file or directory)", name=str(tmp_path / "no.txt"), to=out)
    refused("is not UTF-8 text (byte 1)", name=one(tmp_path, b"a\xff\n"), to=out)
    refused("line 2 is not", "KeyError", name=one(tmp_path, '{"text": "a"}\n{"x": 1}\n', "a.jsonl"), to=out)
    refused("line 1 is not", name=one(tmp_path, '{"text": 5}\n', "a.jsonl"), to=out)
    refused("neither text nor a TFDS set", name=one(tmp_path, "a", "a.parquet"), to=out)
    refused("tokenizer.json", name="python", to=out, tokenizer=str(tmp_path / "no.json"))
    assert not out.exists()
    refused("cannot be written", name=one(tmp_path, "a\nb\n"), to=tmp_path / "one.txt" / "below")


def test_buckets(bucket: str, tmp_path: Path) -> None:
    """Token files there and back; a TFDS set, built here and copied."""
    name = one(tmp_path, "".join(LINES))
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_prepare
from bigjax.data import tokens
from bigjax.tools.prepare import prepare
from etils import epath
prepare({name!r}, "{bucket}/text")
data = tokens.load("tokens:{bucket}/text")
print(bytes([*data.train[:], *data.test[:]]) == open({name!r}, "rb").read())
print(prepare("tiny_pictures", "{bucket}/sets"))
print(*sorted(p.name for p in epath.Path("{bucket}/sets/tiny_pictures/1.0.0").iterdir()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "True" in lines and {"dataset_info.json", "features.json"} < set(lines[-1].split())
    assert f"copy it to each machine (gcloud storage cp -r {bucket}/sets/tiny_pictures DIR) and set" in done.stdout
