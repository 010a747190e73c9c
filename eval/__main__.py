"""`python -m eval` is `codec-eval`."""

import sys

from eval.cli import main

sys.exit(main())
