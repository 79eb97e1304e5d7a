"""Entry point of `python -m attnlab`, equivalent to the console command `attnlab`."""

import sys

from attnlab.runner import cli

if __name__ == "__main__":
    sys.exit(cli.main())
