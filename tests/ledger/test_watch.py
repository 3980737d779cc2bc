"""The ledger finds models and optimizers by itself, audits by its schedule, and leaves no trace."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch.nn.modules import module as torch_modules
from torch.optim import optimizer as torch_optimizer

import trainfix
from tests.ledger.test_plain import Network, loss_of
from trainfix import settings
from trainfix.engine.errors import UnbalancedError
from trainfix.ledger.schedule import Schedule
from trainfix.ledger.sink import Sink
from trainfix.ledger.watch import Watch

STEPS = 3


@pytest.fixture
def watched(monkeypatch):
    """A function that starts a watch; all are ended, and hooks that are left behind are an error."""
    started, said = [], []
    monkeypatch.setattr("trainfix.ledger.sink.report.inform", said.append)
    monkeypatch.setattr("trainfix.ledger.sink.report.warn", lambda text, **_: said.append(text))

    def start(**asked):
        watch = Watch(settings.Ledger(**asked), Sink(None))
        watch.begin()
        started.append(watch)
        watch.said = said
        return watch

    yield start
    for watch in started:
        watch.end()
    assert hooks() == (0, 0, 0)


def hooks():
    """torch's global hooks: on optimizers before and after a step, on modules before a forward pass."""
    tables = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
        torch_modules._global_forward_pre_hooks,
    )
    return tuple(map(len, tables))


def hooks_of(model):
    tables = [[one._backward_hooks, one._post_accumulate_grad_hooks] for one in model.parameters()]
    tables += [[one._forward_hooks, one._forward_pre_hooks] for one in model.modules()]
    return sum(len(table) for row in tables for table in row if table)


def backwards(model, window, *, drop=False):
    for number in range(STEPS):
        before = [None if one.grad is None else one.grad.clone() for one in model.parameters()]
        (loss_of(model, 10 * window + number) / STEPS).backward()
        if drop and number == 1:
            for one, kept in zip(model.parameters(), before, strict=True):
                one.grad = kept


def train(windows=3, *, drop=(), model=None, optimizer=None, closure=False):
    """The parameters after it [elements]. drop: windows in which the middle micro-batch is lost."""
    torch.manual_seed(0)
    model = Network() if model is None else model
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    for window in range(1, windows + 1):
        if closure:

            def within(window=window):
                optimizer.zero_grad()
                backwards(model, window, drop=window in drop)
                return 0.0

            optimizer.step(within)
        else:
            backwards(model, window, drop=window in drop)
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([one.detach().reshape(-1) for one in model.parameters()])


def states(watch):
    return [(one.finding.window, one.state) for one in watch.verdicts]


def test_a_right_run_balances_and_a_wrong_one_does_not(watched):
    watch = watched(first=3)
    train(drop=(2,))
    assert states(watch) == [(1, "balanced"), (2, "not balanced"), (3, "balanced")]
    assert watch.verdicts[1].problems == ("micro-batch 2 of 3 is dropped",)
    assert watch.said[1] == "trainfix ledger: window 2 of AdamW: NOT BALANCED: micro-batch 2 of 3 is dropped"


def test_training_is_the_same_to_the_bit(watched):
    alone = train()
    watched(first=2)
    assert torch.equal(train(), alone)


def test_after_the_audited_windows_no_hook_is_left_but_the_one_that_counts(watched):
    watch, model = watched(first=2), Network()
    train(2, model=model)
    assert hooks() == (1, 0, 0)
    assert hooks_of(model) == 0
    train(3, model=model)
    assert states(watch) == [(1, "balanced"), (2, "balanced")]


def test_between_audited_windows_no_hook_is_left_either(watched):
    watch, model = watched(first=1, every=4), Network()
    optimizer = torch.optim.AdamW(model.parameters())
    seen = []
    for window in range(1, 11):
        backwards(model, window)
        seen.append(hooks_of(model) > 0)
        optimizer.step()
        optimizer.zero_grad()
    audited = [1, 4, 5, 8, 9]
    assert [number for number, one in enumerate(seen, 1) if one] == audited
    assert states(watch) == [(number, "balanced") for number in audited]


def test_what_is_left_of_a_window_shows_in_the_second_of_two_in_a_row(watched):
    watch, model = watched(first=0, every=3), Network()
    optimizer = torch.optim.AdamW(model.parameters())
    for window in range(1, 5):
        backwards(model, window)
        optimizer.step()
        if window != 3:
            optimizer.zero_grad()
    assert states(watch) == [(3, "balanced"), (4, "not balanced")]
    assert "of the window before are added again" in watch.verdicts[1].problems[0]


