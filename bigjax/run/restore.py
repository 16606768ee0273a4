"""What other work takes from a run: its model, or the parameters to start from."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from bigjax import UsageError, place
from bigjax.metrics import Metrics
from bigjax.program import Program
from bigjax.run import manifest
from bigjax.run.checkpoint import Checkpoints, to_stderr
from bigjax.run.frozen import frozen_of, name_of
from bigjax.run.modules import module_from
from bigjax.run.workdir import read_config
from bigjax.step import TrainState, averages_of


def load(
    workdir: epath.PathLike,
    *,
    step: int | str | None = None,
    player: str | None = None,
    model: nn.Module | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """(module, variables) of a finished or interrupted run, from its newest checkpoint, on the first device.

    `step` is that of another checkpoint, or "best": of a run with --best, the best of those that are kept. `player`
    chooses among several (a GAN's "generator"). If the run kept averages (--ema), you get those. `model` is for a
    module that config.json can't rebuild: with functions or arrays as fields, or defined in a notebook.

        model, variables = bigjax.load("runs/mnist_cnn")
        logits_BC = model.apply(variables, images_BHWC)

    The script that trained is read, and of it nothing is run but the definitions that the module's class needs. Raises
    UsageError if there is no run, no such checkpoint or player, or only you can say what the module was.
    """
    record = read_config(workdir)
    models = record["models"]
    player = player_of(models, player, workdir=workdir)
    module = module_from(models[player]) if model is None else model
    with contextlib.closing(Checkpoints(place(workdir) / "checkpoints", read_only=True)) as checkpoints:
        step = which(checkpoints, step, best=record["config"].get("best"), workdir=workdir)
        state = checkpoints.shapes(step)["state"]
        averaged = player in (state.get("ema") or {})
        parts = ("ema", "model_state") if averaged else ("params", "model_state")
        chosen = {k: {player: state[k][player]} for k in parts if player in (state.get(k) or {})}
        saved = checkpoints.restore(step, {"state": chosen})["state"]
    kept = saved.get("model_state", {}).get(player, {})
    if not averaged:
        return module, {"params": saved["params"][player], **kept}
    average = saved["ema"][player]
    if "batch_stats" not in average and set(average) != {"params"}:  # release 0.1 averaged parameters alone
        average = {"params": average}
    return module, {**kept, **average}


def player_of(models: Mapping[str, Any], player: str | None = None, *, workdir: epath.PathLike) -> str:
    """A player of a run: the one that is named, or the only one."""
    if player is None and len(models) == 1:
        return next(iter(models))
    if player not in models:
        raise UsageError(
            f"{workdir} has the players {', '.join(models)}: name one, as load(..., player={list(models)[-1]!r})"
        )
    return player


def last_state(workdir: epath.Path, program: Program) -> TrainState:
    """That of a finished run."""
    with contextlib.closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
        if (step := checkpoints.newest(tell=to_stderr)) is None:
            raise UsageError(f"the checkpoints of {workdir} are gone: --no-resume trains the run again")
        return resume(checkpoints, step, program)[0]


def which(checkpoints: Checkpoints, step: int | str | None, *, best: str | None, workdir: epath.PathLike) -> int:
    """The step that is asked for; UsageError if it isn't there, or damaged."""
    if step is None and (step := checkpoints.newest(tell=to_stderr)) is not None:
        return step
    if not (there := checkpoints.steps()):
        raise UsageError(f"{workdir} holds no checkpoint yet: let it train until one is saved")
    kept = ", ".join(map(str, there))
    if step == "best":
        mode, _, name = (best or "").partition(":")
        scores = {n: score for n in there if (score := (checkpoints.manager.metrics(n) or {}).get(name)) is not None}
        if not scores:
            raise UsageError(
                f"{workdir} has no best checkpoint: train with --validation 0.1 --best max:accuracy, or give step= one "
                f"of {kept}"
            )
        step = (max if mode == "max" else min)(scores, key=scores.get)
    if step not in there:
        raise UsageError(f"{workdir} has no checkpoint of step {step!r}: give step= one of {kept}")
    if wrong := manifest.damage(checkpoints.folder, step):
        raise UsageError(f"the checkpoint of step {step} in {workdir} is damaged ({wrong}): give another of {kept}")
    return step


def resume(checkpoints: Checkpoints, step: int, program: Program) -> tuple[TrainState, Metrics]:
    """The state saved at `step` and its open window. Release 0.1 averaged parameters alone: its averages go on."""
    shapes = program.state_shapes
    saved = checkpoints.shapes(step)["state"].get("ema") or {}
    old = any("params" not in own for own in saved.values()) and shapes.ema
    if old:
        shapes = shapes.replace(ema={player: own["params"] for player, own in shapes.ema.items()})
    tree = checkpoints.restore(step, {"state": shapes, "window": program.window_shapes})
    state = tree["state"]
    if old:
        live = averages_of(state.params, jax.tree.map(jax.numpy.copy, state.model_state))
        state = state.replace(ema={player: {**own, "params": state.ema[player]} for player, own in live.items()})
    return state, tree["window"]


def begun(state: TrainState, program: Program, *, tell: Callable[[str], None]) -> TrainState:
    """What a new run begins with: the state as it is initialized, with the experiment's weights or --init-from's."""
    initial, source = program.experiment.initial, program.config.init_from
    if initial and source:
        raise UsageError(f"--init-from {source}, and other weights to begin with: leave one of them out")
    if initial or source:
        state, said = initial(state) if initial else transfer(state, source)
        tell(said)
    return state


def transfer(state: Any, source: epath.PathLike) -> tuple[Any, str]:
    """The state with those parameters of another run whose path and shape are the same, and lines that say which.

    What is frozen (`models.adapt`), here or there, is among them. A shape in which neighbouring axes are one, as heads
    are merged, counts as the same.

    Raises UsageError where the source has no checkpoint, or nothing fits.
    """
    read_config(place(source, "--init-from "))
    checkpoints = Checkpoints(place(source) / "checkpoints", read_only=True)
    step = checkpoints.newest(tell=to_stderr)
    if step is None:
        raise UsageError(f"--init-from {source} holds no checkpoint: give a run that saved one")
    saved = checkpoints.shapes(step)["state"]
    saved = {"params": saved["params"], "model_state": frozen_of(saved.get("model_state") or {})}
    there = {name_of(path): s for path, s in jax.tree.leaves_with_path(saved)}
    ours = {"params": state.params, "model_state": frozen_of(state.model_state)}
    here = {name_of(path): x for path, x in jax.tree.leaves_with_path(ours)}
    taken = {k for k, x in here.items() if k in there and regrouped(there[k].shape, x.shape)}
    if not taken:
        raise UsageError(f"--init-from {source}: none of its parameters has a path and shape of this model")
    same = {k: x.sharding for k, x in here.items() if k in taken and there[k].shape == x.shape}

    def placed(path: Any, s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=same.get(name_of(path), s.sharding))

    abstract = jax.tree_util.tree_map_with_path(placed, {k: v for k, v in saved.items() if v})
    values = checkpoints.restore(step, {"state": abstract})["state"]
    checkpoints.close()
    values = {name_of(path): x for path, x in jax.tree.leaves_with_path(values)}

    def choose(path: Any, x: Any) -> Any:
        k = name_of(path)
        if k in taken and k not in same:
            return jax.device_put(np.asarray(values[k]).reshape(x.shape).astype(x.dtype), x.sharding)
        return values[k].astype(x.dtype) if k in taken else x

    chosen = jax.tree_util.tree_map_with_path(choose, ours)
    params, model_state = chosen["params"], dict(state.model_state)
    model_state |= {player: {**model_state[player], **own} for player, own in chosen["model_state"].items()}
    lists = {
        f"took {len(taken)} of {len(here)} parameters from {source} at step {step}": [k for k in here if k in taken],
        "reshaped": [f"{k} {there[k].shape} -> {x.shape}" for k, x in here.items() if k in taken and k not in same],
        "left as initialized": [
            f"{k} {x.shape}" + (f" (there {there[k].shape})" if k in there else "")
            for k, x in here.items()
            if k not in taken
        ],
        "not in this model": [k for k in there if k not in here],
    }
    ema = jax.tree.map(jax.numpy.copy, averages_of(params, model_state)) if state.ema else state.ema
    said = "\n  ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)
    return state.replace(params=params, model_state=model_state, ema=ema), said


def regrouped(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether two shapes are the same but for neighbouring axes that one of them has as one: (4, 6) and (4, 2, 3)."""
    ends = [set(np.cumprod((1, *shape)).tolist()) for shape in (old, new)]
    return np.prod(old) == np.prod(new) and (ends[0] <= ends[1] or ends[1] <= ends[0])
