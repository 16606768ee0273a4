"""A text by its characters, in windows.

T characters, N windows.
"""

import hashlib

import numpy as np

from bigjax import UsageError
from bigjax.data import corpus, sources
from bigjax.data.pipeline import Dataset
from bigjax.data.text import lines, window_count, window_fields

TRAINED = 0.9  # of the characters, the first


def load(name: str, *, eval_data: str | None = None, length: int, stride: int, **options: object) -> Dataset:
    """Windows of `length` characters for `tasks.next_token`; its class names are the characters, by number.

    name: `python`, a .txt or a folder of them, of which without `eval_data` the last tenth of the characters is the
    test split; or data with `text` (`sources.load`, which takes the options). Characters are numbered by their code, as
    all of both splits has them. Training windows begin every `stride` characters; of the test split each character
    counts once. Fact: `corpus_sha256`, of the whole text. UsageError: a text that is too short.
    """
    corpus.alike(name, eval_data)
    if not corpus.in_one_piece(name):
        data = sources.load(name, eval_data=eval_data, **options)
        parts = [lines(corpus.texts(split)).decode() for split in (data.train, data.test)]
    elif eval_data is None:
        whole = corpus.whole(name).decode()
        cut = int(TRAINED * len(whole))
        parts = [whole[:cut], whole[cut:]]
    else:
        parts = [corpus.whole(part).decode() for part in (name, eval_data)]
    if len(parts[0]) <= length or not parts[1]:
        raise UsageError(f"{name} has {len(parts[0])} characters to train on: give more, or lower --context {length}")
    codes, token_T = np.unique(np.frombuffer("".join(parts).encode("utf-32-le"), "<u4"), return_inverse=True)
    token_T, cut = token_T.astype(np.int32), len(parts[0])
    digest = hashlib.sha256("".join(parts).encode()).hexdigest()
    return Dataset(
        windows(token_T[:cut], length=length, stride=stride, once=False),
        windows(token_T[cut:], length=length, stride=length, once=True),
        class_names=tuple(map(chr, codes)),
        name=name,
        facts={"corpus_sha256": digest},
    )


def windows(token_T: np.ndarray, *, length: int, stride: int, once: bool) -> dict[str, np.ndarray]:
    """Windows as `text.byte_windows` gives them, of any tokens; before the first is token 0."""
    size = len(token_T)
    count = window_count(size, length=length, stride=stride)
    padded = np.zeros(max((count - 1) * stride + length + 1, size + 1), np.int32)
    padded[1 : size + 1] = token_T
    rows = np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::stride][:count]
    return {"tokens": rows, **window_fields(np.arange(count), size, length=length, stride=stride, once=once)}
