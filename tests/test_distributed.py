"""Joining processes: what the flags, the environment and a cluster may say, and what is refused."""

import jax
import pytest

from jax_lora import distributed


@pytest.fixture
def no_cluster(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: started.append(given))
    return started


def test_there_is_a_single_process_unless_told(no_cluster):
    distributed.initialize()
    assert no_cluster == []


def test_the_cluster_the_flags_or_the_environment_say_who_takes_part(no_cluster, monkeypatch):
    distributed.initialize("auto")
    distributed.initialize("[::1]:1234", 4, 0)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "first:99")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    distributed.initialize()
    told = [
        tuple(x[k] for k in ("coordinator_address", "num_processes", "process_id"))
        for x in no_cluster[1:]
    ]
    assert no_cluster[0] == {}
    assert told == [("[::1]:1234", 4, 0), ("first:99", 2, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 2, 1), "--processes and --process: found without a coordinator"),
        (("", -1, 1), "--processes and --process: found without a coordinator"),
        (("host", 2, 0), "coordinator: found 'host', expected host:port or auto"),
        (("host:1", -1, 0), "coordinator: found process 0 of -1, expected 0 to one less"),
        (("host:1", 2, 2), "coordinator: found process 2 of 2, expected"),
        (("host:1", 2, -1), "coordinator: found process -1 of 2, expected"),
    ],
)
def test_bad_flags_of_many_processes_are_refused(no_cluster, arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*arguments)


def test_a_number_in_the_environment_must_be_one(no_cluster, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES: found 'two', expected a number"):
        distributed.initialize("host:1")


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (RuntimeError("DEADLINE_EXCEEDED\nmore"), OSError, "the processes did not meet: DEADLINE"),
        (ValueError("coordinator_address should be defined."), ValueError, "found no cluster"),
    ],
)
def test_processes_that_do_not_meet_are_a_line(no_cluster, monkeypatch, fault, kind, message):
    def fail(**_):
        raise fault

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(kind, match=message):
        distributed.initialize("auto")
