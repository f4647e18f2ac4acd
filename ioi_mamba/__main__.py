"""`python -m ioi_mamba` is `ioi-mamba`."""

import sys

from .cli import main

sys.exit(main())
