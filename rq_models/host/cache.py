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
    """Return the model of this name, loading it from ``package.module:Class`` if this process has not yet.

    Raises:
        LoadError: it can't be imported or constructed.
    """
    with _LOCK:
        if name not in MODELS:
            MODELS[name] = Model(name, construct(load_class(class_path)), nan)
            LOADS[name] = LOADS.get(name, 0) + 1
        return MODELS[name]
