"""Sampling draws from the distribution it promises, ends where it should, and its command line refuses nonsense."""

import re
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from gpt2 import generate as module
from gpt2.files import UserError
from gpt2.generate import GenerateConfig, SamplingConfig, generate, generate_text
from gpt2.model import GPT, GPTConfig
from gpt2.weights import save_model
from tests.analysed import BLOCK_SIZE, VOCAB_SIZE, make_model
from tests.closure import ROOT

# An id that no test draws by chance: its logit is never high.
NEVER = -1
PROMPT = torch.tensor([5, 60, 33])


def make_sampling(**changed) -> SamplingConfig:
    plain = {"max_tokens": 12, "num_seq": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    return SamplingConfig(**{**plain, **changed})


@torch.no_grad()
def likeliest(model: GPT, prompt: torch.Tensor, n: int) -> list[int]:
    """Argmax of all logits again and again, the whole sequence or the last block_size tokens in a pass."""
    ids = prompt.tolist()
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids[-BLOCK_SIZE:]]))[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def next_probabilities(model: GPT, temperature: float = 1.0) -> torch.Tensor:
    """Probabilities (V,) of the token after PROMPT."""
    return (model(PROMPT[None])[0, -1] / temperature).softmax(0)


def draw_next(model: GPT, n: int, **changed) -> torch.Tensor:
    """How often each id is drawn after PROMPT in `n` draws, (V,)."""
    rows = generate(model, PROMPT, make_sampling(max_tokens=1, num_seq=n, **changed), NEVER)
    return torch.bincount(torch.tensor(rows).flatten(), minlength=VOCAB_SIZE)


@pytest.fixture
def model() -> GPT:
    """A model whose next token is neither certain nor open."""
    model = make_model()
    with torch.no_grad():
        model.wte.weight *= 12
    return model


@pytest.mark.parametrize("n", [1, 12, 3 * BLOCK_SIZE], ids=["one", "within the context", "beyond the context"])
def test_without_temperature_the_likeliest_token_is_taken(model, n):
    assert generate(model, PROMPT, make_sampling(temperature=0.0, max_tokens=n), NEVER) == [likeliest(model, PROMPT, n)]


def test_a_prompt_longer_than_the_context_is_seen_from_its_end(model):
    long = torch.arange(BLOCK_SIZE + 9)
    expected = likeliest(model, long, 5)
    assert generate(model, long, make_sampling(temperature=0.0, max_tokens=5), NEVER) == [expected]
    assert generate(model, long[9:], make_sampling(temperature=0.0, max_tokens=5), NEVER) == [expected]


@pytest.mark.parametrize("changed", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}])
def test_the_narrowest_sampling_takes_the_likeliest_token(model, changed):
    rows = generate(model, PROMPT, make_sampling(num_seq=3, **changed), NEVER)
    assert rows == 3 * [likeliest(model, PROMPT, 12)]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_tokens_are_drawn_with_their_probabilities(model, temperature):
    n = 20_000
    expected = n * next_probabilities(model, temperature)
    drawn = draw_next(model, n, temperature=temperature)
    common = expected > 20
    assert common.sum() >= 3
    # Five deviations of a binomial; the rare ids count together.
    found = torch.cat([drawn[common], drawn[~common].sum(0, keepdim=True)])
    mean = torch.cat([expected[common], expected[~common].sum(0, keepdim=True)])
    assert ((found - mean).abs() <= 5 * (mean * (1 - mean / n)).sqrt() + 1).all()


def test_top_k_keeps_the_likeliest_and_their_odds(model):
    probabilities = next_probabilities(model)
    order = probabilities.argsort(descending=True)
    drawn = draw_next(model, 5000, top_k=3)
    assert set(drawn.nonzero().flatten().tolist()) == set(order[:3].tolist())
    expected = 5000 * probabilities[order[:3]] / probabilities[order[:3]].sum()
    assert (abs(drawn[order[:3]] - expected) <= 5 * expected.sqrt()).all()
    assert (draw_next(model, 500, top_k=VOCAB_SIZE + 50) == draw_next(model, 500, top_k=0)).all()


def test_top_p_keeps_the_fewest_tokens_that_reach_it(model):
    probabilities = next_probabilities(model)
    ordered, order = probabilities.sort(descending=True)
    mass = ordered.cumsum(0)
    for n_kept in (1, 2, 4):
        # Between the mass of one fewer and of all of them.
        below = mass[n_kept - 2].item() if n_kept > 1 else 0.0
        drawn = draw_next(model, 5000, top_p=(below + mass[n_kept - 1].item()) / 2)
        assert set(drawn.nonzero().flatten().tolist()) == set(order[:n_kept].tolist())


def test_the_seed_alone_decides_the_text(model):
    one = generate(model, PROMPT, make_sampling(num_seq=3, seed=5), NEVER)
    torch.manual_seed(99)
    assert generate(model, PROMPT, make_sampling(num_seq=3, seed=5), NEVER) == one
    assert generate(model, PROMPT, make_sampling(num_seq=3, seed=6), NEVER) != one
    assert len({tuple(row) for row in one}) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_ids_that_pad_the_vocabulary_are_never_drawn(model, temperature):
    # Whatever the hidden state, one of a row and its opposite has a huge logit.
    with torch.no_grad():
        model.wte.weight[VOCAB_SIZE:] = 1e6
        model.wte.weight[VOCAB_SIZE + 1 :: 2] = -1e6
    rows = generate(model, PROMPT, make_sampling(num_seq=50, temperature=temperature), NEVER)
    assert max(map(max, rows)) < VOCAB_SIZE


