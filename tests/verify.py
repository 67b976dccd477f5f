"""The former place of tools.verify, kept for one version."""

import sys

from tools import verify

if __name__ == "__main__":
    sys.stderr.write("python -m tests.verify is now python -m tools.verify\n")
    verify.main(sys.argv[1:])
