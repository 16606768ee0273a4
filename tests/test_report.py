import base64
import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bigjax import UsageError
from bigjax.look.pictures import load_gallery, save_gallery
from bigjax.look.report import write_report

pytestmark = pytest.mark.usefixtures("drawn")
CONFIG = {
    "experiment": "mnist_cnn",
    "config": {
        "seed": 3,
        "steps": 400,
        "note": "<script>alert(1)</script>",
        "width": [32, 64],
        "adamw": {"clip": 0.5, "b1": 0.9},
    },
    "defaults": {"seed": 0, "adamw": {"clip": 0.0}},
    "metric": "eval/ece",
    "gallery": ["samples", "nearest"],
    "versions": {"jax": "0.10.2"},
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "command": ["mnist_cnn.py", "--seed", "3"],
}
RESULT = {
    "experiment": "mnist_cnn",
    "step": 400,
    "seed": 3,
    "parameters": 93322,
    "metrics": {"eval/accuracy": 0.984, "eval/loss": 0.0512, "eval/ece": 0.00417},
    "published": [
        {"metric": "eval/accuracy", "value": 0.975, "reached": True, "source": "S & Co, https://example.org"},
        {"metric": "eval/loss", "value": 0.04, "source": "by hand", "reached": False},
        {"metric": "eval/fid", "value": 21.7, "source": "in other features", "reached": None},
    ],
    "seconds": {"total": 41.0, "compile": 6.1, "train": 31.2, "eval": 2.0, "data_wait": 0.3, "checkpoint": 0.4},
    "examples_per_second": 5123.0,
    "devices": {"platform": "cpu", "kind": "Xeon", "count": 1, "processes": 1},
    "confusion": [[37, 2], [5, 41]],
    "class_names": ["cat", "<dog>"],
    "per_class": {"precision": [0.881, 0.953], "recall": [0.949, 0.891], "f1": [0.914, 0.921]},
}
LOG = [
    {
        "step": 100,
        "split": "train",
        "loss": 2.0,
        "accuracy": 0.4,
        "grad_norm": 1.5,
        "grad_norm/model/Conv_0": 0.5,
        "grad_norm/model/Dense_0": 1.25,
        "examples_per_second": 5000.0,
    },
    {
        "step": 200,
        "split": "train",
        "loss": 0.01,
        "accuracy": 0.9,
        "grad_norm": float("nan"),
        "grad_norm/model/Conv_0": 0.75,
        "grad_norm/model/Dense_0": 1.125,
        "examples_per_second": None,
    },
    {"step": 200, "split": "eval", "loss": 0.625, "accuracy": 0.875},
]


def texts(page: str) -> str:
    """What a reader sees, without the pictures."""
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    return tmp_path


@pytest.mark.parametrize("expected", [
    "eval/accuracy 0.984 published 0.975 · ✓ reached S &amp; Co, https://example.org",
    "eval/loss 0.0512 published 0.04 · ✗ not reached by hand",
    "eval/fid – published 21.7 · not measured in other features",
    "parameters 93,322", "updates 400", "seed 3", "examples/s 5,123", "kind Xeon", "commit 0123456789 command",
    "mnist_cnn.py --seed 3",
    "41 seconds", "compile 6.1 s", "train 31.2 s", "data wait 0.3 s", "checkpoint 0.4 s", "other 1 s",
    "loss train 0.01 eval 0.625", "accuracy train 0.9 eval 0.875", "examples_per_second train 5,000 step 100",
    "Norms grad_norm train 1.5 step 100", "grad_norm, model Conv_0 0.75 Dense_0 1.125",
    "true \\ said cat &lt;dog&gt; examples precision recall f1 cat 37 2 39 0.881 0.949 0.914",
    "eval/ece 0.00417", "steps 400", "width [32, 64]", "jax 0.10.2",
    "Configuration seed 3 default 0 adamw.clip 0.5 default 0.0 steps 400",
])  # fmt: skip
def test_every_section_shows_the_values_of_the_files(workdir, expected):
    assert expected in texts(write_report(workdir).read_text())


