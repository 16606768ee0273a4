"""`plan`: its arithmetic, its messages, and real compilations for slices that are not there."""

import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from etils import epath
from rich.console import Console
from test_experiments import load

from bigjax import UsageError, cli
from bigjax.experiment import RunConfig
from bigjax.ops.attention import attention, splash_attention
from bigjax.tools import hlo, plan, slices

SCRIPTS = {p.name: p for p in sorted((REPOSITORY / "experiments").glob("*/*.py"))}
no_compiler = importlib.util.find_spec("libtpu") is None
needs_compiler = pytest.mark.skipif(
    no_compiler, reason='no TPU compiler here (make slow installs it): pip install -e ".[tpu]"'
)
KEYS = (
    "topology chips mesh parameters hbm_bytes fits model_flops_per_step hardware_flops_per_step hbm_traffic_bytes "
    "collectives seconds limited_by mfu_bound examples_per_second_bound chip_hours compile_seconds"
).split()


def run(*arguments: str, cwd: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS[arguments[0]]), "plan", *arguments[1:]]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:", "v5e:2by4", ""])
def test_what_is_no_slice_gets_the_list_of_slices(topology: str) -> None:
    with pytest.raises(UsageError) as e:
        slices.slice_of(topology)
    assert "is no TPU slice: write KIND:SHAPE" in str(e.value)
    for kind in ("v4: 2x2x1", "v5e: 2x2", "v5p: 2x2x1", "v6e: 2x2"):
        assert kind in str(e.value)


@pytest.mark.slow
@needs_compiler
def test_a_slice_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(UsageError, match="v5p:3x8x8 is refused .*: use one of these"):
        slices.slice_of("v5p:3x8x8")


def test_without_the_compiler_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UsageError, match=r'planning needs the TPU compiler: pip install -e "\.\[tpu\]"'):
        slices.slice_of("v5e:2x4")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", slices.CHIPS)
def test_every_slice_of_the_list_exists_with_one_device_a_chip(kind: str) -> None:
    for shape in slices.CHIPS[kind].shapes.split():
        _, devices = slices.slice_of(f"{kind}:{shape}")
        assert len(devices) == np.prod([int(n) for n in shape.split("x")]), shape


def test_rings_of_a_torus() -> None:
    """An all-reduce over 4 × 4 chips of two dimensions, and an all-gather over 4 of one."""
    places = [SimpleNamespace(coords=(x, y, 0)) for x in range(4) for y in range(4)]
    mesh = SimpleNamespace(shape={"data": 4, "fsdp": 4, "tensor": 1}, devices=np.array(places).reshape(4, 4, 1))
    chip = slices.CHIPS["v5p"]
    assert (plan.links(mesh, "fsdp"), plan.links(mesh, "data × fsdp")) == (1, 2)

    def seconds(kind: str, axis: str, group: int) -> float:
        return plan.interconnect_seconds(hlo.Collective(kind, axis, 1e9, 3, group, True, "f32"), mesh, chip)

    assert seconds("all-gather", "fsdp", 4) == pytest.approx(3 * 1e9 * 3 / 4 / 1.8e11)
    assert seconds("reduce-scatter", "fsdp", 4) == seconds("all-gather", "fsdp", 4)
    assert seconds("all-reduce", "data × fsdp", 16) == pytest.approx(3 * 2 * 1e9 * 15 / 16 / (2 * 1.8e11))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_splash_attention_is_attention(kv_heads: int) -> None:
    """The kernel, interpreted: values and gradients in bfloat16, with as many key/value heads and with fewer."""
    q_BLHK, k_BMGK, v_BMGK = (
        jax.random.normal(jax.random.key(i), (2, 128, heads, 64), jnp.bfloat16)
        for i, heads in enumerate((4, kv_heads, kv_heads))
    )

    def run(function) -> tuple:
        def loss(*x):
            y_BLHK = function(*x).astype(jnp.float32)
            return jnp.sin(y_BLHK).sum(), y_BLHK

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q_BLHK, k_BMGK, v_BMGK)
        return y, *gradients

    plain = run(lambda *x: attention(*x, causal=True))
    splash = run(lambda *x: splash_attention(*x, interpret=True))
    for a, b in zip(splash, plain, strict=True):
        scale = float(jnp.abs(b.astype(jnp.float32)).max())
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.02 * scale)


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 MiB"), (2**20 * 1.5, "1.5 MiB"), (50e6, "47.7 MiB"), (2e9, "1.86 GiB")]
)
def test_small_states_are_in_megabytes(size: float, shown: str) -> None:
    p = {"topology": "v5e:2x4", "chips": 8, "mesh": {"data": 8}, "batch_size": 8, "parameters": 1, "state_bytes": size}
    p |= {"model_flops_per_step": 1, "hardware_flops_per_step": 1, "why": "so", "compile_seconds": 1}
    with (console := Console(width=110)).capture() as said:
        plan.show(p, console)
    assert re.search(rf"state a chip +{re.escape(shown)}\s", said.get())


