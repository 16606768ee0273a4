"""What loading costs: seconds beside those of reading the file once, and host memory beside the parameters.

    python bench/load_weights.py        # writes experiments/results/load_weights.json; a minute, on a quiet machine

Folders of about 500 MB, in the page cache throughout: GPT-2's layout in float32, which is ours; Llama's, where each
kernel is transposed, in float32 and in bfloat16; all are loaded as float32. Reading is `Path.read_bytes`, loading all
of `bigjax.pretrained.load`, each 9 times in turn: the ratio is that of medians.

Memory is measured in a process with 8 CPU devices, whose memory is the host's: a thread reads every millisecond what
the process holds (RssAnon: pages of the file itself are the page cache's). From the peak, what there was before is
taken away, and the bytes of the parameters' shards, those that several devices share once.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from bigjax import pretrained
from bigjax.pretrained import names, reading, store
from bigjax.run import source, workdir
from bigjax.sharding import MeshConfig, make_mesh

RESULT = Path(__file__).parents[1] / "experiments" / "results" / "load_weights.json"
TIMES = 9
GPT2 = {"architectures": ["GPT2LMHeadModel"]}
LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "num_attention_heads": 16, "vocab_size": 32_000}
LLAMA |= {"intermediate_size": 2816, "tie_word_embeddings": True}
KINDS = {  # name: (config.json, the dtype of the file)
    "gpt2_float32": (GPT2, np.float32),
    "llama_float32": (LLAMA | {"num_hidden_layers": 7}, np.float32),
    "llama_bfloat16": (LLAMA | {"num_hidden_layers": 17}, ml_dtypes.bfloat16),
}


def written(folder: Path, config: dict[str, Any], dtype: Any) -> Path:
    """A folder with the tensors that the configuration asks for."""
    family, random = reading.family_of(config, folder), np.random.default_rng(0)
    model = family.kind(**family.read(config, set()))
    shapes = names.shapes_of(model, family.inputs(model))
    found = names.sources(family.table(model, set()), shapes).values()
    tensors = {name: s.shape for s in found for name in s.theirs}
    rows = [
        (name, shape, np.dtype(dtype), lambda shape=shape: random.random(shape, np.float32).astype(dtype))
        for name, shape in tensors.items()
    ]
    store.write_tensors(folder / store.WHOLE, rows)
    (folder / store.CONFIG).write_text(json.dumps(config))
    return folder


def seconds(folder: Path) -> dict[str, Any]:
    """Of reading and of loading, in turn; the first of each warms up."""
    taken: dict[str, list[float]] = {"read": [], "load": []}
    for _ in range(TIMES + 1):
        for name, call in (
            ("read", (folder / store.WHOLE).read_bytes),
            ("load", lambda: jax.block_until_ready(pretrained.load(folder))),
        ):
            begin = time.perf_counter()
            kept = call()
            taken[name].append(time.perf_counter() - begin)
            del kept
    read, load = (statistics.median(v[1:]) for v in taken.values())
    return {
        "bytes": (folder / store.WHOLE).stat().st_size,
        "read_seconds": read,
        "load_seconds": load,
        "ratio": load / read,
        "seconds_of_each": {k: v[1:] for k, v in taken.items()},
    }


def held() -> int:
    """What this process holds of its own, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


def memory(folder: str, scan: bool) -> dict[str, Any]:
    """Runs in the other process: what a load over 8 devices holds beyond the parameters."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), batch_size=8)
    jax.device_put(np.zeros(8)).block_until_ready()
    before, peak, done = held(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, held())

    thread = threading.Thread(target=watch)
    thread.start()
    _, variables = pretrained.load(folder, mesh=mesh, scan=scan)
    done.set()
    thread.join()
    shards = [s.data for x in jax.tree.leaves(variables) for s in x.addressable_shards]
    own = sum({s.unsafe_buffer_pointer(): s.nbytes for s in shards}.values())
    beyond = max(peak, held()) - before - own
    return {"parameter_bytes": own, "largest_shard_bytes": max(s.nbytes for s in shards), "beyond_bytes": beyond}


def in_eight(folder: Path, scan: bool) -> dict[str, Any]:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, str(folder), *["scan"] * scan]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as base:
        for name, (config, dtype) in KINDS.items():
            (folder := Path(base) / name).mkdir()
            found[name] = seconds(written(folder, config, dtype))
            found[name] |= {k: in_eight(folder, k == "sharded_scanned") for k in ("sharded", "sharded_scanned")}
            (folder / store.WHOLE).unlink()
    found["devices"], found["versions"] = workdir.devices(), source.versions()
    found["git_commit"] = (source.commit() or "unknown")[:7]
    workdir.write_json(RESULT, found)
    print(RESULT.read_text())


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(memory(sys.argv[1], sys.argv[2:] == ["scan"])))
    else:
        main()
