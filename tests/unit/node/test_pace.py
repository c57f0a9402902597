"""What the agent says to a training, as the process hears it between two steps."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from flowmesh_cas.errors import InternalError
from flowmesh_node import frames
from flowmesh_node.operators.base import Batch
from flowmesh_node.process import Worker


@pytest.fixture
def pair() -> Iterator[tuple[Worker, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Worker(theirs), ours


def test_silence_is_heard_at_once(pair: tuple[Worker, socket.socket]) -> None:
    assert pair[0].pace() == (False, 0.0)


def test_everything_said_since_the_last_step_counts_and_counts_once(pair: tuple[Worker, socket.socket]) -> None:
    worker, agent = pair
    for pace in (frames.Pace(now=True), frames.Pace(behind_s=0.5), frames.Pace(behind_s=0.25)):
        agent.sendall(frames.pack(pace))
    assert worker.pace() == (True, 0.25)
    assert worker.pace() == (False, 0.0)


def test_a_checkpoint_reaches_the_agent(pair: tuple[Worker, socket.socket]) -> None:
    worker, agent = pair
    worker.keep(0, "folder", 7, 10, 800)
    assert frames.receive(agent) == frames.Checkpointed(0, "folder", 7, 10, 800)


def test_a_batch_for_a_process_at_work_is_an_error(pair: tuple[Worker, socket.socket]) -> None:
    worker, agent = pair
    agent.sendall(frames.pack(frames.Run(Batch("flow.noop", 1, []))))
    with pytest.raises(InternalError):
        worker.pace()


def test_what_is_said_after_the_training_has_ended_disturbs_nobody(pair: tuple[Worker, socket.socket]) -> None:
    worker, agent = pair
    agent.sendall(frames.pack(frames.Pace(now=True)) + frames.pack(frames.Run(Batch("no.such.type", 1, []))))
    agent.shutdown(socket.SHUT_WR)
    worker.serve()
    assert frames.receive(agent) == frames.Finished()
