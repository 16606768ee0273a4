"""How far the bounds of `plan` are from what ran: published training runs of dense Transformers, planned.

    python bench/plan_calibration.py            # writes experiments/results/plan_calibration.json; some minutes a run

The runs are MaxText's (github.com/AI-Hypercomputer/maxtext, src/maxtext/configs/tpu/v5e and v5p: README.md for the
measurements, one script a model for batch, mesh and rematerialization; commit e591f30, one slice each), with float32
parameters and Adam moments, bfloat16 computation, flash attention, rows of 2,048 tokens, and a vocabulary of 32,000.
Their shapes follow from `global_parameter_scale` (`get_individual_scales` in src/maxtext/configs/types.py). What they
keep under "minimal" is what our "dots" keeps.
"""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments" / "text"))

import gpt  # noqa: E402

from bigjax.run import source, workdir  # noqa: E402
from bigjax.sharding import MeshConfig  # noqa: E402
from bigjax.tools import plan  # noqa: E402

RESULT = ROOT / "experiments" / "results" / "plan_calibration.json"
COMMON = {
    "vocabulary": 32_000,
    "context": 2048,
    "position": "rotary",
    "norm": "rms",
    "activation": "swiglu",
    "bias": False,
    "tied": False,
    "head": 128,
}
SHAPES = {  # parameters in 10⁹ -> layers, width, heads, hidden units of the MLP
    16: (32, 4096, 64, 28672),
    32: (32, 8192, 64, 28672),
    64: (64, 8192, 64, 28672),
    128: (64, 8192, 128, 57344),
    256: (64, 16384, 128, 57344),
    512: (128, 16384, 128, 57344),
}
# size, slice, rows a chip, tensor axis, rematerialization, measured MFU
RUNS = [
    (16, "v5e:16x16", 6, 1, "full", 0.6110),
    (32, "v5e:16x16", 4, 1, "full", 0.6686),
    (64, "v5e:16x16", 2, 1, "full", 0.5990),
    (32, "v5p:4x4x4", 6, 4, "dots", 0.7147),
    (64, "v5p:4x4x4", 3, 4, "dots", 0.7031),
    (128, "v5p:4x4x8", 1, 8, "dots", 0.6868),
    (256, "v5p:8x8x8", 1, 8, "dots", 0.6709),
    (512, "v5p:8x8x8", 2, 8, "full", 0.6399),
]


def calibrate(size: int, topology: str, rows: int, tensor: int, remat: str, measured: float) -> dict:
    """One run: what its plan says beside what was measured."""
    layers, width, heads, mlp = SHAPES[size]
    name = f"maxtext_{size}b"
    gpt.PRESETS[name] = COMMON | {"layers": layers, "width": width, "heads": heads, "mlp": mlp}
    chips = len(plan.slice_of(topology)[1])
    config = gpt.Config(
        model=name,
        batch_size=rows * chips,
        remat=remat,
        attention="splash",
        split_residual=tensor > 1,  # as MaxText does
        mesh=MeshConfig(data=1, fsdp=chips // tensor, tensor=tensor),
    )
    p = plan.plan(gpt.build, config, topology=topology)
    keys = (
        "topology",
        "chips",
        "mesh",
        "batch_size",
        "parameters",
        "fits",
        "hbm_bytes",
        "seconds",
        "limited_by",
        "why",
    )
    kept = {k: p[k] for k in keys if k in p}
    bound = p.get("mfu_bound")
    return {"run": name, **kept, "remat": remat, "mfu_measured": measured, "mfu_bound": bound} | (
        {"bound_over_measured": bound / measured} if bound else {}
    )


def main() -> None:
    runs: list[dict] = []
    for run in RUNS:
        runs.append(calibrate(*run))
        print(json.dumps(runs[-1]), flush=True)
        write(runs)


def write(runs: list[dict]) -> None:
    """After each run, so that none is lost."""
    ratios = [r["bound_over_measured"] for r in runs if "bound_over_measured" in r]
    workdir.write_json(
        RESULT,
        {
            "source": "MaxText, src/maxtext/configs/tpu/{v5e,v5p}/README.md at commit e591f30",
            "median_bound_over_measured": statistics.median(ratios) if ratios else None,
            "all_fit": all(r["fits"] for r in runs),
            "no_bound_below_measurement": all(r >= 1 for r in ratios),
            "runs": runs,
            "versions": source.versions(),
            "git_commit": (source.commit() or "unknown")[:7],
        },
    )


if __name__ == "__main__":
    main()
