"""The README's FastAPI application, word for word, in front of a real worker."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi.testclient import TestClient

README = Path(__file__).parents[2] / "README.md"

MODEL = """
    from typing import TypedDict

    class Flower(TypedDict):
        petal_width: float

    class Model:
        example = {"petal_width": 0.2}
        def predict(self, data: Flower):
            return {"species": "setosa" if data["petal_width"] < 1 else "virginica"}
"""


def test_the_readmes_application_predicts_and_refuses(project, start_worker, monkeypatch, redis_url):
    project.add("iris_model", MODEL, preload=True)
    worker = start_worker(project, "iris_model")
    (source,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
        if "FastAPI(" in block
    ]
    monkeypatch.setenv("REDIS_URL", redis_url)
    namespace: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), namespace)  # noqa: S102 - our own README
    with TestClient(namespace["app"]) as http:
        answers = [http.post("/iris", json={"petal_width": width}) for width in (0.2, 2)]
        assert [answer.json() for answer in answers] == [{"species": "setosa"}, {"species": "virginica"}]
        refused = http.post("/iris", json={"petal_width": "asdfg"})
    assert refused.status_code == 422
    assert "petal_width" in refused.json()["detail"]
    assert worker.process.poll() is None
