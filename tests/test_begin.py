"""A run that begins with the weights of a folder: what it takes, what it leaves, and that it can be resumed."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_with_devices, tiny_experiment
from test_experiments import load, run
from test_pretrained import configured, cut, unpacked
from test_user_files import pictures, said_by

import bigjax
from bigjax import UsageError, pretrained, train
from bigjax.data.crops import Crops
from bigjax.data.pipeline import batches
from bigjax.data.reading import Images
from bigjax.experiment import Experiment, RunConfig
from bigjax.models import BERT, GPT, Inception, ResNet, ViT
from bigjax.models.layers import normalize
from bigjax.ops import optimizers
from bigjax.pretrained import begin, families, inception, vit
from bigjax.program import Program
from bigjax.step import TrainState, init_state
from bigjax.tasks import classify, next_token

MODELS = {
    "vit": ViT(image=4, patch=2, layers=2, width=8, heads=2, mlp=12, outputs=5),
    "resnet": ResNet(stages=(1,), block="basic", width=4, outputs=5),
}
SAID = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1.0], "size": {"height": 4, "width": 4}}


def folder_with(path: Path, model: Any, *inputs: Any) -> Path:
    """A folder of the hub with a model whose numbers are all random, and what it says of images."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: random.uniform(0.1, 1, s.shape).astype(np.float32), shapes)
    pretrained.save(path, model, {k: v for k, v in variables.items() if k != "intermediates"})
    (path / begin.PIXELS).write_text(json.dumps(SAID))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("folders")
    return {name: folder_with(top / name, model, jnp.zeros((1, 4, 4, 3))) for name, model in MODELS.items()}


def experiment(folder: Path, *, outputs: int = 3, scan: bool | None = None, **changes: Any) -> Experiment:
    """Grey images of three classes, by the folder's model under another head."""
    begun = begin.weights(folder)
    fields = {"outputs": outputs} if scan is None else {"outputs": outputs, "scan": scan}
    task = classify(begun.model.clone(**fields), classes=outputs, top_k=2)
    return tiny_experiment(**{"task": task, "initial": begun} | changes)


def born(given: Experiment, *, ema: float = 0.0) -> TrainState:
    """The state that a new run is given, all of it 7."""
    batch = {k: v[:2] for k, v in given.train.items()} | {
        "index": np.zeros(2, np.int32),
        "mask": np.ones(2, np.float32),
    }
    init = partial(init_state, task=given.task, tx=given.tx(1), ema=ema)
    return jax.tree.map(lambda s: jnp.full(s.shape, 7, s.dtype), jax.eval_shape(init, jax.random.key(0), batch))


def agree(state: Any, plain: Any, folder: Path, *, scan: bool = False) -> None:
    """Of the state that a run begins with the body is the folder's and the head as initialized."""
    _, theirs = pretrained.load(folder, **({"scan": True} if scan else {}))
    ours = {"params": dict(state.params["model"]), **state.model_state["model"]}
    own = ours["params"].pop("logits")
    chex.assert_trees_all_equal(own, plain.params["model"]["logits"])
    assert theirs["params"].pop("logits")["kernel"].shape[1] == 5
    chex.assert_trees_all_equal(ours, theirs)
    assert jax.tree.map(jnp.shape, plain.model_state) == jax.tree.map(jnp.shape, state.model_state)


@pytest.mark.parametrize(("name", "scan"), [("vit", None), ("vit", True), ("resnet", None)])
def test_the_body_is_the_folders_and_the_head_is_new(name: str, scan: bool | None, folders: dict[str, Path]) -> None:
    """Averages begin with them too. The images have one channel, and the weights are for three."""
    given = experiment(folders[name], scan=scan)
    assert (given.initial.model.mean, given.initial.model.std) == ((0.1, 0.2, 0.3), (0.5, 0.25, 1.0))
    assert given.initial.side == 4 and given.train["image"].shape[1:] == (4, 4, 1)
    plain = born(given, ema=0.9)
    state, said = given.initial(plain)
    agree(state, plain, folders[name], scan=bool(scan))
    chex.assert_trees_all_equal(state.ema["model"]["params"], state.params["model"])
    count = len(jax.tree.leaves(state.params)) + len(jax.tree.leaves(state.model_state))
    width = 4 if name == "resnet" else 8
    assert said == (
        f"took {count - 2} of {count} arrays from {folders[name]}; as initialized: params/logits/bias (3,), "
        f"params/logits/kernel ({width}, 3)"
    )


