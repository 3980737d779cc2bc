"""doctor's reports for people and for machines: the words as snapshots, JSON and SARIF against their schemas, and
nothing that an examined file holds steers a terminal or breaks out of Markdown.

`SNAPSHOTS=write pytest tests/cli/test_reports.py` writes the snapshots anew: read their diff.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import packaging.requirements  # noqa: F401  (doctor takes these while only the examined packages are on the path)
import pytest
from jsonschema import Draft4Validator, Draft202012Validator
from markdown_it import MarkdownIt
from markdown_it.token import Token

import trainfix
from tests.support.stacks import folder
from trainfix.advisories import load
from trainfix.cli import examine, page
from trainfix.cli.examine import Finding, Report
from trainfix.cli.json import doctor_json, prove_json
from trainfix.cli.markdown import code, doctor_markdown, issue_block, plain
from trainfix.cli.proof_text import prove_text
from trainfix.cli.sarif import doctor_sarif, uri
from trainfix.cli.text import doctor_text
from trainfix.environment.blockers import Blocker
from trainfix.environment.configs import load as load_configs
from trainfix.environment.runconfig import Origin

from .conftest import OFFLOADED

SNAPSHOTS = Path(__file__).with_name("snapshots")
SCHEMAS = Path(trainfix.__file__).with_name("schemas")
SARIF = json.loads(Path(__file__).with_name("sarif-2.1.0.schema.json").read_text(encoding="utf-8"))
RIGHT = {"coefficients": [1.0] * 8, "relative_error": 1e-8, "cosine": 1.0, "norm_ratio": 1.0}
WRONG = {"coefficients": [1.0, *[0.0] * 6, 1.0], "relative_error": 0.95, "cosine": 0.36, "norm_ratio": 0.53}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
ANSI = re.compile(r"\033\[[\d;]*m|\033\]8;[^\033]*\033\\")


def proof(**changes: object) -> dict[str, Any]:
    """A record of prove."""
    known = {"id": "TF-0001", "package": "deepspeed", "installed": "0.18.9", "applicable": True, "reproduced": True}
    return {**known, "repaired": True, "reason": None, "before": WRONG, "after": RIGHT, "seconds": 1.0, **changes}


def with_finding(report: Report, advisory_id: str = "TF-0001", **fields: object) -> Report:
    """A copy of the report in which one finding has these fields."""
    findings = [replace(one, **fields) if one.advisory.id == advisory_id else one for one in report.findings]
    return replace(report, findings=tuple(findings))


def finding(report: Report, advisory_id: str = "TF-0001") -> Finding:
    return next(one for one in report.findings if one.advisory.id == advisory_id)


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory):
    """examine() as if these releases, and axolotl's metadata where it is asked for, were all that is installed."""
    config = tmp_path_factory.mktemp("config") / "ds.json"
    config.write_text(json.dumps(OFFLOADED | {"bf16": {"enabled": True}}))
    site = tmp_path_factory.mktemp("site")
    metadata = site / "axolotl-0.17.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.4\nName: axolotl\nVersion: 0.17.0\nRequires-Dist: deepspeed<0.19\n\n")

    def report(*, config_file: Path | None = config, pinned: bool = False, **packages: str) -> Report:
        folders = [str(folder(name, version)) for name, version in packages.items()] + ([str(site)] if pinned else [])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "path", [*folders, *(one for one in sys.path if "-packages" not in one)])
            for name in [name for name in os.environ if name.startswith("TRAINFIX")]:
                patch.delenv(name)
            configs = []
            if config_file is not None:
                patch.chdir(config_file.parent)
                configs = load_configs([config_file.name])
            return replace(examine.examine(configs), python="3.11.0", catalogue="2026-11-22")

    return report


@pytest.fixture(scope="module")
def broken(examined) -> Report:
    """Two packages with errors, a config that reaches some, an upgrade that is forbidden, and a proof."""
    report = examined(deepspeed="0.18.9", transformers="4.53.3", accelerate="1.7.0", pinned=True)
    return replace(report, proofs={"TF-0001": proof()})


@pytest.fixture(scope="module")
def clean(examined) -> Report:
    return examined(config_file=None)


def masked(text: str) -> str:
    """The text without what changes from one release of trainfix, or one run, to the next."""
    text = re.sub(r"trainfix \d+(?:\.\w+)*(?=, catalogue)", "trainfix V", text)
    return re.sub(r"(?<=\033\]8;id=)\d+", "N", text)


