"""Train, evaluate, sample from or describe an experiment: `python run.py --help`."""

import sys

from attnlab.runner import cli

if __name__ == "__main__":
    sys.exit(cli.main())
