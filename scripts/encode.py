"""Thin entry point: the same as `codec encode ...`."""

import sys

from codec.cli import main

if __name__ == "__main__":
    sys.exit(main(["encode", *sys.argv[1:]]))
