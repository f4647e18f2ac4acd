"""Tasks: what a model is asked. `base` holds the pairs of prompts every analysis takes, `ioi` makes them."""

from ioi_mamba.tasks import ioi
from ioi_mamba.tasks.base import Pairs

__all__ = ["Pairs", "ioi"]
