"""The commands of a shell script, or of a file that holds one command, that start a Python program: what they start,
with which flags, and how many ranks the launcher makes. Nothing is ever executed.

The launchers' options are those of the released sources: DeepSpeed's ``launcher/runner.py`` (0.14.0 to 0.19.8),
PyTorch's ``distributed/run.py`` (2.4 to 2.13), accelerate's ``commands/launch.py`` (1.0.1 to 1.11.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from trainfix.environment.configs.documents import ConfigError, Document
from trainfix.environment.configs.shell import LARGEST, Simple, is_literal, simple_commands
from trainfix.environment.configs.shellsyntax import ASSIGNED, SyntaxFault, Text, TooMuch
from trainfix.environment.printable import printable
from trainfix.environment.runconfig import Open

# Launcher -> its options that take no value, without dashes and with _ for -. All others take one.
_SWITCHES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "python": frozenset(
            """
            b B d E h i I O OO P q s S u v V x
            """.split()
        ),
        "torchrun": frozenset(
            """
            m module standalone no_python run_path use_env virtual_local_rank
            """.split()
        ),
        "deepspeed": frozenset(
            """
            module no_python no_local_rank no_ssh no_ssh_check force_multi save_pid elastic_training
            bind_cores_to_rank q quiet
            """.split()
        ),
        "accelerate": frozenset(
            """
            m module no_python q quiet debug cpu multi_gpu tpu ipex use_xpu use_deepspeed use_fsdp
            use_megatron_lm use_parallelism_config same_network enable_cpu_affinity dynamo_use_fullgraph
            dynamo_use_dynamic dynamo_use_regional_compilation tpu_cluster no_tpu_cluster tpu_use_sudo
            downcast_bf16 fp8_use_autocast_during_eval
            """.split()
        ),
    }
)
# Modules that are launchers, started by ``python -m``.
_LAUNCHER_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "torch.distributed.run": "torchrun",
        "torch.distributed.launch": "torchrun",
        "deepspeed.launcher.runner": "deepspeed",
        "accelerate.commands.launch": "accelerate",
    }
)
# Programs that train and start their own ranks.
CONSOLE_PROGRAMS = ("llamafactory-cli", "axolotl", "trl")
# What may stand before the program.
_WRAPPERS = frozenset(
    """
    apptainer command conda docker env exec mamba micromamba mpiexec mpirun nice nohup nsys numactl pixi podman
    poetry ray setsid singularity srun stdbuf sudo taskset timeout trainfix unbuffer uv
    """.split()
)
_MANY = frozenset(("mpiexec", "mpirun", "srun"))  # of these, that start the same program several times
_PYTHON = re.compile(r"python(\d(\.\d+)?)?")
_LONGEST = 12  # digits of a number
_FLAG = re.compile(r"--?[A-Za-z]")


@dataclass(frozen=True)
class Flag:
    """One option as given. `values`: all words up to the next option."""

    name: str
    values: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class Command:
    """One command that starts a Python program.

    program: a dotted module, a script's path, or a console program's name, as written.
    words, flags: what the program gets; the words are those before the first flag.
    launcher: torchrun, deepspeed, accelerate, python, or the console program itself; options: its own.
    environment: variables that the script sets for it; many: it is itself started several times (srun).
    source: the last file that the script reads before, which may set its variables; empty if none.
    """

    file: str
    line: int
    program: str
    words: tuple[str, ...]
    flags: tuple[Flag, ...]
    launcher: str
    options: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    many: bool = False
    source: str = ""

    @property
    def is_named(self) -> bool:
        """Whether the script tells the program, at least that it is one Python file."""
        return is_literal(self.program) or self.program.endswith(".py")

    @property
    def place(self) -> str:
        """The command's place in words."""
        return f"{self.file}, line {self.line}"

    def lines(self) -> dict[tuple[str, ...], int]:
        """The line of each flag, as `Document.lines` has them."""
        return {(flag.name,): flag.line for flag in self.flags}