@pytest.mark.parametrize(
    ("first", "every", "audited"),
    [
        (2, 0, [1, 2]),
        (2, 5, [1, 2, 5, 6, 10, 11]),
        (0, 4, [4, 5, 8, 9, 12]),
        (6, 5, [1, 2, 3, 4, 5, 6, 10, 11]),
        (0, 1, list(range(1, 13))),
        (1, 2, list(range(1, 13))),
    ],
)
def test_the_schedule(first, every, audited):
    schedule = Schedule(first, every)
    assert [number for number in range(1, 13) if schedule.is_audited(number)] == audited
    following = [schedule.next_after(number) for number in range(12)]
    wanted = [next((one for one in audited if one > number), None) for number in range(12)]
    assert [one for one, want in zip(following, wanted, strict=True) if want] == [one for one in wanted if one]


def test_stop_raises_before_the_optimizer_takes_a_wrong_step(watched):
    watched(first=3, action="stop")
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    backwards(model, 1, drop=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnbalancedError, match=r"micro-batch 2 of 3 is dropped\. The optimizer has not taken this step"):
        optimizer.step()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_closure_is_audited_when_its_step_is_through(watched):
    watch = watched(first=3)
    train(drop=(2,), closure=True)
    assert states(watch) == [(1, "balanced"), (2, "not balanced"), (3, "balanced")]


def test_lbfgs_is_not_audited_and_that_is_said(watched):
    watch, model = watched(first=2), Network()
    train(2, model=model, optimizer=torch.optim.LBFGS(model.parameters()), closure=True)
    assert watch.verdicts == []
    assert any("LBFGS" in text for text in watch.said)


def test_two_optimizers_of_one_model_each_have_their_windows(watched):
    watch, model = watched(first=2), Network()
    pair = [
        torch.optim.SGD([one for one in model.parameters() if one.dim() == 2], lr=0.1),
        torch.optim.AdamW([one for one in model.parameters() if one.dim() < 2]),
    ]
    for window in range(1, 4):
        backwards(model, window, drop=window == 2)
        for optimizer in pair:
            optimizer.step()
        for optimizer in pair:
            optimizer.zero_grad()
    assert [(one.finding.optimizer, *state) for one, state in zip(watch.verdicts, states(watch), strict=True)] == [
        ("SGD", 1, "balanced"),
        ("AdamW 2", 1, "balanced"),
        ("SGD", 2, "not balanced"),
        ("AdamW 2", 2, "not balanced"),
    ]
    assert hooks_of(model) == 0