def test_grey_images_are_repeated() -> None:
    """By the models, which normalise them."""
    grey, said = jnp.full((2, 4, 4, 1), 0.25), (tuple(SAID["image_mean"]), tuple(SAID["image_std"]))
    one, three = (normalize(image, *said, dtype="float32") for image in (grey, jnp.repeat(grey, 3, axis=-1)))
    chex.assert_trees_all_equal(one, three)
    with pytest.raises(UsageError, match="mean and std have 3 entries, the input's last axis has 2"):
        normalize(jnp.zeros((2, 4, 4, 2)), *said, dtype="float32")


def test_a_head_for_as_many_classes_is_kept(folders: dict[str, Path]) -> None:
    given = experiment(folders["vit"], outputs=5)
    state, said = given.initial(born(given))
    chex.assert_trees_all_equal(state.params["model"], pretrained.load(folders["vit"])[1]["params"])
    assert "as initialized" not in said


def test_other_families_and_tasks(tmp_path: Path) -> None:
    """A GPT whole; a BERT of masked words as a classifier, with what the masks' head alone has left out."""
    for name, kind in (("gpt2", GPT), ("bert_masked", BERT)):
        (tmp_path / name).mkdir()
        unpacked(name, tmp_path / name)
        begun = begin.weights(tmp_path / name, kind)
        assert begun.side is None
        changes = {"head": "sequence", "pooler": True, "outputs": 2} if kind is BERT else {}
        model = begun.model.clone(**changes)
        tokens = {"tokens": np.ones((8, 6), np.int32)}
        task = next_token(model) if kind is GPT else classify(model, classes=2, inputs=lambda batch: (batch["tokens"],))
        state, said = begun(born(tiny_experiment(task=task, train=tokens)))
        left = said.partition("; as initialized: ")[2]
        assert ({"logits", "pooler"} <= set(left.split("/"))) is (kind is BERT) and (kind is BERT or not left)
        layer = pretrained.load(tmp_path / name)[1]["params"]["layer_0"]
        chex.assert_trees_all_equal(state.params["model"]["layer_0"], layer)


def fit(home: Path, given: Experiment, **flags: Any) -> train.Run:
    flags = {"steps": 4, "batch_size": 8, "log_every": 1, "save_every": 2, "eval_every": 4, "keep": 3} | flags
    return train.fit(given, RunConfig(workdir=str(home), **flags), quiet=True)


def log_of(home: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (home / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "second" not in k and "wait" not in k} for line in lines]


