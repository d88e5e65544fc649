"""The model: construct it once, ask it often."""

from ml_base import MLModel

from iris_model import __version__, artifact
from iris_model.schemas import EXAMPLE, IrisInput, IrisOutput


class IrisModel(MLModel):
    """Tells three species of iris apart; the constructor loads the artifact and raises ArtifactError if it can't."""

    qualified_name = "iris_model"
    display_name = "Iris Model"
    description = "Tells three species of iris apart by the length and width of sepal and petal."
    version = __version__
    input_schema = IrisInput
    output_schema = IrisOutput
    example = EXAMPLE

    def __init__(self) -> None:
        self._classifier = artifact.load()

    def predict(self, data: IrisInput) -> IrisOutput:
        """Return the species of one flower."""
        return self.predict_batch([data])[0]

    def predict_batch(self, data: list[IrisInput]) -> list[IrisOutput]:
        """Return the species of each flower, in the order given, by one call of the SVC."""
        if not data:
            return []
        rows = [(d.sepal_length, d.sepal_width, d.petal_length, d.petal_width) for d in data]
        return [IrisOutput(species=species) for species in self._classifier.predict(rows).tolist()]
