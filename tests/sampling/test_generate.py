"""Generation equals its definition without a cache, draws from the distribution it promises and ends where it should;
the command writes what the library call returns.
"""

import re
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from pydantic import ValidationError

from gpt2 import generate as module
from gpt2.generate import GenerateConfig, generate, stream
from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.model.weights import save_model
from gpt2.pipeline.files import UserError
from gpt2.sampling.sampling import SamplingConfig, draw_tokens, window_start
from tests.analysed import BLOCK_SIZE, VOCAB_SIZE, make_model
from tests.closure import ROOT
from tests.reference import make_reference

# An id that no test draws by chance: its logit is never high.
NEVER = -1
PROMPT = torch.tensor([5, 60, 33])


def make_sampling(**changed) -> SamplingConfig:
    plain = {"max_tokens": 12, "num_seq": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    return SamplingConfig(**{**plain, **changed})


def draw_rows(model: GPT, prompt: torch.Tensor, sampling: SamplingConfig, eot_token: int = NEVER) -> list[list[int]]:
    """New ids of every sequence."""
    rows = [[] for _ in range(sampling.num_seq)]
    for drawn in draw_tokens(model, prompt, sampling, eot_token):
        for number, token in drawn.items():
            rows[number].append(token)
    return rows


def see(ids: list[int], block_size: int) -> list[int]:
    """What the model sees of `ids`: whenever they are more than the context, its older half is dropped."""
    dropped = 0
    while len(ids) - dropped > block_size:
        dropped += (block_size + 1) // 2
    return ids[dropped:]


@torch.no_grad()
def draw_without_cache(model: GPT, prompt: torch.Tensor, sampling: SamplingConfig) -> list[list[int]]:
    """The definition: for every token of every sequence, a pass over all that the model sees."""
    seeds, rows = torch.Generator().manual_seed(sampling.seed), []
    for _ in range(sampling.num_seq):
        own = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=seeds)))
        ids = prompt.tolist()
        for _ in range(sampling.max_tokens):
            logits = model(torch.tensor([see(ids, model.config.block_size)]))[0, -1]
            if sampling.temperature == 0:
                ids.append(int(logits.argmax()))
            else:
                mass = (logits.double() / sampling.temperature).softmax(0).cumsum(0)
                u = torch.rand((), dtype=torch.float64, generator=own)
                ids.append(int((mass < mass[-1] * (1 - u)).sum()))
        rows.append(ids[len(prompt) :])
    return rows


def likeliest(model: GPT, prompt: torch.Tensor, n: int) -> list[int]:
    return draw_without_cache(model, prompt, make_sampling(temperature=0.0, max_tokens=n))[0]


@torch.no_grad()
def next_probabilities(model: GPT, temperature: float = 1.0) -> torch.Tensor:
    """Probabilities (V,) of the token after PROMPT."""
    return (model(PROMPT[None])[0, -1] / temperature).softmax(0)


def draw_next(model: GPT, n: int, **changed) -> torch.Tensor:
    """How often each id is drawn after PROMPT in `n` draws, (V,)."""
    rows = draw_rows(model, PROMPT, make_sampling(max_tokens=1, num_seq=n, **changed))
    return torch.bincount(torch.tensor(rows).flatten(), minlength=VOCAB_SIZE)


def make_decided(norm: str = "preln", heads: tuple[int, ...] | None = None) -> GPT:
    """A model whose next token is neither certain nor open."""
    model = make_model(norm, heads=heads)
    with torch.no_grad():
        model.wte.weight *= 12
    return model


@pytest.fixture
def model() -> GPT:
    return make_decided()


KINDS = {
    "preln": {},
    "postln": {"norm": "postln"},
    "deepnorm": {"norm": "deepnorm"},
    "heads pruned": {"heads": (4, 0, 1)},
    "no heads": {"heads": (0, 0, 0)},
}
LENGTHS = {"short": 1, "a little": 3, "the context": BLOCK_SIZE, "more": BLOCK_SIZE + 1, "much more": 3 * BLOCK_SIZE}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_changes_no_token(kind, length, temperature):
    model = make_decided(**KINDS[kind])
    prompt = torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length))
    sampling = make_sampling(temperature=temperature, max_tokens=2 * BLOCK_SIZE + 5, num_seq=2)
    assert draw_rows(model, prompt, sampling) == draw_without_cache(model, prompt, sampling)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels are for a GPU")
NARROWEST = [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-300}, {"temperature": 1e-6}, {"temperature": 1e-300}]


