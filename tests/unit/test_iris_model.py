"""The example model, and the artifact it ships."""

import json
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from iris_model import artifact, iris_train
from iris_model.iris_predict import IrisModel
from iris_model.schemas import EXAMPLE, IrisInput, IrisOutput
from pydantic import ValidationError
from sklearn.datasets import load_iris
from sklearn.svm import SVC


@pytest.fixture(scope="module")
def model():
    return IrisModel()


@pytest.fixture(scope="module")
def flowers():
    """All 150 rows of the data: what was measured, and the species."""
    iris = load_iris()
    return iris.data.tolist(), iris.target_names[iris.target].tolist()


def given(row):
    return IrisInput(**dict(zip(EXAMPLE, row, strict=True)))


def rewritten(path, change):
    """Write the shipped artifact to `path` after `change` has been done to its data."""
    data = json.loads(artifact.PATH.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def run(*arguments, folder):
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_the_readme_s_flower_is_a_setosa(model):
    assert model.predict(IrisInput(**EXAMPLE)).model_dump(mode="json") == {"species": "setosa"}


def test_it_describes_itself(model):
    assert model.qualified_name == "iris_model"
    assert model.display_name
    assert model.description
    assert model.version == "1.0.0"
    assert model.input_schema is IrisInput
    assert model.output_schema is IrisOutput
    assert model.input_schema.model_validate(model.example)


def test_a_batch_answers_as_single_predictions_do_in_the_same_order(model, flowers):
    batch = [given(row) for row in flowers[0]]

    assert model.predict_batch(batch) == [model.predict(item) for item in batch]
    assert model.predict_batch(batch[::-1]) == model.predict_batch(batch)[::-1]
    assert model.predict_batch([]) == []


def test_the_shipped_model_answers_as_a_newly_trained_svc_does(model, flowers):
    trained = SVC(gamma=0.001, C=100).fit(*flowers)

    answers = [output.species for output in model.predict_batch([given(row) for row in flowers[0]])]

    assert answers == trained.predict(flowers[0]).tolist()
    assert sum(a == b for a, b in zip(answers, flowers[1], strict=True)) == 147


def test_training_makes_the_shipped_artifact_again(tmp_path):
    made, accuracy = iris_train.train()
    artifact.save(made, tmp_path / "new.json")

    shipped = json.loads(artifact.PATH.read_text())
    again = json.loads((tmp_path / "new.json").read_text())
    assert again["reference"] == shipped["reference"]
    assert again["parameters"] == shipped["parameters"] == {"gamma": 0.001, "C": 100}
    assert accuracy == pytest.approx(0.98)
    assert artifact.load(tmp_path / "new.json").predict([list(EXAMPLE.values())]).tolist() == ["setosa"]


@pytest.mark.parametrize("value", ["asdfg", "0.2", True, None, [0.2], 0, -0.2, 11, float("nan"), float("inf")])
def test_a_wrong_petal_width_is_named(value):
    with pytest.raises(ValidationError) as caught:
        IrisInput(**{**EXAMPLE, "petal_width": value})

    assert [error["loc"] for error in caught.value.errors()] == [("petal_width",)]


def test_a_whole_number_is_a_length():
    assert IrisInput(**{**EXAMPLE, "sepal_length": 5}) == IrisInput(**EXAMPLE)


def test_loading_unpickles_nothing():
    program = """
import sys
from iris_model.iris_predict import IrisModel
events = []
sys.addaudithook(lambda event, arguments: events.append(event))
IrisModel()
assert "open" in events, "the hook saw nothing"
assert "pickle.find_class" not in events
"""

    done = run("-c", program, folder="/")

    assert done.returncode == 0, done.stderr


class Payload:
    """Unpickled, it makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_the_artifact_s_place_is_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"
    planted = tmp_path / "iris_svc.json"
    planted.write_bytes(pickle.dumps(Payload(ran)))

    with pytest.raises(artifact.ArtifactError, match="not an artifact of iris_model, or is damaged: run "):
        artifact.load(planted)

    assert not ran.exists()
    pickle.loads(planted.read_bytes())  # it would have run
    assert ran.exists()


def test_a_missing_artifact_says_so(tmp_path):
    with pytest.raises(artifact.ArtifactError, match=r"gone\.json can't be read \(No such file or directory\): run "):
        artifact.load(tmp_path / "gone.json")


@pytest.mark.parametrize("text", ["", "{}", "[]", "\x00\xff", '{"scikit_learn": "1.9.1"}', "[" * 10_000])
def test_a_damaged_artifact_says_so(tmp_path, text):
    damaged = tmp_path / "damaged.json"
    damaged.write_text(text, encoding="latin-1")

    with pytest.raises(artifact.ArtifactError, match=r"damaged\.json is not an artifact of iris_model, or is damaged"):
        artifact.load(damaged)


def test_an_artifact_that_answers_otherwise_is_refused(tmp_path):
    path = rewritten(tmp_path / "other.json", lambda data: data["reference"][0].__setitem__(4, "virginica"))

    with pytest.raises(artifact.ArtifactError, match="and does not give the same answers in "):
        artifact.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["parameters"].update(no_longer_there=1.0),
        lambda data: data["parameters"].update(gamma=-1.0),
        lambda data: data["support_vectors"].clear(),
        lambda data: data["support_vectors"][0].__setitem__(0, float("nan")),
        lambda data: data["reference"].clear(),
    ],
    ids=["parameter that scikit-learn dropped", "parameter out of range", "no rows", "NaN", "nothing to check against"],
)
def test_what_scikit_learn_does_not_take_is_refused(tmp_path, change):
    path = rewritten(tmp_path / "other.json", change)

    with pytest.raises(artifact.ArtifactError, match=r"^iris_model was trained with .* and does not load in "):
        artifact.load(path)


def test_the_command_in_the_error_repairs_the_model(tmp_path):
    package = Path(artifact.__file__).parent
    copy = shutil.copytree(package, tmp_path / "iris_model", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "iris_svc.json").write_text("{")
    construct = ("-c", "from iris_model.iris_predict import IrisModel; IrisModel()")

    sentence = run(*construct, folder=tmp_path).stderr.splitlines()[-1]
    command = shlex.split(sentence.rpartition(": run ")[2])
    assert command == [sys.executable, "-m", "iris_model.iris_train"]
    repair = run(*command[1:], folder=tmp_path)

    assert "accuracy 0.980" in repair.stdout, repair.stderr
    assert run(*construct, folder=tmp_path).returncode == 0