def check(name: str, text: str) -> None:
    file = SNAPSHOTS / name
    if os.environ.get("SNAPSHOTS") == "write":
        SNAPSHOTS.mkdir(exist_ok=True)
        file.write_text(masked(text), encoding="utf-8")
    assert masked(text) == file.read_text(encoding="utf-8")


# The text.


def test_the_text_at_118_columns(broken):
    check("doctor-118.txt", doctor_text(broken, colour=False))


def test_the_text_at_80_columns(broken):
    text = doctor_text(broken, colour=False, width=80)
    check("doctor-80.txt", text)
    assert max(map(len, text.splitlines())) <= 80


def test_the_text_on_a_terminal_with_rich(broken):
    check("doctor-rich-80.txt", doctor_text(broken, colour=True, width=80))


def test_a_clean_installation_is_all_good(clean):
    check("all-good.txt", doctor_text(clean, colour=False))


def test_rich_changes_no_word(broken):
    shown = ANSI.sub("", doctor_text(broken, colour=True, width=80))
    without_rules = re.sub(r" ─+$", "", shown, flags=re.M)
    assert without_rules == doctor_text(broken, colour=False, width=80)


def test_without_rich_a_terminal_gets_coloured_marks_and_the_same_words(broken, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    shown = doctor_text(broken, colour=True, width=80)
    assert "\033[31m[X]\033[0m  TF-0001  ZeRO-2" in shown
    assert ANSI.sub("", shown) == doctor_text(broken, colour=False, width=80)


def test_the_page_is_as_wide_as_the_terminal_and_118_elsewhere(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert page.width(None) == page.width("report.txt") == 118
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert (page.width(None), page.width("report.txt")) == (80, 118)
    monkeypatch.setenv("COLUMNS", "240")
    assert page.width(None) == 118


def test_findings_stand_together_by_package_the_gravest_package_first(broken):
    lines = doctor_text(broken, colour=False).splitlines()
    heads = [line for line in lines if re.match(r"\w+ [\d.]+: \d+ to ", line)]
    assert [head.split(":")[0] for head in heads] == ["deepspeed 0.18.9", "transformers 4.53.3", "accelerate 1.7.0"]
    packages = [load(line[5:12]).package for line in lines if line.startswith("[")]
    assert list(dict.fromkeys(packages)) == [package for package, _ in groupby(packages)]


def test_a_proof_is_told_in_the_block_of_its_finding(broken):
    text = doctor_text(broken, colour=False)
    block = text.split("[X]  TF-0001")[1].split("\n\n")[0]
    assert "proved here: 6 of 8 micro-batches lost; gone with the repair\n" in block


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"repaired": False}, "6 of 8 micro-batches lost; NOT gone with the repair"),
        ({"repaired": None, "reason": "no compiler"}, "6 of 8 micro-batches lost; no compiler"),
        (
            {"before": WRONG | {"coefficients": [0.5, 2.0, 1.0, 1.0]}},
            "2 of 4 micro-batches count wrongly (0.50 to 2.00); gone with the repair",
        ),
        (
            {"before": WRONG | {"coefficients": [0.5, 0.0]}},
            "1 of 2 micro-batches count wrongly (0.50 to 0.50), 1 lost; gone with the repair",
        ),
        (
            {"before": WRONG | {"coefficients": [1.0, 1.0]}},
            "the gradient is wrong by 0.95 of its norm; gone with the repair",
        ),
        ({"reproduced": False}, "the error did not show"),
        ({"reproduced": None, "before": None, "reason": "no torch"}, "could not be run; no torch"),
        ({"applicable": False, "reproduced": None, "before": None}, "does not apply"),
    ],
)
def test_a_proof_in_one_line(broken, changes, words):
    text = doctor_text(replace(broken, proofs={"TF-0001": proof(**changes)}), colour=False)
    assert f"     proved here: {words}\n" in text


def test_who_stands_in_the_way_and_how_strongly(broken):
    ways = {
        "requires": "axolotl 0.17.0 requires deepspeed<0.19",
        "extra": "axolotl 0.17.0 requires deepspeed<0.19 in an extra",
        "runtime-check": "axolotl 0.17.0 checks for deepspeed<0.19 when it starts",
        "recommends": "axolotl 0.17.0 recommends deepspeed<0.19",
    }
    for strength, words in ways.items():
        blocker = Blocker("axolotl 0.17.0", "deepspeed<0.19", strength)
        text = doctor_text(with_finding(broken, blocked_by=(blocker,)), colour=False)
        assert f"     upgrade:     fixed in deepspeed 0.19.0, but {words}\n" in text


