"""The artifact: what training leaves behind and the model loads; the README says why it looks like this."""

import json
import shlex
import sys
from pathlib import Path

import sklearn
from pydantic import BaseModel, ValidationError
from sklearn.svm import SVC

from iris_model.schemas import Species

PATH = Path(__file__).with_name("iris_svc.json")

# Sepal length and width, petal length and width in centimetres, and the species.
Row = tuple[float, float, float, float, Species]


class ArtifactError(RuntimeError):
    """The artifact can't be used; the message says which command makes a new one."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: run {shlex.quote(sys.executable)} -m iris_model.iris_train")


class Artifact(BaseModel):
    """A trained SVC, as plain data.

    `support_vectors` carry the species they were trained with, `reference` rows the species the trained SVC gave them.
    """

    scikit_learn: str
    parameters: dict[str, float]
    support_vectors: list[Row]
    reference: list[Row]

    def classifier(self) -> SVC:
        """Return the trained SVC; raise ArtifactError if its answers to the reference rows have changed."""
        try:
            classifier = SVC(**self.parameters)
            classifier.fit([row[:4] for row in self.support_vectors], [row[4] for row in self.support_vectors])
            answers = classifier.predict([row[:4] for row in self.reference]).tolist()
        except (TypeError, ValueError) as error:  # what scikit-learn raises on parameters or rows it does not take
            raise ArtifactError(self._unusable("does not load")) from error
        if answers != [row[4] for row in self.reference]:
            raise ArtifactError(self._unusable("does not give the same answers"))
        return classifier

    def _unusable(self, why: str) -> str:
        return f"iris_model was trained with scikit-learn {self.scikit_learn} and {why} in {sklearn.__version__}"


def load(path: Path = PATH) -> SVC:
    """Return the SVC that the artifact at `path` holds; raise ArtifactError if there is none that still works."""
    try:
        artifact = Artifact.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"iris_model's artifact {path} can't be read ({error.strerror})") from error
    except ValidationError as error:
        raise ArtifactError(f"{path} is not an artifact of iris_model, or is damaged") from error
    return artifact.classifier()


def save(artifact: Artifact, path: Path = PATH) -> None:
    """Write the artifact to `path`, a row on each line."""
    text = json.dumps(artifact.model_dump(mode="json"))
    path.write_text(text.replace("[[", "[\n[").replace("], [", "],\n[") + "\n", encoding="utf-8")
