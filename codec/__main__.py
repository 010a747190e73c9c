"""`python -m codec` is the command `codec`."""

import sys

from codec.cli import main

sys.exit(main())