class Judge(torch.nn.Module):
    """A second model, through whose scores the first one's loss goes."""

    def __init__(self):
        super().__init__()
        self.score = torch.nn.Sequential(torch.nn.Linear(50, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def forward(self, hidden):
        return self.score(hidden).mean()


@pytest.mark.parametrize("drop", [False, True])
def test_two_models_that_train_each_other_are_told_apart(watched, drop):
    watch = watched(first=2)
    torch.manual_seed(0)
    maker, judge = Network(), Judge()
    optimizers = torch.optim.Adam(maker.parameters()), torch.optim.Adam(judge.parameters())
    words = torch.randint(50, (4, 3, 8), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizers[1].zero_grad()
        for number in range(2):
            (judge(maker(words[number]).detach()) - judge(maker(words[2 + number]).detach())).square().backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        judge(maker(words[0])).backward()  # fills the judge's gradients too: they are cleared before its next window
        before = [one.grad.clone() for one in maker.parameters() if one.grad is not None]
        judge(maker(words[1])).square().backward()
        if drop:
            for one, kept in zip([one for one in maker.parameters() if one.grad is not None], before, strict=True):
                one.grad.copy_(kept)
        optimizers[0].step()
    wrong = {one.finding.optimizer for one in watch.verdicts if one.state != "balanced"}
    assert len(watch.verdicts) >= 4
    assert wrong == ({"Adam 2"} if drop else set())  # the second that stepped is the maker's


def test_gradients_that_are_only_asked_for_are_no_micro_batch(watched):
    watch, model = watched(first=2), Network()
    optimizer = torch.optim.AdamW(model.parameters())
    for window in range(1, 3):
        for number in range(STEPS):
            torch.autograd.grad(loss_of(model, number), list(model.parameters()), allow_unused=True)
            (loss_of(model, 10 * window + number) / STEPS).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert states(watch) == [(1, "balanced"), (2, "balanced")]
    assert [len(one.finding.backwards) for one in watch.verdicts] == [STEPS, STEPS]


def test_gradients_that_a_loop_assigns_by_hand_are_its_micro_batches(watched):
    watch, model = watched(first=2), Network()
    optimizer = torch.optim.AdamW(model.parameters())
    for window in range(1, 3):
        for number in range(STEPS):
            found = torch.autograd.grad(loss_of(model, 10 * window + number) / STEPS, list(model.parameters()))
            for one, gradient in zip(model.parameters(), found, strict=True):
                one.grad = gradient if one.grad is None else one.grad + gradient
        optimizer.step()
        optimizer.zero_grad()
    assert states(watch) == [(1, "balanced"), (2, "balanced")]


def test_a_window_that_a_scaler_skips_is_no_alarm(watched):
    watch, model = watched(first=2), Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for window in range(1, 4):
        for number in range(STEPS):
            factor = float("inf") if window == 1 and number == 1 else 1024.0
            (factor * loss_of(model, 10 * window + number) / STEPS).backward()
        if window > 1:  # as torch.amp.GradScaler does
            for one in model.parameters():
                one.grad.div_(1024.0)
            optimizer.step()
        optimizer.zero_grad()
    assert states(watch) == [(1, "balanced"), (2, "balanced")]
    assert [len(one.finding.backwards) for one in watch.verdicts] == [STEPS, STEPS]


@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()"])
def test_a_compiled_model_is_audited_and_trains_as_without(watched, how):
    def compiled():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Network()
        if how == "model.compile()":
            model.compile(backend="aot_eager", fullgraph=True)
            return model, model
        return model, torch.compile(model, backend="aot_eager", fullgraph=True)

    def run():
        model, called = compiled()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for window in range(1, 6):
            backwards(called, window, drop=window == 4)
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([one.detach().reshape(-1) for one in model.parameters()])

    alone = run()
    watch = watched(first=4)
    torch.testing.assert_close(run(), alone, rtol=1e-6, atol=1e-6)
    found = dict(states(watch))
    assert "not balanced" in found.values()
    assert list(found.values()).count("balanced") >= 2


def test_an_optimizer_of_parameters_that_no_model_holds_is_named(watched):
    watch = watched(first=2)
    loose = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([loose], lr=0.1)
    for _ in range(10):
        loose.sum().backward()
        optimizer.step()
    assert [text for text in watch.said if "SGD steps parameters of no model" in text]


def test_a_model_inside_another_that_is_called_first_gives_way_to_it(watched):
    watch = watched(first=2)
    torch.manual_seed(0)
    inner = torch.nn.Linear(4, 4)
    outer = torch.nn.Sequential(inner, torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)
    for window in range(3):
        inner(torch.ones(2, 4)).sum().backward()
        for number in range(STEPS):
            outer(torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * window + number))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert states(watch)[-1] == (2, "balanced")


def test_an_error_of_the_ledger_ends_it_and_not_the_run(watched, monkeypatch):
    watch, model = watched(first=2), Network()
    monkeypatch.setattr("trainfix.ledger.watch.judge", lambda *_: 1 / 0)
    alone = train(model=model)
    assert alone.isfinite().all()
    assert [text for text in watch.said if "gave up: ZeroDivisionError" in text]
    assert hooks_of(model) == 0


def test_inside_a_block_every_window_is_audited_and_nothing_is_left_after_it(capsys):
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters())
    with trainfix.ledger(model, optimizer) as verdicts:
        train(3, drop=(2,), model=model, optimizer=optimizer)
    assert [one.state for one in verdicts] == ["balanced", "not balanced", "balanced"]
    assert hooks() == (0, 0, 0)
    assert hooks_of(model) == 0


def test_a_block_audits_only_its_own_optimizer():
    models = Network(), Network()
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    with trainfix.ledger(models[0], optimizers[0]) as verdicts:
        for model, optimizer in zip(models, optimizers, strict=True):
            train(2, model=model, optimizer=optimizer)
    assert [one.finding.optimizer for one in verdicts] == ["AdamW", "AdamW"]


def test_a_block_can_stop_and_says_what_it_does_not_take():
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(trainfix.UnbalancedError), trainfix.ledger(model, optimizer, action="stop"):
        train(1, drop=(1,), model=model, optimizer=optimizer)
    for wrong, error, words in (
        ({"model": 1, "optimizer": optimizer}, TypeError, "model must be the torch.nn.Module"),
        ({"model": model, "optimizer": 1}, TypeError, "optimizer must be a torch optimizer or hold one, not int"),
        ({"model": model, "optimizer": optimizer, "action": "halt"}, ValueError, "valid: warn, stop"),
    ):
        with pytest.raises(error, match=words), trainfix.ledger(**wrong):
            pass


SCRIPT = """
import trainfix, torch
from tests.ledger.test_watch import train
train(3, drop=(2,))
"""


@pytest.mark.parametrize("mode", ["on", "off"])
def test_the_variable_starts_it_with_or_without_repairs_and_its_records_go_where_it_says(tmp_path, mode, monkeypatch):
    monkeypatch.setenv("TRAINFIX", mode)
    monkeypatch.setenv("TRAINFIX_LEDGER", f"first:2,action=warn,out={tmp_path / 'records'}")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "trainfix ledger: window 2 of AdamW: NOT BALANCED: micro-batch 2 of 3 is dropped" in done.stderr
    (file,) = (tmp_path / "records").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["window"], row["state"]) for row in rows] == [(1, "balanced"), (2, "not balanced")]
    assert [row["coefficient"] for row in rows[1]["micro_batches"]] == pytest.approx([1, 0, 1], abs=1e-3)


def test_without_the_variable_torch_has_no_hook_of_ours():
    script = "import trainfix, torch; from tests.ledger.test_watch import hooks; print(hooks())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "(0, 0, 0)\n"
