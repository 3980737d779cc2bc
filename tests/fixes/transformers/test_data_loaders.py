"""Looking a window ahead changes nothing about the data: the same micro-batches, in the same order."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

RELEASES = ("4.45.2", "4.53.3", "5.5.3")
LOOKS_AHEAD = "4.45.2"  # where trainfix does it (TF-0401); from 4.46 on Trainer reads a window itself
CASES = {
    "shuffled": {"data": "rows"},
    "resumed in mid-epoch": {"data": "rows", "resume": 1},
    "resumed in the second epoch": {"data": "rows", "resume": 3},
    "resumed without skipping": {"data": "rows", "resume": 1, "arguments": {"ignore_data_skip": True}},
    "a stream": {"data": "stream"},
    "a resumed stream": {"data": "stream", "resume": 1},
    "worker processes": {"data": "rows", "arguments": {"dataloader_num_workers": 1}},
}
# On two CPU ranks 4.45.2 cannot load a checkpoint's optimizer with torch 2.13, nor send around rows of unequal length.
OWN_STREAMS = {"accelerator_config": {"dispatch_batches": False}}
TWO_RANKS = {
    "shuffled": CASES["shuffled"],
    "worker processes": CASES["worker processes"],
    "a stream read by each rank": {"data": "stream", "arguments": OWN_STREAMS},
}
ENV = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # what older releases save of the random generators needs it
STEPS = 4

everywhere = pytest.mark.parametrize("version", RELEASES)
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def trained(runs):
    """A function: release -> the results without trainfix and with it, by case."""

    def both(version, table=CASES, **options):
        program = "tests.fixes.transformers.data_loaders"
        packages = {"transformers": version}
        off, on = (
            runs(packages, table, trainfix=trainfix, program=program, env=ENV, **options) for trainfix in (False, True)
        )
        for results in (off, on):
            assert [one["error"] for one in results.values()] == [None] * len(table)
        return off, on

    return both


def assert_same_data(off, on):
    """What no optimizer step follows need not be read."""
    stepped = off["steps"][-1]
    assert on["steps"] == off["steps"]
    assert on["batches"][:stepped] == off["batches"][:stepped]
    assert on["batches"] == off["batches"][: len(on["batches"])]
    assert on["loaders"] == off["loaders"]
    assert on["global_step"] == off["global_step"]


@everywhere
@every_case
def test_the_same_micro_batches_come_in_the_same_order(trained, version, name):
    off, on = trained(version)
    assert_same_data(off[name], on[name])


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_read_the_same_micro_batches_where_trainfix_looks_ahead(trained, name):
    off, on = trained(LOOKS_AHEAD, TWO_RANKS, ranks=2)
    assert_same_data(off[name], on[name])


@everywhere
def test_a_resumed_training_reads_what_was_left(trained, version):
    _, on = trained(version)
    whole, rest = on["shuffled"]["batches"], on["resumed in mid-epoch"]["batches"]
    assert rest == whole[STEPS:]


@everywhere
def test_the_data_are_shuffled_anew_in_every_epoch(trained, version):
    _, on = trained(version)
    ids = [tuple(batch[0][0]) for batch in on["shuffled"]["batches"]]
    first, second = ids[:11], ids[11:]
    assert len(set(first)) == 11
    assert second != first[: len(second)]
    assert [loader[0] for loader in on["shuffled"]["loaders"]] == [11, 11]
