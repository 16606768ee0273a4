"""The families that are known: which file of this folder speaks for an architecture, or for a model of ours."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from bigjax import UsageError
from bigjax.pretrained.names import Row

Config = dict[str, Any]
FILES = (
    "gpt", "bert", "vit", "resnet", "t5", "inception",
    "gemma", "mixtral",
    "convnext", "efficientnet", "vgg", "densenet",
)  # fmt: skip
UNITS = {"gelu": "gelu_erf", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "relu": "relu"}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of one class are known to others.

    architectures: what config.json calls them. kind: our class. read: config.json and the names of the tensors ->
    fields of ours. write: a model -> its config.json; UsageError where they have no such model. table: of a model, and
    the names of the tensors where there are some, which of their modules is which of ours. ours: their names in a file
    -> those of the table (regular expressions). same: what a file may hold once more, and which tensor
    it must equal then. ignored: what a file may hold beside. inputs: shapes of what a model is called with. pixels:
    mean and deviation of its images where a folder says nothing of them.
    """

    architectures: tuple[str, ...]
    kind: type[nn.Module]
    read: Callable[[Config, set[str]], Config]
    write: Callable[[nn.Module], Config]
    table: Callable[[nn.Module, set[str]], list[Row]]
    inputs: Callable[[nn.Module], tuple[jax.ShapeDtypeStruct, ...]]
    ours: tuple[tuple[str, str], ...] = ()
    same: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET

    def architecture(self, config: Config) -> str:
        """That of config.json's which is known here."""
        return next(name for name in _named(config) if name in self.architectures)


def families() -> list[Family]:
    return [importlib.import_module(f"bigjax.pretrained.{file}").FAMILY for file in FILES]


def _named(config: Config) -> list[Any]:
    """As transformers says it, or timm."""
    names = config.get("architectures") or [config.get("architecture")]
    return names if isinstance(names, list) else [names]


def family_of(config: Config, folder: Path) -> Family:
    """By config.json, which names one architecture."""
    known = {name: family for family in families() for name in family.architectures}
    names = _named(config)
    found = [name for name in names if isinstance(name, str) and name in known]
    if not found:
        said = ", ".join(map(str, filter(None, names))) or "no architecture"
        ours = [name for name in known if name[0].isupper()]
        raise UsageError(
            f"{folder}/config.json names {said}, which is not known here: {', '.join(ours)} are, and of timm "
            f"{', '.join(name for name in known if name not in ours)}"
        )
    if config.get("quantization_config"):
        raise UsageError(
            f"{folder}/config.json says that the weights are quantized (quantization_config), and such are not read: "
            "give a folder of the same model with whole ones"
        )
    return known[found[0]]


def family_for(model: nn.Module) -> Family:
    """By our model."""
    for family in families():
        if type(model) is family.kind:
            return family
    kinds = ", ".join(sorted({family.kind.__name__ for family in families()}))
    raise UsageError(f"a {type(model).__name__} has no form that others read: only {kinds} can be saved for them")


def only(config: Config, name: str, *values: Any) -> Any:
    """config[name], which must be one of `values`, as it is where nothing is said."""
    value = config.get(name, values[0])
    if value not in values:
        raise UsageError(
            f"config.json says {name} = {value!r}, which is not known here: only {', '.join(map(repr, values))}"
        )
    return value


def renamed(config: Config, names: Config) -> Config:
    """A config with what it gives by other names (other -> usual) under the usual ones too."""
    given = {usual: config[other] for other, usual in names.items() if other in config}
    for usual, value in given.items():
        only(config, usual, value)
    return config | given


def side(config: Config, name: str, otherwise: int) -> int:
    """config[name], pixels of a square: one number, or the same for both sides."""
    value = config.get(name, otherwise)
    sides = {*value} if isinstance(value, list | tuple) and len(value) == 2 else {value}
    if len(sides) > 1 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise UsageError(f"config.json says {name} = {value!r}, which is not known here: only one side, of pixels, is")
    return sides.pop()


def rotary(config: Config, base: float, *kinds: str) -> Config:
    """How positions turn, as transformers 4 said it or as 5 does; `rope_type` is one of `kinds`."""
    said = config.get("rope_scaling") or config.get("rope_parameters") or {}
    beside = {k: config[k] for k in ("rope_theta", "partial_rotary_factor") if config.get(k) is not None}
    rope = {"rope_theta": base} | beside | said
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    only(rope, "rope_type", *kinds)
    only(rope, "partial_rotary_factor", 1)
    return rope


def arguments(config: Config, names: Config, *, pool: str = "avg") -> Config:
    """The fields that timm's config.json gives in `model_args`, of those in `names` (theirs -> ours).

    pool: how these models make one row of an image, which they all do.
    """
    for said in (config, config.get("pretrained_cfg") or {}):
        only(said, "global_pool", pool)
    given = config.get("model_args") or {}
    if unknown := sorted(given.keys() - names.keys()):
        raise UsageError(
            f"config.json gives {config['architecture']} the arguments {', '.join(unknown)}, which are not known here: "
            f"only {', '.join(names) or 'none'} are"
        )
    return {names[k]: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def timm(architecture: str, outputs: int, **arguments: Any) -> Config:
    """config.json as timm reads it."""
    told = {"architecture": architecture, "num_classes": outputs, "model_args": arguments}
    return told | {"pretrained_cfg": {"num_classes": outputs}}


def unit_from(config: Config, name: str, otherwise: str) -> str:
    """Our name of the activation that config[name] names."""
    unit = config.get(name, otherwise)
    return UNITS[only({name: unit}, name, *UNITS)]


def unit_to(activation: Any) -> str:
    """Their name of an activation of ours."""
    for theirs, ours in UNITS.items():
        if activation == ours:
            return theirs
    raise UsageError(
        f"activation {activation!r} has no name that others know: only {', '.join(dict.fromkeys(UNITS.values()))} have"
    )


def labels(config: Config) -> int:
    """How many outputs a head for classes has."""
    return len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)


def labels_of(count: int) -> Config:
    """The same as config.json says it."""
    names = {n: f"LABEL_{n}" for n in range(count)}
    return {"id2label": names, "label2id": {name: n for n, name in names.items()}}
