"""Files as users have them: what is read of them, what is said, and what is refused in one line.

N examples, H height, W width, C channels.
"""

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from bigjax import UsageError
from bigjax.data import text, tokens
from bigjax.data.pipeline import Dataset
from bigjax.data.sources import column_statistics, image_statistics, load
from bigjax.models import CNN
from bigjax.tasks import classify
from bigjax.train import fit

ARROW = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5  # no turn or mirror image of it is like it


def said_by(call: object, *arguments: object, **options: object) -> str:
    """The one line of the error."""
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and message.encode()
    return message


def refused(path: object, *said: str, **options: object) -> None:
    message = said_by(load, str(path), **options)
    for part in said:
        assert part in message


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pictures(folder: Path, count: int = 6) -> Path:
    """Two classes of grey pictures, all different."""
    for i in range(count):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(ARROW, i)).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def read(folder: Path, image: Image.Image, ending: str = "png", **options: object) -> np.ndarray:
    """What a picture is read as: (H,W,C)."""
    for name in "ab":
        (folder / name).mkdir(parents=True)
        image.save(folder / name / f"it.{ending}", **({"exif": image.getexif()} if image.getexif() else {}))
    data = load(str(folder), eval_data=str(folder), **options)
    return data.train["image"][0]


# ---- division by nothing


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])  # whose mean square less squared mean is not 0, but rounding
def test_a_channel_that_never_varies_has_a_deviation_of_one(value: float, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.random.default_rng(0).random((50, 4, 4, 3)).astype(np.float32)
    image[..., 1] = value
    mean, std = image_statistics({"image": image})
    assert std[1] == 1.0 and mean[1] == pytest.approx(value) and std[0] == pytest.approx(image[..., 0].std(), rel=1e-4)
    assert (
        capsys.readouterr().err
        == "never varies in the training data: channel 1 of image: taken with a deviation of 1\n"
    )
    assert image_statistics({"image": np.zeros((3, 4, 4, 1), np.uint8)}) == (0.0, 1.0)
    capsys.readouterr()
    image_statistics({"image": image[..., :1]})
    assert capsys.readouterr().err == ""


def test_a_column_that_never_varies_has_a_deviation_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).random((50, 3)).astype(np.float32)
    x[:, 2] = 0.1
    mean, std = column_statistics(x, names=("age", "height", "country"))
    assert std == pytest.approx((x[:, 0].std(), x[:, 1].std(), 1.0), rel=1e-5) and mean[2] == pytest.approx(0.1)
    assert "never varies in the training data: country: taken with" in capsys.readouterr().err
    assert column_statistics(np.full(5, 7.0), names=["target"]) == (7.0, 1.0)
    assert "target" in capsys.readouterr().err


# ---- pictures


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "grey key"])
def test_what_is_transparent_shows_white(kind: str, tmp_path: Path) -> None:
    """Black ink on nothing: without its transparency it would be black all over."""
    alpha = np.zeros((6, 8), np.uint8)
    alpha[2, 3], alpha[4, 4] = 255, 51
    black = Image.fromarray(np.zeros((6, 8), np.uint8))
    expected = 255 - alpha
    match kind:
        case "RGBA":
            image = Image.merge("RGBA", [black] * 3 + [Image.fromarray(alpha)])
        case "LA":
            image = Image.merge("LA", [black, Image.fromarray(alpha)])
        case "palette":
            image = Image.fromarray((alpha > 0).astype(np.uint8)).convert("P")
            image.putpalette([0, 0, 0] * 256)
            image.info["transparency"], expected = 0, np.where(alpha > 0, 0, 255)
        case "grey key":
            image = Image.fromarray(alpha)
            image.info["transparency"], expected = 0, np.where(alpha > 0, alpha, 255)
    got = read(tmp_path / "a", image)
    assert got.shape[2] == (3 if kind in ("RGBA", "palette") else 1) and got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.broadcast_to(expected[..., None], got.shape))
    red = read(tmp_path / "b", image, background="red")
    assert red[0, 0].tolist() == [255, 0, 0] and max(red[2, 3]) in (0, 255)
    assert "background 'reddish' is no colour" in said_by(load, str(tmp_path / "a"), background="reddish")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_data_say(orientation: int, tmp_path: Path) -> None:
    turned = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose}
    turned |= {6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90}
    image = Image.fromarray(ARROW)
    image.getexif()[0x0112] = orientation
    got = read(tmp_path, image)
    np.testing.assert_array_equal(got[..., 0], turned.get(orientation, lambda a: a)(ARROW))


