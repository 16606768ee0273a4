"""What --help and help(RunConfig) say of each flag."""

import dataclasses
import inspect
import pydoc
from dataclasses import dataclass
from typing import Annotated

import pytest
from test_experiments import SCRIPTS, load

from bigjax import cli
from bigjax.data.augment import Augmentation
from bigjax.data.crops import Crops
from bigjax.experiment import NonNegative, RunConfig
from bigjax.look import flags
from bigjax.ops.optimizers import LARS, SGD
from bigjax.optim import AdamW
from bigjax.sharding import DistributedConfig, MeshConfig


@dataclass(frozen=True)
class Group:
    rate: float = 0.5  # of the group


@dataclass(frozen=True)
class Config(RunConfig):
    steps: int | None = 7
    data: str = "#1"  # my own # data
    length: int = 3  # also a group's name
    # above the field
    sizes: Annotated[tuple[int, ...], NonNegative] = (
        4,
        5,
    )
    mute: bool = False
    group: cli.Flat[Group] = Group()


def help_of(Config: type, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.parse(Config, verb, args=["--help"], prog="mine.py")
    return capsys.readouterr().out


def test_each_flag_of_runconfig_has_a_text_and_a_group() -> None:
    for f in dataclasses.fields(RunConfig):
        group, text = flags.told(RunConfig)[f.name]
        assert group and (text or dataclasses.is_dataclass(f.default)), f.name
    assert list(flags.groups(RunConfig))[1:] == ["run", "length", "data", "optimization", "log", "checkpoint", "device"]


def test_help_of_runconfig_shows_them() -> None:
    text = pydoc.plain(pydoc.render_doc(RunConfig))
    assert "optimization:\n |      batch_size = 128: examples an update, over all devices" in text
    assert "mesh = MeshConfig(): Devices along each axis" in text
    assert inspect.getdoc(Config) != inspect.getdoc(RunConfig)  # a script's own stays its own


def test_a_text_is_the_comment_behind_or_above_a_field_or_its_parents() -> None:
    told = flags.told(Config)
    assert told["data"] == ("data", "my own # data")
    assert told["steps"] == flags.told(RunConfig)["steps"]
    assert told["length"] == ("", "also a group's name") and told["sizes"] == ("", "above the field")
    assert told["mute"] == ("", "")


def test_help_shows_a_scripts_own_flags_first_then_groups(monkeypatch, capsys) -> None:
    text = help_of(Config, "plan", monkeypatch, capsys)
    places = [text.index(w) for w in ("--length", " group options", " run options", " length options", "--topology")]
    assert places == sorted(places)
    assert "updates; of steps, epochs and minutes whichever ends" in text and "(default: 7)" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "--topology" not in help_of(Config, "train", monkeypatch, capsys)


def test_flags_land_where_they_belong() -> None:
    given = "--steps 9 --length 4 --rate 0.25 --mesh.data 2 --no-resume --sizes 1 --data x --topology v5p:2x2x1"
    config, plan = cli.parse(Config, "plan", args=given.split())
    mesh = dataclasses.replace(RunConfig().mesh, data=2)
    assert plan == flags.Plan(topology="v5p:2x2x1")
    assert config == Config(steps=9, length=4, group=Group(0.25), mesh=mesh, resume=False, sizes=(1,), data="x")
    config, _ = cli.parse(Config, "train", args=["--keep", "3"], default=Config(seed=5, group=Group(0.75)))
    assert config == Config(seed=5, keep=3, group=Group(0.75))


def test_a_class_without_source_is_parsed_too() -> None:
    made = dataclasses.make_dataclass("Made", [("width", int, 3)], bases=(RunConfig,), frozen=True)
    assert cli.parse(made, "train", args=["--width", "4"])[0] == made(width=4)


@pytest.mark.parametrize("group", [AdamW, Augmentation, Crops, DistributedConfig, LARS, MeshConfig, SGD])
def test_each_flag_of_a_group_has_a_text(group: type) -> None:
    assert [name for name, (_, text) in flags.told(group).items() if not text] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_of_a_script_has_a_text(script: str) -> None:
    Config = load(script).Config
    texts = {f.name: text for members in flags.groups(Config).values() for f, text in members}
    nested = {f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default)}
    assert [name for name, text in texts.items() if not text and name not in nested] == []
