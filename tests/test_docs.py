"""The pages of docs/: the one that is made, and that what they link to is there."""

import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from bigjax.tools import models

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def test_the_table_of_models_is_made_of_the_models() -> None:
    text = (REPOSITORY / "docs" / "models.md").read_text()
    assert text == models.page(), "write it anew: python -m bigjax.tools.models > docs/models.md"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert "://" in link or target.exists(), link
        assert not anchor or anchor in anchors(target), link