def test_a_lock_file_alone_says_that_verdicts_are_by_version_only(broken):
    for report in (doctor_text, doctor_markdown):
        options = {"colour": False} if report is doctor_text else {}
        said = report(replace(broken, lock="uv.lock"), **options)
        assert "by version only: uv.lock names the releases" in said


def test_another_environment_is_named(broken):
    assert "note:        examined are the packages in .venv\n" in doctor_text(
        replace(broken, site=".venv"), colour=False
    )


def test_a_package_whose_release_a_lock_file_leaves_open_is_said_to_be_so(broken):
    fields = {"verdict": "unknown", "installed": None, "notes": ("deepspeed has no pin",)}
    report = with_finding(replace(broken, lock="requirements.txt", python=None), **fields)
    text = doctor_text(replace(report, findings=(finding(report),)), colour=False)
    assert "\ndeepspeed of an unknown release: 1 to look at\n" in text
    assert "     installed:   deepspeed of an unknown release: it could not be judged\n" in text
    assert "None" not in text + doctor_markdown(report) + issue_block(report)


def test_what_is_asked_for_tells_the_shape_that_decided(broken):
    asked = replace(broken, findings=(finding(broken),), detailed=True)
    assert "installed:   deepspeed 0.18.9 has this error (shape 8f1759c219c1)" in doctor_text(asked, colour=False)
    assert "shape" not in doctor_text(broken, colour=False)


# What examined files hold.

HOSTILE = 'a\x1b[31m`|``</details>@me\u202e\r\n\x9b2J#1 [x](http://e.vil) {0} "\udcff.json'


@pytest.fixture(scope="module")
def hostile(broken) -> Report:
    """A report whose file names, values and reasons are somebody's attempt to break out."""
    fields = {"because": (f"zero_optimization.stage = {HOSTILE} ({HOSTILE})",), "notes": (HOSTILE,)}
    blocker = Blocker(f"evil {HOSTILE}", "deepspeed<0.19", "requires")
    report = with_finding(broken, blocked_by=(blocker,), places=(Origin(HOSTILE, HOSTILE, 3),), **fields)
    report = with_finding(report, "TF-0009", ignored=HOSTILE)
    packages = {**broken.packages, "torch": f"2.0+{HOSTILE}"}
    proofs = {"TF-0001": proof(reason=HOSTILE)}
    site, lock = f"site{HOSTILE}", f"lock{HOSTILE}"
    return replace(
        report, configs=(HOSTILE,), remarks=(HOSTILE,), packages=packages, proofs=proofs, site=site, lock=lock
    )


@pytest.mark.parametrize(
    "render",
    [
        lambda report: doctor_text(report, colour=False),
        lambda report: doctor_text(report, colour=False, width=80),
        lambda report: ANSI.sub("", doctor_text(report, colour=True)),
        doctor_json,
        doctor_sarif,
        doctor_markdown,
        issue_block,
        lambda report: prove_text([*report.proofs.values()], 0, colour=False),
        lambda report: prove_json([*report.proofs.values()], 0),
    ],
    ids=["text", "text-80", "rich", "json", "sarif", "markdown", "issue", "prove", "prove-json"],
)
def test_no_control_character_of_an_examined_file_reaches_a_terminal(hostile, render):
    shown = render(hostile)
    assert CONTROL.findall(shown) == []
    assert "1b[31m" in shown  # it is there, and visible
    shown.encode("utf-8")


def test_json_gives_such_a_name_back_as_it_was(hostile):
    assert json.loads(doctor_json(hostile))["configs"] == [HOSTILE]


def tokens(text: str) -> Iterator[Token]:
    """Every token of Markdown as GitHub has it, tables included."""
    for block in MarkdownIt("commonmark").enable("table").parse(text):
        yield block
        yield from block.children or ()


