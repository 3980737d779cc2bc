"""The proofs of TF-0201 to TF-0205 show the errors of the installed LLaMA-Factory, and that they are gone."""

from __future__ import annotations

import pytest

from tests.support.llamafactory_runs import stack
from trainfix.proofs import prove_all

from .test_prove import environment

pytestmark = pytest.mark.slow

MEANS_OF_MEANS = [0.4286, 19.5, 19.5, 0.6393]
BY_RANK = [0.5321] * 4 + [8.3] * 4


@pytest.mark.parametrize(
    ("release", "companions", "worst"),
    [
        (
            "0.9.5",
            {"deepspeed": "0.18.4"},
            {"TF-0201": MEANS_OF_MEANS, "TF-0202": [1.714, 78.0, 78.0, 2.557], "TF-0204": [0.25] * 4},
        ),
        ("0.9.4", {"transformers": "4.51.3"}, {"TF-0203": BY_RANK}),
        ("0.9.2", {}, {"TF-0203": BY_RANK}),
        ("0.9.3", {"transformers": "4.45.2"}, {"TF-0205": MEANS_OF_MEANS}),
        ("0.8.3", {}, {"TF-0205": MEANS_OF_MEANS}),
    ],
)
def test_a_proof_shows_the_error_of_the_release_and_that_it_is_gone_with_trainfix(
    release: str, companions: dict[str, str], worst: dict[str, list[float]]
) -> None:
    folders = stack(release, **companions)
    for record in prove_all(list(worst), env=environment(*folders)):
        assert (record["applicable"], record["reproduced"], record["repaired"]) == (True, True, True), record["reason"]
        assert record["before"]["coefficients"] == pytest.approx(worst[record["id"]], rel=1e-3)
        assert record["after"]["relative_error"] < 1e-5


def test_the_proof_of_the_v1_trainer_says_that_it_needs_deepspeed() -> None:
    (record,) = prove_all(["TF-0204"], env=environment(*stack("0.9.5")))
    assert (record["applicable"], record["reproduced"], record["repaired"]) == (True, None, None)
    assert record["reason"].endswith("TF-0204 shows only under DeepSpeed, which is not installed")