def commands(document: Document) -> tuple[Command, ...]:
    """The commands in a script that start a Python program. Raises ConfigError where it is no shell script."""
    path = document.path
    try:
        found = simple_commands(Text.of(document.text[: LARGEST + 1]))
    except SyntaxFault as fault:
        raise ConfigError(
            f"{path}, line {fault.line}: a {fault.what} opens here and is never closed; correct it, or name a file "
            "that holds only the command"
        ) from None
    except (TooMuch, RecursionError):
        raise ConfigError(
            f"{path} is larger than a script that starts a training, or its variables unfold to more; name a file that "
            "holds only the command"
        ) from None
    return tuple(command for one in found if (command := _command(path, one)) is not None)


def ranks(command: Command) -> tuple[int | Open, str]:
    """How many ranks the launcher starts, and how the script says so. accelerate's config may say it instead."""
    rule = {"torchrun": _torchrun, "deepspeed": _deepspeed, "accelerate": _accelerate, "python": _python}
    count, said = rule.get(command.launcher, _own)(command)
    if isinstance(count, int) and count < 1:
        return _unsaid(command, f"{said} starts none"), said
    return count, said


def hidden(found: Sequence[Command]) -> str | None:
    """What to say of a command that starts what the script does not tell, if there is one."""
    for command in found:
        if not command.is_named:
            reads = f"; it reads {command.source}" if command.source else ""
            return (
                f"{command.place}: {command.launcher} starts {command.program}, which this script does not set{reads}; "
                "name the file that sets it"
            )
    return None


def whole_number(text: str) -> int:
    """The number that `text` is. Raises ValueError where it is none, or larger than anything counted here."""
    if len(text) > _LONGEST:
        raise ValueError(text)
    return int(text)


# Finding the program


def _command(file: str, simple: Simple) -> Command | None:
    """What one shell command starts; None if it is no Python program."""
    words = list(simple.words)
    environment = dict(simple.environment)
    many = False
    if _base(words[0].text) in _WRAPPERS:
        many = _base(words[0].text) in _MANY
        while words and not _starts_python(words[0].text):
            assigned = ASSIGNED.match(words[0].text)
            if assigned is not None:
                environment[assigned[1]] = words[0].text[assigned.end() :]
            words.pop(0)
    if not words or not _starts_python(words[0].text):
        return None
    launched = _launched(_base(words[0].text), words)
    if launched is None:
        return None
    launcher, options, rest = launched
    program, arguments = rest[0], rest[1:]
    positional, flags = _flags(arguments)
    return Command(
        file,
        simple.line,
        printable(program.text),
        positional,
        flags,
        launcher,
        MappingProxyType(options),
        MappingProxyType(environment),
        many,
        printable(simple.source),
    )


def _base(word: str) -> str:
    return word.rpartition("/")[2]


def _starts_python(word: str) -> bool:
    name = _base(word)
    return bool(_PYTHON.fullmatch(name)) or name in (*_SWITCHES, *CONSOLE_PROGRAMS) or name.endswith(".py")


def _launched(name: str, words: Sequence[Text]) -> tuple[str, dict[str, str], Sequence[Text]] | None:
    """The launcher, its options, and the rest of the words, which begins with the program."""
    if name in CONSOLE_PROGRAMS:
        return name, {}, words
    if name.endswith(".py"):
        return "python", {}, words
    if name == "accelerate" and [word.text for word in words[1:2]] != ["launch"]:
        return None
    launcher = "python" if _PYTHON.fullmatch(name) else name
    options, rest = _options(launcher, words[2 if launcher == "accelerate" else 1 :])
    if not rest:
        return None
    if launcher == "python" and "m" in options and rest[0].text in _LAUNCHER_MODULES:
        launcher = _LAUNCHER_MODULES[rest[0].text]
        options, rest = _options(launcher, rest[1:])
    return (launcher, options, rest) if rest else None


def _options(launcher: str, words: Sequence[Text]) -> tuple[dict[str, str], Sequence[Text]]:
    """A launcher's own options, and what follows them."""
    options: dict[str, str] = {}
    at = 0
    while at < len(words) and words[at].text.startswith("-"):
        name, given, value = words[at].text.lstrip("-").partition("=")
        name = name.replace("-", "_")
        at += 1
        if launcher == "python" and name == "m":
            options[name] = ""
            break
        if not given and name and name not in _SWITCHES[launcher]:
            value = words[at].text if at < len(words) else ""
            at += 1
        options[name] = printable(value)
    return options, words[at:]


