"""python -m bigjax doctor: what to know of a machine before paying for it, a line for each thing that a run needs."""

import ast
import os
import queue
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from glob import glob
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices

from bigjax import UsageError, place
from bigjax.run import machine, processes, source

PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", *PLUGINS)
STORAGE_SECONDS = 25


def examine(workdir: str = "runs", *, quick: bool = False) -> bool:
    """Prints a line for each thing checked, then their count; whether none failed. `quick`: without the two steps."""
    there = f"choose a --workdir other than {workdir}"
    if "://" in workdir:
        there = (
            f"check the network, gcloud auth application-default login, and name and roles (docs/tpu.md) of {workdir}"
        )
    cache = "set JAX_COMPILATION_CACHE_DIR to another folder"
    said = check("libraries", libraries, 120, "pip install -e .")
    said += check("data", data, STORAGE_SECONDS, "set TFDS_DATA_DIR to a folder of this machine")
    said += check("working directory", lambda: storage("working directory", workdir), STORAGE_SECONDS, there)
    said += check("compilation cache", lambda: compilation_cache(cache), STORAGE_SECONDS, cache)
    found = check("devices", devices, 120, "end other programs that hold the accelerator, or restart the machine")
    said += found
    if not found["failed"]:  # else what comes behind it would only wait for them again
        said += check("processes", meeting, 60, "start this command on every machine, and open the ports between them")
        if not quick:
            said += check("two steps", two_steps, 300, "see above for what else failed, or reinstall bigjax")
    warnings = f"{said['warning']} warning" + "s" * (said["warning"] != 1)
    print(f"{said['ok']} ok, {warnings}, {said['failed']} failed", flush=True)
    return not said["failed"]


def line(status: str, name: str, found: str, remedy: str = "") -> str:
    return f"{status:<8} {name:<18} {found}" + (f" — {remedy}" if remedy else "")


def check(name: str, lines: Callable[[], Iterable[str]], seconds: float, remedy: str) -> Counter[str]:
    """Prints lines as they come, or one that says why the next does not within `seconds`; how many begin with what."""
    said: queue.Queue[str | None] = queue.Queue()

    def work() -> None:
        try:
            for each in lines():
                said.put(each)
        except UsageError as e:
            said.put(line("failed", name, str(e)))
        except ImportError as e:
            said.put(line("failed", name, processes.first_line(e), 'pip install -e ".[gcs]"'))
        except BaseException as e:  # whatever a broken library or machine leads to
            said.put(line("failed", name, f"{type(e).__name__}: {processes.first_line(e)}", remedy))
        said.put(None)

    threading.Thread(target=work, daemon=True).start()  # left behind where it never answers
    counts = Counter[str]()

    def show(each: str) -> None:
        print(each, flush=True)
        counts[each.split()[0]] += 1

    try:
        for each in iter(lambda: said.get(timeout=seconds), None):
            show(each)
    except queue.Empty:
        show(line("failed", name, f"no answer within {seconds:g} s", remedy))
    return counts


def libraries() -> Iterator[str]:
    yield line("ok", "python", f"{sys.version.split()[0]} ({sys.executable})")
    from bigjax import train  # noqa: F401  (whatever a run imports)

    installed = {d.name: d.version for d in metadata.distributions()}
    told = [f"bigjax {source.version('bigjax')}"]
    told += [f"{name} {installed[name]}" for name in LIBRARIES if name in installed]
    yield line("ok", "libraries", ", ".join(told))


def scripts_by_data() -> dict[str, list[str]]:
    """{data: scripts} by what the class Config of each script gives as its --data."""
    found: dict[str, set[str]] = {}
    for home in (Path(__file__).parents[2], Path()):
        for path in home.glob("experiments/*/*.py"):
            classes = [
                c for c in ast.parse(path.read_text()).body if isinstance(c, ast.ClassDef) and c.name == "Config"
            ]
            for field in (f for c in classes for f in c.body if isinstance(f, ast.AnnAssign)):
                if ast.unparse(field.target) == "data":
                    found.setdefault(ast.literal_eval(field.value), set()).add(path.stem)
    return {name: sorted(scripts) for name, scripts in found.items()}


