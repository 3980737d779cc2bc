"""The records of the catalogue are well formed, and what they say about DeepSpeed's releases is what the releases hold.

`python -m tests.advisories.test_records SCHEMA` checks the records against a copy of OSV's own schema (see README.md).
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from packaging.version import Version

from tests.matrix.shapes import load as table_of_shapes
from tests.support.releases import RELEASES, release
from trainfix import advisories
from trainfix.environment.shapes import ABSENT, shape_in_text
from trainfix.settings import ADVISORY_IDS

FILES = sorted(advisories.RECORDS.glob("*.json"))
SCHEMA = json.loads(Path(__file__).with_name("record.schema.json").read_text(encoding="utf-8"))

every_record = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
# The same of the others, whose wheels tests.matrix.shapes has looked into, are in tests/matrix/test_losses.py.
OF_DEEPSPEED = [path for path in FILES if advisories.load(path.stem).package == "deepspeed"]
every_record_of_deepspeed = pytest.mark.parametrize("path", OF_DEEPSPEED, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def shapes_by_release(target: str) -> dict[str, str | None]:
    """The shape of one function in the source of every release."""
    module, qualname = target.split(":")
    source = Path(*module.split(".")).with_suffix(".py")
    found: dict[str, str | None] = {}
    for version in RELEASES:
        file = release(version) / source
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        found[version] = shape_in_text(text, qualname) or ABSENT
    return found


def span(versions: list[str]) -> str:
    """``0.15.2 to 0.18.2``; where releases between are missing, ``0.14.0 to 0.14.5, 0.15.2``."""
    runs: list[list[str]] = []
    for version in versions:
        if runs and RELEASES.index(version) == RELEASES.index(runs[-1][-1]) + 1:
            runs[-1].append(version)
        else:
            runs.append([version])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


@every_record
def test_a_record_fits_the_schema(path: Path) -> None:
    jsonschema.validate(read(path), SCHEMA, cls=jsonschema.Draft202012Validator)


@every_record
def test_a_record_is_named_after_its_id_and_its_url_too(path: Path) -> None:
    record = read(path)
    assert path.stem == record["id"]
    ours = record["database_specific"]["trainfix"]
    if ours["source_patches"]:
        assert ours["url"].endswith(f"/patches/{record['id']}/README.md")
        assert (advisories.patches_folder() / record["id"] / "README.md").is_file()
    else:
        assert ours["url"].endswith(f"/docs/advisories/{record['id']}.md")


def test_the_pages_of_the_catalogue_are_what_the_records_say(checkout: Path) -> None:
    sys.path.insert(0, str(checkout / "tools"))
    try:
        pages = importlib.import_module("advisories").pages()
    finally:
        sys.path.pop(0)
    written = {path.name: path.read_text(encoding="utf-8") for path in (checkout / "docs" / "advisories").iterdir()}
    assert written == pages, "python tools/advisories.py"


def test_the_ids_known_at_import_are_those_of_the_records() -> None:
    assert [path.stem for path in FILES] == list(ADVISORY_IDS) == [advisory.id for advisory in advisories.load_all()]


@every_record
def test_ranges_and_versions_agree_over_all_releases(path: Path) -> None:
    record = read(path)
    affected = record["affected"][0]
    introduced, end = affected["ranges"][0]["events"]
    since, until = Version(introduced["introduced"]), Version(next(iter(end.values())))
    before_end = Version.__lt__ if "fixed" in end else Version.__le__
    package = affected["package"]["name"]
    releases = list(RELEASES if package == "deepspeed" else table_of_shapes()[package])
    wanted = [version for version in releases if since <= Version(version) and before_end(Version(version), until)]
    # A release between that does not have the error is told by its shape: see tests/matrix/test_losses.py.
    assert affected["versions"] == [version for version in wanted if version in affected["versions"]]
    assert {affected["versions"][0], affected["versions"][-1]} == {wanted[0], wanted[-1]}
    assert package != "deepspeed" or affected["versions"] == wanted
    assert record["database_specific"]["trainfix"]["last_run"] == releases[-1]
    upgrade = record["database_specific"]["trainfix"]["ways_out"]["upgrade"]
    assert (upgrade is None) == ("fixed" not in end)
    assert upgrade is None or (upgrade in releases and Version(upgrade) >= until), "a release that can be installed"


@pytest.mark.slow
@every_record_of_deepspeed
def test_the_shapes_of_a_record_are_those_of_the_47_releases(path: Path) -> None:
    record = read(path)
    for target, classes in record["database_specific"]["trainfix"]["evidence"].items():
        found: dict[str | None, list[str]] = {}
        for version, shape in shapes_by_release(target).items():
            found.setdefault(shape, []).append(version)
        listed = {shape: text for shapes in classes.values() for shape, text in shapes.items()}
        # What a source patch makes of a function: it may repair this advisory, or another one in the same function.
        patched = {shape: text for shape, text in listed.items() if text.startswith("patches/")}
        assert set(classes.get("patched", ())) <= set(patched)
        released = {shape: text for shape, text in listed.items() if shape not in patched}
        spans = {shape: span(versions) for shape, versions in found.items()}
        assert {shape: spans.get(shape) for shape in released} == released  # that none is missing: the next test
        assert not set(patched) & set(found), "a patched function must look like no release"


@pytest.mark.slow
@every_record_of_deepspeed
def test_a_release_is_affected_by_shape_exactly_where_the_record_lists_it(path: Path) -> None:
    record, advisory = read(path), advisories.load(path.stem)
    verdicts: dict[str, str] = {}
    by_target = {target: shapes_by_release(target) for target in advisory.evidence}
    for version in RELEASES:
        shapes = {target: shapes[version] for target, shapes in by_target.items()}
        verdict = advisories.judge(advisory, {advisory.package: version}, shapes)
        assert verdict.by == ("shape" if advisory.evidence else "version")
        verdicts[version] = verdict.verdict
    assert [version for version in RELEASES if verdicts[version] == "affected"] == record["affected"][0]["versions"]


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A catalogue of one record that a test may damage."""
    path = tmp_path / "TF-0001.json"
    path.write_bytes(FILES[0].read_bytes())
    monkeypatch.setattr(advisories, "RECORDS", tmp_path)
    advisories.load_all.cache_clear()
    yield path
    advisories.load_all.cache_clear()


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_truncated_record_is_named_with_the_next_step(catalogue: Path, kept: float) -> None:
    whole = catalogue.read_bytes()
    catalogue.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(advisories.RecordError, match="reinstall") as error:
        advisories.load_all()
    assert str(catalogue) in str(error.value)


@pytest.mark.parametrize("missing", ["evidence", "triggers", "source_patches", "severity"])
def test_a_record_without_a_key_is_named_with_the_key(catalogue: Path, missing: str) -> None:
    record = read(catalogue)
    del record["database_specific"]["trainfix"][missing]
    catalogue.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(advisories.RecordError, match=missing) as error:
        advisories.load_all()
    assert str(catalogue) in str(error.value)


def test_a_schema_violation_is_seen() -> None:
    record = read(FILES[0])
    record["affected"][0]["ranges"][0]["events"].reverse()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, SCHEMA, cls=jsonschema.Draft202012Validator)


def against_osv(schema: Path) -> int:
    """Print what OSV's own schema has against our records, their ids read as those of a private database."""
    validator = jsonschema.Draft202012Validator(json.loads(schema.read_text(encoding="utf-8")))
    problems = [
        f"{path.stem}: {'/'.join(map(str, problem.path))}: {problem.message}"
        for path in FILES
        for problem in validator.iter_errors(read(path) | {"id": f"x_{path.stem}"})
    ]
    print("\n".join(problems) or f"{len(FILES)} records fit {schema}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(against_osv(Path(sys.argv[1])))