def test_a_run_is_resumed_bit_for_bit_and_knows_its_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its own at step 2, not the folder's again; a folder with other weights is another run's."""
    folder = shutil.copytree(folders["resnet"], tmp_path / "folder")
    straight = fit(tmp_path / "run", experiment(folder))
    assert bigjax.load(tmp_path / "run")[0] == straight.model
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    (tmp_path / "cut" / "result.json").unlink()
    shutil.copytree(tmp_path / "cut", tmp_path / "changed")
    resumed = fit(tmp_path / "cut", experiment(folder))
    chex.assert_trees_all_equal(resumed.state, straight.state)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "run")
    model, variables = pretrained.load(folder)
    variables["params"]["conv_stem"]["kernel"] = variables["params"]["conv_stem"]["kernel"] * 2
    pretrained.save(folder, model, variables)
    with pytest.raises(UsageError, match=r"other code or data: .*\n  initial data, checksum of its values: \d+ ->"):
        fit(tmp_path / "changed", experiment(folder))
    with pytest.raises(UsageError, match="--init-from .*, and other weights to begin with: leave one of them out"):
        fit(tmp_path / "both", experiment(folder), init_from=str(tmp_path / "run"))
    assert not (tmp_path / "both" / "config.json").exists()


def on_eight_devices(folders: list[str]) -> None:
    """Each array lies as the state has it, and is the folder's; the step that follows is one device's."""
    from bigjax.sharding import MeshConfig

    for folder, tensor in zip(folders, (2, 1)):
        given = experiment(Path(folder))
        config = RunConfig(batch_size=8, mesh=MeshConfig(data=-1, fsdp=2, tensor=tensor))
        program = Program(given, config, given.train, steps=1)
        plain = program.initialize(program.key)
        state, _ = given.initial(plain)
        places = jax.tree.map(lambda x: x.sharding, state)
        assert places == jax.tree.map(lambda s: s.sharding, program.state_shapes)
        assert any(not place.is_fully_replicated for place in jax.tree.leaves(places.params))
        agree(state, plain, Path(folder))
        with jax.set_mesh(program.mesh):
            fed = program.batches(0)
            state, *_ = program.update(state, program.fresh_window(), next(fed), program.key, program.controls())
            fed.close()
        assert int(state.step) == 1 and int(state.skipped) == 0


@pytest.mark.slow
def test_on_a_mesh(folders: dict[str, Path], tmp_path: Path) -> None:
    given = list(map(str, folders.values()))
    run_with_devices(f"import test_begin; test_begin.on_eight_devices({given!r})", folder=tmp_path)


REFUSED = {
    "another kind": (ResNet, {}, lambda f: None, r"holds ViT \(ViTForImageClassification\), where ResNet is wanted"),
    "another of its kind": (ViT, {"patch": 4}, lambda f: None, "a ViT with patch 2, not 4: leave out what asks"),
    "cut": (ViT, {}, cut, r"is truncated or damaged \(\d+ bytes, where its header says \d+\): fetch it again"),
    "other tensors": (ViT, {}, lambda f: configured(f, num_hidden_layers=1), "not those that its config.json descr"),
    "no mean": (
        ViT,
        {},
        lambda f: (f / begin.PIXELS).write_text(json.dumps(SAID | {"image_mean": 0.5})),
        "preprocessor_config.json says that the mean is 0.5, not three numbers: correct it",
    ),
    "no deviation": (
        ViT,
        {},
        lambda f: (f / begin.PIXELS).write_text(json.dumps(SAID | {"image_std": [0.5, 0, 0.5]})),
        r"the std is \[0.5, 0, 0.5\], not three numbers",
    ),
    "no size": (
        ViT,
        {},
        lambda f: (f / begin.PIXELS).write_text(json.dumps(SAID | {"size": "large"})),
        "preprocessor_config.json says that images have size 'large', which is none: correct it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_refused(wrong: str, folders: dict[str, Path], tmp_path: Path) -> None:
    kind, like, spoil, said = REFUSED[wrong]
    folder = shutil.copytree(folders["vit"], tmp_path / "folder")
    spoil(folder)
    with pytest.raises(UsageError, match=said) as e:
        begin.weights(folder, kind, like=like)
    assert "\n" not in str(e.value)


def test_a_body_of_another_shape_is_refused(folders: dict[str, Path]) -> None:
    """As a script of one's own may make it; no array of it is begun afresh unsaid."""
    begun = begin.weights(folders["vit"])
    wide = tiny_experiment(task=classify(begun.model.clone(outputs=3, mlp=16), classes=3, top_k=2), initial=begun)
    with pytest.raises(UsageError, match=r"of this model: params/layer_0/mlp/down/kernel \[16, 8\] \(\(12, 8\)"):
        begun(born(wide))