def test_a_plan_leaves_the_accelerators_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which JAX would take when it is asked for anything; what the environment says later is too late for it."""
    before = jax.config.jax_platforms
    seen = []
    monkeypatch.setattr(plan, "plan", lambda *_, **__: seen.append(jax.config.jax_platforms) or {})
    monkeypatch.setattr(plan, "show", lambda *_: None)
    try:
        jax.config.update("jax_platforms", "tpu,cpu")
        plan.write_plan(None, RunConfig(), topology="v5e:2x4", home=epath.Path(tmp_path))
    finally:
        jax.config.update("jax_platforms", before)
    assert seen == ["cpu"] and (tmp_path / "plan.json").read_text() == "{}\n"
    with pytest.raises(UsageError, match="--batch-size 0: give a number above 0"):
        plan.write_plan(None, RunConfig(batch_size=0), topology="v5e:2x4", home=epath.Path(tmp_path))


# ---- real plans


@pytest.fixture
def as_users() -> Iterator[None]:
    """Without the settings of the tests' own programs, nor a cache for what is compiled for a TPU."""
    changes = {"disable_most_optimizations": False, "enable_compilation_cache": False}
    changes |= {"numpy_rank_promotion": "allow", "numpy_dtype_promotion": "standard"}
    before = {k: jax.config.values[f"jax_{k}"] for k in changes}
    for k, v in changes.items():
        jax.config.update(f"jax_{k}", v)
    yield
    for k, v in before.items():
        jax.config.update(f"jax_{k}", v)


MODELS = {"gpt.py": ["tiny"], "pretrain.py": ["bert_tiny", "t5_tiny"]}  # of scripts that have several
SCRIPTS_AND_MODELS = [f"{s} {m}".strip() for s in SCRIPTS for m in MODELS.get(s, [""])]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("script", "topology"), [(s, ("v5e:2x4", "v5p:4x4x4")[n % 2]) for n, s in enumerate(SCRIPTS_AND_MODELS)]
)
def test_every_experiment_plans(
    script: str, topology: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_users: None
) -> None:
    """In this process; the others start one."""
    monkeypatch.chdir(tmp_path)
    size = "64" if topology == "v5p:4x4x4" else "8"
    script, *model = script.split()
    flags = ["--model", *model] if model else []
    module = load(Path(script).stem)
    flags += ["--topology", topology, "--batch-size", size, "--workdir", "p"]
    cli.main(module.Config, module.build, ["plan", *flags])
    p = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert set(KEYS) <= p.keys() and p["fits"] and p["chips"] == {"v5e:2x4": 8, "v5p:4x4x4": 64}[topology]
    assert 0 < p["mfu_bound"] <= 1 and p["seconds"]["bound"] == max(
        p["seconds"][k] for k in ("compute", "hbm", "interconnect")
    )


@pytest.mark.slow
@needs_compiler
def test_a_sharded_gpt(tmp_path: Path) -> None:
    """The state's bytes are those of its shards, splash leaves no L × L array, and what doesn't fit is told."""
    flags = ["--model", "gpt2_124m", "--topology", "v5e:2x4", "--batch-size", "64", "--workdir", "p"]
    split = ["--mesh.data", "1", "--mesh.fsdp", "8"]
    said = run("gpt.py", *flags, *split, cwd=tmp_path).stdout
    assert "limited by" in said and "MFU" in said and "all-gather" in said
    splash = json.loads((tmp_path / "p" / "plan.json").read_text())
    arguments = splash["hbm_bytes"]["arguments"]
    batch = 8 * 1025 * 4
    assert splash["state_bytes"] <= arguments <= splash["state_bytes"] * 1.02 + batch * 2 + 2**20  # and padding
    assert splash["state_bytes"] <= 124_475_904 * 12 / 7
    plain = ["--attention", "plain"]
    run("gpt.py", *flags, *split, *plain, cwd=tmp_path)
    wide = json.loads((tmp_path / "p" / "plan.json").read_text())
    one_score = 8 * 12 * 1024 * 1024 * 4 * 5 // 8
    assert wide["hbm_traffic_bytes"] - splash["hbm_traffic_bytes"] > 12 * 4 * one_score
    assert wide["hardware_flops_per_step"] == splash["hardware_flops_per_step"]

    flags[flags.index("64")] = "4096"
    said = run("gpt.py", *flags, "--remat", "none", cwd=tmp_path).stdout
    assert "fits" in said and "no: RESOURCE_EXHAUSTED" in said
    none = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert none["fits"] is False and none["limited_by"] == "memory"