@pytest.mark.parametrize("render", [doctor_markdown, issue_block])
def test_nothing_breaks_out_of_markdown(hostile, render):
    found = list(tokens(render(hostile)))
    links = {one.attrs["href"] for one in found if one.type == "link_open"}
    assert links
    assert all(str(link).startswith("https://github.com/trainfix/trainfix/") for link in links)
    raw = {one.content.strip() for one in found if one.type == "html_inline"}
    assert raw <= {"<!-- -->"}
    blocks = [one.content.strip() for one in found if one.type == "html_block"]
    assert all(re.fullmatch(r"<details><summary>[^<>]*</summary>|</details>", block) for block in blocks)
    texts = [one.content for one in found if one.type == "text" and one.content not in links]
    assert not [text for text in texts if re.search(r"[@#]\w|://", text)]
    assert any(one.type == "code_inline" and "[31m`|``</details>@me" in one.content for one in found)


def test_a_table_of_markdown_keeps_its_columns(hostile):
    rows, cells = [], 0
    for one in tokens(doctor_markdown(hostile)):
        if one.type == "tr_open":
            cells = 0
        cells += one.type in ("th_open", "td_open")
        if one.type == "tr_close":
            rows.append(cells)
    assert len(rows) > 3
    assert set(rows) == {6}


@pytest.mark.parametrize("text", ["`", "``a`", "a", "`a`", "a|b", " ", "", "\\", "a\\"])
def test_a_code_span_holds_its_text_whole(text):
    (span,) = [one for one in tokens(code(text)) if one.type == "code_inline"]
    assert span.content.strip() == text.strip()


@pytest.mark.parametrize("text", ["a_b_c", "*x*", "<b>", "[a](b)", "a|b", "&amp;", "`x`", "~~x~~", "\\", "!"])
def test_plain_text_of_markdown_shows_just_its_characters(text):
    (inline,) = [one for one in MarkdownIt("commonmark").parse(f"x {plain(text)} y") if one.type == "inline"]
    assert "".join(one.content for one in inline.children if one.type in ("text", "text_special")) == f"x {text} y"


# JSON.


def strict(schema: Any) -> Any:
    """The schema as the tests take it: a key that it does not name is an error, so that it names all."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        closed.setdefault("additionalProperties", False)
    return closed


def schema_of(command: str) -> Any:
    schema = json.loads((SCHEMAS / f"{command}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return schema


def errors(document: object, command: str) -> list[str]:
    return [error.message for error in Draft202012Validator(strict(schema_of(command))).iter_errors(document)]


def test_every_json_report_keeps_to_its_schema(broken, clean, hostile, examined):
    no_config = examined(config_file=None, deepspeed="0.18.9")
    newest = examined(deepspeed="0.19.8")
    for report in (broken, clean, hostile, no_config, newest):
        assert errors(json.loads(doctor_json(report)), "doctor") == []


def test_the_command_keeps_to_the_schema(trainfix, write):
    for argv in (("doctor",), ("doctor", "--config", write(), "--assume-import", "--strict")):
        assert errors(trainfix(*argv, "--format", "json").json, "doctor") == []


def test_the_json_of_prove_keeps_to_its_schema():
    records = [
        proof(),
        proof(applicable=None, reproduced=None, repaired=None, before=None, after=None, reason="no torch"),
        proof(installed=None, applicable=False, reproduced=None, repaired=None, before=None, after=None),
    ]
    assert errors(json.loads(prove_json(records, 3)), "prove") == []


def test_a_schema_misses_no_key_and_takes_no_other(broken, examined):
    document = json.loads(doctor_json(broken))
    document["hazards"] = json.loads(doctor_json(examined(deepspeed="0.19.8")))["hazards"]
    for path in ((), ("findings", 0), ("findings", 0, "blocked_by", 0), ("hazards", 0)):
        changed = copy.deepcopy(document)
        part = changed
        for step in path:
            part = part[step]
        part["another"] = 1
        assert errors(changed, "doctor") == ["Additional properties are not allowed ('another' was unexpected)"]
        del part["another"]
        part.pop(next(iter(part)))
        assert len(errors(changed, "doctor")) == 1


def test_a_reader_of_today_takes_the_keys_of_tomorrow(broken):
    document = json.loads(doctor_json(broken)) | {"another": 1}
    assert [*Draft202012Validator(schema_of("doctor")).iter_errors(document)] == []


def test_both_schemas_describe_a_proof_alike():
    doctor, prove = schema_of("doctor")["$defs"], schema_of("prove")["$defs"]
    assert {name: doctor[name] for name in prove} == prove


# SARIF.


def log(report: Report) -> Any:
    """The one run of the report's SARIF log, which is checked against the schema."""
    document = json.loads(doctor_sarif(report))
    assert [error.message for error in Draft4Validator(SARIF).iter_errors(document)] == []
    assert (document["version"], len(document["runs"])) == ("2.1.0", 1)
    return document["runs"][0]


