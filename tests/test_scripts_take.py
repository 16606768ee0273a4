"""What each experiment script takes of data, what it says of others, and how users' data are read by flags.

N examples, H height, W width, C channels.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from test_experiments import SCRIPTS, load
from test_user_files import pictures, said_by, written
from tfds_fixture import build_set

from bigjax import UsageError, cli
from bigjax.data import characters, corpus, sources, takes, tfds, tokens
from bigjax.data.pictures import resized
from bigjax.step import to_float

DECLARED = {
    name.split("/")[1].removesuffix(".py"): fields for name, fields in takes.declared(takes.scripts(), "TAKES").items()
}
IMAGES = [name for name, fields in DECLARED.items() if "image" in fields]


def arrays(path: Path, **fields: Any) -> Path:
    np.savez(path, **fields)
    return path


def lines(path: Path, row: Callable[[int], dict[str, Any]], count: int = 40) -> Path:
    return written(path, "".join(json.dumps(row(n)) + "\n" for n in range(count)))


def table(path: Path, header: str, row: Callable[[int], str], count: int = 40) -> Path:
    return written(path, "\n".join([header, *map(row, range(count))]))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Data of each kind: its name as --data, and the fields that it holds."""
    folder = tmp_path_factory.mktemp("kinds")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 8, 8, 1), np.uint8)
    x = rng.random((40, 5))
    whole = {
        "an embedded set": ("digits", ("image", "label")),
        "pictures": (pictures(folder / "pictures", 20), ("image", "label")),
        "images of classes": (arrays(folder / "classes.npz", image=image, label=np.arange(40) % 2), ("image", "label")),
        "images with numbers": (arrays(folder / "numbers.npz", image=image, target=x[:, 0]), ("image", "target")),
        "columns of classes": (table(folder / "a.csv", "a,b,label", lambda n: f"{n},1,{n % 2}"), ("x", "label")),
        "columns of numbers": (arrays(folder / "x.npz", x=x, target=x[:, 0]), ("x", "target")),
        "texts of classes": (lines(folder / "t.jsonl", lambda n: {"text": f"{n}", "label": n % 2}), ("text", "label")),
        "texts in a table": (table(folder / "t.csv", "text,label", lambda n: f"it {n},{n % 2}"), ("text", "label")),
        "pairs": (lines(folder / "p.jsonl", lambda n: {"source": f"a {n}", "target": "b"}), ("source", "target")),
        "tokens": (f"tokens:{folder / 'tokens'}", ("tokens",)),
        "text": (written(folder / "book.txt", "It was a dark night.\n" * 2000), ("text",)),
    }  # fmt: skip
    written(folder / "tokens" / "train.bin", np.arange(900, dtype="<u2").tobytes())
    written(folder / "tokens" / "test.bin", np.arange(300, dtype="<u2").tobytes())
    return {kind: (str(name), fields) for kind, (name, fields) in whole.items()}


KINDS = (
    "an embedded set", "pictures", "images of classes", "images with numbers", "columns of classes",
    "columns of numbers", "texts of classes", "texts in a table", "pairs", "tokens", "text",
)  # fmt: skip
VISION = ("mnist_cnn", "mnist_lstm", "mnist_mlp", "resnet_classify", "vit_classify")
TEXTS = ("bert_classify", "text_cnn", "text_lstm")
CLASSIFIERS = ", ".join(["mnist_gan.py", *(f"experiments/vision/{name}.py" for name in VISION)])
TAKING = {  # of some fields the scripts, as a user is told them
    (
        "text",
        "label",
    ): f"use {', '.join(f'experiments/text/{name}.py' for name in TEXTS)} for those, or give other data",
    ("image", "label"): f"use experiments/generate/{CLASSIFIERS} for those, or",
    ("x", "target"): "use experiments/tables/diabetes_linear.py for those, or",
    ("tokens",): "use experiments/text/gpt.py, experiments/text/pretrain.py for those, or",
    ("source", "target"): "use experiments/text/translate.py for those, or",
}


