"""Ray's workers below ``trainfix run``: active in a cluster of the driver's own and in one that was there before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.activation.children import BOOTSTRAP, below_run, package, without_trainfix
from tests.support import stacks
from tests.support.releases import release
from trainfix.activation import ray_workers

RAY = {"ray": "2.60.0", "protobuf": "7.36.2"}

CLUSTER = """
import ray, sys
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""

# What a driver does: two actors, one with a variable of its own, and a task say how they stand.
DRIVER = """
import json, os, ray, sys
address = os.environ.get("CLUSTER")
ray.init(log_to_driver=False, **({"address": address} if address else {"num_cpus": 2, "include_dashboard": False}))
def say():
    import trl
    active = any(type(finder).__module__ == "trainfix.engine.finder" for finder in sys.meta_path)
    return active, os.environ.get("TRAINFIX_QUIET"), os.environ.get("OWN")
class Actor:
    def say(self):
        return say()
Actor = ray.remote(Actor)
actors = [Actor.remote(), Actor.options(runtime_env={"env_vars": {"OWN": "mine"}}).remote()]
found = ray.get([actor.say.remote() for actor in actors] + [ray.remote(say).remote()])
print(json.dumps(found))
"""

# One actor per rank, as the frameworks of reinforcement learning have it, and one with another role.
RANKS = """
import json, os, ray, socket
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
@ray.remote
class Actor:
    def train(self):
        from tests.activation import rank
        return rank.train()
    def idle(self):
        import accelerate
        return "judged"
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
def actor(rank):
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if os.environ.get("ODD_RANK") == str(rank):
        place["TRAINFIX"] = "off"
    return Actor.options(runtime_env={"env_vars": place}).remote()
judge = Actor.remote().idle.remote()
training = [actor(rank).train.remote() for rank in range(2)]
print(json.dumps([ray.get(judge), *[ray.get(one) for one in training[: 1 if "ODD_RANK" in os.environ else 2]]]))
"""


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """What the driver printed last."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables for a driver: Ray, and an empty package to repair, on its path."""
    folders = [stacks.folder(name, version) for name, version in RAY.items()]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    quiet |= {"RAY_worker_niceness": "0"}  # else other tests on the same cores starve the actors
    return without_trainfix(*folders, package(tmp_path_factory.mktemp("packages")), **quiet)


@pytest.fixture(scope="module")
def cluster(env: dict[str, str]) -> Iterator[str]:
    """The address of a cluster that somebody without trainfix has started."""
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdin is not None and running.stdout is not None
        yield running.stdout.readline().strip()
        running.stdin.close()


@pytest.mark.slow
def test_the_workers_of_the_drivers_own_cluster_are_active(env: dict[str, str]) -> None:
    found = answer(below_run(sys.executable, "-c", DRIVER, env=env))
    assert found == [[True, None, None], [True, None, "mine"], [True, None, None]]


@pytest.mark.slow
def test_the_workers_of_a_cluster_that_was_there_before_are_active_with_the_drivers_settings(
    env: dict[str, str], cluster: str
) -> None:
    there = env | {"CLUSTER": cluster, "TRAINFIX_QUIET": "1"}
    plain = subprocess.run([sys.executable, "-c", DRIVER], env=there, capture_output=True, text=True, check=False)
    assert answer(plain) == [[False, None, None], [False, None, "mine"], [False, None, None]]
    found = answer(below_run(sys.executable, "-c", DRIVER, env=there))
    assert found == [[True, "1", None], [True, "1", "mine"], [True, "1", None]]


def training(env: dict[str, str], **variables: str) -> Any:
    folders = os.pathsep.join(map(str, (release("0.18.9"), stacks.SOURCE, stacks.ROOT)))
    path = {"PYTHONPATH": os.pathsep.join([folders, env["PYTHONPATH"].rpartition(os.pathsep)[0]])}
    more = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return answer(below_run(sys.executable, "-c", RANKS, env=env | path | more | variables))


@pytest.mark.slow
def test_ranks_that_are_actors_agree_beside_an_actor_with_another_role(env: dict[str, str]) -> None:
    judge, *ranks = training(env)
    assert judge == "judged"
    assert [(one["active"], one["error"]) for one in ranks] == [(True, None), (True, None)]
    assert [one["coefficients"] for one in ranks] == [[1.0, 1.0, 1.0, 1.0]] * 2


@pytest.mark.slow
def test_an_actor_with_trainfix_off_is_named_by_the_others(env: dict[str, str]) -> None:
    judge, first = training(env, ODD_RANK="1")
    assert judge == "judged"
    assert first["error"].startswith("UnfixedBugError: the ranks do not all run the same repair: rank 0 runs")
    assert "but rank 1 did not answer within 4 s (trainfix is missing, off or disabled there" in first["error"]


# The hook alone.

BELOW = {"PYTHONPATH": os.pathsep.join([BOOTSTRAP, "/user"])}


def test_the_workers_own_path_stays_behind_our_folder() -> None:
    assert ray_workers.env_vars({}, BELOW) == {"PYTHONPATH": BOOTSTRAP + os.pathsep + "${PYTHONPATH}"}


def test_the_users_variables_win_and_theirs_of_the_path_stays() -> None:
    wanted = {"PYTHONPATH": "/theirs", "TRAINFIX": "warn", "X": "1"}
    found = ray_workers.env_vars(wanted, BELOW | {"TRAINFIX": "strict", "TRAINFIX_QUIET": "1", "OTHER": "2"})
    ours = {"PYTHONPATH": os.pathsep.join([BOOTSTRAP, "/theirs"]), "TRAINFIX_QUIET": "1"}
    assert found == wanted | ours


def test_the_users_hook_comes_first_and_its_answer_is_not_changed_in_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "kept = {'pip': ['x'], 'env_vars': {'A': '1'}}\ndef hook(env):\n    return kept\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", BOOTSTRAP)
    assert set(ray_workers.hook(None)) == {"env_vars"}
    monkeypatch.setenv(ray_workers.USERS_HOOK, "mine.hook")
    found = ray_workers.hook({"working_dir": "lost, as the user's hook has it"})
    assert (found["pip"], found["env_vars"]["A"]) == (["x"], "1")
    import mine  # type: ignore[import-not-found]

    assert mine.kept["env_vars"] == {"A": "1"}


def test_rays_hook_is_ours_only_below_run_and_keeps_the_users(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").touch()
    script = "import os, ray; print([value for name, value in sorted(os.environ.items()) if name.endswith('_HOOK')])"
    for users in ({}, {"RAY_RUNTIME_ENV_HOOK": "mine.hook"}):
        env = without_trainfix(tmp_path, **users)
        plain = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        assert plain.stdout == f"{[*users.values()]}\n"
        below = below_run(sys.executable, "-c", script, env=env)
        assert below.stdout == f"{['trainfix.activation.ray_workers.hook', *users.values()]}\n"
