"""Train the model on the iris data that comes with scikit-learn: python -m iris_model.iris_train."""

import sklearn
from sklearn.datasets import load_iris
from sklearn.svm import SVC

from iris_model import artifact

PARAMETERS = {"gamma": 0.001, "C": 100}


def train() -> tuple[artifact.Artifact, float]:
    """Return the artifact of a newly trained SVC, and its accuracy on the rows it was trained with."""
    iris = load_iris()
    measurements = iris.data.tolist()
    species = iris.target_names[iris.target].tolist()

    trained = SVC(**PARAMETERS).fit(measurements, species)
    answers = trained.predict(measurements).tolist()

    made = artifact.Artifact(
        scikit_learn=sklearn.__version__,
        parameters=PARAMETERS,
        support_vectors=[(*measurements[i], species[i]) for i in trained.support_],
        reference=[(*measurements[i], answers[i]) for i in range(len(measurements))],
    )
    # What is shipped must answer as what was trained.
    made.classifier()
    return made, float(trained.score(measurements, species))


def main() -> None:
    """Train and overwrite the artifact that this interpreter's iris_model loads."""
    made, accuracy = train()
    artifact.save(made)
    report = f"accuracy {accuracy:.3f} with scikit-learn {sklearn.__version__}; wrote {artifact.PATH}"
    print(report)  # noqa: T201 - what a command is asked for


if __name__ == "__main__":
    main()