def test_every_script_says_what_it_takes() -> None:
    assert DECLARED.keys() == SCRIPTS.keys()
    assert all(load(script).TAKES == fields for script, fields in DECLARED.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_data_that_a_script_does_not_take(script: str, kind: str, kinds: dict[str, Any]) -> None:
    """As --data and as --eval-data one line says what it takes, what they hold, and which script takes those."""
    (name, held), fields, module = kinds[kind], DECLARED[script], load(script)
    if set(fields) <= set(held):
        return
    own = next(name for name, holds in kinds.values() if set(fields) <= set(holds))
    for flags in ({"data": name}, {"data": own, "eval_data": name}):
        said = said_by(module.build, module.Config(**flags))
        if fields == ("tokens",) and "eval_data" in flags:
            assert (
                said == f"{script}.py evaluates on the test.bin beside the tokens it trains on: leave out --eval-data"
            )
            continue
        if fields == ("tokens",) and kind in ("text", "texts of classes"):
            prepare = f"python -m bigjax prepare {name} --to DIR, then --data tokens:DIR"
            assert said == f"{name} is text, not yet in tokens: {prepare}"
            continue
        words = {"x": "x (numbers)"}
        both = [" and ".join(words.get(f, f) for f in given) for given in (fields, held)]
        assert said.startswith(f"this script takes {both[0]}, but {name} holds {both[1]}: ")
        assert TAKING.get(held, "") in said and f"{script}.py" not in said


def test_the_test_above_has_every_kind(kinds: dict[str, Any]) -> None:
    assert set(KINDS) == kinds.keys()
    assert {fields for _, fields in kinds.values()} > set(DECLARED.values()) - {("image",)}


def test_readers_are_looked_into() -> None:
    """Data that are read by index, of a user's own too, are known by their first example."""

    class Reader:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, row: int) -> dict[str, np.ndarray]:
            return {"picture": np.zeros((4, 4, 1), np.uint8), "label": np.int32(0)}

    said = said_by(takes.check, Reader(), ("image", "label"), name="mine")
    assert said == "this script takes image and label, but mine holds picture and label: give other data"
    assert "this script takes image, but the split holds picture and label" in said_by(
        sources.image_statistics, Reader()
    )


