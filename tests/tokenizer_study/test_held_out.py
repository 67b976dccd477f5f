"""Every token judged once from at least half a context, words with their ends, and guessing all tokens alike."""

import math
from collections import Counter

import numpy as np
import pytest
import regex
import torch

from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.tokenizer.bpe import train_encodings
from gpt2.tokenizer.encodings import PATTERN, load_encoding, make_encoding, ranked_tokens
from gpt2.tokenizer_study.held_out import (
    END,
    LETTER,
    NUMBER,
    OTHER,
    SPACE,
    encode_held_out,
    find_boundaries,
    score_even,
    score_held_out,
    stream_hidden,
)

TRAINING = [value.__doc__ for _, value in sorted(vars(np).items()) if isinstance(value.__doc__, str)][:300]
TEXTS = ["A naïve DataFrame\n\n  of arrays: 漢字, 3.14.", "The dataframe isn't an array.", " x"]
GROUPS = {
    "rare": Counter({" naïve": 1}),
    "compound": Counter({" DataFrame": 1, " dataframe": 1}),
    "technical": Counter({" array": 1, " dataframe": 1}),
}


@pytest.fixture(scope="module", params=[300, 1000])
def encoding(request):
    return train_encodings(TRAINING, [request.param])[0]


def make_model(vocab_size: int) -> GPT:
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=vocab_size, norm="preln"), 1).eval()
    with torch.no_grad():
        model.wte.weight *= 20  # Far from guessing all tokens alike.
    return model


def test_the_stream_holds_documents_between_end_of_text_tokens_and_the_words_of_groups(encoding):
    text = encode_held_out(TEXTS, GROUPS, encoding)
    parts = [encoding.encode_ordinary(document) for document in TEXTS]
    assert text.stream.tolist() == [encoding.eot_token, *(i for part in parts for i in (*part, encoding.eot_token))]
    assert text.n_bytes == sum(len(document.encode()) for document in TEXTS)
    for group, members in GROUPS.items():
        rows = text.words[text.words[group]]
        found = [(d, piece) for d, t in enumerate(TEXTS) for piece in regex.findall(PATTERN, t) if piece in members]
        spelled = [encoding.decode(text.stream[1:][row.start : row.stop].tolist()) for row in rows.itertuples()]
        assert list(zip(rows["document"], spelled, strict=True)) == found
        assert rows["bytes"].tolist() == [len(piece.encode()) for _, piece in found]


@pytest.mark.parametrize("length", [2, 7, 16, 17, 18, 24, 25, 26, 200])
def test_every_token_is_judged_once_from_at_least_half_a_context(length):
    model = make_model(50)
    stream = torch.randint(50, (length,), generator=torch.Generator().manual_seed(length))
    hidden = stream_hidden(model, stream, 3)
    assert hidden.shape == (length - 1, 8)
    for target in range(1, length):
        # The first window is whole; each later one adds the second half of its targets.
        start = 0 if target <= 16 else (target - 9) // 8 * 8
        assert target <= 16 or target - start > 8
        with torch.no_grad():
            assert torch.allclose(hidden[target - 1], model.hidden(stream[None, start:target])[0, -1], atol=1e-4)


def test_bits_of_words_are_those_of_their_tokens_and_of_their_ends(encoding):
    """The formula of the module, from the logits of the whole stream, which fits one context here."""
    text = encode_held_out(["of arrays, naïve arrays"], {"rare": {" naïve": 1, " arrays": 1}}, encoding)
    config = GPTConfig(
        n_layer=1, n_head=2, n_embd=8, block_size=len(text.stream), vocab_size=encoding.n_vocab, norm="preln"
    )
    model = GPT(config, 1).eval()
    with torch.no_grad():
        model.wte.weight *= 20
        log_p = model(text.stream[None, :-1])[0, :, : encoding.n_vocab].log_softmax(1).double()
    score = score_held_out(model, text, 4, "float32")
    nats = -log_p.gather(1, text.stream[1:, None]).squeeze(1)
    assert score.bits_per_byte[""] == pytest.approx(nats.sum().item() / math.log(2) / 24, rel=1e-5)
    tokens = [token.decode("utf-8", errors="replace") for token in ranked_tokens(encoding)] + ["<end>"]

    def boundary(target: int, previous: str) -> float:
        """Piece begins: not a letter after a letter; after the comma anything that is no punctuation."""
        if previous == ",":
            begins = [
                token[0].isalnum() or token[0].isspace() or token == "<end>" or token[0] == "\ufffd" for token in tokens
            ]
        else:
            begins = [not (token[0].isalpha() or token[0] == "\ufffd") for token in tokens]
        # Bytes that continue a character begin nothing.
        inside = [0x80 <= token[0] < 0xC0 for token in ranked_tokens(encoding)] + [False]
        return log_p[target].exp()[torch.tensor(begins) & ~torch.tensor(inside)].sum().log().item()

    for row, previous in zip(score.words.itertuples(), ("f", ",", "e"), strict=True):
        expected = nats[row.start : row.stop].sum().item() - boundary(row.stop, "s") + boundary(row.start, previous)
        assert row.bits == pytest.approx(expected / math.log(2), rel=1e-5)