@pytest.mark.slow
@needs_compiler
def test_search_ranks_the_meshes_that_fit(tmp_path: Path) -> None:
    """On four chips: all ways to split them, the fastest first, and why the others can't be."""
    flags = ["--model", "tiny", "--topology", "v5e:2x2", "--batch-size", "8", "--search", "--workdir", "p"]
    said = run("gpt.py", *flags, cwd=tmp_path).stdout
    p = json.loads((tmp_path / "p" / "plan.json").read_text())
    tried = {tuple(r["mesh"].values()): r for r in p["search"]}
    assert set(tried) == {(d, f, t) for d in (1, 2, 4) for f in (1, 2, 4) for t in (1, 2, 4) if d * f * t == 4}
    assert "heads 2 of GPT is not divisible by mesh.tensor (4)" in tried[1, 1, 4]["why"]
    bounds = [r["seconds"]["bound"] for r in p["search"] if r.get("fits")]
    assert len(bounds) == 5 and bounds == sorted(bounds) and p["seconds"]["bound"] == bounds[0]
    assert p["remat"] == "none" and said.count("ms") >= 5 and re.search(r"^remat +none +$", said, re.M)


@pytest.mark.slow
@needs_compiler
def test_gpt3_on_512_chips(tmp_path: Path) -> None:
    """What the README shows: it fits, in little time and memory of this machine."""
    mesh = ["--topology", "v5p:8x8x8", "--mesh.data", "1", "--mesh.fsdp", "64", "--mesh.tensor", "8"]
    run("gpt.py", "--model", "gpt3_175b", "--batch-size", "512", *mesh, "--workdir", "p", cwd=tmp_path)
    p = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert p["fits"] and p["chips"] == 512 and p["parameters"] == 174_604_836_864
    assert p["state_bytes"] <= p["parameters"] * 12 / 512 * 1.02
    tokens = 512 * 2048
    assert 6 * p["parameters"] * tokens < p["model_flops_per_step"] < 6.5 * p["parameters"] * tokens
    assert p["compile_seconds"] < 300
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 16e9


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh.fsdp", "3"], "does not cover the 8 devices: use"),
        (["--mesh.data", "1", "--mesh.tensor", "8"], "heads 2 of GPT is not divisible by mesh.tensor (8): use --mesh."),
        (["--mesh.data", "8", "--batch-size", "12"], "batch_size 12 is not divisible by the data axis (8): use 8 or"),
    ],
)  # fmt: skip
def test_meshes_that_cannot_be(flags: list[str], message: str, tmp_path: Path) -> None:
    said = run("gpt.py", "--model", "tiny", "--topology", "v5e:2x4", *flags, cwd=tmp_path, code=2).stderr
    assert message in said and "Traceback" not in said and len(said.strip().splitlines()) == 1


def test_the_calibration_says_what_it_holds() -> None:
    found = json.loads((REPOSITORY / "experiments" / "results" / "plan_calibration.json").read_text())
    ratios = [r["mfu_bound"] / r["mfu_measured"] for r in found["runs"] if r["mfu_bound"]]
    assert found["median_bound_over_measured"] == pytest.approx(float(np.median(ratios)))
    assert found["no_bound_below_measurement"] == all(r >= 1 for r in ratios)
    assert found["all_fit"] == all(r["fits"] for r in found["runs"])
    readme = " ".join((REPOSITORY / "docs" / "plan.md").read_text().split())
    assert f"the median bound is {found['median_bound_over_measured']:.2f} × it" in readme
    assert found["all_fit"] and found["no_bound_below_measurement"] and "all eight runs fit" in readme