@pytest.mark.parametrize(("ending", "order"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2")])
def test_sixteen_bits_of_grey_become_eight(ending: str, order: str, tmp_path: Path) -> None:
    image = Image.fromarray((ARROW.astype(np.uint16) * 257 + 100).astype(order))
    np.testing.assert_array_equal(read(tmp_path, image, ending)[..., 0], ARROW)


def test_pictures_that_are_not_read_say_what_they_are(tmp_path: Path) -> None:
    floats = pictures(tmp_path / "floats")
    Image.fromarray(ARROW.astype(np.float32)).save(floats / "a" / "f.tiff")
    refused(floats, "f.tiff holds 32-bit floats from 0 to 235, but pictures have 1, 3 or 4 channels of 8 bits or")
    integers = pictures(tmp_path / "integers")
    Image.fromarray(ARROW.astype(np.int32) * 1000).save(integers / "b" / "i.tiff")
    refused(integers, "i.tiff holds 32-bit integers from 0 to 235000, but")
    five = pictures(tmp_path / "five")
    cells = five / "a" / "five.tif"
    cells.write_bytes((five / "a" / "0.png").read_bytes()[:30])
    refused(five, "five.tif is not a readable image (damaged, or of a kind that is not read: pictures have 1, 3 or 4")


@pytest.mark.parametrize("channels", [2, 5])
def test_arrays_have_as_many_channels_as_images(channels: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((4, 6, 6, channels), np.uint8), label=[0, 1, 0, 1])
    refused(tmp_path / "a.npz", f"image has shape (4, 6, 6, {channels}), which is {channels} channels, the last axis")


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_that_come_first_are_told(channels: int, tmp_path: Path) -> None:
    image = np.zeros((4, channels, 28, 28), np.uint8)
    np.savez(tmp_path / "a.npz", image=image, label=[0, 1, 0, 1])
    refused(tmp_path / "a.npz", f"({4}, {channels}, 28, 28)", "channels come first", "image.transpose(0, 2, 3, 1)")


# ---- labels


@pytest.mark.parametrize("labels", [[1, 2, 3], [7, 40, 1000], [0, 2, 2**40]])
def test_labels_of_arrays_are_counted(labels: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label = np.array(labels * 10)
    np.savez(tmp_path / "a.npz", x=np.arange(60.0).reshape(30, 2), label=label)
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 2)), label=labels[1:])
    np.savez(tmp_path / "c.npz", x=np.zeros((2, 2)), label=[labels[0], 5])
    data = load(str(tmp_path / "a.npz"), eval_data=str(tmp_path / "b.npz"))
    assert data.classes == 3 and data.class_names == tuple(map(str, labels)) and data.train["label"].dtype == np.int32
    assert data.train["label"].tolist() == [0, 1, 2] * 10 and data.test["label"].tolist() == [1, 2]
    listed = ", ".join(map(str, labels))
    gap = "do not start at 0" if labels[0] else "leave numbers out"
    assert f"labels {gap}: the 3 of the data ({listed}) are the classes" in capsys.readouterr().err
    refused(tmp_path / "a.npz", "c.npz has the class '5', which", eval_data=str(tmp_path / "c.npz"))


def test_labels_are_compared_by_what_they_say(tmp_path: Path) -> None:
    """Whichever of the two counts from 0 without a gap, and in whatever form of file."""
    np.savez(tmp_path / "whole.npz", x=np.zeros((3, 1)), label=[0, 1, 2])
    np.savez(tmp_path / "gap.npz", x=np.zeros((2, 1)), label=[1, 2])
    rows = written(tmp_path / "gap.csv", "a,label\n0,1\n0,2\n")
    for other in (tmp_path / "gap.npz", rows):
        assert load(str(tmp_path / "whole.npz"), eval_data=str(other)).test["label"].tolist() == [1, 2]
    assert load(str(rows), eval_data=str(tmp_path / "gap.npz")).test["label"].tolist() == [0, 1]
    refused(rows, "whole.npz has the class '0'", eval_data=str(tmp_path / "whole.npz"))


def test_one_class_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.random.default_rng(0).random((30, 8, 8)), label=np.full(30, 7))
    data = load(str(tmp_path / "a.npz"))
    assert data.classes == 1  # which an autoencoder learns from
    assert "the data have one class only" in said_by(classify, CNN(outputs=1), classes=data.classes)


# ---- tables


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b,a,label\n1,2,3,0\n", "two columns of one name, number 1 ('a') and number 3 ('a')"),
        ("a, a,label\n1,2,0\n", "number 1 ('a') and number 2 (' a')"),
        ("Text,label,text\nx,0,y\n", "number 1 ('Text') and number 3 ('text')"),
        ("a,,label\n1,2,0\n", "column 2 has no name: name or remove it"),
        ("a;b;label\n1;2;0\n", "separates columns by ';': write it with commas"),
    ],
)
def test_columns_that_cannot_be_told_apart(content: str, said: str, tmp_path: Path) -> None:
    refused(written(tmp_path / "a.csv", content), "a.csv", said)


