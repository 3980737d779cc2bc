"""What ``trainfix run`` gives the command that it starts, and what it must say about it first."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from trainfix.activation import BOOTSTRAP

_PYTHON = re.compile(r"(python|pypy)[0-9.]*t?d?(\.exe)?")
_TAKES_A_WORD = ("-W", "-X", "--check-hash-based-pycs")  # options of the interpreter
_NOT_ACTIVE = {
    "I": "-I makes Python ignore PYTHONPATH",
    "E": "-E makes Python ignore PYTHONPATH",
    "S": "-S keeps Python from running sitecustomize",
}
_DEEPSPEED = ("deepspeed", "deepspeed.pt", "deepspeed.launcher.runner")
_DEFAULT_HOSTFILE = "/job/hostfile"  # deepspeed/launcher/runner.py, DLTS_HOSTFILE


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables for the command: the bootstrap folder stands first on PYTHONPATH."""
    inherited = [part for part in environ.get("PYTHONPATH", "").split(os.pathsep) if part != BOOTSTRAP]
    path = os.pathsep.join([BOOTSTRAP, *inherited]) if any(inherited) else BOOTSTRAP
    return {**environ, "PYTHONPATH": path}


def warnings(command: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """What in the command keeps a Python process below it from being active, one text each."""
    return [*_about_options(command), *_about_nodes(command, environ), *_about_ray_jobs(command)]


def _about_options(command: Sequence[str]) -> Iterator[str]:
    python = next((at for at, word in enumerate(command) if _PYTHON.fullmatch(os.path.basename(word))), None)
    if python is None:
        return
    letters = "".join(_interpreter_options(command[python + 1 :]))
    for letter, why in _NOT_ACTIVE.items():
        if letter in letters:
            yield f"{why}, so trainfix will not be active: leave it out, or put `import trainfix` into the script"


def _interpreter_options(words: Sequence[str]) -> Iterator[str]:
    """The letters of the options before the script, ``-m`` or ``-c``: ``Is`` for ``-Is``."""
    skip = False
    for word in words:
        if skip:
            skip = False
            continue
        if not word.startswith("-") or word == "-":
            return
        skip = word in _TAKES_A_WORD
        if word.startswith("--"):
            continue
        letters = re.split("[cmWX]", word[1:])[0]
        yield letters
        if re.search("[cm]", word[1 : len(letters) + 2]):
            return


def _about_nodes(command: Sequence[str], environ: Mapping[str, str]) -> Iterator[str]:
    """DeepSpeed's launcher hands other nodes what begins with PYTHON, and what stands in its environment file."""
    hostfile = _hostfile(command)
    if hostfile is None or not os.path.isfile(hostfile):
        return
    yield f"deepspeed starts the nodes of {hostfile} with this PYTHONPATH: {BOOTSTRAP} must exist on each of them"
    settings = [f"{name}={value}" for name, value in environ.items() if re.match("TRAINFIX(_|$)", name)]
    if settings:
        yield (
            f"deepspeed does not hand {' '.join(settings)} on to other nodes: "
            "put each, as a line of its own, into ~/.deepspeed_env"
        )


def _hostfile(command: Sequence[str]) -> str | None:
    """The file with the nodes that a command of DeepSpeed's launcher names, or its default."""
    if not any(os.path.basename(word) in _DEEPSPEED for word in command):
        return None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word in ("-H", "--hostfile"):
            return following
        if word.startswith("--hostfile="):
            return word.partition("=")[2]
    return _DEFAULT_HOSTFILE


def _about_ray_jobs(command: Sequence[str]) -> Iterator[str]:
    if [os.path.basename(command[0]), *command[1:3]] == ["ray", "job", "submit"]:
        yield (
            "the job runs on the cluster, not below this command: "
            "put it into the job instead, ray job submit [OPTIONS] -- trainfix run -- COMMAND"
        )