def test_an_end_of_text_token_ends_its_sequence_and_is_left_out(model):
    free = generate(model, PROMPT, make_sampling(num_seq=20), NEVER)
    # A token that one sequence draws in the middle and another never draws.
    eot = next(id_ for id_ in free[0][2:8] if id_ not in free[0][:2] and any(id_ not in row for row in free))
    ended = generate(model, PROMPT, make_sampling(num_seq=20), eot)
    assert ended == [row[: row.index(eot)] if eot in row else row for row in free]
    assert len({len(row) for row in ended}) > 1


def test_generation_stops_when_all_sequences_have_ended(model):
    first = likeliest(model, PROMPT, 1)[0]
    passes = []
    model.h[0].register_forward_hook(lambda *_: passes.append(1))
    assert generate(model, PROMPT, make_sampling(num_seq=4, temperature=0.0, max_tokens=50), first) == [[]] * 4
    assert len(passes) == 1


def test_an_end_of_text_token_in_the_prompt_ends_nothing(model):
    rows = generate(model, torch.tensor([7, 5, 7]), make_sampling(temperature=0.0), eot_token=7)
    assert rows == [likeliest(model, torch.tensor([7, 5, 7]), 12)]
    assert 7 not in rows[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with GPT-2's vocabulary."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 50257}
    path = tmp_path_factory.mktemp("models") / "gpt2"
    save_model(GPT(GPTConfig(**shape, norm="preln"), seed=3), path)
    return path


def test_text_continues_a_prompt_or_starts_a_document(folder):
    model = module.load_model(folder)
    texts = generate_text(model, "The array", make_sampling(num_seq=2))
    assert len(texts) == 2
    assert all(isinstance(text, str) and text for text in texts)
    seen = []
    model.wte.register_forward_hook(lambda _, args, __: seen.append(args[0][0].tolist()))
    generate_text(model, "", make_sampling())
    assert seen[0] == [50256]


def test_a_model_of_another_vocabulary_is_refused():
    with pytest.raises(UserError, match="the model has vocab_size=97, encoding gpt2 has 50257"):
        generate_text(make_model(), "text", make_sampling())


def test_the_command_prints_each_sequence_with_its_prompt(folder, capsys):
    command = ["--model", str(folder), "--prompt", "Plot a", "--max_tokens", "4", "--num_seq", "3", "--seed", "2"]
    module.main(command)
    printed = capsys.readouterr().out
    texts = generate_text(module.load_model(folder), "Plot a", SamplingConfig(max_tokens=4, num_seq=3, seed=2))
    assert printed == "".join(f"--- {i} ---\nPlot a{text}\n" for i, text in enumerate(texts, start=1))
    module.main(command)
    assert capsys.readouterr().out == printed


def test_the_command_has_the_defaults_of_the_configuration(folder, capsys):
    module.main(["--model", str(folder), "--prompt", "x"])
    texts = generate_text(module.load_model(folder), "x", SamplingConfig())
    assert capsys.readouterr().out == f"--- 1 ---\nx{texts[0]}\n"


def test_a_missing_model_ends_the_process_with_a_message_alone(tmp_path):
    command = [sys.executable, "-m", "gpt2.generate", "--model", "models/none"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"generate: models/none holds no model .*; train one with `dvc repro train`\n", done.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], r"generate\.temperature = -1\.0: Input should be greater than or equal to 0"),
        (["--temperature", "nan"], r"generate\.temperature = nan"),
        (["--temperature", "inf"], r"generate\.temperature = inf: Input should be a finite number"),
        (["--max_tokens", "0"], r"generate\.max_tokens = 0: Input should be greater than 0"),
        (["--num_seq", "0"], r"generate\.num_seq = 0"),
        (["--top_k", "-1"], r"generate\.top_k = -1"),
        (["--top_p", "0"], r"generate\.top_p = 0\.0"),
        (["--top_p", "1.5"], r"generate\.top_p = 1\.5: Input should be less than or equal to 1"),
    ],
)
def test_the_command_refuses_settings_that_cannot_be(folder, options, message):
    with pytest.raises(SystemExit, match=f"^generate: {message}") as raised:
        module.main(["--model", str(folder), *options])
    # A text as exit code is printed and becomes status 1.
    assert isinstance(raised.value.code, str)


@pytest.mark.parametrize("options", [["--max_tokens", "many"], ["--tokens", "3"]])
def test_the_command_refuses_options_it_cannot_read(folder, options, capsys):
    with pytest.raises(SystemExit) as raised:
        module.main(["--model", str(folder), *options])
    assert raised.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_the_report_needs_a_prompt():
    with pytest.raises(ValidationError, match="prompts"):
        GenerateConfig(prompts=())
