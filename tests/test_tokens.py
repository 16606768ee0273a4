"""Token files. T tokens; what nanoGPT and llm.c write is written here as their scripts do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigjax import UsageError, train
from bigjax.data import sources, text, tokens
from bigjax.data.pipeline import batches, eval_batches
from bigjax.experiment import Experiment, RunConfig
from bigjax.models import GPT
from bigjax.tasks import next_token

TRAIN, TEST = (np.random.default_rng(s).integers(0, 50257, n, dtype=np.int64) for s, n in ((0, 1000), (1, 301)))


def nanogpt(path: Path, tokens_T: np.ndarray, dtype: str = "uint16") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens_T.astype(dtype).tofile(path)


def llm_c(path: Path, tokens_T: np.ndarray, *, magic: int = 20240520, version: int = 1, dtype: str = "uint16") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens_T)
    path.write_bytes(header.tobytes() + tokens_T.astype(dtype).tobytes())


def test_nanogpt_files_token_for_token(tmp_path: Path) -> None:
    nanogpt(tmp_path / "train.bin", TRAIN)
    nanogpt(tmp_path / "val.bin", TEST)
    data = tokens.load(f"tokens:{tmp_path}")
    np.testing.assert_array_equal(data.train[:], TRAIN)
    np.testing.assert_array_equal(data.test[5:9], TEST[5:9])
    assert data.train[:].dtype == np.int32 and isinstance(data.train.parts[0], np.memmap)
    assert (data.facts["vocabulary"], len(data.train), len(data.test)) == (50257, 1000, 301)
    assert data.facts["tokenizer"] is None
    nanogpt(tmp_path / "test.bin", TEST[:7])  # a test split, where there is one, is the test split
    assert len(tokens.load(f"tokens:{tmp_path}").test) == 7
    assert tokens.load(str(tmp_path), vocabulary=50304).facts["vocabulary"] == 50304


def test_uint32(tmp_path: Path) -> None:
    nanogpt(tmp_path / "train.bin", TRAIN, "uint32")
    nanogpt(tmp_path / "val.bin", TEST + 70000, "uint32")
    refused(tmp_path, "every second token of", "train.bin is 0, as in uint32 read as uint16")
    data = tokens.load(f"tokens:{tmp_path}", dtype="uint32")
    assert data.facts["vocabulary"] == 128256
    np.testing.assert_array_equal(data.train[:], TRAIN)
    np.testing.assert_array_equal(data.test[:], TEST + 70000)


def test_llm_c_files_in_shards(tmp_path: Path) -> None:
    for shard in range(4):
        llm_c(tmp_path / f"fineweb_train_{shard + 1:06}.bin", TRAIN[shard * 250 : (shard + 1) * 250])
    llm_c(tmp_path / "fineweb_val_000000.bin", TEST)
    data = tokens.load(f"tokens:{tmp_path}")
    np.testing.assert_array_equal(data.train[:], TRAIN)
    np.testing.assert_array_equal(data.train[240:760], TRAIN[240:760])  # over three files
    np.testing.assert_array_equal(data.test[:], TEST)
    llama = tmp_path / "llama"
    for split, tokens_T in (("train", TRAIN), ("val", TEST + 100000 - 50257 + 20000)):
        llm_c(llama / f"tiny_shakespeare_{split}.bin", tokens_T, magic=20240801, version=7, dtype="uint32")
    data = tokens.load(f"tokens:{llama}")
    assert data.facts["vocabulary"] == 128256 and data.test[:].max() > 2**16
    np.testing.assert_array_equal(data.train[:], TRAIN)


@settings(max_examples=60)
@given(
    size=st.integers(1, 60), length=st.integers(1, 20), stride=st.integers(1, 20), once=st.booleans(), data=st.data()
)
def test_windows_are_those_of_bytes(size: int, length: int, stride: int, once: bool, data: Any) -> None:
    content = bytes(data.draw(st.lists(st.integers(0, 255), min_size=size, max_size=size)))
    stride = min(stride, length)
    expected = text.byte_windows(content, length=length, stride=stride, once=once)
    cut = data.draw(st.integers(0, size))  # in two files
    parts = [np.frombuffer(part, np.uint8).astype("<u2") for part in (content[:cut], content[cut:])]
    held = tokens.Tokens(["a", "b"], parts, vocabulary=256)
    reader = tokens.Windows(held, length=length, stride=stride, once=once, before=ord("\n"))
    assert len(reader) == len(expected["tokens"])
    for row in range(len(reader)):
        example = reader[row]
        assert example.keys() == expected.keys()
        for field, value in example.items():
            np.testing.assert_array_equal(value, expected[field][row])
            assert value.dtype == np.int32


@pytest.mark.parametrize("stride", [16, 5])
def test_evaluation_has_every_token_as_a_target_once(stride: int) -> None:
    held = tokens.Tokens(["a"], [np.arange(1000, dtype="<u2")], vocabulary=1000)
    seen = []
    for batch in eval_batches(tokens.Windows(held, length=16, stride=stride), batch_size=7):
        for b in np.flatnonzero(batch["mask"]):
            start = batch["start"][b] if stride < 16 else 1
            seen += list(batch["tokens"][b, start : batch["length"][b]])
    assert sorted(seen) == list(range(1000))
    batch = next(batches(tokens.Windows(held, length=16, stride=stride, once=False), seed=0, batch_size=7))
    assert batch["tokens"].shape == (7, 17) and batch["tokens"].dtype == np.int32 and "start" not in batch


def test_a_gpt_trains_on_them(tmp_path: Path) -> None:
    for split in ("train", "val"):
        nanogpt(tmp_path / "data" / f"{split}.bin", np.arange(200) % 7)
    data = tokens.load(f"tokens:{tmp_path / 'data'}", vocabulary=7)
    model = GPT(vocabulary=data.facts["vocabulary"], layers=1, width=8, heads=1, context=8)
    experiment = Experiment(
        task=next_token(model, bytes_a_token=data.facts["bytes_a_token"]),
        tx=lambda steps: {"model": optax.adam(1e-2)},
        train=tokens.Windows(data.train, length=8, stride=4, once=False),
        test=tokens.Windows(data.test, length=8),
    )
    run = train.fit(experiment, RunConfig(workdir=str(tmp_path / "run"), steps=2, batch_size=8), quiet=True)
    assert 1 < run.result["metrics"]["eval/loss"] < 3


# ---- what is refused


def refused(folder: Path, *said: str, **how: Any) -> None:
    with pytest.raises(UsageError) as error:
        tokens.load(f"tokens:{folder}", **how)
    for part in said:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folders_and_files(tmp_path: Path) -> None:
    refused(tmp_path / "no", "no is not a folder: give tokens:DIR with train.bin and test.bin")
    refused(tmp_path, "has no train.bin: prepare it by python -m bigjax prepare TEXT --to")
    nanogpt(tmp_path / "train.bin", TRAIN)
    nanogpt(tmp_path / "untrained.bin", TRAIN)
    refused(tmp_path, "has no test.bin or val.bin")
    (tmp_path / "val.bin").mkdir()
    refused(tmp_path, "val.bin cannot be read (Is a directory)")
    with pytest.raises(UsageError, match="only a language model reads"):
        sources.load(f"tokens:{tmp_path}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "val.bin is empty"),
        (TEST.astype("uint16").tobytes()[:-1], "holds 601 bytes, which is no number of uint16 tokens"),
        (np.array([20240520, 1, 5], np.int32).tobytes(), "ends within llm.c's header (12 of 1024 bytes)"),
        (np.array([20240520, 3, 5] + [0] * 253, np.int32).tobytes(), "llm.c's header of version 3, which is not read"),
        (np.array([20240520, 1, 5] + [0] * 253, np.int32).tobytes() + b"12345678", "says it has 5 tokens, but holds 8"),
        (np.array([20240520, 1, 0] + [0] * 253, np.int32).tobytes(), "holds 0 bytes"),
        (np.array([5, 60000], "uint16").tobytes(), "holds token 60000, but the vocabulary is 50257"),
    ],
)
def test_torn_files(content: bytes, said: str, tmp_path: Path) -> None:
    nanogpt(tmp_path / "train.bin", TRAIN)
    (tmp_path / "val.bin").write_bytes(content)
    refused(tmp_path, "val.bin", said)


def test_a_token_outside_the_vocabulary_is_found_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "LOOKED_AT", 50)
    held = tokens.Tokens(["here.bin"], [np.arange(100, dtype="<u2")], vocabulary=90)
    reader = tokens.Windows(held, length=10)
    assert reader[8]["tokens"][-1] == 89
    with pytest.raises(UsageError, match=r"here.bin holds token 99, but the vocabulary is 90"):
        reader[9]


def test_tokens_json_holds(tmp_path: Path) -> None:
    nanogpt(tmp_path / "train.bin", TRAIN % 300, "uint32")
    nanogpt(tmp_path / "test.bin", TEST % 300, "uint32")
    about = {"tokenizer": "tokenizer.json", "vocabulary": 300, "dtype": "uint32", "before": 7, "sha256": "ab"}
    about["splits"] = {"train": {"tokens": 1000, "bytes": 3000}, "test": {"tokens": 301, "bytes": 903}}
    (tmp_path / "tokens.json").write_text(json.dumps(about))
    data = tokens.load(f"tokens:{tmp_path}")
    assert data.facts == {
        "vocabulary": 300,
        "before": 7,
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "bytes_a_token": 3.0,
        "corpus_sha256": "ab",
    }
    np.testing.assert_array_equal(data.train[:], TRAIN % 300)
    refused(tmp_path, "has a vocabulary of 300: 256 is too small", vocabulary=256)
    nanogpt(tmp_path / "test.bin", TEST[:300] % 300, "uint32")
    refused(tmp_path, "test.bin holds 300 tokens, but tokens.json says 301: prepare the folder again")
    (tmp_path / "tokens.json").write_text(json.dumps(about | {"dtype": "uint8"}))
    refused(tmp_path, "tokens.json is damaged (KeyError: 'uint8')")
    (tmp_path / "tokens.json").write_text("{")
    refused(tmp_path, "tokens.json is damaged (JSONDecodeError")
