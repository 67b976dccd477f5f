"""check-params: refuse a params.yaml with any fault, in any section, before the first stage starts.

Its output never changes, so a valid edit of params.yaml re-runs this stage and those that read the edited section.
"""

from pathlib import Path

from gpt2.check.schema import find_faults
from gpt2.pipeline import params
from gpt2.pipeline.files import UserError, write_text
from gpt2.pipeline.stage import Stage

VALID = Path("data/params.valid")


def main() -> None:
    with Stage("check-params"):
        if faults := find_faults(params.read()):
            raise UserError("\n" + "\n".join(faults))
        write_text(VALID, "params.yaml is valid\n")


if __name__ == "__main__":
    main()
