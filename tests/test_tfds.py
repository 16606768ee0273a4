"""Real TFDS sets, built here as array_record files: which splits, features and labels are taken, in memory or by index.

The first pixel of a picture is 20 × the place of its class's name in "abc".
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets
from test_user_files import said_by
from tfds_fixture import build_set

from bigjax.data import tfds
from bigjax.data.pipeline import Dataset, batches, eval_batches, size_of
from bigjax.data.sources import load

TAKES = ("image", "label")


def rows(count: int, *, hidden: int = 0, image: str = "image", label: str = "label", side: int = 4) -> list[dict]:
    """Pictures of classes in turn; the first so many have no label."""
    out = []
    for n in range(count):
        picture = np.full((side, side, 1), n % 256, np.uint8)
        picture[0, 0] = 20 * (n % 3)
        out.append({image: picture, label: -1 if n < hidden else "abc"[n % 3]})
    return out


def pictures(image: str = "image", label: str = "label", names: str = "abc", side: int | None = 4) -> Callable:
    return lambda f: {image: f.Image(shape=(side, side, 1)), label: f.ClassLabel(names=list(names))}


def other_label(kind: Callable, value: Callable[[int], Any]) -> tuple[Callable, dict]:
    """The same pictures, with a label of another kind."""
    features = lambda f: {"image": f.Image(shape=(4, 4, 1)), "label": kind(f)}  # noqa: E731
    return features, {"train": [row | {"label": value(n)} for n, row in enumerate(rows(30))]}


def texts(count: int, text: str = "text", label: str = "label") -> list[dict]:
    return [{text: f"it is {n}", label: n % 2} for n in range(count)]


def deep(count: int) -> list[dict]:
    """Pictures of 16 bits, whose values are 257 × those of `rows`."""
    return [row | {"image": row["image"][..., 0].astype(np.uint16) * 257} for row in rows(count)]


SETS: dict[str, tuple[Callable, dict[str, list[dict]]]] = {
    "plain": (pictures(), {"train": rows(30), "test": rows(12)}),
    "only_test": (pictures(), {"test": rows(20)}),
    "no_train": (pictures(), {"validation": rows(10), "test": rows(20)}),
    "hidden": (pictures(), {"train": rows(30), "validation": rows(10), "test": rows(12, hidden=12)}),
    "half_hidden": (pictures(), {"train": rows(30), "test": rows(12, hidden=5)}),
    "all_hidden": (pictures(), {"train": rows(30, hidden=30), "test": rows(12, hidden=12)}),
    "val": (pictures(), {"train": rows(30), "val": rows(10)}),
    "dev": (pictures(), {"train": rows(30), "dev": rows(10)}),
    "extra": (pictures(), {"train": rows(30), "extra": rows(10)}),
    "turned": (pictures(names="cba"), {"train": rows(30), "test": rows(12)}),
    "more": (pictures(names="abcd"), {"test": [*rows(3), rows(1)[0] | {"label": "d"}]}),
    "wide": (pictures(side=6), {"test": rows(12, side=6)}),
    "img": (pictures("img", "class"), {"train": rows(30, image="img", label="class")}),
    "odd": (pictures("thing", "sort"), {"train": rows(30, image="thing", label="sort")}),
    "sentence": (
        lambda f: {"sentence": f.Text(), "labels": f.ClassLabel(num_classes=2)},
        {"train": texts(30, "sentence", "labels"), "test": texts(6, "sentence", "labels")},
    ),
    "hidden_texts": (
        lambda f: {"text": f.Text(), "label": f.ClassLabel(num_classes=2)},
        {"train": texts(30), "validation": texts(6), "test": [row | {"label": -1} for row in texts(8)]},
    ),
    "integers": other_label(lambda f: f.Scalar(np.int64), lambda n: 7 * (n % 3) + 2),
    "named": other_label(lambda f: f.Text(), lambda n: "xyz"[n % 3]),
    "whole": other_label(lambda f: f.Scalar(np.float32), lambda n: float(n % 3)),
    "measured": other_label(lambda f: f.Scalar(np.float32), lambda n: n % 3 + 0.5),
    "several": other_label(lambda f: f.Sequence(f.ClassLabel(num_classes=3)), lambda n: [0, n % 3]),
    "deep": (
        lambda f: {"image": f.Image(shape=(4, 4, 1), dtype=np.uint16), "label": f.ClassLabel(names=list("abc"))},
        {"train": deep(30)},
    ),
    "deep_unsaid": (pictures(), {"train": deep(30)}),
    "sizes": (pictures(side=None), {"train": rows(20), "test": rows(10)}),
}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tfds sets")
    for name, (features, splits) in SETS.items():
        build_set(path, name, "1.0.0", features, splits)
    thing = {"train": rows(30, image="thing", label="sort")}
    build_set(path, "keyed", "1.0.0", pictures("thing", "sort"), thing, supervised=("thing", "sort"))
    for config in ("large", "small"):
        build_set(path, "configs", "1.0.0", pictures(), {"train": rows(12), "test": rows(3)}, config=config)
    for version, count in (("1.9.0", 10), ("1.10.0", 12)):
        build_set(path, "versions", version, pictures(), {"train": rows(count), "test": rows(3)})
    return path


@pytest.fixture
def sets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    return folder


@pytest.fixture(params=["memory", "index"])
def read(request: pytest.FixtureRequest, sets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Loads a set in memory and by index."""
    if request.param == "index":
        monkeypatch.setattr(tfds, "IN_MEMORY", 0)
    return lambda name, **options: load(name, **{"takes": TAKES} | options)


