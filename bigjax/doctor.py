"""python -m bigjax doctor: what to know of a machine before paying for it.

Nothing of JAX is imported before it is checked, so that what is broken is a line and no traceback.
"""

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob
from importlib import metadata
from typing import Literal

from etils import epath

from bigjax import UsageError
from bigjax.deadline import within

PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
STORAGE_SECONDS = 25


@dataclass(frozen=True)
class Line:
    status: Literal["ok", "warning", "failed"]
    name: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.status:<8} {self.name:<18} {self.found}" + (f" — {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Check:
    """A check and how long it may take; `remedy` is for what it does not foresee."""

    name: str
    lines: Callable[[], Iterator[Line]]
    seconds: float
    remedy: str
    subject: str = ""  # what is looked at

    def run(self) -> list[Line]:
        """Its lines, or one that says what went wrong."""
        about = f"{self.subject}: " if self.subject else ""
        try:
            return within(self.seconds, lambda: list(self.lines()))
        except TimeoutError:
            return [Line("failed", self.name, f"{about}no answer within {self.seconds:g} s", self.remedy)]
        except UsageError as e:
            return [Line("failed", self.name, str(e))]
        except (Exception, SystemExit) as e:  # whatever a broken library or machine leads to
            said = str(e).strip().partition("\n")[0]
            return [Line("failed", self.name, f"{about}{type(e).__name__}: {said}", self.remedy)]


def examine(workdir: str = "runs", *, quick: bool = False) -> bool:
    """Prints a line for each thing checked; whether none failed. `quick` leaves the two-step run out."""
    cache = "set JAX_COMPILATION_CACHE_DIR to another folder"
    checks = [
        Check("python", python, 10, "install Python 3.11 or newer"),
        Check("libraries", libraries, 30, "pip install -e ."),
        Check("data", data, 120, "pip install -e ."),
        storage(workdir),
        Check("compilation cache", compilation_cache, STORAGE_SECONDS, cache),
        Check("devices", devices, 120, "end other programs that hold the accelerator, or restart the machine"),
        Check("processes", handshake, 60, "start the same command on every machine, and open the ports between them"),
    ]
    if not quick:
        checks.append(Check("two steps", two_steps, 300, "see above for what else failed, or reinstall bigjax"))
    failed = False
    logging.disable(logging.ERROR)  # storage libraries log each attempt; the line says what came of them
    try:
        for check in checks:
            wrong = any(line.status == "failed" for line in shown(check.run()))
            failed |= wrong
            if wrong and check.name == "devices":  # what comes behind it would only wait for them again
                break
    finally:
        logging.disable(logging.NOTSET)
    return not failed


def shown(lines: list[Line]) -> list[Line]:
    for line in lines:
        print(line, flush=True)
    return lines


# ---- the machine


def python() -> Iterator[Line]:
    found = f"{sys.version.split()[0]} ({sys.executable})"
    if sys.version_info < (3, 11):  # noqa: UP036
        yield Line("failed", "python", found, "install Python 3.11 or newer")
    else:
        yield Line("ok", "python", found)


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def libraries() -> Iterator[Line]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    found = {name: version(name) for name in names}
    if missing := [name for name in names if found[name] is None]:
        yield Line("failed", "libraries", f"{', '.join(missing)} not installed", "pip install -e .")
        return
    plugins = {name: v for name in PLUGINS if (v := version(name))}
    told = ", ".join(f"{name} {v}" for name, v in (found | plugins).items())
    others = {k: v for k, v in plugins.items() if k != "libtpu"} | {"jaxlib": found["jaxlib"]}  # libtpu counts apart
    if wrong := [name for name, v in others.items() if v != found["jax"]]:
        said = f"{told}: {wrong[0]} is not of jax's version"
        yield Line("failed", "libraries", said, f"pip install -U {' '.join(('jax', *others))}")
        return
    import jax  # noqa: F401  (its own complaints about versions)

    yield Line("ok", "libraries", told)


def devices() -> Iterator[Line]:
    import jax

    found = jax.devices()
    first = found[0]
    stats = first.memory_stats() or {}
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    told = f"{len(found)} × {first.device_kind}"
    if "bytes_limit" in stats:
        told += f", {size(stats['bytes_limit'])} each"
    yield Line("ok", "devices", f"{told}; host memory {size(host)}")
    if first.platform == "cpu":
        asked = os.environ.get("JAX_PLATFORMS")
        for kind, seen in accelerators().items():
            remedy = "unset JAX_PLATFORMS" if asked else f'pip install -e ".[{kind}]"'
            why = f"JAX_PLATFORMS={asked} is set" if asked else "jax runs on the CPU"
            yield Line("warning", "accelerator", f"this machine has {seen}, but {why}", remedy)


def accelerators() -> dict[str, str]:
    """What the machine has, by the extra that makes JAX use it."""
    seen = {}
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout.splitlines()
        if gpus := [line for line in listed if line.startswith("GPU ")]:
            seen["cuda"] = gpus[0].partition(" (UUID")[0] + (f" and {len(gpus) - 1} more" if gpus[1:] else "")
    if chips := glob("/dev/accel*") or glob("/dev/vfio/[0-9]*"):
        seen["tpu"] = f"{len(chips)} TPU chips ({chips[0]})"
    return seen


def size(count: float) -> str:
    """Bytes for people."""
    power = min((len(str(int(count))) - 1) // 3, 4)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def handshake() -> Iterator[Line]:
    """Every process has to come."""
    import jax

    if (count := jax.process_count()) == 1:
        yield Line("ok", "processes", "one process")
        return
    from jax.experimental import multihost_utils

    begin = time.perf_counter()
    multihost_utils.sync_global_devices("bigjax doctor")
    took = time.perf_counter() - begin
    yield Line("ok", "processes", f"process {jax.process_index()} of {count} met the others in {took:.1f} s")


# ---- data


def data() -> Iterator[Line]:
    from bigjax.data import sources, text
    from bigjax.data.pipeline import size_of

    folder, names = sources.tfds_folder(), sets()
    where = folder if os.environ.get("TFDS_DATA_DIR") else f"{folder} (TFDS_DATA_DIR is not set)"
    try:
        if within(STORAGE_SECONDS, epath.Path(folder).exists):
            yield Line("ok", "data folder", where)
        else:
            yield Line("warning", "data folder", f"{where} is not there", "needed for TFDS sets only: see below")
    except Exception as e:
        said = f"{where} cannot be reached ({type(e).__name__})"
        yield Line("failed", "data folder", said, "set TFDS_DATA_DIR to a folder of this machine")
        names = {name: scripts for name, scripts in names.items() if name not in sources.TFDS}
    for name, scripts in names.items():
        used = f" ({', '.join(scripts)})" if scripts else ""
        try:
            if name == "python":
                corpus = text.python_corpus()
                found = f"{size(len(corpus.train))} to train on, {size(len(corpus.test))} to test on"
            elif name in sources.TFDS:
                if not sources.tfds_builder(sources.TFDS[name], folder).info.splits:
                    raise UsageError(f"not prepared in {folder}")
                found = "prepared"
            else:
                part = sources.EMBEDDED[name]()
                found = f"{size_of(part.train):,} examples to train on, {size_of(part.test):,} to test on"
        except UsageError as e:
            remedy = sources.prepare_command(name) if name in sources.TFDS else ""
            yield Line("warning", f"data {name}", f"{e}{used}", remedy)
        else:
            yield Line("ok", f"data {name}", found + used)


def sets() -> dict[str, list[str]]:
    """The names that --data may have, and the scripts that offer them; all names where there are no scripts."""
    from bigjax import results
    from bigjax.data import sources

    known = {name: [] for name in (*sources.EMBEDDED, "python", *sources.TFDS)}
    try:
        scripts = sorted(results.experiments().glob("*.py"))
    except UsageError:
        return known
    for script in scripts:
        for offered in re.findall(r"^    data: str = (.*)$", script.read_text(), flags=re.M):
            for name in set(re.findall(r"\w+", offered)) & known.keys():
                known[name].append(script.stem)
    return {name: scripts for name, scripts in known.items() if scripts}


# ---- storage


def probe(folder: epath.Path) -> float:
    """Writes a file there, reads it back, and leaves nothing behind; the seconds that this took."""
    begin = time.perf_counter()
    new = [] if "://" in str(folder) else [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file, content = folder / f".doctor-{uuid.uuid4().hex}", uuid.uuid4().hex
    file.write_text(content)
    back = file.read_text()
    file.unlink()
    for made in new:
        made.rmdir()
    if back != content:
        raise OSError("what was read is not what was written")
    return time.perf_counter() - begin


def storage(workdir: str, seconds: float = STORAGE_SECONDS) -> Check:
    remedy = "check the network, the credentials (gcloud auth application-default login) and the name of the bucket"
    return Check("working directory", lambda: working_directory(workdir), seconds, remedy, subject=workdir)


def working_directory(workdir: str) -> Iterator[Line]:
    home = epath.Path(workdir).expanduser()
    try:
        took = probe(home)
    except ImportError as e:  # etils names the library that it lacks
        yield Line("failed", "working directory", f"{workdir}: {e}", 'pip install -e ".[gcs]"')
    except OSError as e:
        yield Line(
            "failed",
            "working directory",
            f"{workdir} cannot be written ({e.strerror or e})",
            "choose another --workdir",
        )
    else:
        yield Line("ok", "working directory", f"{workdir}: written and read back in {took:.2f} s")


def compilation_cache() -> Iterator[Line]:
    import jax

    from bigjax.train import cache_compilations

    cache_compilations(True)
    folder = epath.Path(jax.config.jax_compilation_cache_dir)
    try:
        probe(folder)
    except OSError as e:
        said = f"{folder} cannot be written ({e.strerror or e}): every run compiles anew"
        yield Line("warning", "compilation cache", said, "set JAX_COMPILATION_CACHE_DIR to another folder")
        return
    files = list(folder.iterdir()) if folder.exists() else []
    yield Line("ok", "compilation cache", f"{folder}: {len(files)} files, {size(sum(p.stat().length for p in files))}")


# ---- training


def two_steps() -> Iterator[Line]:
    """A tiny MLP through the real loop: compiled, trained, evaluated, saved, reported."""
    import jax
    import numpy as np
    import optax

    if jax.process_count() > 1:  # each would have a temporary folder of its own
        yield Line("warning", "two steps", "not tried by several processes", "run a script on all with --steps 2")
        return
    from bigjax import train
    from bigjax.experiment import Experiment, RunConfig
    from bigjax.models import MLP
    from bigjax.tasks import classify, fields

    batch = 2 * jax.device_count()
    x_ND = np.random.default_rng(0).normal(size=(2 * batch, 4)).astype(np.float32)
    split = {"x": x_ND, "label": (x_ND.sum(1) > 0).astype(np.int32)}
    model = MLP(features=(8,), outputs=2)
    experiment = Experiment(
        name="doctor",
        model=model,
        task=classify(model, classes=2, inputs=fields("x")),
        tx=lambda steps: {"model": optax.adam(1e-2)},
        train=split,
        test=split,
    )
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        run = train.fit(experiment, RunConfig(workdir=home, steps=2, batch_size=batch), quiet=True)
    took, loss = time.perf_counter() - begin, run.result["metrics"]["eval/loss"]
    yield Line("ok", "two steps", f"trained, evaluated, saved and reported in {took:.1f} s (loss {loss:.3f})")
