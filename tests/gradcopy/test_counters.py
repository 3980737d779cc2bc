"""What the copy path moves, launches and waits for: the saved figures say it, and a new run says the same."""

import json
import re

import pytest

from benchmarks import counters

ROWS = json.loads(counters.SAVED.read_text(encoding="utf-8"))["rows"]
PARAMETERS, BUCKETS = ROWS[0]["parameters"], ROWS[0]["buckets"]
ASYNCHRONOUS = ("host-add", "ring", "resident")
TO_THE_DEVICE, TO_THE_HOST = "host_to_device_bytes", "device_to_host_bytes"


def rows(version, tier=None):
    found = [row for row in ROWS if (row["deepspeed"], row["tier"]) == (version, tier)]
    assert [row["accumulation"] for row in found] == list(counters.ACCUMULATIONS)
    return found


def bytes_per_element(row):
    """(to the device, to the host) per element of the partition and window."""
    return counters.per_element(row, TO_THE_DEVICE), counters.per_element(row, TO_THE_HOST)


def ours():
    return [row for tier in counters.TIERS for row in rows(counters.BROKEN, tier)]


def test_the_broken_release_never_writes_back_in_the_middle_of_a_window():
    for row in rows("0.18.9"):
        assert bytes_per_element(row) == (2 * (row["accumulation"] - 1), 6)
        assert TO_THE_HOST not in row["micro_batches"]["middle"]
        assert row["relative_error"] > 0.5


@pytest.mark.parametrize("version", ["0.19.0", "0.19.8"])
def test_upstreams_repair_pays_for_every_micro_batch_in_both_directions(version):
    for row in rows(version):
        accumulation = row["accumulation"]
        assert bytes_per_element(row) == (2 * (accumulation - 1), 2 * accumulation + 4)
        assert 1e-4 < row["relative_error"] < 1e-2  # it sums in bf16


def test_every_tier_of_trainfix_gives_the_float32_sum():
    assert all(row["relative_error"] < 1e-8 for row in ours())
    for accumulation in counters.ACCUMULATIONS:
        assert len({row["relative_error"] for row in ours() if row["accumulation"] == accumulation}) == 1


@pytest.mark.parametrize(
    ("tier", "up", "down"),
    [
        ("resident", lambda steps: 0, lambda steps: 4),
        ("ring", lambda steps: 4 * (steps - 1), lambda steps: 4 * steps),
        ("host-add", lambda steps: 0, lambda steps: 2 * steps),
        ("torch", lambda steps: 0, lambda steps: 2 * steps),
    ],
)
def test_the_bytes_that_each_tier_moves(tier, up, down):
    for row in rows(counters.BROKEN, tier):
        for_norms = 0.01  # eight bytes for each few thousand elements
        wanted = up(row["accumulation"]), down(row["accumulation"])
        assert bytes_per_element(row) == pytest.approx(wanted, abs=for_norms)


@pytest.mark.parametrize("tier", ASYNCHRONOUS)
def test_trainfix_waits_for_the_device_at_the_step_only_and_not_once_per_parameter(tier):
    for row in rows(counters.BROKEN, tier):
        micro = row["micro_batches"]
        assert "syncs" not in micro["first"]
        assert "syncs" not in micro["middle"]
        assert micro["boundary"].get("syncs", 0) <= 2  # until the sums are home; the norms come in one copy


def test_a_window_that_deepspeed_sums_rightly_is_left_to_it():
    for plain, with_trainfix in zip(rows("0.19.8"), rows("0.19.8", "auto"), strict=True):
        same = ("micro_batches", "pinned_bytes", "relative_error")
        assert {key: with_trainfix[key] for key in same} == {key: plain[key] for key in same}


@pytest.mark.parametrize("version", ["0.18.9", "0.19.0", "0.19.8"])
def test_deepspeed_waits_for_the_device_twice_per_parameter_at_the_boundary(version):
    assert all(row["micro_batches"]["boundary"]["syncs"] >= 2 * PARAMETERS for row in rows(version))


def test_0_19_8_also_waits_for_every_parameter_of_every_micro_batch():
    assert all(row["micro_batches"]["middle"]["syncs"] == PARAMETERS for row in rows("0.19.8"))


def test_trainfix_makes_no_temporaries_of_an_elements_size():
    assert all(counters.per_element(row, "temporary_bytes") < 0.01 for row in ours())
    assert all(counters.per_element(row, "temporary_bytes") > 10 for row in rows("0.18.9") + rows("0.19.8"))


@pytest.mark.parametrize("tier", ["ring", "resident"])
def test_a_bucket_is_added_in_at_most_two_launches(tier):
    for row in rows(counters.BROKEN, tier):
        micro = row["micro_batches"]
        assert all(micro[when]["kernels"] <= 2 * BUCKETS for when in ("first", "middle"))
        assert micro["boundary"]["kernels"] <= 2 * BUCKETS + 1  # and one that lays the norms together
        assert "new_tables" not in micro["middle"]


def test_trainfix_needs_no_second_accumulator_on_the_host():
    """128 MiB of slots at most, whatever the model; DeepSpeed takes two bytes per element more."""
    assert all(row["pinned_bytes"] == 2 * row["elements"] for row in rows("0.18.9") + rows("0.19.8"))
    assert all(row["pinned_bytes"] in (0, 128 << 20) for row in ours())


def test_the_table_says_what_was_counted():
    lines = counters.table(ROWS, counters.SHOWN).splitlines()
    assert len(lines) == 2 + len(counters.VARIANTS)
    assert lines[2].startswith("| 0.18.9, broken | 14.0 | 6.0 | 20.0 |")


def test_the_readme_shows_the_saved_table():
    shown = counters.BLOCK.search(counters.README.read_text(encoding="utf-8"))
    assert shown is not None
    assert shown.group() == f"{counters.table(ROWS, counters.SHOWN)}\n{counters.caption(ROWS)}"


@pytest.mark.slow
def test_a_new_run_counts_what_is_saved():
    again = counters.count_all()
    assert exact(again) == exact(ROWS), f"run: {re.search('PYTHONPATH=.*', counters.__doc__).group()}"
    for row, before in zip(again, ROWS, strict=True):
        assert row["relative_error"] == pytest.approx(before["relative_error"], rel=0.1)


def exact(found):
    """All but the error of the sum, whose last digits are this machine's matrix products."""
    return [{**row, "relative_error": None} for row in found]
