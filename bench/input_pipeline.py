"""How many pictures a second the input pipeline makes, beside what one TPU v5e chip would take at most, by its plan.

    python bench/input_pipeline.py            # writes experiments/results/input_pipeline.json; some minutes, when quiet
    python bench/input_pipeline.py --no-plan  # without the TPU compiler: its part stays as it was

The set is one of TFDS, read by index, of synthetic JPEGs of ImageNet's sizes: 500 × 375 pixels mostly, about 110 kB
each (noise of a photograph's spectrum). Each is decoded and cut as `Crops` has it, to 224 pixels, in batches of 128.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tfds_fixture import build_set  # noqa: E402

from bigjax.data import pipeline  # noqa: E402
from bigjax.data.crops import Crops  # noqa: E402
from bigjax.experiment import Experiment, RunConfig  # noqa: E402
from bigjax.models import ResNet, ViT  # noqa: E402
from bigjax.ops import optimizers  # noqa: E402
from bigjax.run import source, workdir  # noqa: E402
from bigjax.sharding import MeshConfig  # noqa: E402
from bigjax.tasks import classify  # noqa: E402
from bigjax.tools import plan  # noqa: E402

RESULT = ROOT / "experiments" / "results" / "input_pipeline.json"
COUNT, BATCH, SIDE, TOPOLOGY, ROWS = 256, 128, 224, "v5e:2x2", 256  # pictures, an update, pixels, rows a chip
SIZES = ((375, 500),) * 4 + ((500, 375),) * 2 + ((333, 500), (400, 400))  # height, width
MODELS = {
    "ResNet-50": lambda dtype: ResNet(dtype=dtype),
    "ViT-S/16": lambda dtype: ViT(width=384, heads=6, dtype=dtype, pool="mean"),
}


def picture(random: np.random.Generator, height: int, width: int) -> bytes:
    """A JPEG whose amplitudes fall with frequency as those of photographs do."""
    y, x = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
    fall = 1 / np.maximum(np.hypot(y, x), 1 / max(height, width)) ** 1.2
    grey, *tints = (
        np.fft.irfft2(fall * np.exp(2j * np.pi * random.random(fall.shape)), (height, width)) for _ in "abc"
    )
    grey, tints = grey / grey.std(), [t / t.std() for t in tints]
    image_HWC = np.stack([grey + 0.3 * tints[0], grey, grey + 0.3 * tints[1]], axis=-1) * 50 + 120
    buffer = io.BytesIO()
    Image.fromarray(np.clip(image_HWC, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=93)
    return buffer.getvalue()


def build(folder: str) -> float:
    """Writes the set; the mean size of a picture in bytes."""
    random = np.random.default_rng(0)
    pictures = [picture(random, *SIZES[n % len(SIZES)]) for n in range(COUNT)]
    rows = [{"image": content, "label": n % 1000} for n, content in enumerate(pictures)]
    features = lambda f: {"image": f.Image(shape=(None, None, 3)), "label": f.ClassLabel(num_classes=1000)}  # noqa: E731
    build_set(folder, "synthetic", "1.0.0", features, {"train": rows, "test": rows[:1]})
    return statistics.mean(map(len, pictures))


def alone(work: Callable[[int], Any], calls: int = COUNT) -> float:
    """Milliseconds of a core for one call."""
    begin = time.process_time()
    for n in range(calls):
        work(n % COUNT)
    return 1e3 * (time.process_time() - begin) / calls


def speed(data: pipeline.Dataset, transform: pipeline.Transform, threads: int, batches: int) -> tuple[float, float]:
    """Pictures a second of the pipeline with so many threads that read, and milliseconds of a core for each."""
    pipeline.READ_THREADS = threads
    made = pipeline.batches(data.train, seed=0, batch_size=BATCH, transform=transform)
    next(made)
    begin, used = time.perf_counter(), time.process_time()
    for _ in itertools.islice(made, batches):
        pass
    passed, used = time.perf_counter() - begin, time.process_time() - used
    made.close()
    return batches * BATCH / passed, 1e3 * used / (batches * BATCH)


def taken(name: str) -> dict[str, Any]:
    """What one chip would take at most, training in bfloat16."""
    chips = 4
    config = RunConfig(batch_size=ROWS * chips, dtype="bfloat16", steps=1000, mesh=MeshConfig(data=chips))
    image_NHWC = np.broadcast_to(np.uint8(0), (ROWS * chips, SIDE, SIDE, 3))
    data = {"image": image_NHWC, "label": np.zeros(ROWS * chips, np.int32)}
    task = classify(MODELS[name](config.dtype), classes=1000)
    p = plan.plan(lambda c: Experiment(task, optimizers.SGD(), data, None), config, topology=TOPOLOGY)
    if not p["fits"]:
        raise SystemExit(f"{name} does not fit {TOPOLOGY} with {ROWS} rows a chip: {p}")
    keys = ("topology", "batch_size", "limited_by", "mfu_bound")
    return {k: p[k] for k in keys} | {"examples_per_second_a_chip": p["examples_per_second_bound"] / chips}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2, 4, 16])
    parser.add_argument("--batches", type=int, default=3, help="measured at each number of threads, three times")
    parser.add_argument("--plan", action=argparse.BooleanOptionalAction, default=True)
    asked, cores = parser.parse_args(), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        size = build(folder)
        os.environ["TFDS_DATA_DIR"] = folder
        data, transform = Crops(side=SIDE).load("tfds:synthetic", takes=("image", "label"))
        reader, random = data.train.reader, np.random.default_rng(0)
        found: dict[str, Any] = {"pictures": COUNT, "mean_bytes": size, "side": SIDE, "cores": cores}
        found["core_milliseconds"] = {
            "read": alone(lambda row: reader[row]),
            "read, decode": alone(lambda row: np.asarray(reader[row]["image"])),
            "read, decode, cut at random": alone(lambda row: transform(data.train[row], random)),
            "read, decode, cut the centre": alone(lambda row: np.asarray(data.train[row]["image"])),
        }
        speeds: dict[int, list[tuple[float, float]]] = {n: [] for n in asked.threads}
        for _ in range(3):  # in turn, so that what else runs meets all
            for n in speeds:
                speeds[n].append(speed(data, transform, n, asked.batches))
    pairs = {n: [statistics.median(column) for column in zip(*each, strict=True)] for n, each in speeds.items()}
    found["by_threads"] = [
        {"threads": n, "examples_per_second": a, "core_milliseconds": b} for n, (a, b) in pairs.items()
    ]
    if asked.plan:  # minutes of compiling
        found["a_v5e_chip_takes"] = {name: taken(name) for name in MODELS}
    else:
        found["a_v5e_chip_takes"] = json.loads(RESULT.read_text())["a_v5e_chip_takes"] if RESULT.exists() else {}
    found |= {"devices": workdir.devices(), "versions": source.versions()}
    found["git_commit"] = (source.commit() or "unknown")[:7]
    print(table(found))
    workdir.write_json(RESULT, found)


def table(found: dict[str, Any]) -> str:
    lines = [f"{found['pictures']} JPEGs of {found['mean_bytes'] / 1e3:.0f} kB; milliseconds of a core for each:"]
    lines += [f"{ms:6.2f} ms  {name}" for name, ms in found["core_milliseconds"].items()]
    for each in found["by_threads"]:
        speed, cost = each["examples_per_second"], each["core_milliseconds"]
        lines.append(
            f"{cost:6.2f} ms  all, by {each['threads']} threads: {speed:.0f} pictures/s of {found['cores']} cores"
        )
    cost = min(each["core_milliseconds"] for each in found["by_threads"])
    for name, p in found["a_v5e_chip_takes"].items():
        chip = p["examples_per_second_a_chip"]
        lines.append(f"{name}: a v5e chip takes {chip:.0f} pictures/s at most: {chip * cost / 1e3:.1f} such cores")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
