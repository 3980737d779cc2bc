"""One of two ranks with DistributedDataParallel: prints what the first rank's ledger finds, window by window.

python -m tests.ledger.two_ranks RANK PORT FAULT
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

import torch

from tests.ledger.test_plain import Network, listen, loss_of
from trainfix import settings
from trainfix.engine.errors import UnbalancedError
from trainfix.ledger import exchange
from trainfix.ledger.audit import Finding
from trainfix.ledger.sink import Sink
from trainfix.ledger.watch import Watch


def say(found: Finding) -> None:
    balance = found.balance
    coefficients = dict(zip(map(str, found.backwards), balance.coefficients, strict=True))
    row = {"verdict": balance.verdict, "scale": balance.scale, "coefficients": coefficients, "apart": found.apart}
    print(json.dumps({**row, "missing": found.missing}), flush=True)


def main() -> None:
    rank, port, fault = sys.argv[1:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if fault == "stop":
        Watch(settings.Ledger(first=2, action="stop"), Sink(None)).begin()
    elif fault != "one rank is off" or rank == "0":
        exchange.TIMEOUT_SECONDS = 2.0
        listen(model, optimizer, say)
    for window in range(2):
        steps = 3 + int(rank) if fault == "uneven" else 3
        for number in range(steps):
            # All but the last are summed on the rank alone, as accelerate does it.
            alone = number < steps - 1 or fault == "never averaged"
            with model.no_sync() if alone else contextlib.nullcontext():
                (loss_of(model, 100 * int(rank) + 10 * window + number) / steps).backward()
            if fault in ("dropped on the second rank", "stop") and rank == "1" and number == 1:
                for one in model.parameters():
                    one.grad.zero_()
        try:
            optimizer.step()
        except UnbalancedError as error:
            print(json.dumps({"stopped": str(error), "window": window}), flush=True)
            break
        optimizer.zero_grad()
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
