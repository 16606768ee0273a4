"""python -m bigjax: what concerns no single experiment."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from bigjax import UsageError


@dataclass(frozen=True)
class Reproduce:
    """Run rows of the table of results again, and print published, recorded and new values."""

    rows: tyro.conf.Positional[list[str]] = field(
        default_factory=list
    )  # names of rows; none means all that are recorded
    record: bool = False  # keep the new values in experiments/results


def main() -> None:
    command = tyro.cli(
        tyro.conf.OmitSubcommandPrefixes[Annotated[Reproduce, tyro.conf.subcommand("reproduce")]]
        | Annotated[None, tyro.conf.subcommand("version")],
        prog="python -m bigjax",
    )
    from bigjax import __version__, results

    if command is None:
        print(__version__)
        return
    try:
        results.reproduce(command.rows, record=command.record)
    except UsageError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
