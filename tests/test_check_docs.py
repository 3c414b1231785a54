"""docs/compatibility.md is what the rules say."""

from __future__ import annotations

from scripts.docs_parts.compatibility import OUT, page


def test_the_page_is_current() -> None:
    text = page()
    assert OUT.read_text(encoding="utf-8") == text, "run scripts/docs"
    assert "| flux1 | ComfyUI | all |" in text
