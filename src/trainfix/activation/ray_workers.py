"""What ``ray.init`` asks below ``trainfix run``: the workers of a cluster that is already running become active too.

A cluster that ``ray.init`` starts itself inherits the driver's environment; one that was started before does not, and
gets from here, through Ray's runtime environment, the bootstrap folder and the settings. The folder must exist on every
node. Not reached: tasks whose own runtime_env sets PYTHONPATH, ``ray.init("ray://...")``, and drivers started by
``uv run``, for which Ray leaves its hook out; there, ``trainfix enable`` in the workers' environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from typing import Any

from trainfix.activation.found import bootstraps_in
from trainfix.settings import VARIABLES

USERS_HOOK = "_TRAINFIX_USERS_RAY_HOOK"  # set by bootstrap/_trainfix_waiting.py


def hook(runtime_env: Any) -> Any:
    """The runtime environment (a mapping, or None) with trainfix active in it, after the user's own hook."""
    users = os.environ.get(USERS_HOOK)
    if users:
        module, _, function = users.rpartition(".")
        runtime_env = getattr(import_module(module), function)(runtime_env)
    answer = {} if runtime_env is None else deepcopy(runtime_env)
    answer["env_vars"] = env_vars(answer.get("env_vars") or {}, os.environ)
    return answer


def env_vars(wanted: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """The workers' variables: those that are wanted already, our settings, and our folder first on PYTHONPATH.

    Ray puts the worker's own value in the place of ``${PYTHONPATH}``.
    """
    rest = wanted.get("PYTHONPATH", "${PYTHONPATH}")
    path = os.pathsep.join([*bootstraps_in(environ), rest])
    settings = {name: environ[name] for name in VARIABLES if name in environ}
    return {**settings, **wanted, "PYTHONPATH": path}
