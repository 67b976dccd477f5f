"""generate: sample texts from the trained model, for the report."""

from pathlib import Path

from gpt2.generate import GenerateConfig, generate
from gpt2.model.dist import setup_device
from gpt2.model.weights import load_model
from gpt2.pipeline.files import write_csv
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.stage import Stage
from gpt2.tokenizer.encodings import encoding_of

MODEL = Path("models/gpt2")
SAMPLES = Path("plots/generate/samples.csv")


def main() -> None:
    with Stage("generate") as stage:
        config = stage.load("generate", GenerateConfig)
        model = load_model(MODEL, setup_device(stage.load("hardware", HardwareConfig)))
        sampling = config.model_dump(exclude={"prompts"})
        encoding = encoding_of(MODEL)
        rows = [(prompt, text) for prompt in config.prompts for text in generate(model, prompt, encoding, **sampling)]
        write_csv(SAMPLES, ("prompt", "text"), rows)


if __name__ == "__main__":
    main()
