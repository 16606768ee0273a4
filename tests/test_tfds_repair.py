"""TFDS sets that are damaged or in TFRecord files: what is said, and that the command which is named repairs them."""

import contextlib
import io
import json
import shlex
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorflow_datasets
from test_user_files import said_by
from tfds_fixture import build_set, png

from bigjax.data import tfds
from bigjax.data.pipeline import batches, eval_batches, size_of
from bigjax.data.sources import load
from bigjax.tools import sets
from bigjax.tools.prepare import prepare

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 5, 5, 1), np.uint8)


class BuiltHere(tensorflow_datasets.core.GeneratorBasedBuilder):
    """Twelve images; TFDS finds its builder by the name built_here."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self) -> Any:
        kinds = tensorflow_datasets.features
        features = {"image": kinds.Image(shape=(5, 5, 1)), "label": kinds.ClassLabel(num_classes=3)}
        return tensorflow_datasets.core.DatasetInfo(builder=self, features=kinds.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict:
        return {"train": self._generate_examples(range(8)), "test": self._generate_examples(range(8, 12))}

    def _generate_examples(self, rows: range) -> Any:
        for row in rows:
            yield row, {"image": png(IMAGES[row]), "label": row % 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    quietly(prepare, "built_here", str(folder))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The set, to be damaged; there is a blank in the path."""
    path = tmp_path / "my sets"
    shutil.copytree(whole, path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(path))
    return path


def quietly(function: Callable, *arguments: Any) -> Any:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # bars of progress
        return function(*arguments)


def check_whole() -> None:
    data = load("built_here")
    seen = [
        x.tobytes() for split in (data.train, data.test) for b in eval_batches(split, batch_size=4) for x in b["image"]
    ]
    assert sorted(seen) == sorted(image.tobytes() for image in IMAGES)
    assert size_of(data.test) == 4


def to_tfrecord(path: Path) -> None:
    """What `tfds.load` leaves: the same records in files of another form."""
    from array_record.python.array_record_module import ArrayRecordReader

    def checksum(content: bytes) -> bytes:
        crc = google_crc32c.value(content)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    for file in path.glob("*.array_record*"):
        reader, out = ArrayRecordReader(str(file)), b""
        for row in range(reader.num_records()):
            [record] = reader.read([row])
            length = struct.pack("<Q", len(record))
            out += length + checksum(length) + record + checksum(record)
        file.with_name(file.name.replace("array_record", "tfrecord")).write_bytes(out)
        file.unlink()
    about = path / "dataset_info.json"
    about.write_text(about.read_text().replace("array_record", "tfrecord"))


def shard(path: Path, split: str = "train") -> Path:
    [file] = path.glob(f"*-{split}.*record-*")
    return file


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    at = next(i for i in range(at, len(content)) if content[i])  # what fills up the file is 0
    content[at] ^= 4
    file.write_bytes(bytes(content))