@pytest.mark.parametrize("content", ["TAKES = (", "TAKES = fields()", b"TAKES = '\xff'"])
def test_a_script_that_cannot_be_read_hides_no_mistake(
    content: str | bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ./experiments, which may be anything."""
    script = written(tmp_path / "experiments" / "a" / "b.py", content)
    monkeypatch.chdir(tmp_path)
    assert "give other data" in said_by(takes.check, ("text",), ("image",), name="mine")
    assert "b.py" in said_by(takes.declared, script.parents[1], "TAKES")


# ---- images of any size


@pytest.mark.parametrize("shape", [(8, 8, 1), (17, 23, 3)])
@pytest.mark.parametrize("script", IMAGES)
def test_images_of_any_size_are_learned_from(script: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Every loss of it is traced, without being compiled."""
    rng = np.random.default_rng(0)
    fields = {"image": rng.integers(0, 256, (30, *shape), np.uint8), "label": np.arange(30) % 3}
    module = load(script)
    experiment = module.build(module.Config(data=str(arrays(tmp_path / "a.npz", **fields))))
    task, key = experiment.task, jax.random.key(0)
    batch = to_float({k: v[:2] for k, v in experiment.train.items()})
    batch |= {"index": np.arange(2, dtype=np.int32), "mask": np.ones(2, np.float32)}

    def pass_(key: jax.Array) -> Any:
        params, state = task.init(key, batch)
        return [loss(params, state, batch, key)[0] for loss in task.losses.values()], task.evaluate(
            params, state, batch, key
        )

    losses, metrics = jax.eval_shape(pass_, key)
    assert len(losses) == len(task.models) and metrics


# ---- flags of reading


def test_resized_images() -> None:
    """Bilinear, smoothed where they shrink: means stay, constants stay, nothing leaves the range."""
    rng = np.random.default_rng(0)
    image = rng.random((40, 60, 3)).astype(np.float32)
    small = resized(image, 10)
    assert small.shape == (10, 10, 3) and small.dtype == np.float32
    np.testing.assert_allclose(small.mean((0, 1)), image.mean((0, 1)), atol=0.01)
    assert small.std() < 0.4 * image.std()  # picking single pixels would keep it
    bytes_ = (image * 255).astype(np.uint8)
    np.testing.assert_allclose(resized(bytes_, 10), small * 255, atol=2)
    np.testing.assert_array_equal(resized(np.full((5, 7, 1), 200, np.uint8), 28), np.full((28, 28, 1), 200))
    ramp = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None, None], (4, 4, 1))
    np.testing.assert_allclose(resized(ramp, 8)[:, 0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_images_of_different_sizes_are_made_equal(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 20)
    Image.fromarray(np.full((30, 50), 9, np.uint8)).save(folder / "a" / "large.png")
    assert "make them equal, by --resize N or by cropping" in said_by(sources.load, str(folder))
    data = sources.load(str(folder), resize=12)
    everything = np.concatenate([data.train["image"], data.test["image"]])
    assert everything.shape == (21, 12, 12, 1) and (everything == 9).all((1, 2, 3)).sum() == 1
    assert data.train.names[0].endswith(".png")
    again = sources.load(str(folder), resize=6)
    assert again.train.names.tolist() == data.train.names.tolist()  # which are held out goes by the files' names


def test_all_images_can_be_resized(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((20, 8, 6)).astype(np.float32)
    path = str(arrays(tmp_path / "a.npz", image=image, label=np.arange(20) % 2))
    wide = str(arrays(tmp_path / "b.npz", image=image.transpose(0, 2, 1), label=np.arange(20) % 2))
    data = sources.load(path, eval_data=wide, resize=16)
    assert data.train["image"].shape == data.test["image"].shape == (20, 16, 16, 1) and data.train["image"].max() <= 1
    assert sources.load("digits", resize=28).test["image"].shape[1:] == (28, 28, 1)
    text = str(lines(tmp_path / "t.jsonl", lambda n: {"text": f"{n}", "label": n % 2}))
    assert f"--resize is for images, and {text} holds text, label: leave it out" == said_by(
        sources.load, text, resize=16
    )
    folder = build_pictures(tmp_path / "tfds", [(n % 5 + 4, n % 3 + 4) for n in range(12)])
    first = folder.train[0]
    assert first["image"].shape == (16, 16, 3) and first["label"] == first["image"][0, 0, 0] % 2
    assert len(folder.train) == 8 and len(folder.test) == 4


def build_pictures(folder: Path, sizes: list[tuple[int, int]]) -> Any:
    """A TFDS set of images that differ in size, read by index, 16 pixels a side."""
    rows = [{"image": np.full((*size, 3), n, np.uint8), "label": n % 2} for n, size in enumerate(sizes)]
    features = lambda f: {"image": f.Image(shape=(None, None, 3)), "label": f.ClassLabel(num_classes=2)}  # noqa: E731
    build_set(folder, "shapes", "1.0.0", features, {"train": rows[:8], "test": rows[8:]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", f"file://{folder}")
        assert tfds.prepared(tfds.folder()) == ["shapes"]
        assert "did you mean shapes?" in said_by(sources.load, "shape")
        assert "the TFDS set fashion_mnist is not in" in said_by(sources.load, "fashion_mnist")
        with pytest.raises(UsageError, match=r"no data called 'neither': use mnist5k, .*, shapes, tfds:NAME, or"):
            sources.load("neither")
        return sources.load("shapes", resize=16, takes=("image", "label"))


def test_flags_of_reading_that_say_nothing_are_refused(tmp_path: Path) -> None:
    path = str(arrays(tmp_path / "a.npz", x=np.zeros((4, 1)), label=[0, 1, 0, 1]))
    for option, said in (
        ({"text_column": "a"}, "--text-column names a column of a .csv or .jsonl"),
        ({"label_column": "a"}, "--label-column names a column of a .csv or .jsonl"),
        ({"background": "red"}, "--background is for folders of pictures"),
    ):
        assert said_by(sources.load, path, **option) == f"{said}, and {path} is none: leave it out"


def test_columns_that_are_named(tmp_path: Path) -> None:
    reviews = table(tmp_path / "r.csv", "id,Review,label,stars", lambda n: f"{n},it {n},x,{n % 3}")
    data = sources.load(str(reviews), text_column="Review", label_column="stars", takes=("text", "label"))
    assert set(data.train) == {"text", "label"} and data.class_names == ("0", "1", "2")
    assert data.train["text"][0].startswith("it ")
    rows = lines(tmp_path / "r.jsonl", lambda n: {"body": f"it {n}", "text": 7, "kind": "ab"[n % 2]})
    data = sources.load(str(rows), text_column="body", label_column="kind", takes=("text", "label"))
    assert data.class_names == ("a", "b") and data.train["text"][0].startswith("it ")
    houses = table(tmp_path / "h.csv", "area,price,label", lambda n: f"{n},{2 * n},1")
    data = sources.load(str(houses), label_column="price", takes=("x", "target"))
    assert data.facts["columns"] == ("area", "label (another)")
    np.testing.assert_array_equal(data.train["target"], 2 * data.train["x"][:, 0])
    both = sources.load(str(houses), label_column="price", takes=("x", "label"))  # classes, in another script
    assert both.classes == 40 and set(both.train) == {"x", "label"}
    takes_text = {"takes": ("text", "label")}
    for path, options, said in (
        (reviews, {"text_column": "review"}, "r.csv has no column 'review': there are id, Review, label, stars"),
        (rows, {"label_column": "sort"}, "r.jsonl, line 1 has no column 'sort': there are body, text, kind"),
        (houses, {"label_column": "cost", "takes": ("x", "target")}, "h.csv has no column 'cost': there are area"),
        (reviews, takes_text, "has the columns id, Review, label, stars: it needs text and label"
            ": rename yours, or name them by --text-column and --label-column"),
        (table(tmp_path / "n.csv", "area,price", lambda n: f"{n},1"), {"takes": ("x", "target")},
            "beside the inputs, or say which by --label-column"),
    ):  # fmt: skip
        assert said in said_by(sources.load, str(path), **options)


@pytest.mark.parametrize(
    ("script", "flags", "there"),
    [
        ("mnist_cnn", "--resize 28 --background red", {"images": {"resize": 28, "background": "red"}}),
        ("mnist_vae", "--resize 8", {"images": {"resize": 8, "background": "white"}}),
        ("mnist_gan", "--split train=a --image-feature b --label-feature c",
            {"images": {"split": "train=a", "image_feature": "b", "label_feature": "c"}}),
        ("text_lstm", "--text-column a --label-column b", {"columns": {"text_column": "a", "label_column": "b"}}),
        ("text_lstm", "--text-feature a --label-feature b --split test=c",
            {"columns": {"text_feature": "a", "label_feature": "b", "split": "test=c"}}),
        ("python_gpt", "--text-column a", {"columns": {"text_column": "a"}}),
        ("diabetes_linear", "--label-column b", {"columns": {"label_column": "b"}}),
    ],
)  # fmt: skip
def test_scripts_have_the_flags_of_their_kind(script: str, flags: str, there: dict[str, Any]) -> None:
    config, _ = cli.parse(load(script).Config, "train", args=flags.split())
    for group, values in there.items():
        assert values.items() <= dataclasses.asdict(config)[group].items()
    assert flags.count("--") == sum(map(len, there.values())) or script == "mnist_vae"


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("bert_classify", ("learning-rate 0.1", "weight-decay 0.2", "clip 3")),
        ("text_cnn", ("learning-rate 0.1", "label-smoothing 0.2", "drop-tokens 0")),
        ("char_gpt", ("learning-rate 0.1", "adam-rate 0.1", "weight-decay 0.2")),
        ("mnist_autoencoder", ("learning-rate 0.1", "code 8", "dropout 0.1", "rotate 3", "decoder-features 8 8")),
    ],
)
def test_a_recipe_takes_no_other_flag_for_what_it_sets(script: str, flags: tuple[str, ...]) -> None:
    """Which is said before any data is read."""
    module = load(script)
    for flag in flags:
        config, _ = cli.parse(module.Config, "train", args=["--classic", *f"--{flag}".split(), "--data", "none.npz"])
        named = flag.split()[0]
        said = said_by(module.build, config)
        assert said == f"--classic brings its own --{named}: leave one of the two out"


# ---- paths


def test_paths_in_all_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arrays(tmp_path / "a b.npz", x=np.arange(20.0)[:, None], label=np.arange(20) % 2)
    for name in ("~/a b.npz", f"file://{tmp_path}/a%20b.npz", f"file://localhost{tmp_path}/a b.npz"):
        data = sources.load(name, eval_data=name)
        assert len(data.train["x"]) == len(data.test["x"]) == 20
    for split, count in (("train", 900), ("test", 300)):
        written(tmp_path / "t" / f"{split}.bin", np.arange(count, dtype="<u2").tobytes())
    assert len(tokens.load("tokens:~/t").train) == len(tokens.load(f"tokens:file://{tmp_path}/t").train) == 900
    written(tmp_path / "book.txt", "a line\n" * 100)
    assert len(corpus.load("~/book.txt", length=16, batch_size=2).test) == 70
    monkeypatch.setenv("TFDS_DATA_DIR", "~/sets")
    assert tfds.folder() == str(tmp_path / "sets")


@pytest.mark.parametrize(
    "name", ["https://host/a.csv", "s3://bucket/a.npz", "hdfs://a/b", "http://host/folder", "file://a.csv"]
)
@pytest.mark.parametrize("read", [sources.load, lambda name: tokens.load(f"tokens:{name}"), tokens.load])
def test_addresses_that_are_not_read(read: Callable[[str], Any], name: str, tmp_path: Path) -> None:
    said = f"data {name!r} cannot be read or written here: give a local path (download it first), or gs://bucket/folder"
    assert said_by(read, name) == said
    own = arrays(tmp_path / "a.npz", x=np.zeros((2, 1)), label=[0, 1])
    assert said_by(sources.load, str(own), eval_data=name) == said


def test_data_in_a_bucket(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = epath.Path(bucket)
    file = arrays(tmp_path / "a.npz", x=np.arange(20.0)[:, None], label=np.arange(20) % 2)
    (folder / "a.npz").write_bytes(file.read_bytes())
    (folder / "a.txt").write_text("a line\n" * 100)
    for picture in pictures(tmp_path / "p").glob("*/*.png"):
        (folder / "p" / picture.parent.name / picture.name).write_bytes(picture.read_bytes())
    np.testing.assert_array_equal(sources.load(f"{bucket}/a.npz").train["x"], sources.load(str(file)).train["x"])
    assert sources.load(f"{bucket}/p", resize=4).train["image"].shape[1:] == (4, 4, 1)
    assert len(corpus.load(f"{bucket}/a.txt", length=16, batch_size=2).test) == 70
    assert said_by(sources.load, f"{bucket}/b.npz") == f"{bucket}/b.npz does not exist: check the path given as data"
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert said_by(sources.load, f"{bucket}/a.npz") == f'data {bucket}/a.npz needs gcsfs: pip install -e ".[gcs]"'


# ---- a user's own text


def test_a_gpt_of_bytes_takes_a_users_own_text(tmp_path: Path) -> None:
    """The last tenth of the lines is for testing, as `prepare` has it; a folder is its files one after the other."""
    book = [f"line {n} of it\n" for n in range(1000)]
    path = written(tmp_path / "book.txt", b"\xef\xbb\xbf" + "".join(book).encode())
    data = corpus.load(str(path), length=32, batch_size=16)
    assert data.test == "".join(book[900:]).encode()
    assert bytes(data.train["tokens"][0].astype(np.uint8)) == b"\n" + "".join(book[:3]).encode()[:32]
    assert data.facts["xz_bits_per_byte"] > 0 and len(data.facts["corpus_sha256"]) == 64
    for n in range(3):
        written(tmp_path / "books" / f"{n}.txt", "".join(book[n::3]).rstrip("\n"))
    folder = str(tmp_path / "books")
    assert corpus.whole(folder).decode() == "".join(book[0::3] + book[1::3] + book[2::3])
    data = corpus.load(str(path), eval_data=folder, length=32, batch_size=16)
    assert data.test == corpus.whole(folder)
    rows = lines(tmp_path / "r.jsonl", lambda n: {"body": book[n].strip(), "n": n}, 100)
    data = corpus.load(str(rows), length=32, batch_size=16, text_column="body", takes=("text",))
    assert len(data.train) + data.test.count(b"\n") == 100 and data.test.startswith(b"line ")
    module = load("python_gpt")
    experiment = module.build(module.Config(data=str(path), context=32, width=8, heads=2, layers=1))
    assert [p.source for p in experiment.published] == ["xz -9 on the same bytes, in this run"]


def test_text_that_is_too_little_or_none(tmp_path: Path) -> None:
    small = {"length": 256, "batch_size": 16}
    path = written(tmp_path / "a.txt", "one line\ntwo\n")
    said = "has 9 bytes to train on, too few windows of --context 256 (1) for --batch-size 16: give more text"
    assert said in said_by(corpus.load, str(path), **small)
    assert "a.txt has 1 lines of text: at least two" in said_by(corpus.load, str(written(path, "one")), **small)
    assert "a.txt has 0 lines of text" in said_by(corpus.load, str(written(path, "")), **small)
    assert "is not UTF-8 text (byte 0)" in said_by(corpus.load, str(written(path, b"\xff\n\n")), **small)
    assert "no.txt cannot be read (No such file" in said_by(corpus.load, str(tmp_path / "no.txt"), **small)
    written(path, "a line\n" * 3000)
    pairs = lines(tmp_path / "p.jsonl", lambda n: {"text": "a"})
    for read, how in ((corpus.load, small), (characters.load, {"length": 8, "stride": 4})):
        for one, other in ((path, pairs), (pairs, path)):
            said = said_by(read, str(one), eval_data=str(other), takes=("text",), **how)
            assert said == f"{path} is text in one piece, and {pairs} is no .txt or folder of them: give two of a kind"
