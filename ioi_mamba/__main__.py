"""`python -m ioi_mamba` is `ioi-mamba`."""

import sys

from ioi_mamba.cli.main import main

sys.exit(main())
