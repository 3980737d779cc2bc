"""Where verdicts go: the log, a file of records, and an end to the run where that was asked for."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from trainfix.engine import report
from trainfix.ledger.verdict import BALANCED, Verdict


class Sink:
    """Takes verdicts and remarks. out: the folder of the records, None for none; made where it is not there."""

    def __init__(self, out: str | None) -> None:
        self._file = None if out is None else Path(out) / f"ledger-{socket.gethostname()}-{os.getpid()}.jsonl"
        self._said: set[str] = set()

    def verdict(self, verdict: Verdict) -> None:
        say = report.inform if verdict.state == BALANCED else _warn
        say(f"trainfix ledger: {verdict.line()}")
        for remark in verdict.remarks:
            if remark not in self._said:
                self._said.add(remark)
                report.inform(f"trainfix ledger: {remark}")
        self._write({"kind": "window", **verdict.record()})

    def note(self, text: str) -> None:
        """What cannot be read, or why the ledger gave up."""
        if text not in self._said:
            self._said.add(text)
            report.warn(f"trainfix ledger: {text}", every_rank=True)
            self._write({"kind": "note", "text": text})

    def remark(self, text: str) -> None:
        """What is worth knowing beside the windows."""
        report.inform(f"trainfix ledger: {text}")
        self._write({"kind": "remark", "text": text})

    def _write(self, record: dict[str, object]) -> None:
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            file_name, self._file = self._file, None
            report.warn(f"trainfix ledger: {file_name} cannot be written ({error.strerror}); records go nowhere")


def _warn(text: str) -> None:
    report.warn(text, every_rank=True)  # the rank that judges is the first of its own group