@on_a_gpu
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_k": 9}, {"top_p": 0.6}], ids=str)
@pytest.mark.parametrize("num_seq", [1, 5, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_draws_the_same_tokens(kind, num_seq, sampling):
    config = make_decided(**KINDS[kind]).config.model_copy(update={"block_size": 300})
    model = GPT(config, seed=0).double()
    with torch.no_grad():
        model.wte.weight *= 12
    # Some sequences end early, and the context is full twice.
    sampling = make_sampling(max_tokens=600, num_seq=num_seq, **sampling)
    on_cpu = draw_rows(model, PROMPT, sampling, eot_token=7)
    assert draw_rows(model.cuda(), PROMPT, sampling, eot_token=7) == on_cpu


@on_a_gpu
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["kernels one by one", "kernels that overlap"])
@pytest.mark.parametrize("n_head", [12, 16, 20, 25], ids=["124M", "355M", "774M", "1558M"])
def test_a_gpu_draws_the_same_tokens_at_all_widths_of_gpt2(n_head, capability, monkeypatch):
    if torch.cuda.get_device_capability() < capability:
        pytest.skip("kernels cannot overlap before compute capability 9.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    shape = {"n_layer": 2, "n_head": n_head, "n_embd": 64 * n_head, "block_size": 300, "vocab_size": 5000}
    model = GPT(GPTConfig(**shape, norm="preln"), seed=0).double()
    with torch.no_grad():
        model.wte.weight *= 3
        for block in model.h:
            for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                linear.weight *= 4
    sampling = make_sampling(max_tokens=200, num_seq=3, top_k=50)
    on_cpu = draw_rows(model, PROMPT, sampling)
    assert draw_rows(model.cuda(), PROMPT, sampling) == on_cpu


@on_a_gpu
@pytest.mark.parametrize("changed", NARROWEST, ids=str)
def test_the_narrowest_sampling_takes_the_likeliest_token_on_a_gpu(model, changed):
    expected = likeliest(model, PROMPT, 12)
    rows = draw_rows(model.cuda(), PROMPT, make_sampling(num_seq=3, **{"top_k": 50, **changed}))
    assert rows == 3 * [expected]


@pytest.mark.parametrize("block_size", [1, 2, 7])
def test_the_cache_changes_no_token_in_the_shortest_contexts(block_size):
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": block_size, "vocab_size": 50}
    model = GPT(GPTConfig(**shape, norm="postln"), seed=1)
    sampling = make_sampling(max_tokens=20, num_seq=2)
    assert draw_rows(model, PROMPT % 50, sampling) == draw_without_cache(model, PROMPT % 50, sampling)


def test_greedy_generation_is_that_of_transformers(model):
    n = BLOCK_SIZE - len(PROMPT)
    theirs = make_reference(model).generate(
        PROMPT[None], max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert draw_rows(model, PROMPT, make_sampling(temperature=0.0, max_tokens=n)) == theirs[:, len(PROMPT) :].tolist()


@pytest.mark.parametrize("block_size", [1, 2, 7, 24, 1024])
def test_the_window_is_a_function_of_the_number_of_tokens(block_size):
    for n in range(1, 5 * block_size):
        seen = n - window_start(n, block_size)
        assert seen == len(see(list(range(n)), block_size))
        assert block_size // 2 < seen <= block_size or seen == n <= block_size


def test_a_pass_takes_one_token_but_for_one_in_half_a_context(model):
    passes = []
    model.wte.register_forward_hook(lambda _, args, __: passes.append(tuple(args[0].shape)))
    draw_rows(model, PROMPT, make_sampling(num_seq=4, max_tokens=BLOCK_SIZE + 14))
    half = BLOCK_SIZE // 2
    until_full, until_full_again = [(4, 1)] * (BLOCK_SIZE - len(PROMPT)), [(4, 1)] * (half - 1)
    again = (4, half + 1)
    assert passes == [(1, len(PROMPT)), *until_full, again, *until_full_again, again, (4, 1), (4, 1), (4, 1)]


@pytest.mark.parametrize("changed", NARROWEST, ids=str)
def test_the_narrowest_sampling_takes_the_likeliest_token(model, changed):
    rows = draw_rows(model, PROMPT, make_sampling(num_seq=3, **changed))
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


def test_the_seed_and_the_number_of_a_sequence_alone_decide_its_text(model):
    three = draw_rows(model, PROMPT, make_sampling(num_seq=3, seed=5))
    torch.manual_seed(99)
    assert draw_rows(model, PROMPT, make_sampling(num_seq=20, seed=5))[:3] == three
    assert draw_rows(model, PROMPT, make_sampling(num_seq=3, seed=5, max_tokens=5)) == [row[:5] for row in three]
    rows = [tuple(row) for seed in range(4) for row in draw_rows(model, PROMPT, make_sampling(num_seq=4, seed=seed))]
    assert len(set(rows)) == 16


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_ids_that_pad_the_vocabulary_are_never_drawn(model, temperature):
    # Whatever the hidden state, one of a row and its opposite has a huge logit.
    with torch.no_grad():
        model.wte.weight[VOCAB_SIZE:] = 1e6
        model.wte.weight[VOCAB_SIZE + 1 :: 2] = -1e6
    rows = draw_rows(model, PROMPT, make_sampling(num_seq=50, temperature=temperature))
    assert max(map(max, rows)) < VOCAB_SIZE


def test_an_end_of_text_token_is_left_out_and_ends_its_sequence_which_costs_nothing_then(model):
    free = draw_rows(model, PROMPT, make_sampling(num_seq=20))
    # A token that one sequence draws in the middle and another never draws.
    eot = next(id_ for id_ in free[0][2:8] if id_ not in free[0][:2] and any(id_ not in row for row in free))
    rows = []
    model.wte.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    ended = draw_rows(model, PROMPT, make_sampling(num_seq=20), eot)
    assert ended == [row[: row.index(eot)] if eot in row else row for row in free]
    assert len({len(row) for row in ended}) > 1
    # The first pass is over the prompt; the one after the nth token has the sequences that are longer than n - 1.
    assert rows[1:] == [sum(len(row) >= n for row in ended) for n in range(1, 12)]


def test_generation_stops_when_all_sequences_have_ended(model):
    first = likeliest(model, PROMPT, 1)[0]
    passes = []
    model.h[0].register_forward_hook(lambda *_: passes.append(1))
    assert draw_rows(model, PROMPT, make_sampling(num_seq=4, temperature=0.0, max_tokens=50), first) == [[]] * 4
    assert len(passes) == 1


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"temperature": 0.0}], ids=str)
def test_a_model_that_gives_no_numbers_is_refused(model, sampling):
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[3, 2] = torch.nan
    with pytest.raises(UserError, match="hidden states are not finite"):
        draw_rows(model, PROMPT, make_sampling(**sampling))


