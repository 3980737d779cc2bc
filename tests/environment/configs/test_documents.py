"""Reading files as data: lines, clear errors, and nothing but a ConfigError for whatever a file holds."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainfix.environment import configs
from trainfix.environment.configs import (
    KINDS,
    ConfigError,
    accelerate,
    axolotl,
    documents,
    llamafactory,
    load,
    transformers,
    trl,
)
from trainfix.environment.configs.deepspeed import TOP
from trainfix.environment.configs.documents import find, read
from trainfix.environment.runconfig import RUN_KEYS
from trainfix.environment.runconfig.deepspeed import DEVICE, MODEL_TYPE, STAGE, STEPS

# Lines of keys


def test_yaml_keys_have_their_lines(write):
    document = read(write("c.yaml", "a: 1\nb:\n  c: 2\n  d:\n    - e: 3\n"))
    assert [document.line(*path) for path in (("a",), ("b", "c"), ("b", "d", "0", "e"))] == [1, 3, 5]


def test_a_json_key_has_its_line_where_it_stands_once(write):
    document = read(write("c.json", '{\n "a": 1,\n "b": {"c": 2},\n "d": {"c": 3}\n}'))
    assert (document.line("a"), document.line("c")) == (2, None)


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(here):
    text = "output_dir: out\r\nlearning_rate: 1.0e-5\r\nnum_train_epochs: 2\r\n"
    Path("args.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (config,) = load(["args.yaml"])
    setting = config.setting("epochs")
    assert (setting.value, setting.places[0].line) == (2, 3)
    Path("ds.json").write_bytes(b'\xef\xbb\xbf{\r\n"zero_optimization": {\r\n"stage": 2}}\r\n')
    (config,) = load(["ds.json"])
    assert config.setting(STAGE).value == 2


# Files that cannot be read


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.yaml", "a: 1\na: 2\n", "c.yaml, line 2: the key 'a' stands twice"),
        ("c.json", '{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ("c.yaml", "a: [1\n", "not valid YAML"),
        ("c.yaml", "a: !!python/object/apply:os.system [touch opened]\n", "is not plain data"),
        ("c.yaml", "a: !ENV x\n", "the tag !ENV is not plain data"),
        ("c.yaml", "- 1\n- 2\n", "holds a list"),
        ("c.yaml", "just text\n", "holds a string"),
        ("c.yaml", "", "holds nothing"),
        ("c.yaml", "a: 1\n---\nb: 2\n", "not valid YAML"),
        ("c.yaml", "<<: 3\n", "<< takes mappings only"),
        ("c.yaml", "a: \x00\n", "not a usable YAML file"),
        ("c.yaml", "a: &a [*a]\n", "unfolds to more than a config can hold"),
        ("c.yaml", "a: 2024-13-45\n", "not a usable YAML file"),
        ("c.json", "", "not valid JSON"),
        ("c.json", "{'a': 1}", "not valid JSON"),
        ("c.json", "[" * 100_000, "not a usable JSON file"),
        ("c.json", '{"a": ' * 20_000 + "1" + "}" * 20_000, "c.json"),
        ("c.json", '{"a": 1} // note', "no comments"),
    ],
)
def test_the_error_names_the_file_and_what_is_wrong(write, name, content, words):
    with pytest.raises(ConfigError) as error:
        load([write(name, content)])
    assert words in str(error.value)
    assert name in str(error.value)
    assert not Path("opened").exists()


def test_an_anchor_bomb_is_stopped(write):
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    with pytest.raises(ConfigError, match="unfolds to more than a config can hold"):
        load([write("bomb.yaml", text)])


def test_deep_nesting_is_stopped(write):
    with pytest.raises(ConfigError):
        load([write("deep.yaml", "a: " + "[" * 300 + "]" * 300)])


def test_merges_and_anchors_of_a_real_config_are_followed(write):
    text = "base: &base {stage: 3}\noutput_dir: o\nsave_steps: 5\ndeepspeed:\n  zero_optimization:\n    <<: *base\n"
    (config,) = load([write("args.yaml", text)])
    assert config.value(STAGE) == 3


def test_what_is_not_text_is_named(here):
    Path("c.json").write_bytes(b"{\xff}")
    with pytest.raises(ConfigError, match=r"c\.json is not UTF-8 text \(byte 1\)"):
        load(["c.json"])


def test_a_huge_file_is_not_read(here):
    with Path("big.yaml").open("wb") as file:
        file.truncate(documents.LARGEST + 1)
    with pytest.raises(ConfigError, match="more than 16 MiB"):
        load(["big.yaml"])


def test_missing_folders_and_loops(here):
    Path("a").symlink_to("b")
    Path("b").symlink_to("a")
    Path("folder").mkdir()
    Path("folder/ds.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^cannot read a: Too many levels of symbolic links"):
        load(["a"])
    with pytest.raises(
        ConfigError, match=r"folder is a directory: name the config file itself; it holds folder/ds\.json"
    ):
        load(["folder"])
    with pytest.raises(ConfigError, match=r"folder/dss\.json: no such file; did you mean folder/ds\.json\?"):
        load(["folder/dss.json"])


def test_a_file_that_may_not_be_read_is_named(write):
    if os.geteuid() == 0:
        path = "/proc/self/mem"
    else:
        path = write("secret.json", "{}")
        Path(path).chmod(0)
    with pytest.raises(ConfigError, match=rf"^cannot read {path}"):
        load([path])


@pytest.mark.parametrize("name", ["a\x00b", "x" * 5000, "../" * 2000, "", ".", "\x1b[31m"])
def test_a_name_that_no_file_can_have_is_none(here, name):
    assert find(name, "args.json") is None


@pytest.mark.parametrize("name", ["a\x00b", "x" * 5000, "\x1b[31mred"])
def test_a_config_that_names_such_a_file_leaves_it_open(write, name):
    args = {"output_dir": "o", "save_steps": 1, "deepspeed": name}
    (config,) = load([write("args.json", args)])
    assert config.value("deepspeed") is True
    assert "no such file" in config.setting(STAGE).because


def test_a_forced_kind_is_read_as_such(write):
    (config,) = load([write("args.json", {"gradient_accumulation_steps": 4})], kind="transformers")
    assert config.value("framework") == "transformers"
    with pytest.raises(ConfigError, match="looks like no config that trainfix knows"):
        load([write("c.json", {"a": 1})])


def test_nobody_claims_anothers_config(write):
    """Each kind's own small example is recognised by its reader first, and by no other but DeepSpeed's, the last."""
    examples = {
        "accelerate": {"distributed_type": "NO", "num_processes": 1},
        "llamafactory": {"model_name_or_path": "m", "stage": "sft", "finetuning_type": "lora", "output_dir": "o"},
        "axolotl": {"base_model": "m", "micro_batch_size": 1, "num_epochs": 1, "gradient_accumulation_steps": 1},
        "trl": {"model_name_or_path": "m", "dataset_mixture": {}, "output_dir": "o", "learning_rate": 1},
        "saved-run": {"global_step": 1, "log_history": [], "max_steps": 1, "num_train_epochs": 1},
        "transformers": {"output_dir": "o", "learning_rate": 1},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    for kind, content in examples.items():
        document = read(write(f"{kind}.json", content))
        claimed = [kind for kind in KINDS if configs.reader(kind).recognises(document)]
        assert claimed[0] == kind


# Whatever a file holds

KEYS = sorted(
    TOP
    | transformers.DISTINCTIVE
    | trl.OWN
    | trl.TELLS.keys()
    | axolotl.OWN
    | llamafactory.OWN
    | llamafactory.V1
    | llamafactory.NOT_TRAINING.keys()
    | accelerate.SECTION.keys()
    | {"distributed_type", "num_processes", "mixed_precision", "parallelism_config", "deepspeed_config", "fp16", "bf16"}
    | {"deepspeed_config_file", "deepspeed", "fsdp", "base_model", "batch_size", "model", "model_name_or_path", "stage"}
    | {
        "template",
        "do_train",
        "dataset_name",
        "global_step",
        "log_history",
        "optimizer",
        "reward_model",
        "use_deepspeed",
    }
    | {"global_batch_size", "config_file", "name", "fp8", "<<", "", "zero_optimization", "auto", "params", "type"}
)
WORDS = st.sampled_from(
    [
        "auto",
        "none",
        "cpu",
        "DEEPSPEED",
        "FSDP",
        "NO",
        "zero2",
        "sft",
        "true",
        "8",
        "1e-5",
        "ds.json",
        "{",
        "nan",
        "1e999",
        "\x1b[2J",
    ]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.text(max_size=6), st.just(10**400), st.just(-0.0)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=8,
)
MAPPINGS = st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), VALUES, max_size=12)
FUZZED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ask(paths: list[str], kind: str | None = None) -> None:
    """Read the files and ask for every key: nothing but a ConfigError may come out, and every value has its reason."""
    try:
        runs = load(paths, kind)
    except ConfigError as error:
        assert str(error)
        return
    for run in runs:
        for key in (*RUN_KEYS, STAGE, DEVICE, STEPS, MODEL_TYPE, "gradient_clipping", "fp16.enabled"):
            setting = run.setting(key, {"transformers": "4.55.0", "trl": "0.24.0", "axolotl": "0.16.1"})
            assert setting.because
            assert all(place.file for place in setting.places)


@FUZZED
@given(content=MAPPINGS, kind=st.sampled_from([None, *KINDS]))
def test_any_json_mapping_is_read_or_rejected(here, content, kind):
    Path("c.json").write_text(json.dumps(content), encoding="utf-8")
    ask(["c.json"], kind)


@FUZZED
@given(content=MAPPINGS, kind=st.sampled_from([None, *KINDS]))
def test_any_yaml_mapping_is_read_or_rejected(here, content, kind):
    Path("c.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="replace")
    ask(["c.yaml"], kind)


@FUZZED
@given(contents=st.lists(MAPPINGS, min_size=2, max_size=4))
def test_any_files_together_are_read_or_rejected(here, contents):
    names = [f"{number}.json" for number in range(len(contents))]
    for name, content in zip(names, contents, strict=True):
        Path(name).write_text(json.dumps(content), encoding="utf-8")
    ask(names)


@FUZZED
@given(content=st.binary(max_size=200), name=st.sampled_from(["c.json", "c.yaml", "c.sh", "c"]))
def test_any_bytes_are_read_or_rejected(here, content, name):
    Path(name).write_bytes(content)
    ask([name])


@FUZZED
@given(
    lines=st.lists(st.text("abd:-&*!<>|{}[]'\"#%@ \t0123456789", max_size=20), max_size=8),
    ends=st.sampled_from(["\n", "\r\n", "\r", "\u2028"]),
)
def test_any_text_like_yaml_is_read_or_rejected(here, lines, ends):
    Path("c.yaml").write_text(ends.join(lines), encoding="utf-8", newline="")
    ask(["c.yaml"])


@FUZZED
@given(text=st.text(string.printable, max_size=120), kind=st.sampled_from(KINDS))
def test_any_text_as_any_kind_is_read_or_rejected(here, text, kind):
    Path("c.txt").write_text(text, encoding="utf-8", newline="")
    ask(["c.txt"], kind)


@FUZZED
@given(
    names=st.lists(
        st.from_regex(r"(checkpoint|global_step|rng_state_|zero_pp_rank_)[-0-9]{0,30}[a-z_.]{0,9}", fullmatch=True),
        max_size=5,
    )
)
def test_any_names_in_a_folder_are_read_or_rejected(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("run")
    for name in names:
        (folder / name).mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text("{}")
    ask([str(folder)])


def test_the_readers_are_asked_in_an_order_that_ends_with_deepspeed():
    assert KINDS[-1] == "deepspeed"
    assert [configs.reader(kind).KIND for kind in KINDS] == list(KINDS)