def data() -> Iterator[str]:
    """Of each set that has a name."""
    from bigjax.data import embedded, text, tfds
    from bigjax.data.pipeline import size_of

    users = scripts_by_data()
    readers = embedded.SETS | {"python": text.python_corpus}
    for name in (*readers, *tfds.NAMES):
        used = f" ({', '.join(users[name])})" if name in users else ""
        try:
            if name in readers:
                part, unit = readers[name](), "bytes" if name == "python" else "examples"
                found = f"{size_of(part.train):,} {unit} to train on, {size_of(part.test):,} to test on{used}"
                yield line("ok", f"data {name}", found)
            elif tfds.ready(tfds.NAMES[name]):
                yield line("ok", f"data {name}", f"prepared{used}")
            else:
                yield line("warning", f"data {name}", f"not prepared{used}", tfds.prepare_command(name))
        except UsageError as e:
            yield line("warning", f"data {name}", f"{e}{used}")


def storage(name: str, folder: str) -> Iterator[str]:
    """Writes a file there and reads it back; on gs:// asks what Orbax asks of a bucket before it saves."""
    begin = time.perf_counter()
    file = place(folder, "--workdir ") / f".doctor-{uuid.uuid4().hex}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(file.name)
    back = file.read_text()
    file.unlink()
    if back != file.name:
        raise OSError("what was read is not what was written")
    if folder.startswith("gs://"):
        from google.cloud.storage import Client  # comes with gcsfs

        Client().get_bucket(folder.split("/")[2])  # needs storage.buckets.get, as roles/storage.legacyBucketReader has
    yield line("ok", name, f"{folder}: written and read back in {time.perf_counter() - begin:.2f} s")


def compilation_cache(remedy: str) -> Iterator[str]:
    machine.cache_compilations(True)
    try:
        yield from storage("compilation cache", jax.config.jax_compilation_cache_dir)
    except OSError as e:
        yield line("warning", "compilation cache", f"every run compiles anew: {e}", remedy)


def devices() -> Iterator[str]:
    found = jax.devices()
    each = (found[0].memory_stats() or {}).get("bytes_limit")
    memory = f", {each / 1e9:.1f} GB each" if each else ""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    yield line("ok", "devices", f"{len(found)} × {found[0].device_kind}{memory}; host memory {host:.1f} GB")
    chips = {"cuda": glob("/dev/nvidia[0-9]*"), "tpu": glob("/dev/accel[0-9]*") + glob("/dev/vfio/[0-9]*")}
    for extra, files in chips.items():
        if files and found[0].platform == "cpu":
            remedy = "unset JAX_PLATFORMS" if os.environ.get("JAX_PLATFORMS") else f'pip install -e ".[{extra}]"'
            yield line("warning", "accelerator", f"{' '.join(files)} is here, but JAX runs on the CPU", remedy)


def meeting() -> Iterator[str]:
    sync_global_devices("bigjax doctor")
    yield line("ok", "processes", f"process {jax.process_index()} of {jax.process_count()}: all have met")


def two_steps() -> Iterator[str]:
    """A tiny MLP through the real loop."""
    if processes.several():  # each would have a temporary folder of its own
        yield line("warning", "two steps", "not tried by several processes", "run a script on all with --steps 2")
        return
    import optax

    from bigjax import train
    from bigjax.experiment import Experiment, RunConfig
    from bigjax.models import MLP
    from bigjax.tasks import classify

    batch, task = 2 * jax.device_count(), classify(MLP(features=(8,), outputs=2), classes=2)
    split = {"image": np.zeros((2 * batch, 4, 4, 1), np.float32), "label": np.arange(2 * batch, dtype=np.int32) % 2}
    experiment = Experiment(name="doctor", task=task, tx=optax.sgd(0.1), train=split, test=split)
    with tempfile.TemporaryDirectory() as home:
        train.fit(experiment, RunConfig(workdir=home, steps=2, batch_size=batch), quiet=True)
    yield line("ok", "two steps", "trained, evaluated, saved and reported")