def test_an_end_of_text_token_in_the_prompt_ends_nothing(model):
    rows = draw_rows(model, torch.tensor([7, 5, 7]), make_sampling(temperature=0.0), eot_token=7)
    assert rows == [likeliest(model, torch.tensor([7, 5, 7]), 12)]
    assert 7 not in rows[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with GPT-2's vocabulary."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 50257}
    path = tmp_path_factory.mktemp("models") / "gpt2"
    save_model(GPT(GPTConfig(**shape, norm="preln"), seed=3), path)
    return path


def printed_by(folder, capsys, *options: str) -> str:
    module.main(["--model", str(folder), *options])
    return capsys.readouterr().out


def test_text_continues_a_prompt_or_starts_a_document(folder):
    model, seen = module.load_model(folder), []
    model.wte.register_forward_hook(lambda _, args, __: seen.append(args[0][0].tolist()))
    texts = generate(model, "The array", num_seq=2)
    assert len(texts) == 2 and all(isinstance(text, str) and text for text in texts)
    seen.clear()
    generate(model, "")
    assert seen[0] == [50256]


def test_a_folder_gives_what_its_model_gives_and_defaults_are_those_of_the_configuration(folder, capsys):
    text = generate(module.load_model(folder), "x", **SamplingConfig().model_dump())
    assert generate(folder, "x") == generate(str(folder), "x") == text
    assert printed_by(folder, capsys, "--prompt", "x") == f"--- 1 ---\nx{text[0]}\n"


@pytest.mark.parametrize("call", [generate, stream])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_token": 5}, "max_token = 5 .*max_tokens"),
        ({"max_tokens": 0}, "max_tokens = 0: .*greater than 0"),
        ({"num_seq": 1.5}, r"num_seq = 1\.5"),
        ({"num_seq": 0}, "num_seq = 0"),
        ({"temperature": "hot"}, "temperature = 'hot': .*number"),
        ({"temperature": -1.0}, r"temperature = -1\.0: .*greater than or equal to 0"),
        ({"temperature": float("inf")}, "temperature = inf: .*finite"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, r"top_p = 0\.0"),
        ({"top_p": 1.5}, r"top_p = 1\.5: .*less than or equal to 1"),
        ({"seed": -1}, "seed = -1: .*greater than or equal to 0"),
        ({"seed": 2**63}, "seed = 9223372036854775808: .*less than"),
    ],
)
def test_the_call_refuses_invalid_settings(folder, call, options, named):
    with pytest.raises(UserError, match=rf"generate\.{named}"):
        call(folder, "x", **options)