def test_what_folders_say_of_pixels(tmp_path: Path) -> None:
    """In transformers' words and in timm's; ImageNet's mean and deviation where nothing is said."""
    family, usual = vit.FAMILY, families.IMAGENET
    timm = {"mean": [0.5, 0.5, 0.5], "std": [0.1, 0.1, 0.1], "input_size": [3, 240, 240]}
    half = ((0.5,) * 3, (0.1,) * 3)
    cropped = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    raw = {"size": {"shortest_edge": 256}, "do_normalize": False, "image_mean": [1, 1, 1]}
    assert begin.pixels(tmp_path, {}, family) == (None, *usual)
    assert begin.pixels(tmp_path, {}, inception.FAMILY) == (None, (0.5,) * 3, (0.5,) * 3)
    for config in (timm, {"pretrained_cfg": timm}):
        assert begin.pixels(tmp_path, config, family) == (240, *half)
    for given, expected in (
        ({"size": 224}, (224, *usual)),
        (cropped, (224, *usual)),
        (raw, (256, (0.0,) * 3, (1.0,) * 3)),
        ({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.1, 0.1]}, (None, *half)),
    ):
        (tmp_path / begin.PIXELS).write_text(json.dumps(given))
        assert begin.pixels(tmp_path, timm, family) == expected


def test_nothing_given_is_nothing_to_begin_with() -> None:
    assert begin.weights(None, ViT, Inception) is None


# ---- the scripts


def test_a_script_begins_with_a_folder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Grey pictures of another size; what is kept brings the model back, and the same command again is finished."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", 20)
    words = ["--data", "pictures", "--pretrained", str(folders["vit"]), "--steps", "2", "--batch-size", "8"]
    run("vit_classify", *words, "--dropout", "0.1")
    said = capsys.readouterr().out
    assert f"took 38 of 40 arrays from {folders['vit']}; as initialized: params/logits/bias (2,), params/" in said
    model, variables = bigjax.load("runs/vit_classify")
    assert (model.image, model.patch, model.outputs, model.dropout, model.mean) == (4, 2, 2, 0.1, (0.1, 0.2, 0.3))
    start = pretrained.load(folders["vit"])[1]["params"]["patches"]["kernel"]
    assert 0 < np.abs(variables["params"]["patches"]["kernel"] - start).max() < 0.05
    module = load("vit_classify")
    for size, shape in (
        ({}, (4, 4, 1)),
        ({"images": Images(resize=7)}, (8, 8, 1)),
        ({"crops": Crops(side=6)}, (6, 6, 1)),
    ):
        built = module.build(module.Config(data="pictures", pretrained=str(folders["vit"]), **size))
        assert (
            np.shape(next(batches(built.train, seed=0, batch_size=2, transform=built.transform))["image"][0]) == shape
        )


def test_scripts_refuse_other_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    unpacked("bert", tmp_path)
    kinds = {"bert": tmp_path, **folders}
    for script, folder, flags, said in (
        ("vit_classify", "bert", {}, "holds BERT (BertModel), where ViT is wanted: give a folder with that"),
        ("vit_classify", "resnet", {}, "holds ResNet (ResNetForImageClassification), where ViT is wanted"),
        (
            "vit_classify",
            "vit",
            {"model": "s16"},
            "holds a ViT with patch 2, not 16; layers 2, not 12; width 8, not 384",
        ),
        (
            "vit_classify",
            "vit",
            {"heads": 4},
            "holds a ViT with heads 2, not 4: leave out what asks for that, or give",
        ),
        ("resnet_classify", "bert", {}, "holds BERT (BertModel), where ResNet or Inception is wanted"),
        ("resnet_classify", "resnet", {"model": "inception_v3"}, "ForImageClassification), where Inception is wanted"),
        (
            "resnet_classify",
            "resnet",
            {"model": "resnet50"},
            "holds a ResNet with stages (1,), not (3, 4, 6, 3); block b",
        ),
    ):
        module = load(script)
        assert said in said_by(module.build, module.Config(pretrained=str(kinds[folder]), **flags))
    assert "'' cannot be read or written here" in said_by(module.build, module.Config(pretrained=""))


def test_inception_is_a_model_of_the_script(tmp_path: Path) -> None:
    """From scratch, without the second head; and LARS."""
    module = load("resnet_classify")
    built = module.build(module.Config(model="inception_v3", images=Images(resize=75), data="digits", lars=True))
    model = built.task.models["model"]
    assert isinstance(model, Inception) and (model.outputs, model.aux) == (10, False)
    assert built.train["image"].shape[1:] == (75, 75, 1)
    assert built.tx == optimizers.LARS(**vars(module.Config().sgd))
