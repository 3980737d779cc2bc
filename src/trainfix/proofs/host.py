"""Runs one experiment after the other, each in a process of its own that is forked from this interpreter.

To import torch and the frameworks takes several times as long as most experiments do; here they are imported once, and
no more than imported: what an experiment changes ends with its process.

Runs only in a child interpreter (see `trainfix.proofs.interpreters`): requests come on stdin, answers go to stdout, one
line of JSON each.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from typing import IO, Any, NoReturn

_DEEPSPEED = "deepspeed"  # imported as the experiments do it, on its CPU accelerator
_TRANSFORMERS = ("transformers.trainer", "transformers.models.llama.modeling_llama")
# Package that has the error -> what is imported for the experiments on it. What stands here saves time, and nothing
# else: an experiment imports what it needs itself, and says what it lacks.
IMPORTS: Mapping[str, tuple[str, ...]] = {
    "deepspeed": (_DEEPSPEED,),
    "accelerate": (_DEEPSPEED, "accelerate"),
    "transformers": _TRANSFORMERS,
    "trl": _TRANSFORMERS,
    "llamafactory": _TRANSFORMERS,
    "openrlhf": (_DEEPSPEED, *_TRANSFORMERS),
}


def serve() -> None:
    """Answer every request until stdin ends: ``{"package", "proof", "repair"}``, the last an id or None.

    An answer is ``{"code", "out", "err"}``: how the experiment's process ended, and the last lines that it wrote.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        _import(request["package"])
        print(json.dumps(_answer(request)), file=answers, flush=True)


@functools.cache
def _import(package: str) -> None:
    """Import what the experiments on this package take, as far as it can be imported."""
    try:
        experiment = importlib.import_module(".experiment", __package__)
        for name in IMPORTS.get(package, ()):
            if name == _DEEPSPEED:
                experiment.prepare_cpu()
            else:
                importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the experiment meets it again, and answers with it
        print(f"{package}: {type(error).__name__}: {error}", file=sys.stderr)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = os.fork()
        if not process:
            _experiment(request, out, err)
        _, status = os.waitpid(process, 0)
        return {"code": os.waitstatus_to_exitcode(status), "out": _last_line(out), "err": _last_line(err)}


def _experiment(request: Mapping[str, Any], out: IO[bytes], err: IO[bytes]) -> NoReturn:
    """The forked process: run the experiment as an interpreter of its own would, and leave."""
    code: object = 1
    try:
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        if request["repair"] is not None:
            # A loss of precision is repaired only when it is asked for by name.
            sys.modules["trainfix"].apply(request["repair"])
        importlib.import_module(f".{request['proof']}", __package__).main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
        if not isinstance(code, int):  # what `sys.exit` does with words
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
