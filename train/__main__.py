"""`python -m train` is the command `codec-train`."""

import sys

from train.cli import main

sys.exit(main())
