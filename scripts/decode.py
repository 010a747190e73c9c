"""Thin entry point: the same as `codec decode ...`."""

import sys

from codec.cli import main

if __name__ == "__main__":
    sys.exit(main(["decode", *sys.argv[1:]]))
