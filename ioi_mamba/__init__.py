"""Take a Mamba apart: read and write every value inside the mixer, run the IOI experiments, find circuits."""

import sys
from importlib import import_module
from types import ModuleType

from ioi_mamba.circuits.attribution import attribute
from ioi_mamba.circuits.faithfulness import evaluate
from ioi_mamba.circuits.graph import Circuit
from ioi_mamba.circuits.patching import patch_edges
from ioi_mamba.circuits.search import acdc
from ioi_mamba.errors import InputError
from ioi_mamba.model.opening import open_model
from ioi_mamba.passes.forward import mixer, read, run
from ioi_mamba.results.stored import open_result, open_results
from ioi_mamba.steering.steer import steer
from ioi_mamba.tasks import greater_than, ioi
from ioi_mamba.tasks.base import Pairs

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
