"""Shell scripts: which programs they start, with which arguments, and what only a run of the script would tell."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfix.environment.configs import ConfigError, commands
from trainfix.environment.configs.commands import Command
from trainfix.environment.configs.documents import Document, read
from trainfix.environment.configs.shell import calculated
from trainfix.environment.runconfig import Open


def found(script: str) -> tuple[Command, ...]:
    return commands.commands(Document("train.sh", script, {}))


def only(script: str) -> Command:
    (command,) = found(script)
    return command


def arguments(script: str) -> dict[str, tuple[str, ...]]:
    return {flag.name: flag.values for flag in only(script).flags}


def count(script: str) -> int | Open:
    return commands.ranks(only(script))[0]


@pytest.mark.parametrize(
    ("script", "launcher", "program"),
    [
        ("python train.py --a 1", "python", "train.py"),
        ("python3.11 -u -m openrlhf.cli.train_sft", "python", "openrlhf.cli.train_sft"),
        ("deepspeed --num_gpus 2 --module openrlhf.cli.train_sft --a 1", "deepspeed", "openrlhf.cli.train_sft"),
        ("torchrun --standalone --nproc-per-node=2 -m my.module", "torchrun", "my.module"),
        ("python -m torch.distributed.launch --nproc_per_node 2 train.py", "torchrun", "train.py"),
        ("accelerate launch --config_file a.yaml --multi_gpu train.py", "accelerate", "train.py"),
        ("llamafactory-cli train x.yaml", "llamafactory-cli", "llamafactory-cli"),
        ("CUDA_VISIBLE_DEVICES=0,1 nohup ./bin/torchrun train.py &> log &", "torchrun", "train.py"),
        ("cd project && exec deepspeed train.py | tee log", "deepspeed", "train.py"),
        ("ray job submit --address=http://h:1 --runtime-env-json='{\"a\": 1}' -- python3 -m m.n", "python", "m.n"),
        ('srun --nodes=1 bash -c "pip install x && torchrun train.py --a \\"b c\\""', "torchrun", "train.py"),
        ("if [ -z $1 ]; then\n  deepspeed train.py\nfi", "deepspeed", "train.py"),
        ("for i in 1 2; do ./train.py --seed $i; done", "python", "./train.py"),
    ],
)
def test_a_command_has_a_launcher_and_a_program(script, launcher, program):
    command = only(script)
    assert (command.launcher, command.program) == (launcher, program)


@pytest.mark.parametrize(
    "script",
    [
        "echo deepspeed train.py",
        "# deepspeed train.py",
        "pip install deepspeed && which torchrun",
        "pkill -f deepspeed",
        "accelerate config",
        "cat <<EOF\ndeepspeed train.py\nEOF",
        'echo "\ndeepspeed train.py\n"',
        "python -c 'import torch'",
    ],
)
def test_what_only_names_a_program_starts_none(script):
    assert [one.program for one in found(script) if one.program.endswith(".py")] == []


def test_flags_have_their_values_and_lines():
    command = only("deepspeed train.py \\\n  --a 1 \\\n  --b=2 --c \\\n  --d x y --e -1 --b 3\n")
    assert [(flag.name, flag.values, flag.line) for flag in command.flags] == [
        ("--a", ("1",), 2),
        ("--b", ("2",), 3),
        ("--c", (), 3),
        ("--d", ("x", "y"), 4),
        ("--e", ("-1",), 4),
        ("--b", ("3",), 4),
    ]


def test_a_comment_ends_a_command_and_a_backslash_continues_it():
    assert arguments("python t.py --a 1 # --b 2\n# --c 3 \\\npython -V") == {"--a": ("1",)}


def test_a_command_read_from_a_here_document_keeps_its_lines():
    text = "m.n \\\n   --a 1 \\\n   --b $B"
    script = f"set -x\nread -r -d '' training <<EOF\n{text}\nEOF\n    # --c\ndeepspeed --module $training\n"
    command = only(script)
    assert (command.program, command.line) == ("m.n", 8)
    assert [(flag.name, flag.values, flag.line) for flag in command.flags] == [("--a", ("1",), 4), ("--b", ("$B",), 5)]


def test_arrays_hold_arguments_and_comments():
    script = "ARGS=(\n  --a 1\n  # --off\n  --b 'x y'\n)\nARGS+=(--c)\npython t.py ${ARGS[@]} \"${ARGS[@]}\""
    (command,) = found(script)
    assert [flag.name for flag in command.flags] == ["--a", "--b", "--c"] * 2
    assert command.flags[4].values == ("x y",)
    assert command.flags[1].line == 4


@pytest.mark.parametrize(
    ("script", "value"),
    [
        ("GA=8\npython t.py --ga $GA", "8"),
        ("GA=8\npython t.py --ga ${GA}", "8"),
        ("export GA='8'; python t.py --ga \"$GA\"", "8"),
        ("readonly GA=8\nsource other.sh\npython t.py --ga $GA", "8"),
        ("GA=4\nGA=8\npython t.py --ga $GA", "8"),
        ("A=2 B=4\npython t.py --ga $((A * B))", "8"),
        ("A=16\npython t.py --ga $(( $A/2 ))", "8"),
        ("if true; then GA=8; python t.py --ga $GA; fi", "8"),
        ("GA=8\nif true; then GA=8; fi\npython t.py --ga $GA", "8"),
        ("GA=8\nfor i in 1 2; do python t.py --ga $GA; done", "8"),
        ("GA=8\nGA=${GA:-4}\npython t.py --ga $GA", "8"),
        ("run() {\n GA=8\n python t.py --ga $GA\n}\nrun", "8"),
        ("CMD='python t.py --ga 8'\n$CMD", "8"),
        ('eval "python t.py --ga 8"', "8"),
        ("source venv/bin/activate; GA=8; source ~/.bashrc; python t.py --ga $GA", "8"),
    ],
)
def test_a_variable_with_one_literal_value_is_filled_in(script, value):
    assert arguments(script)["--ga"] == (value,)


@pytest.mark.parametrize(
    ("script", "value"),
    [
        ("python t.py --ga $GA", "$GA"),
        ("GA=${GA:-8}\npython t.py --ga $GA", "${GA:-8}"),
        ("GA=$(nproc --all)\npython t.py --ga $GA", "$(…)"),
        ("GA=`nproc`\npython t.py --ga $GA", "`nproc`"),
        ("python t.py --ga $1", "$1"),
        ("GA=4\nif [ $1 ]; then GA=8; fi\npython t.py --ga $GA", "$GA"),
        ("if [ $1 ]; then GA=8; else GA=4; fi\npython t.py --ga $GA", "$GA"),
        ("GA=4\n[ $1 ] && GA=8\npython t.py --ga $GA", "$GA"),
        ("GA=4\nfor i in 1 2; do python t.py --ga $GA; GA=8; done", "$GA"),
        ("for GA in 4 8; do python t.py --ga $GA; done", "$GA"),
        ("case $1 in\n a) GA=4 ;;\n b) GA=8 ;;\nesac\npython t.py --ga $GA", "$GA"),
        ("GA=4\nrun() {\n python t.py --ga $GA\n}\nGA=8\nrun", "$GA"),
        ("GA=4\nset_it() { GA=8; }\nset_it\npython t.py --ga $GA", "$GA"),
        ("GA=4; read GA\npython t.py --ga $GA", "$GA"),
        ("GA=4; ((GA *= 2))\npython t.py --ga $GA", "$GA"),
        ("GA=4; source settings.sh; python t.py --ga $GA", "$GA"),
        ("(GA=8)\npython t.py --ga $GA", "$GA"),
        ("python t.py --ga '$GA'", "$GA"),
        ("A=7\npython t.py --ga $((A ** 2))", "$(…)"),
        ("bash -c 'python t.py --ga $GA'", "$GA"),
    ],
)
def test_what_only_a_run_would_tell_stays_as_written(script, value):
    assert arguments(script)["--ga"] == (value,)


def test_a_program_that_the_script_does_not_name_is_said_with_the_file_that_may():
    script = 'source ./train_dpo.sh slurm\nsrun bash -c "torchrun --nproc_per_node 8 -m ${training_commands}"\n'
    assert commands.hidden(found(script)) == (
        "train.sh, line 2: torchrun starts ${training_commands}, which this script does not set; it reads "
        "./train_dpo.sh; name the file that sets it"
    )


@pytest.mark.parametrize(
    ("script", "ranks"),
    [
        ("deepspeed --num_gpus 4 t.py", 4),
        ("deepspeed --num_gpus 4 --num_nodes 2 --hostfile h t.py", 8),
        ("deepspeed --include localhost:0,2,3 t.py", 3),
        ("deepspeed --include=a:0,1@b:0,1 t.py", 4),
        ("CUDA_VISIBLE_DEVICES=0,1 deepspeed t.py", 2),
        ("export CUDA_VISIBLE_DEVICES=0,1,2\ndeepspeed t.py", 3),
        ("torchrun --nproc_per_node=8 --nnodes 2 t.py", 16),
        ("torchrun --nnodes=2:2 --nproc-per-node 4 t.py", 8),
        ("torchrun t.py", 1),
        ("accelerate launch --num_processes 8 --num_machines 2 t.py", 8),
        ("NPROC_PER_NODE=4 NNODES=2 llamafactory-cli train x.yaml", 8),
        ("CUDA_VISIBLE_DEVICES=0,1 llamafactory-cli train x.yaml", 2),
        ("python t.py", 1),
    ],
)
def test_the_launcher_says_how_many_ranks_there_are(script, ranks):
    assert count(script) == ranks


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("deepspeed t.py", "deepspeed takes all GPUs that it finds; --num_gpus is not given"),
        ("deepspeed --num_gpus $N t.py", "deepspeed --num_gpus $N does not say it"),
        ("deepspeed --num_gpus 4 --hostfile h t.py", "deepspeed --num_gpus 4 --hostfile h does not say it"),
        ("deepspeed --include localhost t.py", "--include localhost does not say it"),
        ("deepspeed --num_gpus 0 t.py", "deepspeed --num_gpus 0 starts none"),
        ("torchrun --nproc_per_node gpu t.py", "torchrun --nproc_per_node gpu --nnodes 1 does not say it"),
        ("torchrun --nnodes 1:4 --nproc_per_node 8 t.py", "--nnodes 1:4 does not say it"),
        ("accelerate launch t.py", "accelerate launch takes it from its config; --num_processes is not given"),
        ("srun -n 8 python t.py", "srun or mpirun starts the program once per task"),
        ("llamafactory-cli train x.yaml", "llamafactory-cli starts as many as there are GPUs"),
    ],
)
def test_unknown_ranks_are_said_with_their_place(script, words):
    why = count(script)
    assert isinstance(why, Open)
    assert why.why.startswith("the number of ranks is not said (train.sh, line 1): ")
    assert why.why.endswith(words)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("128 / 8 / 2", 8),
        ("(1+2)*3", 9),
        ("-1", None),
        ("2 ** 9999999", None),
        ("1/0", None),
        ("9" * 90, None),
        ("", None),
    ],
)
def test_the_shell_s_arithmetic_is_done_for_whole_numbers(text, number):
    assert calculated(text) == number


@pytest.mark.parametrize(("script", "mark", "line"), [("a\nb 'c", "'", 2), ('"', '"', 1), ("x=$(a", "(", 1)])
def test_a_quote_that_is_never_closed_is_named_with_its_line(script, mark, line):
    with pytest.raises(ConfigError) as refused:
        found(script)
    assert str(refused.value).startswith(f"train.sh, line {line}: a {mark} opens here and is never closed; correct it")


def test_a_script_that_unfolds_without_end_is_refused():
    script = "A=0123456789\n" + "A=$A$A\n" * 40 + "python t.py $A"
    with pytest.raises(ConfigError, match="its variables unfold to more"):
        found(script)


def test_deep_nesting_is_refused_or_read_but_nothing_else():
    for script in ("$(" * 5000, "(" * 5000, "{ " * 5000, "$((" * 5000, "eval " * 5000 + "python t.py"):
        try:
            found(script)
        except ConfigError:
            continue


def test_windows_line_ends_and_a_mark_at_the_beginning_are_read(tmp_path):
    file = tmp_path / "train.sh"
    file.write_bytes("\ufeffdeepspeed t.py \\\r\n  --a 1\r\n".encode())
    (command,) = commands.commands(read(str(file)))
    assert [(flag.name, flag.values) for flag in command.flags] == [("--a", ("1",))]


def test_no_control_character_of_a_script_is_left_in_its_words():
    command = only("deepspeed --num_gpus '\x1b[2J' 'a\x1b[31m.py' --a '\x1b]0;x\x07' $'\\e'\n")
    words = (command.program, *command.options.values(), *(value for flag in command.flags for value in flag.values))
    assert all(word.isprintable() for word in words)


WORDS = ["deepspeed", "t.py", "$A", "A=1", "if", "then", "fi", "for", "do", "done", "case", "esac", "in", "{", "}", "("]
WORDS += [
    ")",
    "'",
    '"',
    "`",
    "$(",
    "${",
    "$((",
    "))",
    "<<EOF",
    "EOF",
    "\n",
    ";",
    "&&",
    "||",
    "|",
    "\\\n",
    "#",
    "A+=(x)",
]
WORDS += [
    "[[",
    "]]",
    "((A++))",
    "function",
    "f()",
    "eval",
    "bash -c",
    "read -r A",
    "--a",
    "=",
    "export A=2",
    "source x",
]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)))
def test_any_text_is_read_or_refused_with_words(script):
    try:
        for command in found(script):
            commands.ranks(command)
    except ConfigError as error:
        assert str(error).startswith("train.sh")


def test_a_script_that_is_too_large_or_too_deep_is_refused():
    for script in ("python t.py\n" * 30000, "if a; then " * 200 + "python t.py"):
        with pytest.raises(ConfigError, match="larger than a script that starts a training"):
            found(script)