def test_a_folder_without_a_model_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        stream(tmp_path, "x")


def test_a_model_of_another_vocabulary_is_refused():
    with pytest.raises(UserError, match="the model has vocab_size=97, encoding gpt2 has 50257"):
        generate(make_model(), "text")


def test_pieces_come_as_they_are_drawn(folder):
    model, passes = module.load_model(folder), []
    model.wte.register_forward_hook(lambda *_: passes.append(1))
    pieces = stream(model, "The array", max_tokens=20)
    assert not passes
    next(pieces)
    assert len(passes) < 20
    pieces.close()


@pytest.mark.parametrize("prompt", ["The array", ""])
def test_pieces_make_the_text(folder, prompt):
    texts = ["", "", ""]
    for number, piece in stream(folder, prompt, num_seq=3, seed=8):
        assert piece
        texts[number] += piece
    assert texts == generate(folder, prompt, num_seq=3, seed=8)


@pytest.mark.parametrize(
    ("text", "cut"),
    [("naïve 日本語 🙂🏳️‍🌈 end", 0), ("cut 🙂", 1), ("cut 🙂", 2)],
    ids=["whole", "a byte lacks", "two tokens lack"],
)
def test_a_character_of_several_tokens_appears_whole(folder, monkeypatch, text, cut):
    encoding = module.load_encoding()
    ids = encoding.encode_ordinary(text)
    ids = ids[: len(ids) - cut]
    monkeypatch.setattr(module, "draw_tokens", lambda *_: iter([{0: id_} for id_ in ids]))
    pieces = [piece for _, piece in stream(folder, "x")]
    assert "".join(pieces) == encoding.decode(ids)
    # What was cut off shows at the very end alone.
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces[: -1 if cut else None])


def test_the_command_prints_each_sequence_with_its_prompt(folder, capsys):
    options = ["--prompt", "Plot a", "--max_tokens", "4", "--num_seq", "3", "--seed", "2"]
    printed = printed_by(folder, capsys, *options)
    texts = generate(folder, "Plot a", max_tokens=4, num_seq=3, seed=2)
    assert printed == "".join(f"--- {i} ---\nPlot a{text}\n" for i, text in enumerate(texts, start=1))
    assert printed_by(folder, capsys, *options) == printed


def test_the_command_warns_of_a_prompt_beyond_the_context(folder, capsys):
    module.main(["--model", str(folder), "--prompt", " a" * 30, "--max_tokens", "1"])
    assert re.fullmatch(r"generate: .* 30 tokens, .*block_size=16; .* 14\n", capsys.readouterr().err)
    module.main(["--model", str(folder), "--prompt", " a" * 16, "--max_tokens", "9"])
    assert capsys.readouterr().err == ""


def start_command(folder, *options: str, stdout) -> subprocess.Popen:
    command = [sys.executable, "-m", "gpt2.generate", "--model", str(folder), *options]
    # A job in the background of a script ignores interrupts, and so would its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, preexec_fn=heed)


def test_a_reader_that_goes_away_and_a_person_who_interrupts_end_the_command_quietly(folder):
    endless = ("--prompt", "x", "--max_tokens", "1000000")
    abandoned = start_command(folder, *endless, stdout=subprocess.PIPE)
    interrupted = start_command(folder, *endless, stdout=subprocess.PIPE)
    try:
        for process in (abandoned, interrupted):
            assert process.stdout.read(20).startswith(b"--- 1 ---\nx")
        abandoned.stdout.close()
        interrupted.send_signal(signal.SIGINT)
        assert (abandoned.wait(60), abandoned.stderr.read()) == (1, b"")
        assert (interrupted.wait(60), interrupted.stderr.read()) == (130, b"\n")
    finally:
        abandoned.kill()
        interrupted.kill()


def test_a_missing_model_ends_the_process_with_a_message_alone(tmp_path):
    command = [sys.executable, "-m", "gpt2.generate", "--model", "models/none"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"generate: models/none .*dvc repro train.*\n", done.stderr)


@pytest.mark.parametrize(
    ("option", "value", "named"), [("--temperature", "nan", "temperature = nan"), ("--top-k", "-1", "top_k = -1")]
)
def test_the_command_refuses_invalid_settings(folder, option, value, named):
    with pytest.raises(SystemExit, match=rf"^generate: generate\.{named}") as raised:
        module.main(["--model", str(folder), option, value])
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