def test_the_probabilities_of_all_words_sum_to_one():
    """Letters a and b, a space and a full stop: every word of up to n letters and the chance that it is longer."""
    bytes_ = [bytes([byte]) for byte in range(256)]
    encoding = make_encoding("toy", bytes_)
    begins, ends = find_boundaries(encoding)
    generator = torch.Generator().manual_seed(1)
    # Tokens a, b, space, full stop and end-of-text, in any context of one token.
    ids = [ord("a"), ord("b"), ord(" "), ord("."), 256]
    p = torch.rand(5, 5, generator=generator, dtype=torch.float64)
    p /= p.sum(1, keepdim=True)

    def boundary(context: int) -> float:
        return (p[context] * begins[ids, ends[ids[context]]]).sum().item()

    # After "." a piece that is a word has an optional space and then letters: its first token is a letter or a space.
    def spell(context: int, left: int) -> float:
        """Probability of all continuations of a word by up to `left` letters, or of going on."""
        total = boundary(context)
        for letter in (0, 1):
            total += p[context, letter].item() * (spell(letter, left - 1) if left else 1.0)
        return total

    start = 3
    others = p[start, 2].item() + p[start, 4].item()
    words = sum(p[start, letter].item() * spell(letter, 6) for letter in (0, 1))
    assert (words + others) / boundary(start) == pytest.approx(1)


def test_guessing_all_tokens_alike_is_exact(encoding):
    """A model with zero embeddings does so; the score without a model is the same, ends of words included."""
    text = encode_held_out(TEXTS, GROUPS, encoding)
    model = make_model(encoding.n_vocab)
    with torch.no_grad():
        model.wte.weight.zero_()
    even = score_even(text)
    assert score_held_out(model, text, 4, "float32").bits_per_byte == pytest.approx(even.bits_per_byte, rel=1e-5)
    n_tokens = sum(len(encoding.encode_ordinary(document)) + 1 for document in TEXTS)
    assert even.bits_per_byte[""] == pytest.approx(n_tokens * math.log2(encoding.n_vocab) / text.n_bytes)
    # After a letter and before the next word the two factors are the same.
    n_rare = len(encoding.encode_ordinary(" naïve"))
    assert even.bits_per_byte["rare_"] == pytest.approx(n_rare * math.log2(encoding.n_vocab) / len(" naïve".encode()))


def test_boundaries_follow_gpt2s_pattern():
    encoding = load_encoding()
    begins, ends = find_boundaries(encoding)
    cases = {
        "frame": ({NUMBER, SPACE, OTHER, END}, LETTER), " frame": ({LETTER, NUMBER, SPACE, OTHER, END}, LETTER),
        "12": ({LETTER, SPACE, OTHER, END}, NUMBER), "(": ({LETTER, NUMBER, SPACE, END}, OTHER),
        " ": ({LETTER, NUMBER, OTHER, END}, SPACE), "\n": ({LETTER, NUMBER, OTHER, END}, SPACE),
    }  # fmt: skip
    for token, (expected, end) in cases.items():
        (id_,) = encoding.encode_ordinary(token)
        assert {kind for kind in range(5) if begins[id_, kind]} == expected and ends[id_] == end
    assert begins[encoding.eot_token].all() and ends[encoding.eot_token] == END
    # Within text the pattern is the judge: a boundary wherever a piece begins, up to spaces and contractions.
    for text in TRAINING[:40]:
        pieces = [encoding.encode_ordinary(piece) for piece in regex.findall(PATTERN, text)]
        ids = [id_ for piece in pieces for id_ in piece]
        starts = set(np.cumsum([0, *map(len, pieces)]).tolist())
        for i in range(1, len(ids)):
            if ends[ids[i - 1]] != SPACE and not encoding.decode([ids[i - 1]]).startswith("'"):
                assert bool(begins[ids[i], ends[ids[i - 1]]]) == (i in starts), encoding.decode(ids[i - 1 : i + 1])