def test_names_of_fields_are_found_whatever_their_case(tmp_path: Path) -> None:
    rows = "".join(f"it {i},{i % 2}\n" for i in range(20))
    for header in ("text, label", "Text,LABEL", " TEXT ,Label "):
        data = load(str(written(tmp_path / "a.csv", f"{header}\n{rows}")))
        assert set(data.train) == {"text", "label"} and data.classes == 2
    lines = "".join(json.dumps({"Text ": f"it {i}", "Label": i % 2}) + "\n" for i in range(20))
    assert set(load(str(written(tmp_path / "a.jsonl", lines))).train) == {"text", "label"}
    np.savez(tmp_path / "a.npz", Image=np.random.default_rng(0).random((20, 4, 4)), Label=np.arange(20) % 2)
    assert set(load(str(tmp_path / "a.npz")).train) == {"image", "label"}
    refused(
        written(tmp_path / "b.jsonl", '{"text": "a", "text": "b", "label": 0}\n'), "line 1", "two fields called 'text'"
    )
    refused(written(tmp_path / "b.jsonl", '{"text": "a", "Text": "b", "label": 0}\n'), "line 1 has two fields of one")


@pytest.mark.parametrize("header", [",a,b,label", "Unnamed: 0,a,b,label"])
def test_the_index_that_pandas_writes_is_no_feature(header: str, tmp_path: Path) -> None:
    rows = "".join(f"{i},{i / 2},{-i},{i % 2}\n" for i in range(20))
    data = load(str(written(tmp_path / "a.csv", f"{header}\n{rows}")))
    assert data.train["x"].shape[1] == 2 and data.facts["columns"] == ("a", "b")
    assert (data.train["x"][:, 0] == -data.train["x"][:, 1] / 2).all()
    assert "left out the first column, an index without a name" in data.notes[0]


# ---- folders


def test_what_is_no_picture_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "p", 30)
    for name in ("a/Thumbs.db", "b/notes.txt", "b/desktop.ini", "labels.csv"):
        written(folder / name, "\0\1 of no use")
    for name in ("a/__MACOSX/._0.png", "__MACOSX/a/0.png", "a/.ipynb_checkpoints/0.png"):
        written(folder / name, "\0")
    (folder / "b" / "1.png").rename(folder / "b" / "one")  # a picture without an ending is one
    data = load(str(folder))
    assert len(data.train["label"]) + len(data.test["label"]) == 30 and data.class_names == ("a", "b")
    said = "left out 4 files that are no pictures of a class: labels.csv, a/Thumbs.db, b/desktop.ini, b/notes.txt"
    assert said in capsys.readouterr().err
    written(folder / "c" / "readme.md", "none here")
    refused(folder, "c holds no image files")


def test_endings_in_capitals(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(40.0).reshape(20, 2), label=np.arange(20) % 2)
    (tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    written(tmp_path / "B.CSV", "a,label\n" + "".join(f"{i},{i % 2}\n" for i in range(20)))
    written(tmp_path / "C.JSONL", "".join(f'{{"text": "{i}", "label": {i % 2}}}\n' for i in range(20)))
    folder = pictures(tmp_path / "p", 20)
    (folder / "a" / "0.png").rename(folder / "a" / "0.PNG")
    for name in ("A.NPZ", "B.CSV", "C.JSONL", "p"):
        data = load(str(tmp_path / name))
        assert data.classes == 2 and len(data.train["label"]) + len(data.test["label"]) == 20


@pytest.mark.parametrize("name", ["", " ", "tfds:", "tokens:"])
def test_a_name_that_is_empty(name: str, tmp_path: Path) -> None:
    refused(name, "is empty: give a path")
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 1)), label=[0, 1, 0, 1])
    refused(tmp_path / "a.npz", "is empty: give a path", eval_data=name)
    if name != "tfds:":
        assert "is not a folder: give tokens:DIR" in said_by(tokens.load, name)