def results(report: Report) -> dict[str, Any]:
    run = log(report)
    rules = run["tool"]["driver"]["rules"]
    assert all(rules[one["ruleIndex"]]["id"] == one["ruleId"] for one in run["results"])
    return {one["ruleId"]: one for one in run["results"]}


def test_sarif_has_a_rule_for_each_advisory_and_a_result_for_each_open_finding(broken):
    run = log(broken)
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == [one.advisory.id for one in broken.findings]
    assert [one["ruleId"] for one in run["results"]] == [one.advisory.id for one in broken.findings if not one.settled]
    rule = run["tool"]["driver"]["rules"][0]
    assert rule["helpUri"] == load("TF-0001").url
    assert "Upgrade: fixed in deepspeed 0.19.0" in rule["help"]["markdown"]
    assert len(rule["fullDescription"]["text"]) <= 1024
    assert run["invocations"][0]["exitCode"] == 1


def test_a_clean_installation_has_no_result(clean, hostile):
    assert results(clean) == {}
    assert log(hostile)["results"]


def test_a_result_says_how_grave_and_how_certain_it_is(broken):
    found = results(broken)
    assert (found["TF-0001"]["kind"], found["TF-0001"]["level"]) == ("fail", "error")
    assert (found["TF-0009"]["kind"], found["TF-0009"]["level"]) == ("fail", "warning")  # a loss of precision
    unknown = found["TF-0004"]
    assert (unknown["kind"], "level" in unknown) == ("review", False)
    text = found["TF-0001"]["message"]["text"]
    assert "Reached: zero_optimization.stage = 2" in text
    assert "Proved here: 6 of 8 micro-batches lost" in text
    assert "Upgrade: fixed in deepspeed 0.19.0, but axolotl 0.17.0 requires deepspeed<0.19." in text


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "fail"),
        ({"reachable": "unknown"}, "review"),
        ({"verdict": "unknown"}, "review"),
        ({"reachable": "no"}, "notApplicable"),
        ({"repaired_by": "assumed import"}, "pass"),
    ],
)
def test_an_ignored_finding_is_a_suppressed_result_with_its_reason(broken, changes, kind):
    result = results(with_finding(broken, ignored="a toy run", **changes))["TF-0001"]
    assert result["suppressions"] == [{"kind": "external", "status": "accepted", "justification": "a toy run"}]
    assert result["kind"] == kind
    assert ("level" in result) is (kind == "fail")


def test_a_result_stands_at_the_settings_that_decide(broken):
    places = (Origin("a dir/ds.json", "zero_optimization.stage", 4), Origin("train.yaml", "deepspeed"))
    result = results(with_finding(broken, places=places))["TF-0001"]
    first, second = (one["physicalLocation"] for one in result["locations"])
    assert first == {"artifactLocation": {"uri": "a%20dir/ds.json"}, "region": {"startLine": 4}}
    assert second == {"artifactLocation": {"uri": "train.yaml"}}
    assert result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] == "zero_optimization.stage"


def test_without_a_place_a_result_stands_at_the_config_else_the_lock_file_else_nowhere(broken):
    placeless = with_finding(broken, places=())
    cases: list[tuple[Sequence[str], str | None, list[str]]] = [
        (("ds.json",), "uv.lock", ["ds.json"]),
        (("train.yaml + ds.json", "ds.json"), None, ["train.yaml", "ds.json"]),
        ((), "uv.lock", ["uv.lock"]),
        ((), None, []),
    ]
    for configs, lock, expected in cases:
        found = results(replace(placeless, configs=tuple(configs), lock=lock))["TF-0001"]["locations"]
        assert [one["physicalLocation"]["artifactLocation"]["uri"] for one in found] == expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("./configs/ds.json", "configs/ds.json"),
        ("../ds.json", "../ds.json"),
        ("a:b #1?.json", "a%3Ab%20%231%3F.json"),
        ("é.json", "%C3%A9.json"),
        ("\udcff.json", "%FF.json"),
        ("/elsewhere/ds.json", "file:///elsewhere/ds.json"),
    ],
)
def test_a_file_as_a_uri(file, expected):
    assert uri(file) == expected


