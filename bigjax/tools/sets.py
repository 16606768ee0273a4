"""TFDS sets as array_record files: built by their builders, or made of the TFRecord files that stand there.

What stands there, whole or not, is never deleted.
"""

import contextlib
import json
import os
import shlex
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from etils import epath

from bigjax import UsageError, place
from bigjax.data import tfds, tfds_folder, tfds_splits
from bigjax.data.files import THREADS, few
from bigjax.data.pictures import decoded
from bigjax.data.tfds_folder import Damaged
from bigjax.run.atomic import write_whole


def build(name: str, to: str) -> str:
    """Makes the TFDS set `name` readable in the TFDS folder `to`, and says how, in a line.

    Built where there is none, converted where there are TFRecord files, built again where it is damaged: what is
    damaged is kept beside it. UsageError: it is there already and whole; or what is in the way.
    """
    there, what = place(to, "--to "), tfds_folder.asked(name)
    if what.slice:
        raise UsageError(f"{name} is a part of a set, and a set is prepared whole: leave out {what.slice}")
    if "://" in str(there):
        return _to_bucket(str(what), there, to)
    where = str(there)
    if tfds_folder.inside(what, where):
        raise tfds.missing(what, where, (), flag="--to ")
    said = f"read it by --data {shlex.quote(f'tfds:{what}')}, with TFDS_DATA_DIR={shlex.quote(where)}"
    path = _standing(what, where)
    if path is None:
        made = tfds_folder.builder(str(what), where, file_format="array_record")
        _download_and_prepare(made, str(what), to)
        return said
    try:
        converted = _converted(path, what, where)
    except Damaged as e:
        aside = _rebuilt(what, path, there, to, e.why)
        return f"{e.why}: built again, and what stood there is kept as {aside}; {said}"
    if not converted:
        raise UsageError(f"{path} has the TFDS set {what} already: {said}; delete it there to build it again")
    return said


def known(name: str, to: str) -> bool:
    """Whether `name`, which may have a configuration, is a set that TFDS builds or that stands in `to`."""
    try:
        what = tfds_folder.asked(name)
    except UsageError:
        return False
    return any(f(what.name) for f in (tfds_folder.buildable, tfds_folder.hidden, lambda n: tfds_folder.standing(to, n)))


def _standing(what: tfds_folder.Asked, where: str) -> epath.Path | None:
    with contextlib.suppress(UsageError):  # others of its name
        return tfds_folder.located(what, where)
    return None


