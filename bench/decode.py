"""Decoding: tokens a second of GPT-2 (124M, random weights) beside transformers on the same cores, and peak memory.

    python bench/decode.py        # writes experiments/results/decode.json; ten minutes, on a quiet machine

Greedy, in float32, on two threads each: 128 new tokens behind prompts of 32, for 1 and 8 rows, in turn. Of
transformers it is `generate` with its cache and the attention that it chooses itself. Each runs in a process of its
own, and the other waits. Seconds are medians of whole calls, prompt included; the first call of each compiles or warms
up. Peak memory is a process's highest resident size, which has the weights (498 MB) in it.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parents[1] / "experiments" / "results" / "decode.json"
TIMES, PROMPT, NEW, THREADS = 7, 32, 128, 2
ROWS = (1, 8)
SMALL = {"layers": 1, "width": 64, "heads": 2}  # of --smoke: whether all of it runs


def ours(smoke: bool) -> Any:
    """rows -> a call that writes."""
    import jax
    import numpy as np

    from bigjax.models import GPT
    from bigjax.use.generate import generate

    model = GPT(**SMALL) if smoke else GPT()
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))

    def write(rows: int) -> None:
        prompts = np.random.default_rng(0).integers(0, model.vocabulary, (rows, PROMPT))
        made = generate(model, variables, prompts, length=NEW, temperature=0)
        assert np.asarray(made.length_R).tolist() == [NEW] * rows

    return write


def theirs(smoke: bool) -> Any:
    import importlib.util

    import numpy as np
    import torch

    looked_for = importlib.util.find_spec  # transformers imports torchvision where it is, also one of another torch
    importlib.util.find_spec = lambda name, *more: None if name == "torchvision" else looked_for(name, *more)
    import transformers

    torch.set_num_threads(THREADS)
    sizes = {"n_layer": SMALL["layers"], "n_embd": SMALL["width"], "n_head": SMALL["heads"]} if smoke else {}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def write(rows: int) -> None:
        prompts = torch.from_numpy(np.random.default_rng(0).integers(0, 50257, (rows, PROMPT)))
        with torch.inference_mode():
            made = model.generate(prompts, attention_mask=torch.ones_like(prompts), **how)
        assert made.shape == (rows, PROMPT + NEW)

    return write


def serve(side: str, smoke: bool) -> None:
    """Runs in a process of its own: a number of rows on a line of input, seconds and peak memory on one of output."""
    write = {"ours": ours, "theirs": theirs}[side](smoke)
    for line in sys.stdin:
        begin = time.perf_counter()
        write(int(line))
        seconds = time.perf_counter() - begin
        status = Path("/proc/self/status").read_text()
        peak = next(int(s.split()[1]) * 1024 for s in status.splitlines() if s.startswith("VmHWM:"))
        print(json.dumps([seconds, peak]), flush=True)


def main(smoke: bool) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(THREADS)}
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    found: dict[str, Any] = {"prompt": PROMPT, "new": NEW, "threads": THREADS, "dtype": "float32"}
    for rows in ROWS:
        sides = {}
        for side in ("ours", "theirs"):
            command = [sys.executable, __file__, side, *["--smoke"] * smoke]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
            sides[side] = subprocess.Popen(command, **pipes, preexec_fn=lambda: os.sched_setaffinity(0, cores))
        taken: dict[str, list[float]] = {side: [] for side in sides}
        peaks = {}
        for _ in range(2 if smoke else TIMES + 1):
            for side, process in sides.items():
                print(rows, file=process.stdin, flush=True)
                seconds, peaks[side] = json.loads(process.stdout.readline())
                taken[side].append(seconds)
        for process in sides.values():
            process.stdin.close()
            assert process.wait() == 0
        medians = {side: statistics.median(times[1:]) for side, times in taken.items()}
        found[f"rows_{rows}"] = {
            "tokens_per_second": {side: round(rows * NEW / t, 1) for side, t in medians.items()},
            "ratio": round(medians["theirs"] / medians["ours"], 3),
            "peak_bytes": peaks,
            "first_call_seconds": {side: times[0] for side, times in taken.items()},
            "seconds_of_each": {side: times[1:] for side, times in taken.items()},
        }
    if smoke:
        print(json.dumps(found, indent=1))
        return
    import torch
    import transformers

    from bigjax.run import source, workdir

    found["devices"] = workdir.devices()
    found["versions"] = source.versions() | {"torch": torch.__version__, "transformers": transformers.__version__}
    found["git_commit"] = (source.commit() or "unknown")[:7]
    workdir.write_json(RESULT, found)
    print(RESULT.read_text())


if __name__ == "__main__":
    smoke = "--smoke" in sys.argv
    if sys.argv[1:2] in (["ours"], ["theirs"]):
        serve(sys.argv[1], smoke)
    else:
        main(smoke)