def _flags(words: Sequence[Text]) -> tuple[tuple[str, ...], tuple[Flag, ...]]:
    """The words before the first flag, and the flags."""
    positional: list[str] = []
    flags: list[Flag] = []
    for word in words:
        text = printable(word.text)
        if _FLAG.match(text):
            name, given, value = text.partition("=")
            flags.append(Flag(name, (value,) if given else (), word.line))
        elif flags:
            last = flags.pop()
            flags.append(Flag(last.name, (*last.values, text), last.line))
        else:
            positional.append(text)
    return tuple(positional), tuple(flags)


# Counting ranks


def _torchrun(command: Command) -> tuple[int | Open, str]:
    each, nodes = (command.options.get(name, "1") for name in ("nproc_per_node", "nnodes"))
    fewest, _, most = nodes.partition(":")
    said = f"torchrun --nproc_per_node {each} --nnodes {nodes}"
    return _times(command, said, each, fewest if fewest == most else nodes), said


def _deepspeed(command: Command) -> tuple[int | Open, str]:
    options = command.options
    include = options.get("include", options.get("i"))
    each = options.get("num_gpus", options.get("num_accelerators"))
    hosts = options.get("hostfile", options.get("H"))
    visible = command.environment.get("CUDA_VISIBLE_DEVICES")
    if include is not None:
        return _included(include, command), f"deepspeed --include {include}"
    if each is not None:
        said = f"deepspeed --num_gpus {each}" + (
            f" --num_nodes {options['num_nodes']}" if "num_nodes" in options else ""
        )
        said += "" if hosts is None else f" --hostfile {hosts}"
        return _times(command, said, each, options.get("num_nodes", "1" if hosts is None else "")), said
    if visible and hosts is None and not {"num_nodes", "exclude", "e"} & set(options) and is_literal(visible):
        return visible.count(",") + 1, f"CUDA_VISIBLE_DEVICES={visible} deepspeed"
    return _unsaid(command, "deepspeed takes all GPUs that it finds; --num_gpus is not given"), ""


def _included(include: str, command: Command) -> int | Open:
    """The GPUs in ``host:0,1@host2:0,1``."""
    hosts = include.split("@")
    if not is_literal(include) or not all(re.fullmatch(r"[^:]+:\d+(,\d+)*", host) for host in hosts):
        return _unsaid(command, f"--include {include} does not say it")
    return sum(host.count(",") + 1 for host in hosts)


def _accelerate(command: Command) -> tuple[int | Open, str]:
    count = command.options.get("num_processes", command.options.get("n"))
    if count is None:
        return _unsaid(command, "accelerate launch takes it from its config; --num_processes is not given"), ""
    said = f"accelerate launch --num_processes {count}"
    return _times(command, said, count, "1"), said


def _python(command: Command) -> tuple[int | Open, str]:
    if command.many:
        return _unsaid(command, "srun or mpirun starts the program once per task"), ""
    return 1, "python starts one process"


def _own(command: Command) -> tuple[int | Open, str]:
    """llamafactory-cli starts torchrun with what its environment says, and else on all GPUs."""
    each, visible = (command.environment.get(name) for name in ("NPROC_PER_NODE", "CUDA_VISIBLE_DEVICES"))
    nodes = command.environment.get("NNODES", "1")
    if command.launcher != "llamafactory-cli" or not (each or visible):
        return _unsaid(command, f"{command.launcher} starts as many as there are GPUs"), ""
    said = (f"NPROC_PER_NODE={each}" if each else f"CUDA_VISIBLE_DEVICES={visible}") + f" with {nodes} node(s)"
    if each is None and visible is not None:
        each = str(visible.count(",") + 1) if is_literal(visible) else visible
    return _times(command, said, each or "", nodes), said


def _times(command: Command, said: str, each: str, nodes: str) -> int | Open:
    """Ranks per node times nodes."""
    try:
        return whole_number(each) * whole_number(nodes)
    except ValueError:
        return _unsaid(command, f"{said} does not say it")


def _unsaid(command: Command, why: str) -> Open:
    return Open(f"the number of ranks is not said ({command.place}): {why}")
