"""Thin entry point: the same as `codec-train shards ...`."""

import sys

from train.cli import main

if __name__ == "__main__":
    sys.exit(main(["shards", *sys.argv[1:]]))
