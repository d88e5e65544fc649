"""One prediction by a running worker of the iris model; `scripts/demo` runs this."""

import sys

from rq_models import Client

FLOWER = {"sepal_length": 5.0, "sepal_width": 3.2, "petal_length": 1.2, "petal_width": 0.2}
# The first prediction loads scikit-learn.
PATIENCE = 120

with Client() as client:
    prediction = client.predict("iris_model", FLOWER, timeout=PATIENCE)
print(prediction)
if prediction != {"species": "setosa"}:
    sys.exit("expected {'species': 'setosa'}")