def test_each_metric_has_its_panel_and_each_split_or_layer_its_line(workdir):
    page = write_report(workdir).read_text()
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(drawings) == 3  # loss, accuracy, grad_norm by layer: the others have one point that is finite
    for color in ("var(--train)", "var(--eval)"):
        assert f"stroke: {color}" in drawings[0]
    assert len(re.findall(r"stroke: #[0-9a-f]{6}; stroke-width: 1.3", drawings[2])) == 2
    assert not re.search("#0[1-5]0[1-5]0[1-5]", page)  # no stand-in colour is left


def test_nothing_is_loaded_from_elsewhere(workdir):
    pictures = SimpleNamespace(images=np.zeros((3, 4, 4)), captions=None, columns=2)
    save_gallery(workdir, 100, name="samples", item=pictures)
    page = write_report(workdir).read_text()
    assert page.count("://") == 1  # the one in a source's text
    for value in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]*)""", page):
        assert value.startswith(("data:", "#"))
    assert "<script" not in page and "<link" not in page


def test_text_is_escaped(workdir):
    save_gallery(workdir, 1, name="<i>name", item="<script>text</script>")
    pictures = SimpleNamespace(images=np.zeros((1, 4, 4)), captions=['"><script>caption'], columns=1)
    save_gallery(workdir, 1, name="pictures", item=pictures)
    page = write_report(workdir).read_text()
    assert "<script" not in page and "<i>name" not in page and "<dog>" not in page
    for shown in ("&lt;script&gt;alert(1)", "&lt;script&gt;text", "&quot;&gt;&lt;script&gt;caption", "&lt;i&gt;name"):
        assert shown in page


def test_unfinished_run_says_so_and_shows_its_newest_evaluation(workdir):
    assert "Unfinished" not in write_report(workdir).read_text()
    (workdir / "result.json").unlink()
    shown = texts(write_report(workdir).read_text())
    assert "Unfinished : step 200 of 400" in shown
    assert "eval/accuracy 0.875 at step 200" in shown
    (workdir / "config.json").write_text(json.dumps(CONFIG | {"steps": 900}))  # settled when training started
    assert "Unfinished : step 200 of 900" in texts(write_report(workdir).read_text())
    (workdir / "metrics.jsonl").unlink()
    assert "Unfinished : step 0 of 900" in texts(write_report(workdir).read_text())


def test_a_run_without_an_evaluation_shows_its_training(workdir):
    result = {k: v for k, v in RESULT.items() if k not in ("published", "confusion", "class_names", "per_class")}
    trained = {"train/loss": 0.25, "train/skipped": 0.0, "train/grad_norm": 1.5}
    (workdir / "result.json").write_text(json.dumps(result | {"metrics": trained, "published": []}))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG[:2]))
    shown = texts(write_report(workdir).read_text())
    assert "train/loss 0.25 at the last step Key facts" in shown and "eval" not in shown.replace("eval 2 s", "")


def test_metrics_of_a_custom_task_are_tiles_charts_and_rows(workdir):
    mine = {"eval/regret": 0.125, "eval/bleu": 31.5, "train/regret": 0.5}
    (workdir / "result.json").write_text(json.dumps(RESULT | {"metrics": mine, "published": []}))
    lines = [{"step": 5, "split": split, "regret": 1.5} for split in ("train", "eval")]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = texts(write_report(workdir).read_text())
    assert "eval/bleu 31.5 at the last step eval/regret 0.125 at the last step Key facts" in shown
    assert "regret train 1.5 step 5 · eval 1.5 step 5" in shown and "train/regret 0.5" in shown


def test_null_is_shown_as_missing(workdir):
    """As a loss that is not finite is written."""
    (workdir / "result.json").write_text(json.dumps(RESULT | {"metrics": {"eval/loss": None}, "published": []}))
    (workdir / "metrics.jsonl").write_text('{"step": 5, "split": "train", "loss": null, "accuracy": null}\n')
    shown = texts(write_report(workdir).read_text())
    assert "eval/loss – at the last step" in shown and "Curves loss train – step 5 accuracy train – step 5" in shown
    (workdir / "result.json").unlink()
    assert "train/accuracy – at step 5" in texts(write_report(workdir).read_text())


def test_torn_last_line_is_left_out_and_a_damaged_one_is_named(workdir):
    log = workdir / "metrics.jsonl"
    whole = log.read_text()
    expected = write_report(workdir).read_text()
    log.write_text(whole + '{"step": 300, "spl')
    assert write_report(workdir).read_text() == expected
    log.write_text("torn{\n" + whole)
    with pytest.raises(UsageError, match=r"metrics.jsonl line 1 is no JSON object"):
        write_report(workdir)


def test_not_a_run_and_damaged_files_are_usage_errors(workdir, tmp_path_factory):
    with pytest.raises(UsageError, match="no config.json: give the working directory of a run"):
        write_report(tmp_path_factory.mktemp("empty"))
    (workdir / "result.json").write_text("{")
    with pytest.raises(UsageError, match="result.json is no JSON object"):
        write_report(workdir)


def test_edited_source_is_shown_beside_the_commit(workdir):
    (workdir / "source.patch").write_text("\n")
    assert "edits in" not in write_report(workdir).read_text()
    (workdir / "source.patch").write_text("diff --git")
    assert "0123456789 + edits in source.patch" in write_report(workdir).read_text()


def test_many_classes_show_per_class_columns_only(workdir):
    many = {"confusion": np.diag([7] * 40).tolist(), "class_names": None, "per_class": {"recall": [1.0] * 40}}
    (workdir / "result.json").write_text(json.dumps(RESULT | many))
    shown = texts(write_report(workdir).read_text())
    assert "true \\ said examples recall 0 7 1.000 1 7 1.000 2" in shown


@pytest.mark.parametrize("shape", [(5, 6, 4), (5, 6, 4, 1), (5, 6, 4, 3)])
def test_gallery_round_trip_and_picture_in_the_page(workdir, shape):
    images = np.random.default_rng(0).random(shape).astype(np.float32)
    images[0, 0, 0] = np.nan
    for step, name in ((200, "a/b"), (50, "a/b")):
        path = save_gallery(workdir, step, name=name, item=SimpleNamespace(images=images, captions=None, columns=2))
    assert path.name == "00000050-a%2Fb.npz"
    save_gallery(workdir, 7, name="poem", item="über\nalles")
    gallery = load_gallery(workdir)
    assert list(gallery) == ["a/b", "poem"] and list(gallery["a/b"]) == [50, 200]
    assert gallery["poem"] == {7: "über\nalles"}
    saved = gallery["a/b"][50]
    assert (saved.captions, saved.columns, saved.images.dtype) == (None, 2, np.uint8)
    np.testing.assert_allclose(saved.images / 255, np.nan_to_num(images), atol=0.502 / 255)

    page = write_report(workdir).read_text()
    sources = re.findall(r'width:(\d+)px" alt="step (\d+)" src="data:image/png;base64,([^"]*)"', page)
    assert [(int(width), step) for width, step, _ in sources] == [(900, "200"), (300, "50")]  # newest large, then small
    tile = np.asarray(Image.open(io.BytesIO(base64.b64decode(sources[0][2]))))
    assert tile.shape == (3 * 7, 2 * 5, *[3] * (shape[3:] == (3,)))  # three rows of two, a grey pixel after each
    expected = saved.images[..., 0] if shape[3:] == (1,) else saved.images
    np.testing.assert_array_equal(tile[7:13, 5:9], expected[3])
    assert (tile[6] == 127).all() and (tile[14:, 5:] == 127).all()


@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("kind", [np.float32, np.uint8])
def test_of_other_channels_than_colours_the_mean_is_shown(workdir, channels, kind):
    images = np.zeros((1, 2, 2, channels), kind)
    images[0, 0, 0] = 200 if kind is np.uint8 else 200 / 255
    images[0, 0, 0, 0] = 0
    save_gallery(workdir, 1, name="x", item=SimpleNamespace(images=images, captions=None, columns=1))
    (saved,) = load_gallery(workdir)["x"].values()
    assert saved.images.tolist() == [[[200 - 200 // channels, 0], [0, 0]]]
    assert "data:image/png" in write_report(workdir).read_text()


def test_small_pictures_are_a_few_and_their_pairs_stay_together(workdir):
    """Of each of the first rows the first: under an image is what belongs to it."""
    images = np.arange(200, dtype=np.uint8)[:, None, None] * np.ones((28, 28), np.uint8)
    for step in (1, 2):
        save_gallery(workdir, step, name="x", item=SimpleNamespace(images=images, captions=None, columns=10))
    sources = re.findall(
        r'width:(\d+)px" alt="step 1" src="data:image/png;base64,([^"]*)"', write_report(workdir).read_text()
    )
    ((width, data),) = sources
    tile = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert int(width) == 2 * 5 * 29 and tile[5::29, 5::29].tolist() == [
        [10 * r + c for c in range(5)] for r in range(4)
    ]


def test_what_never_changes_or_was_measured_once_is_a_number(workdir):
    lines = [
        {"step": step, "split": "train", "loss": 1 / step, "skipped": 0.0, "learning_rate": 0.1} for step in range(1, 5)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*lines, LOG[2]]))
    page = write_report(workdir).read_text()
    assert len(re.findall("<svg", page)) == 1  # the loss
    assert "learning_rate train 0.1 throughout" in texts(page) and "accuracy eval 0.875 step 200" in texts(page)
    assert "skipped" not in texts(page[: page.index("Metrics")])


def test_axes_say_what_they_are_and_no_label_is_cut(workdir):
    """Each label lies inside the drawing, by the letters that it was laid out with, with some room for wider ones."""
    lines = [
        {"step": 2_000_000 * n, "split": "train", "loss": 10.0 ** (-2 * n), "learning_rate/adam": n / 3e6}
        for n in range(1, 8)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawings = re.findall(r"<svg.*?</svg>", write_report(workdir).read_text(), flags=re.S)
    assert len(drawings) == 2
    for drawing, unit in zip(drawings, ("loss, log scale", "learning rate"), strict=True):
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', drawing)[1])
        words = re.findall(r'anchor: (\w+)[^>]* x="([\d.]+)"[^>]*rotate\((-?\d+)[^>]*>([^<]*)<', drawing)
        assert {"step (updates)", unit} <= {text for *_, text in words}
        assert "12M" in [text for *_, text in words]
        for anchor, x, turned, text in words:
            size = 8.0 if turned == "-90" else 5.5 * len(text)  # of 8 points, with room for wide letters
            left = float(x) - size * {"middle": 0.5, "end": 1.0}[anchor]
            assert left >= 0 and left + size <= width, (text, left, width)


def test_the_runs_own_metric_comes_first_and_so_do_the_samples(workdir):
    for name in ("nearest", "samples", "another"):
        save_gallery(workdir, 1, name=name, item=name)
    shown = texts(write_report(workdir).read_text())
    assert shown.index("eval/ece 0.00417 at the last step") < shown.index("eval/accuracy 0.984 published")
    assert shown.index("samples step 1") < shown.index("nearest step 1") < shown.index("another step 1")


def test_captioned_pictures_are_shown_one_by_one(workdir):
    images = np.arange(25 * 16, dtype=np.uint16).reshape(25, 4, 4).astype(np.uint8)
    captions = [f"true {i}" for i in range(25)]
    save_gallery(workdir, 9, name="worst", item=SimpleNamespace(images=images, captions=captions, columns=5))
    np.testing.assert_array_equal(load_gallery(workdir)["worst"][9].images, images)
    page = write_report(workdir).read_text()
    assert re.findall("<figcaption>(true [0-9]+)</figcaption>", page) == captions
    assert "--n:5" in page


def test_no_pictures_at_all_is_shown_as_none(workdir):
    save_gallery(workdir, 9, name="worst", item=SimpleNamespace(images=np.zeros((0, 4, 4)), captions=[], columns=5))
    assert "worst step 9 none" in texts(write_report(workdir).read_text())


@pytest.mark.parametrize(("shape", "captions", "message"), [
    ((3, 4), None, r"images \(3, 4\): give \(N,H,W\) or \(N,H,W,C\)"),
    ((3, 4, 4), ["one"], "1 captions for 3 images"),
])  # fmt: skip
def test_unfit_pictures_are_usage_errors(workdir, shape, captions, message):
    with pytest.raises(UsageError, match=message):
        save_gallery(workdir, 1, name="x", item=SimpleNamespace(images=np.zeros(shape), captions=captions, columns=1))


def test_unreadable_gallery_file_is_named(workdir):
    pictures = SimpleNamespace(images=np.zeros((2, 4, 4)), captions=None, columns=1)
    path = save_gallery(workdir, 1, name="x", item=pictures)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UsageError, match="00000001-x.npz can't be read"):
        write_report(workdir)


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, bigjax.look.report, bigjax.look.display; print({'matplotlib', 'PIL', 'jax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