# ---- JSON and strings


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "a", "label": 0}\n' + "[" * 200_000 + "\n", "line 2 is not JSON (nested too deep)"),
        (
            "a.jsonl",
            '{"text": "a", "label": 0}\n{"text": "b", "label": ' + "1" * 5000 + "}\n",
            "line 2 has a number of 5,000 digits: ",
        ),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b \\ud800", "label": 0}\n', "line 2: text has \\ud800, half"),
        ("a.jsonl", '{"text": "a", "label": "x\\udfff"}\n', "line 1: label has \\udfff, half of a surrogate pair"),
        ("a.jsonl", '{"source": "a", "target": "\\ud83d"}\n', "line 1: target has \\ud83d"),
        ("a.csv", "text,label\na,0\nb,--1\n", "line 3: label is '--1': labels must all be"),
        ("a.csv", "text,label\na,0\nb,+-2\n", "line 3: label is '+-2'"),
        ("a.csv", "text,label\na,0\nb," + "7" * 5000 + "\n", "line 3: label is '777777777777...7777777777777': labels"),
        ("a.csv", b"text,label\na,0\ncaf\xe9,1\n", "line 3 is not UTF-8 text, as a .csv file must be (byte 18)"),
    ],
)
def test_strings_that_are_none(name: str, content: str | bytes, said: str, tmp_path: Path) -> None:
    refused(written(tmp_path / name, content), name, said)
    assert len(said_by(load, str(tmp_path / name))) < 400


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p")
    os.rename(folder / "a", os.fsencode(folder) + b"/caf\xe9")
    refused(folder, "caf\\udce9 is not UTF-8", "rename it")
    other = pictures(tmp_path / "q")
    os.rename(other / "a" / "0.png", os.fsencode(other) + b"/a/\xff.png")
    refused(other, "\\udcff.png is not UTF-8", "rename it")
    refused(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff.csv"), "the name of the data,", "is not UTF-8")
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 1)), label=[0, 1], class_names=["ok", "b\ud800"])
    refused(tmp_path / "a.npz", "class_names holds 'b\\ud800', which is no text")
    assert "text 1 (counted from 0) has \\ud800" in said_by(
        text.encode, text.byte_tokenizer(), ["a", "\ud800"], length=3
    )
    for name, content in (("tokens.json", "[" * 200_000), ("train.bin", "ab")):
        written(tmp_path / "t" / name, content)
    assert "tokens.json is damaged (RecursionError" in said_by(tokens.load, f"tokens:{tmp_path / 't'}")


# ---- tokens that say nothing


def both(train: list[str], test: list[str]) -> Dataset:
    label = np.zeros(len(train), np.int32)
    splits = ({"text": np.array(t, object), "label": label[: len(t)]} for t in (train, test))
    return Dataset(*splits, 2, name="own")


def test_the_share_of_unknown_tokens_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    data = both(["one two three four"] * 3, ["one two three five", "one two"])
    words = text.train_tokenizer(data.train["text"], kind="words", vocabulary=100)
    train, test = text.encode_splits(words, data, length=8)
    assert set(train) == {"tokens", "length", "label"} and len(train["label"]) == 3 and len(test["label"]) == 2
    assert capsys.readouterr().err == "own: 16.7% of the tokens of the held-out text are unknown, [UNK]\n"
    genes = both(["ACGTACGT", "GGGTTTAC", "CCATGCAA"], ["TTTACGCA", "ACCCGTGA"])
    text.encode_splits(text.train_tokenizer(genes.train["text"], kind="words"), genes, length=8)
    said = capsys.readouterr().err
    assert said.startswith("warning: own: 100.0% of the tokens of") and "use --tokenizer bpe" in said
    text.encode_splits(text.train_tokenizer(genes.train["text"], kind="bpe"), genes, length=8)
    assert "warning" not in capsys.readouterr().err


def test_words_of_chinese_and_japanese_are_characters() -> None:
    words = text.train_tokenizer(["我喜欢猫 and cats", "猫がラーメンを食べる"], kind="words", vocabulary=100)
    assert words.encode("猫喜欢ラーメン and cats").tokens == [*"猫喜欢ラーメン", "and", "cats"]
    assert words.encode("naïve cats!?").tokens == ["[UNK]", "cats", "[UNK]"]


@pytest.mark.parametrize("columns", ["constant", "twice", "target"])
def test_linear_regression_takes_columns_that_say_nothing(columns: str, tmp_path: Path) -> None:
    """A constant column, one column twice and a constant target: its closed form divides by nothing either."""
    spec = importlib.util.spec_from_file_location(
        "linear", REPOSITORY / "experiments" / "tables" / "diabetes_linear.py"
    )
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    x = np.random.default_rng(0).normal(size=(60, 3))
    x[:, 1] = {"constant": 5.0, "twice": x[:, 0], "target": x[:, 1]}[columns]
    target = np.full(60, 3.0) if columns == "target" else x[:, 0] + x[:, 2]
    rows = [",".join(map(str, (*row, y))) for row, y in zip(x, target, strict=True)]
    path = written(tmp_path / "a.csv", "\n".join(["age,country,size,target", *rows]))
    flags = {"data": str(path), "steps": 300, "batch_size": 50, "eval_every": 300, "workdir": str(tmp_path / "run")}
    config = script.Config(**flags, log_every=300, save_every=300)
    result = fit(dataclasses.replace(script.build(config), name="linear"), config).result
    assert result["metrics"]["eval/loss"] < 1e-6
    if columns == "constant":
        assert result["metrics"]["eval/distance_to_solution"] < 1e-4