def sizes(data: Dataset) -> tuple[int, int]:
    return size_of(data.train), size_of(data.test)


def labels(data: Dataset) -> list[str]:
    """The names of the test split's classes, each of them that of its picture."""
    names, seen = data.class_names, []
    for batch in eval_batches(data.test, batch_size=4):
        for image, label, mask in zip(batch["image"], batch["label"], batch["mask"], strict=True):
            if mask:
                seen.append("abc".index(names[label]) * 20 == image[0, 0, 0] and names[label])
    return seen


# ---- splits


def test_a_set_without_a_split_to_train_on_is_refused_and_can_be_told_one(read: Callable) -> None:
    said = said_by(read, "only_test")
    assert said == (
        "the TFDS set only_test has no split train, but test (20 examples): a trained run is judged on it by evaluate "
        "--data tfds:only_test, or --eval-data tfds:only_test; to train on it say --split train=test"
    )
    data = read("only_test", split="train=test")
    assert sum(sizes(data)) == 20 and size_of(data.test) < 10  # a tenth of it, or so, is held out
    assert "validation (10 examples), test (20): a" in said_by(read, "no_train")
    assert said_by(read, "no_train").endswith("say --split train=validation,test=test")
    assert sizes(read("no_train", split="train=validation,test=test")) == (10, 20)
    assert sizes(read("no_train", split="train=test, test=validation")) == (20, 10)
    data = read("plain", eval_data="tfds:only_test")
    assert sizes(data) == (30, 20) and sorted(set(labels(data))) == ["a", "b", "c"]
    assert sizes(read("plain", eval_data="no_train", split="test=validation")) == (30, 10)


def test_parts_of_splits(read: Callable) -> None:
    assert sizes(read("tfds:plain[:50%]")) == (15, 12)
    assert sizes(read("plain[10:14]")) == (4, 12)
    assert sizes(read("plain", split="train=train[:80%],test=test[:3]")) == (24, 3)
    assert sizes(read("plain", split="train=train[:10]+train[20:]")) == (20, 12)
    assert sizes(read("tfds:plain:1.0.0[:50%]", eval_data="only_test[:25%]")) == (15, 5)
    data = read("plain", split="train=train[10%:],test=train[:10%]")
    assert sizes(data) == (27, 3)
    seen = [
        {x.tobytes() for x in next(eval_batches(s, batch_size=size_of(s)))["image"]} for s in (data.train, data.test)
    ]
    assert len(seen[0]) == 27 and not seen[0] & seen[1]


