"""What goes into a prediction and what comes out."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Species = Literal["setosa", "versicolor", "virginica"]

# Strict: an int is a length too, but True and "5.0" are somebody's mistake. The longest of the 150 flowers is 7.9 cm.
Centimetres = Annotated[float, Field(strict=True, gt=0, le=10)]

EXAMPLE = {"sepal_length": 5.0, "sepal_width": 3.2, "petal_length": 1.2, "petal_width": 0.2}


class IrisInput(BaseModel):
    """The measurements of one flower, in centimetres."""

    model_config = ConfigDict(json_schema_extra={"example": {**EXAMPLE}})

    sepal_length: Centimetres
    sepal_width: Centimetres
    petal_length: Centimetres
    petal_width: Centimetres


class IrisOutput(BaseModel):
    """The species that the model takes the flower for."""

    species: Species