def test_a_file_below_the_current_folder_is_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert uri(str(tmp_path / "configs" / "ds.json")) == "configs/ds.json"


def test_a_fingerprint_outlives_lines_releases_and_reasons(broken):
    def fingerprint(**fields: object) -> str:
        return results(with_finding(broken, **fields))["TF-0001"]["partialFingerprints"]["trainfixFinding/v1"]

    first = fingerprint(places=(Origin("ds.json", "zero_optimization.stage", 4),))
    moved = fingerprint(
        places=(Origin("./ds.json", "zero_optimization.stage", 9),), installed="0.18.2", because=("another reason",)
    )
    assert moved == first
    assert fingerprint(places=(Origin("other.json", "zero_optimization.stage", 4),)) != first


def test_a_message_of_sarif_has_no_placeholder_and_no_link_of_a_file(hostile):
    result = results(hostile)["TF-0001"]
    assert "[x] (http://e.vil) {{0}}" in result["message"]["text"]


# Markdown.


def test_markdown_has_a_table_of_what_needs_attention_and_folds_the_details(broken):
    text = doctor_markdown(broken)
    title = text.splitlines()[0]
    assert re.fullmatch(r"### trainfix doctor: 1 to repair, \d+ to look at, \d+ fine: exit 1 \(.*\)", title)
    url = load("TF-0001").url
    assert f"| **to repair** | [TF-0001]({url}) | `deepspeed 0.18.9` | ZeRO-2 with CPU offload drops" in text
    assert text.count("<details>") == text.count("</details>") >= 3
    assert "- proved here: `6 of 8 micro-batches lost; gone with the repair`" in text
    assert "An upgrade of deepspeed also changes silently" in text


def test_markdown_of_a_clean_installation_is_short(clean):
    text = doctor_markdown(clean)
    assert text.startswith("### trainfix doctor: all good: ")
    assert len(text.splitlines()) <= 4


def test_a_reference_to_an_upstream_change_is_not_one_to_the_readers_own():
    assert plain("since #6550, says @somebody") == "since #<!-- -->6550, says @<!-- -->somebody"


def test_the_block_for_an_issue_names_releases_settings_and_what_was_measured(broken):
    text = issue_block(broken)
    assert "accelerate 1.7.0, deepspeed 0.18.9, transformers 4.53.3" in text
    assert "deepspeed 0.18.9 has this error (shape 8f1759c219c1); reached" in text
    assert "gradient_accumulation_steps = 8 (ds.json)`" in text
    measured = "- by `trainfix prove TF-0001` on this machine: `6 of 8 micro-batches lost; gone with the repair`"
    assert measured in text
    assert "No known silent error" not in text


def test_the_block_for_an_issue_has_no_folder_of_the_users(broken, monkeypatch, tmp_path):
    home = tmp_path / "jane"
    monkeypatch.setenv("HOME", str(home))
    config, remark = f"{home}/secret project/ds.json", f"deepspeed is installed 2 times (0.18.9 in {home}/lib)"
    because = (f"zero_optimization.stage = 2 ({config})",)
    configs = (f"{home}/train.yaml + {config}",)
    report = replace(with_finding(broken, because=because), configs=configs, remarks=(remark,))
    text = issue_block(report)
    assert "zero_optimization.stage = 2 (ds.json)" in text
    assert "2 times (0.18.9 in ~/lib)" in text
    assert "jane" not in text
    assert "secret" not in text


def test_the_block_for_an_issue_of_a_clean_installation_says_so(clean):
    assert "No known silent error is reached without repair." in issue_block(clean)


# Prove.


def test_several_proofs_are_counted_in_the_end():
    records = [
        proof(),
        proof(id="TF-0004"),
        proof(id="TF-0005", repaired=False),
        proof(id="TF-0006", reproduced=None, before=None, after=None, reason="no GPU"),
        proof(id="TF-0007", applicable=False, reproduced=None, before=None, after=None),
    ]
    text = prove_text(records, 1, colour=False)
    assert text.endswith(
        "2 shown and gone with the repair, 1 shown and NOT repaired, 1 not run, 1 not in these releases:\n"
        "an error is still there with the repair (exit 1)\n"
    )
    alone = prove_text(records[:1], 0, colour=False)
    assert alone.endswith("\n\nevery applicable error is gone with the repair (exit 0)\n")
