"""The models of this process: a module-level dict, filled on first use."""

from __future__ import annotations

import threading
from typing import Dict

from .contract import Model, construct, load_class

MODELS: Dict[str, Model] = {}
LOADS: Dict[str, int] = {}
"""How often each model was constructed in this process."""

_LOCK = threading.RLock()


def get(name: str, class_path: str, nan: str = "error") -> Model:
    """Return the model of this name, loading it if this process has not yet.

    Args:
        name: the configured name.
        class_path: ``package.module:Class``; not looked at when the model is loaded already.
        nan: see `output.to_json`.

    Raises:
        LoadError: it can't be imported or constructed.
    """
    model = MODELS.get(name)
    if model is None:
        with _LOCK:
            model = MODELS.get(name)
            if model is None:
                model = Model(name, construct(load_class(class_path)), nan)
                LOADS[name] = LOADS.get(name, 0) + 1
                MODELS[name] = model
    return model