@pytest.mark.parametrize(
    ("name", "split", "said"),
    [
        (
            "plain",
            "train",
            "--split train: give train=SPLIT, test=SPLIT or both: train=validation,test=test or train=tr",
        ),
        ("plain", "train=", "--split train=: give train=SPLIT"),
        ("plain", "train=test,train=test", "give train=SPLIT"),
        ("plain", "learn=train", "--split learn=train: give train=SPLIT"),
        ("plain", "train=dev", "has no split 'dev', but train (30 examples), test (12): name one of these"),
        (
            "plain",
            "train=train[:200%]",
            "has no split 'train[:200%]', but train (30 examples), test (12): write a part",
        ),
        ("plain", "train=train[", "has no split 'train[', but train (30 examples), test (12): write a part as [:50%]"),
        ("plain", "train=train[5:5]", "the split 'train[5:5]' of the TFDS set plain has no examples: there are train"),
        (
            "plain",
            "train=test,test=test",
            "--split takes 12 examples of the TFDS set plain both to train and to test on: choose",
        ),
        ("plain", "test=train[:5]", "--split takes 5 examples of the TFDS set plain both to train and to test on"),
        ("plain[:50%]", "train=train", "plain[:50%] is a part, and so is --split train: write the part there alone"),
        ("plain[%]", None, "has no split 'train[%]', but train (30 examples), test (12): write a part as [:50%]"),
        ("digits", "train=train", "--split train= is for TFDS sets, and digits is none: leave it out"),
    ],
)
def test_splits_that_are_none(name: str, split: str | None, said: str, sets: Path) -> None:
    assert said in said_by(load, name, split=split)


def test_what_is_tested_on_has_labels_and_is_said(read: Callable) -> None:
    data = read("hidden")
    assert data.notes == ("the TFDS set hidden: hides the labels of test (-1), its split validation is tested on",)
    assert sizes(data) == (30, 10) and len(labels(data)) == 10 and all(labels(data))
    said = said_by(read, "hidden", split="test=test")
    assert said == (
        "the TFDS set hidden hides the labels of test (-1): say another to test on by --split, of train (30 examples), "
        "validation (10), test (12)"
    )
    assert sizes(read("plain", eval_data="hidden")) == (30, 10)
    assert "all_hidden hides the labels of test (-1): say another" in said_by(read, "plain", eval_data="all_hidden")
    assert "all_hidden hides the labels of train (-1): say another" in said_by(read, "all_hidden")
    assert sizes(read("hidden_texts", takes=("text", "label"))) == (30, 6)
    assert sizes(read("hidden_texts", takes=("text",))) == (30, 8)  # for a language model
    data = read("all_hidden", takes=("image",))  # for an autoencoder
    assert sizes(data) == (30, 12) and set(next(batches(data.train, seed=0, batch_size=2))) == {
        "image",
        "index",
        "mask",
    }
    data = read("half_hidden")
    assert data.notes == ("the TFDS set half_hidden: left out 5 examples of test without a label (-1)",)
    assert len(labels(data)) == 7 and all(labels(data))


