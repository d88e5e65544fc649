"""The README's recipe for other languages, command by command."""

from __future__ import annotations

import base64
import json
import re
import shlex
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_commands_enqueue_a_prediction(project, start_worker, connection):
    project.add("churn", "class Model:\n    def predict(self, data): return data['months'] + data['calls']")
    start_worker(project, "churn")
    (recipe,) = re.findall(r"^    MULTI\n.*?^    XREAD.*?$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for line in recipe.replace("\\\n", " ").splitlines()]
    pipe = connection.pipeline()
    for line in lines[1:-2]:
        pipe.execute_command(*line)
    pipe.execute()
    reply = connection.execute_command(*lines[-1])
    entries = reply[b"rq:results:j1"] if isinstance(reply, dict) else reply[0][1]
    fields = entries[0][-1]
    fields = fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=True))
    assert json.loads(base64.b64decode(fields[b"return_value"])) == 5
    assert connection.ttl("rq:job:j1") > 0
