"""Functions of Python's standard library and the first lines of their docstrings."""

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from bigjax.data import text
from bigjax.data.pipeline import Dataset

WORDS = 3  # of letters, at least, in a line that is taken


def python_docstrings() -> Dataset:
    """`source`: a function, without its docstring; `target`: that docstring's first line. Split by file, as `python`.

    Results can be compared only where the fact `corpus_sha256` is the same.
    """
    splits, digest = [], hashlib.sha256()
    for held_out in (False, True):
        pairs = [pair for file in text.read_modules(text.listed(held_out=held_out)) for pair in documented(file)]
        source, target = (np.array(side, object) for side in zip(*pairs, strict=True))
        splits.append({"source": source, "target": target})
        digest.update("\0".join([*source, *target]).encode())
    return Dataset(*splits, name="python_docstrings", facts={"corpus_sha256": digest.hexdigest()})


def documented(file: bytes) -> Iterator[tuple[str, str]]:
    """(a function without its docstring, the docstring's first line) for each whose line has WORDS of letters."""
    content = file.decode("utf-8", "replace")
    lines = content.splitlines()
    found = (n for n in ast.walk(ast.parse(content)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    for node in sorted(found, key=lambda node: node.lineno):
        doc = (ast.get_docstring(node) or "").strip()
        first = doc.splitlines()[0].strip() if doc else ""
        if len(re.findall(r"[A-Za-z]{2,}", first)) < WORDS or first.startswith(">>>"):
            continue
        there, margin = node.body[0], node.col_offset
        if lines[there.lineno - 1][: there.col_offset].strip():  # on the line of the function's head
            continue
        own = range(node.lineno, node.end_lineno + 1)
        kept = [lines[n - 1] for n in own if not there.lineno <= n <= there.end_lineno]
        yield "\n".join(line if line[:margin].strip() else line[margin:] for line in kept), first


def name_as_words(source: str) -> str:
    """A function's name and arguments as words: `def read_lines(self, maxSize=9)` gives "read lines max size"."""
    head = re.search(r"def\s+(\w+)\s*\((.*?)\)\s*(->.*?)?:", source, re.DOTALL)
    if head is None:
        return ""
    try:
        found = ast.parse(f"def {head[1]}({head[2]}): pass").body[0].args
        names = [a.arg for a in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
    except SyntaxError:
        names = []
    return " ".join(_words([head[1], *(n for n in names if n not in ("self", "cls"))]))


def _words(names: Iterable[str]) -> list[str]:
    return [part.lower() for name in names for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
