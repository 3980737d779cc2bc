"""The child's program: a run of tests.support.experiment with the ledger listening; its findings beside the windows."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from tests.support import experiment
from tests.support.experiment import Configuration, Trial


def perform(deepspeed: ModuleType, values: Mapping[str, Any], result: dict[str, Any]) -> None:
    from tests.ledger.test_plain import listen
    from trainfix.ledger.audit import Finding

    def note(found: Finding) -> None:
        result["findings"].append(
            {
                "verdict": found.balance.verdict,
                "scale": found.balance.scale,
                "coefficients": found.balance.coefficients,
                "earlier": found.balance.earlier,
                "residual": found.balance.residual,
                "outliers": found.outliers,
                "backwards": found.backwards,
                "of_ranks": {rank: one.coefficients for rank, one in found.of_ranks.items()},
                "apart": found.apart,
            }
        )

    trial = Trial(deepspeed, Configuration(**values))
    result["findings"] = []
    zero = trial.engine.optimizer
    book = listen(trial.engine, getattr(zero, "optimizer", zero), note)
    result["windows"].extend(trial.window() for _ in range(trial.configuration.windows))
    book.close()
    result["parameters"] = trial.parameters()


if __name__ == "__main__":
    experiment.main(perform)
