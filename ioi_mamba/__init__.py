"""Take a Mamba apart: read and write every value inside the mixer, run the IOI experiments, find circuits.

A name is imported when it is first used, so that `import ioi_mamba` does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ioi_mamba.analyses import register
    from ioi_mamba.circuits.attribution import attribute
    from ioi_mamba.circuits.dictionaries import load_dictionary, save_dictionary, train_dictionary
    from ioi_mamba.circuits.faithfulness import evaluate
    from ioi_mamba.circuits.features import features_at
    from ioi_mamba.circuits.flow import patch_flow, token_flow
    from ioi_mamba.circuits.graph import Circuit
    from ioi_mamba.circuits.patching import patch_edges
    from ioi_mamba.circuits.search import acdc
    from ioi_mamba.errors import InputError
    from ioi_mamba.experiments.experiment import Column, Context, Experiment
    from ioi_mamba.experiments.needs import Need
    from ioi_mamba.experiments.options import option
    from ioi_mamba.model.opening import open_model
    from ioi_mamba.passes.effect import effect
    from ioi_mamba.passes.forward import mixer, read, run
    from ioi_mamba.passes.unrolled import hidden_attention
    from ioi_mamba.results.stored import open_result, open_results
    from ioi_mamba.results.study import open_study
    from ioi_mamba.steering.steer import steer
    from ioi_mamba.tasks import greater_than, ioi
    from ioi_mamba.tasks.base import Pairs
    from ioi_mamba.tasks.task import Task
    from ioi_mamba.versions import __version__

_HOMES = {
    "Circuit": "circuits.graph",
    "Column": "experiments.experiment",
    "Context": "experiments.experiment",
    "Experiment": "experiments.experiment",
    "InputError": "errors",
    "Need": "experiments.needs",
    "Pairs": "tasks.base",
    "Task": "tasks.task",
    "__version__": "versions",
    "acdc": "circuits.search",
    "attribute": "circuits.attribution",
    "effect": "passes.effect",
    "evaluate": "circuits.faithfulness",
    "features_at": "circuits.features",
    "greater_than": "tasks",
    "hidden_attention": "passes.unrolled",
    "ioi": "tasks",
    "load_dictionary": "circuits.dictionaries",
    "mixer": "passes.forward",
    "open_model": "model.opening",
    "open_result": "results.stored",
    "open_results": "results.stored",
    "open_study": "results.study",
    "option": "experiments.options",
    "patch_edges": "circuits.patching",
    "patch_flow": "circuits.flow",
    "read": "passes.forward",
    "register": "analyses",
    "run": "passes.forward",
    "save_dictionary": "circuits.dictionaries",
    "steer": "steering.steer",
    "token_flow": "circuits.flow",
    "train_dictionary": "circuits.dictionaries",
}
"""Where each public name is; the block above says the same to type checkers."""

__all__ = [
    "Circuit",
    "Column",
    "Context",
    "Experiment",
    "InputError",
    "Need",
    "Pairs",
    "Task",
    "__version__",
    "acdc",
    "attribute",
    "effect",
    "evaluate",
    "features_at",
    "greater_than",
    "hidden_attention",
    "ioi",
    "load_dictionary",
    "mixer",
    "open_model",
    "open_result",
    "open_results",
    "open_study",
    "option",
    "patch_edges",
    "patch_flow",
    "read",
    "register",
    "run",
    "save_dictionary",
    "steer",
    "token_flow",
    "train_dictionary",
]


if not TYPE_CHECKING:  # for a checker a name that is not above is not there

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
