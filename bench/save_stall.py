"""What saving costs: how long the loop stands still for a save, and what the checksums add to it.

    python bench/save_stall.py        # writes experiments/results/save_stall.json; some minutes, on a quiet machine

The stall is the time of the updates from a save until it is committed, less as many medians of updates without one;
the share is of the time between two saves at python_gpt's default policy, every 500 updates. Saves with and without
checksums are made in turn, with nothing else running, until they are committed.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments" / "text"))

import python_gpt  # noqa: E402

from bigjax.program import AHEAD, Program  # noqa: E402
from bigjax.run import machine, manifest, source, workdir  # noqa: E402
from bigjax.run.checkpoint import Checkpoints  # noqa: E402

RESULT = ROOT / "experiments" / "results" / "save_stall.json"
SAVES, BETWEEN, PAIRS = 8, 60, 9


def size(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def stalls(program: Program, config: python_gpt.Config, folder: str) -> tuple[dict[str, Any], Any]:
    """The loop as train.py has it: updates, the host two ahead, saves in between; and the last state."""
    state, window, batches = program.initialize(program.key), program.fresh_window(), program.batches(0)
    checkpoints, controls = Checkpoints(folder, keep=config.keep), program.controls()
    under_way: deque[Any] = deque()

    def updates(count: int) -> list[float]:
        """Makes so many; when each was done."""
        nonlocal state, window
        times = []
        for _ in range(count):
            state, window, done = program.update(state, window, next(batches), program.key, controls)
            under_way.append(done)
            if len(under_way) > AHEAD:
                under_way.popleft().block_until_ready()
            times.append(time.perf_counter())
        return times

    updates(30)  # compiles, and warms up
    quiet, stalled, returned = [], [], []
    for save in range(SAVES):
        times = updates(BETWEEN)
        quiet += [b - a for a, b in zip(times[5:], times[6:])]  # the host has its lead again
        begin = time.perf_counter()
        checkpoints.save(save, {"state": state, "window": window})
        returned.append(time.perf_counter() - begin)
        stalled.append(updates(BETWEEN)[-1] - begin)  # as many updates and one save
        checkpoints.wait()
    batches.close()
    checkpoints.close()
    update = statistics.median(quiet)
    stall = statistics.median(stalled) - BETWEEN * update
    period = config.save_every * update
    return {
        "update_seconds": update,
        "save_returns_seconds": statistics.median(returned),
        "stall_seconds_a_save": stall,
        "stall_seconds_of_each": [s - BETWEEN * update for s in stalled],
        "updates_between_saves": config.save_every,
        "stall_share": stall / (period + stall),
        "bytes": size(state),
    }, state


def checksums(tree: Any, folder: str) -> dict[str, Any]:
    """Seconds until a save is committed, with and without checksums, in turn."""
    write, seconds = manifest.write, {True: [], False: []}
    checkpoints = Checkpoints(folder, keep=1)
    for step in range(2 * PAIRS + 2):
        summed = step % 2 == 0
        manifest.write = write if summed else lambda *args, **where: None
        begin = time.perf_counter()
        checkpoints.save(step, tree)
        checkpoints.wait()
        if step > 1:  # the first of each warms up
            seconds[summed].append(time.perf_counter() - begin)
    manifest.write = write
    checkpoints.close()
    summed, plain = statistics.median(seconds[True]), statistics.median(seconds[False])
    return {"bytes": size(tree), "seconds": summed, "seconds_without": plain, "added": summed / plain - 1}


def main() -> None:
    machine.keep_memory()
    config = dataclasses.replace(python_gpt.Config(), minutes=None, steps=10**4)
    experiment = python_gpt.build(config)
    program = Program(experiment, config, experiment.train, steps=10**4)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(program.mesh):
        loop, state = stalls(program, config, f"{folder}/loop")
        large = {f"x{i}": jax.random.normal(jax.random.key(i), (1024, 2048)) for i in range(25)}  # 210 MB
        jnp.zeros(()).block_until_ready()
        found = {
            "python_gpt": loop,
            "checksums": [checksums({"state": state}, f"{folder}/small"), checksums(large, f"{folder}/large")],
            "devices": workdir.devices(),
            "versions": source.versions(),
            "git_commit": (source.commit() or "unknown")[:7],
        }
    workdir.write_json(RESULT, found)
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