def _to_bucket(name: str, there: epath.Path, to: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:  # array_record writes to local disks only
        made = tfds_folder.builder(name, scratch, file_format="array_record")
        _download_and_prepare(made, name, to)
        _copy(epath.Path(scratch) / made.name, there / made.name)
    copy = shlex.join(["gcloud", "storage", "cp", "-r", f"{to}/{made.name}"])
    return f"copy it to each machine ({copy} DIR) and set TFDS_DATA_DIR=DIR"


def _rebuilt(what: tfds_folder.Asked, path: epath.Path, there: epath.Path, to: str, why: str) -> epath.Path:
    """The set is built beside the one that is damaged, and takes its place once it is whole; where that one is now."""
    if not tfds_folder.buildable(what.name):
        raise UsageError(f"{why}: {tfds_folder.repair(what, str(there))}")
    try:
        scratch = tempfile.TemporaryDirectory(dir=there, prefix=".bigjax-")
    except OSError as e:
        raise UsageError(f"{to} cannot be written ({e.strerror}): name another --to") from e
    with scratch as folder:
        made = tfds_folder.builder(str(what), folder, file_format="array_record")
        _download_and_prepare(made, str(what), to, downloads=there / "downloads")
        new = epath.Path(made.data_dir)
        target = there / new.relative_to(folder)
        number = next(n for n in range(1, 10**6) if not path.with_name(f"{path.name}.damaged{n}").exists())
        aside = path.rename(path.with_name(f"{path.name}.damaged{number}"))
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(new, target)
    return aside


def _download_and_prepare(builder: Any, name: str, to: str, downloads: epath.Path | None = None) -> None:
    import requests  # comes with TFDS

    try:
        builder.download_and_prepare(download_dir=downloads and str(downloads))
    except ImportError as e:
        package = e.name or "tensorflow"  # TFDS's own error names none
        install = 'pip install -e ".[prepare]"' if package.startswith("tensorflow") else f"pip install {package}"
        raise UsageError(f"building {name} needs {package}: {install} and run this again") from e
    except PermissionError as e:
        raise UsageError(f"{to} cannot be written ({e.strerror}): name another --to") from e
    except requests.exceptions.RequestException as e:
        host = urlsplit(e.request.url).hostname if e.request is not None else "its server"
        raise UsageError(
            f"{name} cannot be downloaded, for {host} cannot be reached ({type(e).__name__}): run this on a machine "
            f"with a network, and copy {to}"
        ) from e
    except Exception as e:  # whatever the builder of the set raises
        raise UsageError(f"{name} cannot be built ({type(e).__name__}: {str(e).strip().partition(chr(10))[0]})") from e


def _copy(source: epath.Path, target: epath.Path) -> None:
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            target.mkdir(parents=True, exist_ok=True)
            path.copy(target / path.name)


# ---- what stands there


def damaged(why: str) -> Damaged:
    return Damaged(why, why)


def _converted(path: epath.Path, what: tfds_folder.Asked, where: str) -> bool:
    """Whether array_record files had to be made; Damaged: the set is not whole."""
    built = tfds_folder.opened(path, what, where)
    formats = tfds_folder.formats(built)
    if not formats & tfds_folder.BY_INDEX:
        if "tfrecord" not in formats:
            raise damaged(f"{path} holds {few(sorted(formats))} files, which are not read")
        _convert(path, built)
    _check(built)
    return not formats & tfds_folder.BY_INDEX


def _check(built: Any) -> None:
    """Damaged: the file of the set that cannot be read, or the example."""
    import tensorflow_datasets

    kinds, features = tensorflow_datasets.features, dict(built.info.features)
    skip = {name: tensorflow_datasets.decode.SkipDecoding() for name in features}
    images = [n for n, f in features.items() if isinstance(f, kinds.Image) and f.np_dtype in ("uint8", "uint16")]
    texts = [n for n, f in features.items() if isinstance(f, kinds.Text)]
    for split in built.info.splits:
        pieces = tfds_splits.instructions(built.name, built.info.splits, split)
        for piece in pieces:
            if ".array_record-" in piece.filename and (wrong := tfds_folder.torn(epath.Path(piece.filename))):
                raise damaged(wrong)
        try:
            with tfds_folder.quiet():
                source = built.as_data_source(split, decoders=skip)
        except Exception as e:
            raise damaged(f"{pieces[0].filename} cannot be opened ({tfds_folder.brief(e)})") from e

        def look(row: int, source: Any = source) -> str:
            try:
                example = source[row]
                for name in images:
                    decoded(example[name], channels=features[name].shape[-1])
                for name in texts:
                    bytes(example[name]).decode()
            except Exception as e:  # what a damaged file, or a damaged example, leads to
                return tfds_folder.brief(e)
            return ""

        with ThreadPoolExecutor(THREADS) as pool:
            for row, why in enumerate(pool.map(look, range(len(source)))):
                if why:
                    raise damaged(f"{tfds_splits.place(pieces, row)} cannot be read ({why})")


# ---- TFRecord


def _convert(path: epath.Path, built: Any) -> None:
    """Writes array_record files beside the TFRecord files of a set, and into its dataset_info.json that they are there.

    The records are the same in both.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    for info in built.info.splits.values():
        template = info.filename_template.replace(filetype_suffix="array_record")
        targets = template.sharded_filepaths(num_shards=len(info.filepaths))
        for file, target, count in zip(info.filepaths, targets, info.shard_lengths, strict=True):
            part = target.with_name(f"{target.name}.part")
            try:
                writer, written = ArrayRecordWriter(str(part), "group_size:1"), 0
            except RuntimeError as e:
                raise UsageError(f"{path} cannot be written ({tfds_folder.brief(e)}): name another --to") from e
            for record in records(file):
                writer.write(record)
                written += 1
            writer.close()
            if written != count:
                raise damaged(f"{file} holds {written:,} examples, not {count:,}")
            part.rename(target)
    about = path / tfds_folder.ABOUT[0]
    known = json.loads(about.read_bytes())
    others = [*known.get("alternativeFileFormats", []), "array_record"]
    write_whole(about, (json.dumps(known | {"alternativeFileFormats": others}, indent=2) + "\n").encode())
    built.info.add_alternative_file_format("array_record")


def records(file: epath.Path) -> Iterator[bytes]:
    """The records of a TFRecord file: 8 bytes that say how long, their checksum, the record, its checksum."""
    try:
        with file.open("rb") as stream:
            number = 0
            while head := stream.read(12):
                length = struct.unpack("<Q", head[:8])[0] if _sound(head[:8], head[8:]) else None
                record = b"" if length is None else stream.read(length)
                if length is None or len(record) < length or not _sound(record, stream.read(4)):
                    raise damaged(f"{file} is damaged at record {number} (counted from 0)")
                yield record
                number += 1
    except OSError as e:
        raise damaged(f"{file} cannot be read ({e.strerror or e})") from e


def _sound(content: bytes, checksum: bytes) -> bool:
    """Whether a checksum, crc32c turned by 15 bits and moved, as TensorFlow writes it, is that of the content."""
    import google_crc32c

    crc = google_crc32c.value(content)
    return checksum == struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
