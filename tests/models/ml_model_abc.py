"""The older base class for models, which was never on PyPI: its shape, in our words."""

from abc import ABC, abstractmethod


class MLModel(ABC):
    """Metadata as properties, `schema` objects as schemas, and a `predict` that validates."""

    @property
    @abstractmethod
    def display_name(self): ...

    @property
    @abstractmethod
    def qualified_name(self): ...

    @property
    @abstractmethod
    def description(self): ...

    @property
    @abstractmethod
    def major_version(self): ...

    @property
    @abstractmethod
    def minor_version(self): ...

    @property
    @abstractmethod
    def input_schema(self): ...

    @property
    @abstractmethod
    def output_schema(self): ...

    @abstractmethod
    def predict(self, data):
        try:
            self.input_schema.validate(data)
        except Exception as error:  # noqa: BLE001 - as it did
            raise MLModelSchemaValidationException(f"Failed to validate input data: {error}")  # noqa: B904 - as it did


class MLModelException(Exception):
    """Raised by models."""


class MLModelSchemaValidationException(MLModelException):
    """Raised when the input does not fit."""
