"""Who stands in the way of an upgrade: by metadata, and by the dated table of what no metadata holds."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.support.stacks import stack
from trainfix.environment import blockers as module
from trainfix.environment.blockers import (
    STRENGTHS,
    TABLE,
    Blocker,
    Demand,
    blockers,
    demands,
    demands_of,
    pins,
)
from trainfix.environment.installed import EnvironmentProblem


@pytest.fixture
def site(tmp_path):
    """Adds a distribution to a folder and returns it: metadata is all that a demand needs."""

    def added(name: str, version: str, *lines: str) -> list[str]:
        metadata = tmp_path / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""]))
        return [str(tmp_path)]

    return added


def of(package: str, paths: list[str], fixed_in: str, newest: str) -> list[tuple[str, str, str]]:
    found = blockers(demands(package, paths), fixed_in, newest=newest)
    return [(one.by, one.requires, one.strength) for one in found]


def demand(requires: str, strength: str, by: str = "framework 1.0", off: str | None = None) -> Demand:
    return Demand(by, Requirement(requires), strength, off)


def test_a_check_at_run_time_counts_more_than_an_extra(site):
    """LLaMA-Factory 0.9.4 names the same range in an extra and in hparams/parser.py."""
    extra = ("Provides-Extra: deepspeed", "Requires-Dist: deepspeed<=0.16.9,>=0.10.0; extra == 'deepspeed'")
    paths = site("llamafactory", "0.9.4", *extra)
    assert of("deepspeed", paths, "0.19.0", "0.19.8") == [
        ("llamafactory 0.9.4", "deepspeed<=0.16.9,>=0.10.0", "runtime-check")
    ]


@pytest.mark.parametrize(
    ("name", "version", "package", "strength", "off"),
    [
        ("llamafactory", "0.9.3", "deepspeed", "runtime-check", None),
        ("llamafactory", "0.9.4", "deepspeed", "runtime-check", "DISABLE_VERSION_CHECK=1"),
        ("llamafactory", "0.9.5", "deepspeed", "recommends", None),
        ("llamafactory", "0.9.2", "trl", "runtime-check", "DISABLE_VERSION_CHECK=1"),
        ("LLaMA_Factory", "0.9.5", "deepspeed", None, None),
        ("llamafactory", "0.9.6", "deepspeed", None, None),
        ("ms_swift", "4.5.0", "deepspeed", "recommends", None),
        ("ms-swift", "3.12.6", "deepspeed", "recommends", None),
        ("ms-swift", "3.1.1", "deepspeed", None, None),
        ("ms-swift", "someones-own", "deepspeed", None, None),
    ],
)
def test_the_table_speaks_of_the_releases_that_we_read(site, name, version, package, strength, off):
    found = demands(package, site(name, version))
    assert [(one.by, one.strength, one.off) for one in found] == (
        [(f"{name} {version}", strength, off)] * bool(strength)
    )
    assert demands_of(package, {name: version, "torch": "2.13.0"}) == found


def test_a_list_of_versions_is_judged_by_the_table_alone():
    found = demands_of("transformers", {"llamafactory": "0.9.4", "trl": "0.24.0", "transformers": "4.57.1"})
    assert blockers(found, "5.5.4", newest="5.23.0") == (
        Blocker("llamafactory 0.9.4", "transformers<=4.57.1,>=4.51.0", "runtime-check", "DISABLE_VERSION_CHECK=1"),
    )
    assert blockers(found, "4.56.0", newest="5.23.0") == ()


def test_a_requirement_is_known_for_a_lock_file_which_holds_none():
    for name, version, strength in (("openrlhf", "0.10.1", "requires"), ("axolotl", "0.14.0", "extra")):
        (found,) = blockers(demands_of("deepspeed", {name: version}), "0.19.0", newest="0.19.8")
        assert (found.by, found.strength) == (f"{name} {version}", strength)


def test_the_strongest_of_several_demands_is_named_and_only_what_blocks_counts():
    assert STRENGTHS == ("requires", "runtime-check", "extra", "recommends")
    every = [demand(f"deepspeed<0.1{number}", strength) for number, strength in enumerate(STRENGTHS, 2)]
    for first in range(4):
        for order in (every[first:], every[first:][::-1]):
            (found,) = blockers(order, "0.19.0", newest="0.19.8")
            assert found == Blocker("framework 1.0", f"deepspeed<0.1{first + 2}", STRENGTHS[first])
    weaker = [demand("deepspeed>=0.14", "requires"), demand("deepspeed==0.18.9", "recommends")]
    assert [one.strength for one in blockers(weaker, "0.19.0", newest="0.19.8")] == ["recommends"]


def test_the_setting_that_switches_the_blocking_check_off_is_known():
    check = demand("deepspeed<0.19", "runtime-check", off="CHECK=0")
    required = demand("deepspeed<0.19", "requires")
    for those, off in (([check], "CHECK=0"), ([check, required], None), ([required], None)):
        (found,) = blockers(those, "0.19.0", newest="0.19.8")
        assert found.off == off


def test_the_first_copy_on_the_path_is_the_one_that_counts(tmp_path, site):
    paths = site("framework", "2.0", "Requires-Dist: torch")
    hidden = tmp_path / "hidden"
    old = hidden / "framework-1.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: framework\nVersion: 1.0\nRequires-Dist: deepspeed<0.19\n"
    )
    assert demands("deepspeed", [*paths, str(hidden)]) == ()
    assert len(demands("deepspeed", [str(hidden), *paths])) == 1


def test_an_egg_info_folder_is_read_too(tmp_path):
    folder = tmp_path / "llamafactory.egg-info"
    folder.mkdir()
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: llamafactory\nVersion: 0.9.3\n")
    (folder / "requires.txt").write_text("trl<=0.9.6\n\n[deepspeed]\ndeepspeed<=0.16.9\n")
    assert [one.strength for one in demands("deepspeed", [str(tmp_path)])][-1] == "runtime-check"
    assert {one.strength for one in demands("trl", [str(tmp_path)])} == {"requires", "runtime-check"}


# The table itself


def test_every_row_of_the_table_is_sound():
    for pin in pins():
        requirement = Requirement(pin.requires)
        assert requirement.name == pin.package and requirement.specifier
        assert SpecifierSet(pin.releases)
        assert pin.strength in STRENGTHS
        assert pin.off is None or (pin.strength == "runtime-check" and re.fullmatch(r"[A-Z_]+=\S+", pin.off))
        assert re.match(r"https://github\.com/[\w.-]+/[\w.-]+/(blob/v[\w.]+/\S+|releases/tag/v[\w.]+)$", pin.source)
        assert date(2026, 11, 1) <= date.fromisoformat(pin.read) <= date.today()
    assert len({(pin.by, pin.releases, pin.package) for pin in pins()}) == len(pins())


def test_the_rows_of_llama_factory_are_what_its_released_wheel_checks():
    """Every check of a version with an upper bound that 0.9.5 makes whenever it parses its arguments."""
    (folder,) = [one for one in stack(llamafactory="0.9.5") if (one / "llamafactory").is_dir()]
    text = (folder / "llamafactory/extras/misc.py").read_text(encoding="utf-8")
    checks = set(re.findall(r'check_version\("((?:transformers|accelerate|trl|deepspeed)[<>=!][^"]*)"\)', text))
    rows = {pin.requires for pin in pins() if pin.by == "llamafactory" and "0.9.5" in SpecifierSet(pin.releases)}
    assert checks == {requires for requires in rows if not requires.startswith("deepspeed")}
    assert 'is_env_enabled("DISABLE_VERSION_CHECK") and not mandatory' in text


def test_a_broken_table_is_a_problem_that_names_the_file_and_the_next_step(tmp_path, monkeypatch):
    broken = tmp_path / "pins.json"
    broken.write_text(json.dumps([{"by": "llamafactory"}]))
    monkeypatch.setattr(module, "TABLE", broken)
    pins.cache_clear()
    try:
        with pytest.raises(
            EnvironmentProblem, match=r"^cannot read the table .*pins\.json: .*; it is part of trainfix"
        ):
            demands("deepspeed", [str(tmp_path)])
    finally:
        pins.cache_clear()
    assert Path(TABLE).name == "pins.json"