def test_a_hidden_label_that_was_not_looked_at_ends_the_evaluation(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = tensorflow_datasets.builder_from_directory(str(sets / "half_hidden" / "1.0.0"))
    there = [int(row["label"]) for row in built.as_data_source("test")]
    first = next(n for n, label in enumerate(there) if label >= 0)
    assert -1 in there[first:]
    monkeypatch.setattr(tfds, "IN_MEMORY", 0)
    monkeypatch.setattr("bigjax.data.tfds_reader.SAMPLE", 1)
    data = load("half_hidden", takes=TAKES, split=f"test=test[{first}:]")
    assert size_of(data.test) == 12 - first
    said = said_by(labels, data)
    assert said.startswith("example ") and said.endswith("of it has no label (-1): say another split by --split")


@pytest.mark.parametrize("name", ["val", "dev"])
def test_other_names_of_test_splits(name: str, read: Callable) -> None:
    data = read(name)
    assert data.notes == (f"the TFDS set {name}: its split {name} is tested on",) and sizes(data) == (30, 10)
    first, held = read("extra").notes
    assert first == "the TFDS set extra: its splits extra are not used; --split test=... takes one to test on"
    assert held.startswith("extra: held out for testing")


# ---- features and labels


def test_synonyms_are_taken_and_said_and_others_told(read: Callable) -> None:
    data = read("img", split="train=train[:20],test=train[20:]")
    assert data.notes == (
        "the TFDS set img: its img is taken for the image; --image-feature names another",
        "the TFDS set img: its class is taken for the label; --label-feature names another",
    )
    assert len(labels(data)) == 10 and all(labels(data))
    data = read("odd", image_feature="thing", label_feature="sort", split="train=train[:20],test=train[20:]")
    assert data.notes == () and len(labels(data)) == 10 and all(labels(data))
    data = read("keyed", split="train=train[:20],test=train[20:]")  # the set itself says what they are
    assert data.notes[0] == "the TFDS set keyed: its thing is taken for the image; --image-feature names another"
    assert len(labels(data)) == 10 and all(labels(data))
    data = read("sentence", takes=("text", "label"))
    assert [note.partition(" is")[0] for note in data.notes] == [
        "the TFDS set sentence: its sentence", "the TFDS set sentence: its labels"
    ]  # fmt: skip
    for batch in eval_batches(data.test, batch_size=6):
        assert [int(text.split()[2]) % 2 for text in batch["text"]] == batch["label"].tolist()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("odd", {}, "the TFDS set odd has no image, but sort (one of 3 classes), thing (image (4, 4, 1) of uint8): "
            "name the feature that is it by --image-feature"),
        ("odd", {"image_feature": "thing"}, "has no label, but sort (one of 3 classes), thing (image (4, 4, 1) of uint8"
            "): name the feature that is it by --label-feature"),
        ("odd", {"image_feature": "sort"}, "--image-feature sort: it is no image, the TFDS set odd has"),
        ("odd", {"image_feature": "pic"}, "the TFDS set odd has no feature 'pic': it has sort (one of 3 classes)"),
        ("digits", {"label_feature": "a"}, "--label-feature is for TFDS sets, and digits is none: leave it out"),
        ("sentence", {}, "this script takes image and label, but sentence holds text and label: use experiments"),
        ("measured", {}, "the TFDS set measured: its label holds 0.5, which is no class: name another by"),
        ("several", {}, "its label is no single class an example: name another by --label-feature"),
    ],
)  # fmt: skip
def test_features_that_are_not_what_is_taken(name: str, options: dict, said: str, read: Callable) -> None:
    assert said in said_by(read, name, **options)


@pytest.mark.parametrize(
    ("name", "names"), [("integers", ("2", "9", "16")), ("named", ("x", "y", "z")), ("whole", ("0", "1", "2"))]
)
def test_labels_that_are_no_class_of_tfds_are_counted(name: str, names: tuple[str, ...], read: Callable) -> None:
    data = read(name, split="train=train[:20],test=train[20:]")
    assert data.class_names == names and data.classes == 3
    assert f"the 3 values of its label ({', '.join(names)}) are the classes" in data.notes[0]
    for batch in eval_batches(data.test, batch_size=10):
        np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] // 20)


@pytest.mark.parametrize("name", ["deep", "deep_unsaid"])
def test_pictures_of_16_bits_become_8(name: str, read: Callable) -> None:
    data = read(name, split="train=train[:20],test=train[20:]")
    assert len(labels(data)) == 10 and all(labels(data))
    [batch] = eval_batches(data.test, batch_size=10)
    assert len(set(batch["image"][:, 0, 1, 0])) == 10 and batch["image"].max() <= 40
    assert ("the TFDS set deep: images of 16 bits become 8" in data.notes) == (name == "deep")


# ---- one set against another