def edit(path: Path, old: str, new: str) -> None:
    about = path / "dataset_info.json"
    assert old in about.read_text()
    about.write_text(about.read_text().replace(old, new, 1))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda p: shard(p).unlink(), "train.array_record-00000-of-00001 is missing"),
    "a shard is empty": (lambda p: shard(p).write_bytes(b""), "train.array_record-00000-of-00001 is empty"),
    "a shard is cut": (lambda p: shard(p).write_bytes(shard(p).read_bytes()[:999]), "is cut off, 999 bytes are left"),
    "a shard is cut late": (lambda p: shard(p).write_bytes(shard(p).read_bytes()[:70000]), "0 of it cannot be read"),
    "a bit of the data": (lambda p: flip(shard(p), 200), "train.array_record-00000-of-00001: example 0 of it"),
    "a bit of the test": (lambda p: flip(shard(p, "test"), 200), "test.array_record-00000-of-00001: example 0 of it"),
    "no info": (lambda p: (p / "dataset_info.json").unlink(), "dataset_info.json is missing"),
    "half an info": (lambda p: (p / "dataset_info.json").write_text('{"name": "bu'), "dataset_info.json is damaged"),
    "an empty info": (lambda p: (p / "dataset_info.json").write_text("{}"), "dataset_info.json or features.json is"),
    "another count": (lambda p: edit(p, '"8"', '"9"'), "example 8 of it cannot be read"),
    "no count": (lambda p: edit(p, '"8"', '"-8"'), "dataset_info.json or features.json is"),
    "another format": (lambda p: edit(p, '"array_record"', '"parquet"'), "parquet-00000-of-00001 cannot be opened"),
    "no features": (lambda p: (p / "features.json").unlink(), "features.json is missing"),
    "an empty folder": (lambda p: [file.unlink() for file in p.iterdir()], "dataset_info.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named_with_the_command_that_repairs_it(
    damage: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "built_here" / "1.0.0"
    hurt, said = DAMAGES[damage]
    hurt(path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    command = f"repair it by: python -m bigjax prepare built_here --to '{folder}'"
    for most in (tfds.IN_MEMORY, 0):
        monkeypatch.setattr(tfds, "IN_MEMORY", most)

        def read() -> None:
            data = load("tfds:built_here")
            next(batches(data.train, seed=0, batch_size=8))
            next(eval_batches(data.test, batch_size=4))

        found = said_by(read)
        assert said in found and found.endswith(command) and str(path) in found
    told = quietly(prepare, *shlex.split(command)[7:8], shlex.split(command)[-1])
    assert f"built again, and what stood there is kept as {path}.damaged1; read it by --data tfds:built_here" in told
    assert {file.name: file.read_bytes() for file in path.with_name("1.0.0.damaged1").iterdir()} == before
    check_whole()
    assert {p.name for p in folder.iterdir()} <= {"built_here", "downloads"}
    assert "has the TFDS set built_here already: read it by" in said_by(prepare, "built_here", str(folder))


@pytest.mark.parametrize("index", [False, True])
def test_one_damaged_example(index: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shard that is whole, of a set that only its owner can build; a label that is no class, too."""
    features = lambda f: {"image": f.Image(shape=(5, 5, 1)), "label": f.ClassLabel(num_classes=3)}  # noqa: E731
    rows = [{"image": IMAGES[n], "label": n % 3} for n in range(8)]
    torn = png(IMAGES[0]).getvalue()[:-30]
    build_set(tmp_path, "torn", "1.0.0", features, {"train": [*rows, {"image": torn, "label": 0}], "test": rows[:3]})
    build_set(
        tmp_path, "large", "1.0.0", features, {"train": [*rows, {"image": np.zeros((7, 5, 1), np.uint8), "label": 0}]}
    )
    texts = [{"text": "good", "label": 0}, {"text": b"caf\xe9", "label": 1}, {"text": "bad", "label": 1}]
    build_set(tmp_path, "latin", "1.0.0", lambda f: {"text": f.Text(), "label": f.ClassLabel(num_classes=2)},
        {"train": texts, "test": texts[:1]})  # fmt: skip
    build_set(
        tmp_path, "none", "1.0.0", lambda f: {**features(f), "label": f.ClassLabel(num_classes=9)}, {"train": rows}
    )
    about = tmp_path / "none" / "1.0.0" / "features.json"
    about.write_text(about.read_text().replace('"9"', '"2"').replace('"num_classes": 9', '"num_classes": 2'))
    (tmp_path / "none" / "1.0.0" / "label.labels.txt").unlink(missing_ok=True)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds, "IN_MEMORY", 0 if index else 2**30)
    for name, why in {
        "torn": "of it cannot be read (OSError: image file is truncated",
        "large": "of it cannot be read (ValueError: its image is",
        "latin": "of it cannot be read (UnicodeDecodeError: ",
        "none": "of it cannot be read (ValueError: its label is 2, and there are 2 classes",
    }.items():

        def read(name: str = name) -> None:
            data = load(f"tfds:{name}")
            for batch in eval_batches(data.train, batch_size=3):
                assert batch
            for batch in eval_batches(data.test, batch_size=3):
                assert batch

        said = said_by(read)
        assert f"{name}-train.array_record-00000-of-00001: example" in said and why in said
        assert said.endswith(f"copy it there again, or build it by its own builder (TFDS has none called {name})")
        assert said.startswith("example ") == (index and name != "latin")  # of the data, by its number


def test_tfrecord_files_are_converted_without_tensorflow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "built_here" / "1.0.0"
    to_tfrecord(path)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    said = said_by(load, "built_here")
    assert said == (
        f"the TFDS set built_here is in {path}, but in tfrecord files, which are not read by index: convert them by: "
        f"python -m bigjax prepare built_here --to '{folder}'"
    )
    before = {file.name: file.read_bytes() for file in path.glob("*.tfrecord*")}
    monkeypatch.setattr(sets, "_download_and_prepare", lambda *_, **__: pytest.fail("it is built"))
    told = prepare("built_here", str(folder))
    assert told == f"read it by --data tfds:built_here, with TFDS_DATA_DIR='{folder}'"
    check_whole()
    assert {file.name: file.read_bytes() for file in path.glob("*.tfrecord*")} == before and len(before) == 2
    about = json.loads((path / "dataset_info.json").read_text())
    assert about["fileFormat"] == "tfrecord" and about["alternativeFileFormats"] == ["array_record"]
    assert not list(path.glob("*.part"))


@pytest.mark.parametrize(
    ("hurt", "said"),
    [
        (lambda p: flip(shard(p), 60), "train.tfrecord-00000-of-00001 is damaged at record 0 (counted from 0)"),
        (lambda p: shard(p).write_bytes(shard(p).read_bytes()[:-5]), "is damaged at record 7 (counted from 0)"),
        (lambda p: shard(p).unlink(), "train.tfrecord-00000-of-00001 cannot be read (No such file or directory)"),
        (lambda p: shard(p).write_bytes(b""), "train.tfrecord-00000-of-00001 holds 0 examples, not 8"),
    ],
    ids=["bit", "cut", "gone", "empty"],
)
def test_tfrecord_files_that_are_damaged_are_built_again(hurt: Callable, said: str, folder: Path) -> None:
    path = folder / "built_here" / "1.0.0"
    to_tfrecord(path)
    hurt(path)
    told = quietly(prepare, "built_here", str(folder))
    assert f"{said}: built again, and what stood there is kept as {path}.damaged1" in told
    check_whole()


def test_what_a_kill_leaves_is_built_anew(folder: Path) -> None:
    """TFDS writes into a folder of its own, which takes the set's name at the end."""
    path = folder / "built_here" / "1.0.0"
    path.rename(path.with_name("incomplete.ABC123_1.0.0"))
    said = said_by(load, "tfds:built_here")
    assert said.startswith(
        f"the TFDS set built_here is not in {folder} (TFDS_DATA_DIR): prepare it by: python -m bigjax"
    )
    assert not tfds.ready("built_here")
    quietly(prepare, "built_here", str(folder))
    check_whole()
    assert tfds.ready("built_here")
    to_tfrecord(path)
    assert not tfds.ready("built_here")


def test_a_damaged_set_of_ones_own_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = lambda f: {"image": f.Image(shape=(5, 5, 1)), "label": f.ClassLabel(num_classes=3)}  # noqa: E731
    build_set(tmp_path, "own", "1.0.0", features, {"train": [{"image": IMAGES[0], "label": 0}]})
    to_tfrecord(tmp_path / "own" / "1.0.0")
    prepare("own", str(tmp_path))  # what is whole is converted without its builder
    build_set(tmp_path, "two", "1.0.0", features, {"train": [{"image": IMAGES[0], "label": 0}]}, config="small")
    to_tfrecord(tmp_path / "two" / "small" / "1.0.0")
    told = prepare("two/small:1.0.0", str(tmp_path))
    assert told == f"read it by --data tfds:two/small:1.0.0, with TFDS_DATA_DIR={tmp_path}"
    assert "three/small is neither text nor a TFDS set" in said_by(prepare, "three/small", str(tmp_path))
    flip(next((tmp_path / "own" / "1.0.0").glob("*.array_record*")), 200)
    said = said_by(prepare, "own", str(tmp_path))
    assert said.endswith("copy it there again, or build it by its own builder (TFDS has none called own)")
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == ["1.0.0"]
    for below in ("own", "own/1.0.0"):
        said = said_by(prepare, "own", str(tmp_path / below))
        assert said == f"--to {tmp_path / below} lies in the folder of own itself: give --to {tmp_path}"
    assert "is a part of a set, and a set is prepared whole: leave out [:5]" in said_by(
        prepare, "own[:5]", str(tmp_path)
    )
