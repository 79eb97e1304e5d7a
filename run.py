"""Train, evaluate, sample from, import, export or describe a run: `python run.py --help`."""

import sys

from attnlab.runner import cli

if __name__ == "__main__":
    sys.exit(cli.main())
