"""Thin entry point: the same as `codec-train go ...`, one go of the training of a model that is shipped."""

import sys

from train.cli import main

if __name__ == "__main__":
    sys.exit(main(["go", *sys.argv[1:]]))
