"""The former place of tools.harness, kept for one version."""

import sys

from tools import harness

if __name__ == "__main__":
    sys.stderr.write("python -m tests.harness is now python -m tools.harness\n")
    harness.main(sys.argv[1:])
