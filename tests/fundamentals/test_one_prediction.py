"""Read this first: what rq-models does, in the order in which one prediction meets it.

Every test here has one idea, real processes and a real server. Nothing is mocked, and nothing looks inside.
"""

from __future__ import annotations

import pytest
from rq.job import Job, JobStatus

from rq_models import Client, InvalidInput, ModelError, NoWorker, UnknownModel

# A model is a class with a constructor that loads and a method that predicts. It knows nothing of queues. The hints are
# optional: they become the schema that callers are held to.
SHIPPING = """
    from dataclasses import dataclass

    @dataclass
    class Parcel:
        kilograms: float
        express: bool = False

    class Model:
        version = "3"
        example = {"kilograms": 1.0}

        def __init__(self):
            self.price_per_kilogram = 4.0

        def predict(self, parcel: Parcel):
            if parcel.kilograms > 100:
                raise ValueError("too heavy")
            return {"price": parcel.kilograms * self.price_per_kilogram * (2 if parcel.express else 1)}
"""


@pytest.fixture
def client(project, redis_url):
    # A table in config/ gives the model its name; the name is also its queue's. The client needs only the address.
    project.add("shipping", SHIPPING)
    with Client(redis_url) as client:
        yield client


def test_a_worker_serves_a_model_and_a_client_predicts(project, start_worker, client):
    start_worker(project, "shipping")
    assert client.predict("shipping", {"kilograms": 2.5}, timeout=60) == {"price": 10.0}


def test_enqueueing_and_waiting_are_two_steps(project, start_worker, client):
    start_worker(project, "shipping")
    job = client.enqueue("shipping", {"kilograms": 1, "express": True})
    assert job.wait(timeout=60) == {"price": 8.0}


def test_a_prediction_is_an_ordinary_rq_job(project, start_worker, client, connection):
    start_worker(project, "shipping")
    job = client.enqueue("shipping", {"kilograms": 1})
    job.wait(timeout=60)
    # So whatever knows RQ, knows our jobs.
    same = Job.fetch(job.id, connection=connection, serializer="json")
    assert same.get_status() == JobStatus.FINISHED
    assert same.func_name == "rq_models.jobs.shipping"
    assert same.origin == "shipping"
    assert same.return_value() == {"price": 4.0}


def test_another_process_picks_the_job_up_by_its_id(project, start_worker, client, redis_url):
    start_worker(project, "shipping")
    job_id = client.enqueue("shipping", {"kilograms": 1}).id
    with Client(redis_url) as another:
        assert another.job(job_id).wait(timeout=60) == {"price": 4.0}


def test_many_predictions_are_enqueued_and_awaited_together(project, start_worker, client):
    start_worker(project, "shipping")
    jobs = client.enqueue_many("shipping", [{"kilograms": n} for n in range(1, 11)])
    assert client.wait_all(jobs, timeout=60) == [{"price": 4.0 * n} for n in range(1, 11)]


def test_a_wrong_input_is_said_before_anything_is_queued(project, start_worker, client, connection):
    start_worker(project, "shipping")
    client.predict("shipping", {"kilograms": 1}, timeout=60)  # now a worker has loaded it and published its schema
    with Client(connection=connection) as fresh, pytest.raises(InvalidInput, match="kilograms"):
        fresh.enqueue("shipping", {"kilograms": "a lot"})
    assert connection.llen("rq:queue:shipping") == 0


def test_the_models_own_exception_arrives_with_its_type(project, start_worker, client):
    start_worker(project, "shipping")
    with pytest.raises(ModelError, match="too heavy") as caught:
        client.predict("shipping", {"kilograms": 101}, timeout=60)
    assert caught.value.type == "ValueError"


def test_a_name_that_nobody_knows_and_a_model_that_nobody_serves_are_said_at_once(project, start_worker, client):
    with pytest.raises(UnknownModel, match="shiping"):
        client.enqueue("shiping", {"kilograms": 1})
    worker = start_worker(project, "shipping")
    worker.stop()
    with Client(project.redis_url) as fresh, pytest.raises(NoWorker, match="shipping"):
        fresh.enqueue("shipping", {"kilograms": 1})


def test_a_job_waits_for_its_worker_if_the_caller_wants_that(project, start_worker, redis_url):
    project.add("later", "class Model:\n    def predict(self, data): return data")
    with Client(redis_url, check_model=False, check_worker=False) as patient:
        job = patient.enqueue("later", "hello")
        start_worker(project, "later")
        assert job.wait(timeout=60) == "hello"
