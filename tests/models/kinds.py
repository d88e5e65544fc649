"""One tiny model of each kind that is hosted. Each says whether a petal is wide, in its own way."""

from dataclasses import dataclass, field
from enum import Enum
from typing import TypedDict

import ml_model_abc
import numpy as np
from ml_base import MLModel
from ml_base.ml_model import MLModelSchemaValidationException
from pydantic import BaseModel, ConfigDict
from schema import And, Or, Schema
from schema import Optional as Maybe


class Flower(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"petal_width": 0.2}]})

    petal_width: float
    names: list[str] = []


class Width(Enum):
    NARROW = "narrow"
    WIDE = "wide"


class Answer(BaseModel):
    width: Width


class Pydantic(MLModel):
    display_name = "Petals"
    qualified_name = "petals"
    description = "Says whether a petal is wide."
    version = "1.2.3"
    input_schema = Flower
    output_schema = Answer

    def __init__(self):
        self.limit = 1.0

    def predict(self, data):
        if data.petal_width < 0:
            raise MLModelSchemaValidationException("petal_width must not be negative")
        return Answer(width=Width.WIDE if data.petal_width > self.limit else Width.NARROW)


class OldAttributes(ml_model_abc.MLModel):
    display_name = "Petals"
    qualified_name = "petals"
    description = "Says whether a petal is wide."
    major_version = "0"
    minor_version = "4"
    input_schema = Schema({"petal_width": float, Maybe("names"): [str]})
    output_schema = Schema({"wide": bool})

    def __init__(self):
        self.seen = []

    def predict(self, data):
        super().predict(data)
        self.seen.append(data)
        return {"wide": np.bool_(data["petal_width"] > 1)}


class OldProperties(OldAttributes):
    @property
    def input_schema(self):
        return Schema({"petal_width": And(float, lambda width: width >= 0), "kind": Or("iris", None)})

    @property
    def output_schema(self):
        return Schema({"wide": bool})


class Untyped:
    def predict(self, data):
        return data


@dataclass
class Petal:
    width: float
    colours: dict[str, int] = field(default_factory=dict)
    note: str | None = None


@dataclass
class Verdict:
    wide: bool


class WithDataclass:
    """Plain class; its hints are its schema."""

    version = 3
    example = Petal(width=0.5)

    def predict(self, petal: Petal) -> Verdict:
        assert isinstance(petal, Petal)
        assert isinstance(petal.width, float)
        return Verdict(petal.width > 1)


class PetalDict(TypedDict):
    width: float


class WithTypedDict:
    def predict(self, petal: PetalDict) -> dict[str, bool]:
        return {"wide": petal["width"] > 1}


class WithPydanticHints:
    def predict(self, flower: Flower) -> Answer:
        return Answer(width="wide" if flower.petal_width > 1 else "narrow")


class Batched:
    """Predicts many at once, unless one of them is negative; keeps the sizes of its batches."""

    def __init__(self):
        self.sizes = []

    def predict(self, petal: Petal) -> bool:
        if petal.width < 0:
            raise ValueError("negative")
        return petal.width > 1

    def predict_batch(self, petals: list[Petal]):
        self.sizes.append(len(petals))
        return np.array([self.predict(petal) for petal in petals])
