"""The committed table of other projects' example configs (docs/config-examples.json), and its page."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def rows(checkout: Path) -> list[dict]:
    return json.loads((checkout / "docs" / "config-examples.json").read_text(encoding="utf-8"))


def test_the_page_is_the_tables(checkout, rows):
    path = checkout / "tools" / "config_examples.py"
    spec = importlib.util.spec_from_file_location("config_examples", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.page(rows) == (checkout / "docs" / "config-examples.md").read_text(encoding="utf-8")


def test_every_file_was_read_or_rejected_with_a_reason_that_names_it(rows):
    assert len(rows) > 500
    for row in rows:
        assert ("kind" in row) != ("rejected" in row)
        assert row.get("runs") or row["file"] in row["rejected"]


def test_every_kind_has_examples(rows):
    kinds = Counter(row.get("kind") for row in rows)
    assert all(kinds[kind] >= 12 for kind in ("accelerate", "axolotl", "deepspeed", "llamafactory", "openrlhf", "trl"))


def test_every_training_has_its_framework_and_its_window_or_a_reason(rows):
    programs = [row for row in rows if row.get("kind") in ("axolotl", "llamafactory", "trl")]
    for row in programs:
        (run,) = row["runs"]
        assert run["framework"] == row["kind"]
        assert run["gradient_accumulation_steps"] == "unknown" or run["gradient_accumulation_steps"] > 0
