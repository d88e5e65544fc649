"""`serve_models`: the errors, checks and serialization of production, in the test's own process."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from rq import Callback, Queue, Retry
from rq.job import JobStatus

from rq_models import (
    Client,
    ConfigurationError,
    InvalidInput,
    InvalidJob,
    InvalidOutput,
    JobNotFound,
    ModelBroken,
    ModelError,
    UnknownModel,
)


@dataclass
class Parcel:
    kilograms: float


class Shipping:
    version = "3"
    example = {"kilograms": 1.0}  # noqa: RUF012 - a model's example

    def __init__(self):
        self.calls = 0

    def predict(self, parcel: Parcel):
        self.calls += 1
        if parcel.kilograms > 100:
            raise ValueError("too heavy")
        if parcel.kilograms < 0:
            return {1, 2}
        return {"price": parcel.kilograms * 4, "box": (1, 2)}


class Flaky:
    def __init__(self):
        self.calls = 0

    def predict(self, data):
        self.calls += 1
        if self.calls < data:
            raise RuntimeError("again")
        return self.calls


def test_it_serves_classes_instances_and_paths(serve_models):
    client = serve_models(shipping=Shipping, flaky=Flaky(), iris_model="iris_model.iris_predict:IrisModel")
    assert isinstance(client, Client)
    assert client.predict("shipping", {"kilograms": 2}, timeout=10) == {"price": 8.0, "box": [1, 2]}
    assert client.predict("flaky", 1) == 1
    flower = {"sepal_length": 5.0, "sepal_width": 3.2, "petal_length": 1.2, "petal_width": 0.2}
    assert client.predict("iris_model", flower) == {"species": "setosa"}
    status = {status.name: status for status in client.models()}["shipping"]
    assert (status.state, status.card.version) == ("warm", "3")


def test_every_verb_of_the_client_works(serve_models):
    client = serve_models(shipping=Shipping)
    job = client.enqueue("shipping", {"kilograms": 1})
    assert job.get_status() == JobStatus.FINISHED
    assert (job.wait()["price"], job.model_version) == (4.0, "3")
    assert client.job(job.id).wait(timeout=0)["price"] == 4.0
    rows = [{"kilograms": number} for number in range(3)]
    assert [one["price"] for one in client.predict_many("shipping", rows)] == [0, 4, 8]
    jobs = client.enqueue_many("shipping", rows)
    assert [one.wait()["price"] for one in client.as_completed(jobs, timeout=10)] == [0, 4, 8]
    assert [one["price"] for one in client.wait_all(jobs, timeout=10)] == [0, 4, 8]
    first = client.enqueue("shipping", {"kilograms": 1})
    assert client.enqueue("shipping", {"kilograms": 2}, depends_on=first).wait(timeout=10)["price"] == 8.0
    with pytest.raises(JobNotFound):
        client.job("nobody")


def test_errors_are_those_of_production(serve_models):
    client = serve_models(shipping=Shipping)
    with pytest.raises(UnknownModel):
        client.predict("shiping", {"kilograms": 1})
    with pytest.raises(InvalidInput, match="kilograms: Input should be a valid number, got 'a lot'"):
        client.predict("shipping", {"kilograms": "a lot"})
    with pytest.raises(ModelError, match="too heavy") as caught:
        client.predict("shipping", {"kilograms": 101})
    assert caught.value.type == "ValueError"
    assert "in predict" in caught.value.traceback
    with pytest.raises(InvalidOutput, match="set is not JSON"):
        client.predict("shipping", {"kilograms": -1})
    with pytest.raises(InvalidJob, match=r"os\.system"):
        client.predict("shipping", {"kilograms": 1}, on_success=Callback("os.system"))


def test_what_the_schema_lets_through_the_model_refuses(serve_models):
    client = serve_models(shipping=Shipping)
    with pytest.raises(InvalidInput, match="kilograms"):
        client.predict("shipping", {"kilograms": "5"})  # pydantic would take it; a dataclass does not


def test_a_foreign_function_is_refused_and_never_imported(serve_models):
    client = serve_models(shipping=Shipping)
    Queue("shipping", connection=client.connection, serializer="json").enqueue("os.abort", job_id="evil")
    client.predict("shipping", {"kilograms": 1})
    with pytest.raises(InvalidJob, match=r"os\.abort"):
        client.job("evil").wait(timeout=10)


def test_a_callers_own_retries_are_kept_and_no_others(serve_models):
    client = serve_models(flaky=Flaky)
    assert client.predict("flaky", 3, retry=Retry(max=5), timeout=10) == 3
    with pytest.raises(ModelError, match="again"):
        client.predict("flaky", 9)


def test_a_model_that_does_not_load_is_said_at_once(serve_models):
    class Broken:
        def __init__(self):
            raise OSError("no weights")

        def predict(self, data):
            return data

    class WrongExample:
        example = 5

        def predict(self, data):
            return 1 / (data - 5)

    with pytest.raises(ModelBroken, match=r"churn: .*no weights"):
        serve_models(churn=Broken)
    with pytest.raises(ModelBroken, match="no module named 'nowhere'"):
        serve_models(churn="nowhere:Model")
    with pytest.raises(ModelBroken, match=r"its own example: .*division by zero"):
        serve_models(churn=WrongExample)


def test_what_waits_for_a_clock_is_not_run(serve_models):
    client = serve_models(flaky=Flaky)
    job = client.enqueue("flaky", 3, retry=Retry(max=5, interval=60))
    with pytest.raises(TimeoutError, match="still scheduled"):
        job.wait(timeout=0.05)


def test_a_job_is_run_before_any_deadline(serve_models):
    assert serve_models(flaky=Flaky).predict("flaky", 1, timeout=30, deadline=0.001) == 1


def test_threads_share_it_and_the_model_sees_one_at_a_time(serve_models):
    class Exclusive:
        def __init__(self):
            self.lock = threading.Lock()

        def predict(self, data):
            assert self.lock.acquire(blocking=False)
            self.lock.release()
            return data

    client = serve_models(exclusive=Exclusive)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: client.predict("exclusive", n, timeout=30), range(40))) == list(range(40))


def test_two_clients_know_nothing_of_each_other(serve_models):
    one, other = serve_models(flaky=Flaky), serve_models(shipping=Shipping)
    assert [status.name for status in one.models()] == ["flaky"]
    assert [status.name for status in other.models()] == ["shipping"]


def test_without_fakeredis_one_sentence_says_how_to_get_it(serve_models, monkeypatch):
    monkeypatch.setitem(sys.modules, "fakeredis", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'rq-models\[testing\]'"):
        serve_models(shipping=Shipping)
