"""Take a Mamba apart: read and write every value inside the mixer, run the IOI experiments, find circuits."""

from .errors import InputError
from .interventions import mixer, read, run
from .models import open_model

__all__ = ["InputError", "mixer", "open_model", "read", "run"]
