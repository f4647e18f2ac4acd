"""Take a Mamba apart: read and write every value inside the mixer, run the IOI experiments, find circuits."""

import sys
from importlib import import_module
from types import ModuleType

from .acdc import acdc
from .attribution import attribute
from .errors import InputError
from .faithfulness import evaluate
from .graph import Circuit
from .interventions import mixer, read, run
from .models import open_model
from .patching import patch_edges
from .results import open_result, open_results
from .steering import steer
from .tasks import greater_than, ioi
from .tasks.base import Pairs

__all__ = [
    "Circuit",
    "InputError",
    "Pairs",
    "acdc",
    "attribute",
    "evaluate",
    "greater_than",
    "ioi",
    "mixer",
    "open_model",
    "open_result",
    "open_results",
    "patch_edges",
    "read",
    "run",
    "steer",
]


class Package(ModuleType):
    """This package as a value: every serialiser takes it by its name, also after its code was made to travel."""

    def __reduce__(self):
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = Package
