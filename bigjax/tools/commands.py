"""The commands of python -m bigjax: what concerns no single experiment."""

import logging
import os
import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from bigjax.run import processes, source, words
from bigjax.sharding import DistributedConfig
from bigjax.tools.sample import Sample


@dataclass(frozen=True)
class Reproduce:
    """Run rows of the table of results again; print published, recorded and new values, and whether they agree."""

    rows: tyro.conf.Positional[list[str]] = field(
        default_factory=list
    )  # names of rows; none means all that are recorded
    seeds: str | None = None  # how many (10: 0 to 9) or which (5..14; 0,3,7), instead of those that are recorded
    record: bool = False  # keep the new values in experiments/results


@dataclass(frozen=True)
class Doctor:
    """Check this machine: libraries, devices, data, storage, and a run of two steps; exit status 1 if any failed."""

    workdir: str = "runs"  # where runs are to be written; may be gs://bucket/folder
    quick: bool = False  # leave the run of two steps out
    distributed: DistributedConfig = DistributedConfig()  # one of several processes: do they meet?


@dataclass(frozen=True)
class Checkpoints:
    """List the checkpoints of a run, and which one it would resume from; exit status 1 if one is damaged."""

    workdir: tyro.conf.Positional[str]  # a run's; may be gs://bucket/folder
    verify: bool = False  # read all of them again


@dataclass(frozen=True)
class Prepare:
    """Build, convert or repair a TFDS set (array_record), or make token files from text."""

    name: tyro.conf.Positional[str]  # a TFDS set (mnist); or text: python (its library), .txt, a folder of .txt, .jsonl
    to: str  # folder to write; may be gs://bucket/folder. Of a TFDS set: the folder that TFDS_DATA_DIR will name
    tokenizer: str | None = None  # of text: bytes (the default), bpe (learned from the text), or a tokenizer.json
    vocabulary: int = 8000  # tokens that bpe learns
    separator: str = "\n"  # what ends each text of a .jsonl


@dataclass(frozen=True)
class Pretrained:
    """Show what a folder of the hub holds, and whether it loads as a model of bigjax."""

    folder: tyro.conf.Positional[str]  # with config.json and safetensors files; or a hub id, owner/name


def main() -> None:
    command = tyro.cli(
        tyro.conf.OmitSubcommandPrefixes[
            Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
            | Annotated[Doctor, tyro.conf.subcommand("doctor")]
            | Annotated[Checkpoints, tyro.conf.subcommand("checkpoints")]
            | Annotated[Prepare, tyro.conf.subcommand("prepare")]
            | Annotated[Pretrained, tyro.conf.subcommand("pretrained")]
            | Annotated[Sample, tyro.conf.subcommand("sample")]
        ]
        | Annotated[None, tyro.conf.subcommand("version")],
        prog="python -m bigjax",
    )
    with words.by_flags(), words.leaving():
        if command is None:
            print(source.version("bigjax"))
        elif isinstance(command, Reproduce):
            from bigjax.tools import results

            results.reproduce(command.rows, seeds=command.seeds, record=command.record)
        elif isinstance(command, Doctor):
            from bigjax.tools import doctor

            logging.disable(logging.ERROR)  # storage libraries log each attempt; the line says what came of them
            with processes.joined(command.distributed, {"command": "doctor"}):
                well = doctor.examine(command.workdir, quick=command.quick)
            sys.stdout.flush()
            os._exit(0 if well else 1)  # a check without an answer leaves a thread that Python may wait for
        elif isinstance(command, Checkpoints):
            from bigjax.run import checkpoint

            lines, whole = checkpoint.listing(command.workdir, verify=command.verify)
            print("\n".join(lines))
            raise SystemExit(0 if whole else 1)
        elif isinstance(command, Pretrained):
            from bigjax.pretrained import reading

            print("\n".join(f"{what:<14}{value}" for what, value in reading.described(command.folder)))
        elif isinstance(command, Sample):
            from bigjax.tools import sample

            sample.sample(command.folder, command)
        else:
            from bigjax.tools import prepare

            flags = {"tokenizer": command.tokenizer, "vocabulary": command.vocabulary, "separator": command.separator}
            print(prepare.prepare(command.name, command.to, **flags))
