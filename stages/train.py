"""train: GPT-2 from scratch on the tokens, or pretrained weights as they are; starts torchrun where it is needed."""

from gpt2.pipeline.command import reporting
from gpt2.pipeline.hardware import ensure_torchrun
from gpt2.pipeline.interrupt import end_with_launcher


def main() -> None:
    with reporting("train"):
        ensure_torchrun("stages.train")
    end_with_launcher()
    # Only now: importing torch takes seconds, and torchrun's processes import it themselves.
    from gpt2.train.run import run_stage

    run_stage()


if __name__ == "__main__":
    main()
