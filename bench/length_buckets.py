"""What batches by length save: examples a second, beside all texts padded to the longest.

    python bench/length_buckets.py sst2/train.jsonl        # lines of text and label; some minutes, on a quiet machine
    python bench/length_buckets.py sst2/train.jsonl --pretrained FOLDER

A BERT of 6 layers of 384, with a tokenizer learned from the texts, or one of the folder's shape with its tokenizer, is
trained in batches of 16, by length and with each text padded to the longest of all, in turn, the same number of
updates; every shape is compiled before. Kept in experiments/results/length_buckets.json are each turn's examples a
second.
"""

import argparse
import json
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments" / "text"))

import bert_classify  # noqa: E402

from bigjax import cli, sharding  # noqa: E402
from bigjax.data.lengths import ByLength  # noqa: E402
from bigjax.data.prefetch import Shapes  # noqa: E402
from bigjax.program import AHEAD, Program  # noqa: E402
from bigjax.run import machine, source, workdir  # noqa: E402

RESULT = ROOT / "experiments" / "results" / "length_buckets.json"


class Trained:
    """A run that goes on from turn to turn."""

    def __init__(self, experiment: Any, config: Any, split: ByLength) -> None:
        self.program, self.size = Program(experiment, config, split, steps=10**6), config.batch_size
        self.state, self.window = self.program.initialize(self.program.key), self.program.fresh_window()
        self.batches, self.controls, self.shares = self.program.batches(0), self.program.controls(), []
        self.updates(Shapes(self.program).all())  # compiles

    def updates(self, count: int) -> float:
        """Makes so many, as train.py does, the host ahead; examples a second."""
        under_way: deque[Any] = deque()
        begin = time.perf_counter()
        for _ in range(count):
            batch, program = next(self.batches), self.program
            self.shares.append((batch["tokens"].size, batch["length"]))
            given = (self.state, self.window, batch, program.key, self.controls)
            self.state, self.window, done = program.update(*given)
            under_way.append(done)
            if len(under_way) > AHEAD:
                under_way.popleft().block_until_ready()
        self.state.step.block_until_ready()
        return count * self.size / (time.perf_counter() - begin)

    def padding(self) -> float:
        places, real = zip(*((n, int(length.sum())) for n, length in self.shares), strict=True)
        return 1 - sum(real) / sum(places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a .jsonl or .csv with text and label")
    parser.add_argument("--pretrained", help="a folder with weights of a BERT")
    parser.add_argument("--updates", type=int, default=50, help="a turn")
    parser.add_argument("--turns", type=int, default=7)
    asked = parser.parse_args()
    machine.cache_compilations(True)
    shape = ["--pretrained", asked.pretrained] if asked.pretrained else "--layers 6 --width 384 --heads 12".split()
    config, _ = cli.parse(bert_classify.Config, "train", args=["--data", asked.data, *shape])
    experiment = bert_classify.build(config)
    rows, speeds = experiment.train, {"by_length": [], "longest": []}
    splits = {"by_length": rows, "longest": ByLength(rows, sizes=(int(rows.lengths.max()),))}
    with jax.set_mesh(sharding.make_mesh(config.mesh, batch_size=config.batch_size)):
        runs = {name: Trained(experiment, config, split) for name, split in splits.items()}
        for _ in range(asked.turns):
            for name, run in runs.items():
                speeds[name].append(run.updates(asked.updates))
            print({name: round(found[-1], 1) for name, found in speeds.items()}, flush=True)
    for run in runs.values():
        run.batches.close()
    times = [a / b for a, b in zip(*speeds.values(), strict=True)]
    record = {
        "data": Path(asked.data).name,
        "rows": len(rows.lengths),
        "parameters": sum(x.size for x in jax.tree.leaves(runs["longest"].state.params)),
        "batch_size": config.batch_size,
        "sizes": {name: list(split.sizes) for name, split in splits.items()},
        "padding_share": {name: run.padding() for name, run in runs.items()},
        "examples_per_second": speeds,
        "times_as_fast": {"median": statistics.median(times), "turns": times},
        "devices": workdir.devices(),
        "commit": (source.commit() or "unknown")[:7],
        "versions": source.versions(),
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(f"by length {statistics.median(times):.2f} times as fast; padding {record['padding_share']}")


if __name__ == "__main__":
    main()
