"""The log of a run, metrics.jsonl: one JSON object a line, no gap and no repeat after a resume."""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from bigjax import SaveError, UsageError, place
from bigjax.run.atomic import unwritten
from bigjax.run.shown import only_shown

BUCKET_SECONDS = 1.0  # Google's limit for writing the same object again


def json_text(value: Any, **options: Any) -> str:
    """JSON as the standard has it: NaN and infinity, for which it has no word, are null. options: of json.dumps."""

    def finite(v: Any) -> Any:
        if isinstance(v, Mapping):
            return {k: finite(part) for k, part in v.items()}
        if isinstance(v, list | tuple):
            return [finite(part) for part in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(finite(value), allow_nan=False, **options)


def read_log(path: epath.Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, null as NaN; a last line that was torn by a kill is left out.

    UsageError: another line is damaged.
    """
    lines = path.read_text().split("\n") if path.exists() else []
    for n, line in enumerate(lines, 1):
        try:
            yield {k: math.nan if v is None else v for k, v in json.loads(line).items()}
        except json.JSONDecodeError:
            if n < len(lines):
                raise UsageError(f"{path}, line {n} is damaged: repair or remove that line") from None
            return  # torn: the step it belongs to is run again


def history(workdir: epath.PathLike) -> dict[str, dict[int, float]]:
    """What the log of a run holds, {"eval/accuracy": {step: value}}, steps in order; all of its sessions are in it."""
    found: dict[str, dict[int, float]] = {}
    for record in read_log(place(workdir) / "metrics.jsonl"):
        step, split = record["step"], record["split"]
        for name, value in record.items():
            if name not in ("step", "split"):
                found.setdefault(f"{split}/{name}", {})[step] = value
    return found


class Log:
    """Writes metrics.jsonl, and TensorBoard's event files if asked.

    Lines after `step`, left by a killed run, are dropped. In a bucket, where nothing can be appended, the whole file is
    written again, not oftener than a bucket allows.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        step: int,
        tensorboard: bool = False,
        active: bool = True,
        tell: Callable[[str], Any] = print,
    ):
        self.path, self.active, self.board = workdir / "metrics.jsonl", active, None
        self.shown = functools.partial(only_shown, "tensorboard", tell)
        self.bucket = "://" in str(workdir)
        self.behind = self.bucket and active  # lines of `text` are not in the bucket yet
        if not active:
            return
        self.text = "".join(json_text(r) + "\n" for r in read_log(self.path) if r["step"] <= step)
        if self.bucket:
            self.flush()
        else:
            part = workdir / "metrics.jsonl.part"
            part.write_text(self.text)
            part.replace(self.path)
        if tensorboard:
            with self.shown():
                from tensorboardX import SummaryWriter

                self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one line; it is on disk when this returns (in a bucket, at the latest after `flush`)."""
        if not self.active:
            return
        line = json_text({"step": step, "split": split, **values}) + "\n"
        if self.bucket:
            self.text, self.behind = self.text + line, True
            if time.monotonic() - self.written > BUCKET_SECONDS:
                self.flush()
        else:
            with self.path.open("a") as f:
                f.write(line)
        board, self.board = self.board, None  # which it stays if it fails, so that it is told once
        if board:
            with self.shown():
                for k, v in values.items():
                    board.add_scalar(f"{split}/{k}", v, step)
                self.board = board

    def flush(self) -> None:
        """In a bucket, writes what is not there yet: before a checkpoint says that it is."""
        if not self.behind:
            return
        try:
            self.path.write_text(self.text)
        except Exception as e:  # whatever the network does to gcsfs
            raise unwritten(e, f"{self.path} could not be written") from e
        self.behind, self.written = False, time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(SaveError):  # the end of a run has written it; else there is another error to tell
            self.flush()
        if self.board:
            with self.shown():
                self.board.close()
