"""What of a model is not trained (`models.adapt`): its place in a state, and its name."""

from collections.abc import Mapping
from typing import Any

from bigjax.optim import path_string


def frozen_of(model_state: Mapping[str, Any]) -> dict[str, Any]:
    """Of each player the parameters that are not trained, {player: {"frozen": tree}}."""
    return {
        player: {"frozen": own["frozen"]}
        for player, own in model_state.items()
        if isinstance(own, Mapping) and "frozen" in own
    }


def name_of(path: tuple[Any, ...]) -> str:
    """PLAYER/PATH of a parameter in {"params": …, "model_state": `frozen_of`}, the same whether it is frozen."""
    collection, player, *rest = path_string(path).split("/")
    return "/".join([player, *(rest[1:] if collection == "model_state" else rest)])
