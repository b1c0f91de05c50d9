"""The queue of jobs: order, bounds, failures, and its end."""

import threading

import pytest

from ldm_jax.sample.web.jobs import CancelledError, Queue
from ldm_jax.sample.web.limits import RefusedError


@pytest.fixture
def queue():
    made = Queue(most=8)
    yield made
    made.close()


def held(queue):
    """An event that lets the running job go on; it runs already."""
    runs, free = threading.Event(), threading.Event()
    job = queue.submit("held", "first", lambda watch: (runs.set(), free.wait(), watch.stop)[-1])
    assert runs.wait(10)
    return free, job


def test_clients_take_turns(queue):
    free, _ = held(queue)
    order = []
    jobs = [
        queue.submit("job", client, lambda watch, name=name: order.append(name))
        for client, name in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"))
    ]
    assert [queue.place(job) for job in jobs] == [1, 4, 5, 2, 3]
    free.set()
    for job in jobs:
        job.future.result(10)
    assert order == ["a1", "b1", "c1", "a2", "a3"]
    assert queue.place(jobs[0]) == 0


def test_a_full_queue_refuses_and_a_failure_is_told_to_who_asked(queue):
    free, _ = held(queue)
    failing = queue.submit("job", "b", lambda watch: 1 // 0)
    jobs = [queue.submit("job", f"client {i}", lambda watch: 7) for i in range(7)]
    with pytest.raises(RefusedError, match="8 requests wait already") as refused:
        queue.submit("job", "d", lambda watch: 7)
    assert refused.value.status == 503
    free.set()
    with pytest.raises(ZeroDivisionError):
        failing.future.result(10)
    assert [job.future.result(10) for job in jobs] == [7] * 7


def test_a_cancelled_job_does_not_run(queue):
    free, _ = held(queue)
    job = queue.submit("job", "b", lambda watch: pytest.fail("it runs"))
    job.cancel()
    free.set()
    with pytest.raises(CancelledError):
        job.future.result(10)


def test_the_end_waits_for_the_running_job_alone(queue):
    free, running = held(queue)
    waiting = queue.submit("job", "b", lambda watch: pytest.fail("it runs"))
    queue.close()
    with pytest.raises(RefusedError, match="the server is stopping"):
        waiting.future.result(10)
    with pytest.raises(RefusedError, match="the server is stopping"):
        queue.submit("job", "c", lambda watch: None)
    free.set()
    assert running.future.result(10) == "last"
    queue.join(10)
