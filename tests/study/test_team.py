"""The processes of one worker as threads with a store of their own; test_study.py has real ones."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest

from jax_lora.errors import RunFailed
from jax_lora.signals import STOPPED
from jax_lora.study.team import Team, fault

BEAT = 0.01


class Store:
    """What JAX's store does, in memory: a key has its value from then on, a folder its keys."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, key):
        return [(k, v) for k, v in list(self.values.items()) if k.startswith(key)]


def never(*_):
    raise AssertionError("nobody is lost here")


@contextmanager
def team(train, processes=3, **options):
    """(the leader, what the others did): `train(process, name)` in threads."""
    store, did = Store(), []

    def follow(process):
        with Team(store, process, processes, beat=BEAT) as one:
            one.follow(lambda name: did.append((name, process)) or train(process, name))

    with ThreadPoolExecutor(processes) as pool:
        others = [pool.submit(follow, process) for process in range(1, processes)]
        with Team(store, 0, processes, beat=BEAT, **options) as leader:
            yield leader, did
        for one in others:
            one.result()


def fails(where, reason="no memory"):
    """A training that fails in some processes, in the cell `bad` alone."""

    def train(process, name):
        if name == "bad" and process in where:
            raise RuntimeError(reason)

    return train


def test_a_process_that_is_alone_leads_nobody():
    with Team() as one:
        one.gather()
        with one.together("cell", never):
            pass
        with pytest.raises(RuntimeError, match="its own"), one.together("cell", never):
            raise RuntimeError("its own")
        assert one.leads and not one.disagreement


def test_all_train_what_the_leader_names_in_its_order():
    with team(fails(())) as (leader, did):
        leader.gather()
        assert not did
        for name in ("a", "b"):
            with leader.together(name, never):
                pass
            assert sorted(did) == [(n, p) for n in ("a", "b")[: len(did) // 2] for p in (1, 2)]
            assert did[-1][0] == name and not leader.disagreement


def test_what_fails_alike_everywhere_stops_nothing():
    train = fails((0, 1, 2))
    with team(train) as (leader, did):
        with pytest.raises(RuntimeError, match=r"^no memory$"), leader.together("bad", never):
            train(0, "bad")
        assert not leader.disagreement
        with leader.together("good", never):
            pass
        assert sorted(did) == [(name, process) for name in ("bad", "good") for process in (1, 2)]


@pytest.mark.parametrize("where", [(0, 2), (1, 2), (0,)])
def test_what_fails_in_some_is_a_failure_of_all_and_their_last(where):
    train = fails(where)
    with team(train) as (leader, _):
        with pytest.raises(OSError, match="no memory") as error, leader.together("bad", never):
            train(0, "bad")
        reasons = "; ".join(f"process {process}: no memory" for process in where)
        assert leader.disagreement == str(error.value)
        assert leader.disagreement == f"not all processes of this worker failed alike: {reasons}"


def test_a_script_that_ends_over_a_fault_failed_and_one_that_was_stopped_ends():
    def train(process, name):
        try:
            raise ValueError("no such file")
        except ValueError as error:
            raise SystemExit(2) from error

    with team(train) as (leader, _):
        with pytest.raises(SystemExit), leader.together("bad", never):
            train(0, "bad")
        assert not leader.disagreement

    with pytest.raises(SystemExit, match="step 3"), team(fails(())) as (leader, did):
        with leader.together("cell", never):
            raise SystemExit("stopped at step 3")
    assert {name for name, _ in did} <= {"cell"}


def test_a_failure_that_the_others_wait_for_ends_the_worker():
    """As in a collective: the leader's training does not end until the worker does."""
    lost, ended = [], threading.Event()

    def leave(code):
        lost.append(code)
        ended.set()

    train = fails((2,))
    with team(train, patience=3 * BEAT, exit_process=leave) as (leader, _):
        with pytest.raises(OSError), leader.together("bad", lost.append):
            assert ended.wait(60)
    assert lost == ["not all processes of this worker failed alike: process 2: no memory", 1]


def test_a_leader_that_the_others_cannot_follow_ends_at_once():
    codes = []
    with Team(Store(), 0, 2, beat=BEAT, farewell=3 * BEAT, exit_process=codes.append):
        pass
    assert codes == [1]


def test_one_that_ends_before_it_is_ready():
    store = Store()
    with pytest.raises(SystemExit), Team(store, 1, 2):
        raise SystemExit(2)
    with Team(store, 0, 2, beat=BEAT) as leader:
        with pytest.raises(ValueError, match="process 1 ended before it began"):
            leader.gather()


def test_a_process_that_is_to_stop_stops_the_leader(monkeypatch):
    asked = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(signal, "SIGTERM", signal.SIGUSR1)
        before = signal.signal(signal.SIGUSR1, lambda *_: asked.set())
        try:
            with team(fails(())) as (leader, _):
                Team(leader._store, 1, 3).stop()
                assert asked.wait(60)
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_a_stop_while_jax_traces_is_no_fault():
    def stopped(x):
        raise SystemExit(STOPPED)

    for traced in (jax.jit(stopped), jax.grad(jax.checkpoint(stopped)), jax.vmap(stopped)):
        with pytest.raises(SystemExit) as end:
            traced(jnp.ones(2))
        assert fault(end.value) is None
    stop = SystemExit(STOPPED)
    stop.__cause__ = Exception("The preceding stack trace is the source of the JAX operation")
    assert fault(stop) is None
    failed = SystemExit(1)
    failed.__cause__ = RunFailed("a loss is not finite")
    assert fault(failed) is failed.__cause__