@pytest.mark.parametrize("index", [(False, True), (True, False), (True, True), (False, False)])
def test_evaluation_data_by_name_take_the_training_classes(
    index: tuple[bool, bool], sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either side in memory or read by index."""
    real = tfds.in_memory
    monkeypatch.setattr(tfds, "in_memory", lambda r, most: real(r, most=0 if index[len(r) == 12] else most))
    data = load("plain", eval_data="tfds:turned", takes=TAKES)
    assert [not isinstance(split, dict) for split in (data.train, data.test)] == list(index)
    assert data.class_names == ("a", "b", "c") and len(labels(data)) == 12 and all(labels(data))
    said = "image of an example has shape (4, 4, 1) in plain but has shape (6, 6, 1) in wide: give evaluation data of"
    assert said in said_by(load, "plain", eval_data="wide", takes=TAKES)
    said = "image of an example has shape (4, 4, 1) in plain but is missing in sentence: give evaluation data of"
    assert said in said_by(load, "plain", eval_data="sentence")
    assert sizes(load("plain", eval_data="sizes", takes=TAKES)) == (30, 10)  # its sizes are not known before


def test_a_class_that_was_not_trained_on(read: Callable) -> None:
    """Said at once where all labels are in memory, and when it comes where they are not."""
    said = said_by(lambda: labels(read("plain", eval_data="more")))
    assert "more has the class 'd', which plain has not (a, b, c): remove it or train on it too" in said


# ---- names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("plain:2.0.0", "there is no plain:2.0.0 in {} (TFDS_DATA_DIR), but plain:1.0.0: name one of these"),
        ("plain/large", "there is no plain/large in {} (TFDS_DATA_DIR), but plain:1.0.0: name one of these"),
        ("configs", "{} holds several configurations of configs: give one of configs/large, configs/small"),
        ("configs/no", "there is no configs/no in {} (TFDS_DATA_DIR), but configs/large:1.0.0, configs/small:1.0.0"),
        ("tfds:a b", "'a b' is no name of a TFDS set: write NAME, NAME/CONFIG or NAME:VERSION"),
        ("tfds:nowhere", "TFDS knows no set called 'nowhere', and none is in {}: see"),
        ("mnist/deep", "TFDS has no set called mnist/deep: mnist has the version 3.0.1, and {} holds none: name"),
        ("imdb_reviews/deep", "imdb_reviews has the configurations plain_text, and {} holds none: name one"),
        ("mnist", "prepare it by: python -m bigjax prepare mnist --to '{}', or use the embedded --data mnist5k"),
        ("imdb", "prepare imdb_reviews --to '{}', or use the embedded --data python_topics"),
    ],
)  # fmt: skip
def test_names_that_are_none(name: str, said: str, sets: Path) -> None:
    assert said.format(sets) in said_by(load, name)


def test_names_of_versions_and_configurations(sets: Path) -> None:
    assert sizes(load("versions")) == (12, 3) and sizes(load("tfds:versions:1.9.0")) == (10, 3)  # the newest
    assert sizes(load("versions:1.9.*")) == (10, 3) and sizes(load("configs/large:1.0.0")) == (12, 3)


@pytest.mark.parametrize("below", ["plain", "plain/1.0.0", "configs/large/1.0.0"])
def test_a_folder_inside_the_sets_own(below: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder / below))
    name = below.partition("/")[0]
    said = f"TFDS_DATA_DIR={folder / below} lies in the folder of {name} itself: give TFDS_DATA_DIR={folder}"
    assert said_by(load, f"tfds:{name}") == said == said_by(load, name)


@pytest.mark.parametrize(
    ("below", "name"), [("plain", "plain"), ("plain/1.0.0", "plain"), ("configs/large", "configs/large")]
)
def test_the_path_of_a_prepared_set_is_known_as_one(below: str, name: str, folder: Path) -> None:
    said = f"{folder / below} is a set that TFDS prepared: TFDS_DATA_DIR='{folder}' --data tfds:{name} reads it"
    assert said_by(load, str(folder / below)) == said


@pytest.mark.parametrize(("takes", "instead"), [(("text",), "python"), (("text", "label"), "python_topics")])
def test_a_missing_set_of_text_recommends_text(takes: tuple[str, ...], instead: str, sets: Path) -> None:
    assert said_by(load, "imdb", takes=takes).endswith(f", or use the embedded --data {instead}")


def test_six_hundred_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_set(tmp_path, "shards", "1.0.0", pictures(), {"train": rows(650)}, shards=600)
    assert len(list((tmp_path / "shards" / "1.0.0").glob("*.array_record-*"))) == 600
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    whole = load("shards", split="train=train[:90%],test=train[90%:]")
    monkeypatch.setattr(tfds, "IN_MEMORY", 0)
    data = load("shards", split="train=train[:90%],test=train[90%:]")
    assert sizes(data) == sizes(whole) == (585, 65) and len(labels(data)) == 65 and all(labels(data))
    a, b = (next(batches(split, seed=0, batch_size=200)) for split in (data.train, whole.train))
    np.testing.assert_array_equal(a["image"], b["image"])
