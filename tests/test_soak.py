"""Fifty kills in one run of python_gpt, the real script made small.

BIGJAX_SOAK_SEED=N repeats the moments of a run that printed N.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_faults import lines, newest, same, until

KILLS = 50
FLAGS = (
    "--steps 6000 --minutes 1000 --width 32 --layers 1 --heads 2 --context 32 --batch-size 8 --log-every 20 "
    "--save-every 30"
).split()


def start(folder: Path) -> subprocess.Popen:
    script = REPOSITORY / "experiments" / "text" / "python_gpt.py"
    return subprocess.Popen(
        [sys.executable, str(script), "--workdir", str(folder), "--data", str(folder.parent / "book.txt"), *FLAGS],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_fifty_random_kills_change_no_bit(tmp_path: Path) -> None:
    """A third of them anywhere in the process's life, the others after some lines of the log: so that it goes on."""
    seed, run = int(os.environ.get("BIGJAX_SOAK_SEED", random.randrange(2**32))), tmp_path / "run"
    print(f"the moments: BIGJAX_SOAK_SEED={seed}")
    draw, startup = random.Random(seed), 5.0
    # the standard library takes each start seconds to read and compress
    (tmp_path / "book.txt").write_text("".join(f"{n} and {n * n} make {n + n * n}\n" for n in range(4000)))
    for count in range(KILLS):
        before, begin = (len(lines(run)), newest(run)), time.monotonic()
        process = start(run)

        def moved(by: int, process: subprocess.Popen = process, before: tuple[int, int] = before) -> bool:
            return process.poll() is not None or len(lines(run)) >= before[0] + by or newest(run) > before[1] + 20 * by

        try:
            if count % 3 == 0:
                time.sleep(draw.uniform(0, startup))
            else:
                until(lambda: moved(1))  # noqa: B023
                startup = time.monotonic() - begin
                by = draw.randrange(1, 5)
                until(lambda: moved(by))  # noqa: B023
                time.sleep(draw.uniform(0, 0.1))
        finally:
            process.send_signal(signal.SIGKILL)
            _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"after {count} kills: {err}"
    print("killed", KILLS, "times, the last at step", newest(run))
    assert newest(run) > 500  # the kills did fall into the training
    for process in [start(run), start(tmp_path / "straight")]:
        assert (process.wait(timeout=600), process.stderr.read()) == (0, "")
        process.stderr.close()
    same(tmp_path / "straight", run)
    assert [r["step"] for r in lines(run) if r["split"] == "train"] == [*range(20, 6001, 20)]
