"""Text token by token against decoding everything at once, for tokenizers of every kind that joins tokens."""

from __future__ import annotations

import functools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from losa.inference.detokenizer import LONGEST, TAIL, Detokenizer

WORDS = ["the", "old", "mill", "by", "river", "s"]
EMOJI = "\U0001f600\u00e9\u4e2d"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def fast(model, decoder, **settings):
    plain = Tokenizer(model)
    plain.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>", **settings)


def vocabulary(tokens):
    return {token: i for i, token in enumerate(["<unk>", "<eos>", *tokens])}


def llama2():
    """Byte fallback, and one space stripped from the start of a text."""
    tokens = [f"\u2581{word}" for word in WORDS] + WORDS + BYTES
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return fast(models.BPE(vocabulary(tokens), [], unk_token="<unk>"), decoders.Sequence(steps))


def metaspace():
    tokens = [f"\u2581{word}" for word in WORDS] + WORDS + ["\u2581"]
    return fast(models.BPE(vocabulary(tokens), [], unk_token="<unk>"), decoders.Metaspace())


def byte_level():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return fast(models.BPE(vocabulary([*letters, "\u0120the", "\u0120old"]), []), decoders.ByteLevel())


def word_piece(**settings):
    tokens = [*WORDS, *(f"##{word}" for word in WORDS), ".", ",", "'", "n't", "n", "'s", "'ve", "re", "?"]
    return fast(models.WordPiece(vocabulary(tokens), unk_token="<unk>"), decoders.WordPiece(cleanup=False), **settings)


KINDS = {
    "byte fallback": llama2,
    "metaspace": metaspace,
    "byte level": byte_level,
    "word piece": word_piece,
    "word piece, spaces cleaned up": lambda: word_piece(clean_up_tokenization_spaces=True),
}


def pieces(tokenizer, prompt, tokens):
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.add(token) for token in tokens), detokenizer.finish()]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def ids_of(tokenizer, names):
    return tokenizer.convert_tokens_to_ids(names)


def random_ids(name, tokenizer, count):
    """Of words; bytes only as whole characters."""
    letters = {b: c for b, c in zip(bytes(range(256)), _byte_letters(), strict=True)}
    found = []
    while len(found) < count:
        if name in ("byte fallback", "byte level") and torch.rand(()) < 0.4:
            encoded = EMOJI[int(torch.randint(3, ()))].encode()
            names = [BYTES[b] if name == "byte fallback" else letters[b] for b in encoded]
            found += ids_of(tokenizer, names)
        else:
            words = [i for t, i in tokenizer.get_vocab().items() if len(t) > 1 and not t.startswith("<0x")]
            words += [i for t, i in tokenizer.get_vocab().items() if name.startswith("word") and len(t) == 1]
            found.append(sorted(words)[int(torch.randint(len(words), ()))])
    return found


@functools.cache
def _byte_letters():
    tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    table = {}
    for point in range(0x800):
        for byte, letter in zip(chr(point).encode(), tokenizer.pre_tokenize_str(chr(point))[0][0], strict=True):
            table[byte] = letter
    return [table.get(byte, "a") for byte in range(256)]


@pytest.mark.parametrize("name", KINDS)
def test_pieces_are_what_decoding_everything_adds(name):
    """Contractions that a tokenizer cleans up across the prompt's end are left out: nothing unshows a prompt."""
    tokenizer = KINDS[name]()
    for length in (0, 1, 3, 20, 200):
        prompt = [1, *random_ids(name, tokenizer, length), *ids_of(tokenizer, ["the", "old"][: length and 2])]
        if name == "byte level":
            prompt = [1, *ids_of(tokenizer, ["\u0120the"] * length)]
        tokens = [
            *ids_of(tokenizer, ["\u0120the" if name == "byte level" else "the"]),
            *random_ids(name, tokenizer, 120),
        ]
        found = pieces(tokenizer, prompt, tokens)
        assert decoded(tokenizer, prompt) + "".join(found) == decoded(tokenizer, prompt + tokens)
        assert sum(map(bool, found)) > 30, "as it comes"


def test_characters_in_several_tokens():
    tokenizer = llama2()
    prompt = ids_of(tokenizer, ["\u2581the"])
    one, two = (ids_of(tokenizer, [BYTES[b] for b in character.encode()]) for character in "\U0001f600\U0001f680")
    # A second character of bytes makes those of the first unreadable until it is whole.
    assert pieces(tokenizer, prompt, one + two) == ["", "", "", "\U0001f600", "", "", "", "\U0001f680", ""]
    assert pieces(tokenizer, prompt, one[:3]) == ["", "", "", "\ufffd" * 3]
    assert "".join(pieces(tokenizer, prompt, one + two[:2] + prompt)).endswith(" the")
    letters = [dict(zip(range(256), _byte_letters(), strict=True))[b] for b in "\u00e9\u00e8".encode()]
    tokenizer = byte_level()
    found = pieces(tokenizer, ids_of(tokenizer, ["\u0120the"]), ids_of(tokenizer, letters))
    assert found == ["", "\u00e9", "", "\u00e8", ""]


def test_special_tokens_give_no_text_and_keep_spaces():
    tokenizer = metaspace()
    the, old = ids_of(tokenizer, ["\u2581the", "\u2581old"])
    assert pieces(tokenizer, [1, 1, the], [1, old, 1]) == ["", " old", "", ""]
    assert pieces(tokenizer, [1] * 30, [the, old]) == ["the", " old", ""]
    many = [the] + [1] * 40
    assert "".join(pieces(tokenizer, many, [old])) == " old"


def test_bytes_that_are_no_text_do_not_hold_everything_back():
    tokenizer = llama2()
    wrong, the = ids_of(tokenizer, ["<0xFF>"])[0], ids_of(tokenizer, ["\u2581the"])[0]
    found = pieces(tokenizer, [the], [wrong] * 300 + [the])
    assert "".join(found) == "\ufffd" * 300 + " the" and sum(map(bool, found)) > 200


@pytest.mark.parametrize("name", KINDS)
def test_work_for_a_token_does_not_grow_with_the_text(monkeypatch, name):
    tokenizer, lengths = KINDS[name](), []
    detokenizer = Detokenizer(tokenizer, random_ids(name, tokenizer, 300))
    decode = type(tokenizer).decode
    monkeypatch.setattr(
        type(tokenizer), "decode", lambda self, ids, **k: lengths.append(len(ids)) or decode(self, ids, **k)
    )
    for token in random_ids(name, tokenizer, 500):
        detokenizer.add(token)
    assert max(lengths) <= LONGEST and sum(lengths) <= 500 * 8 * TAIL
    for _ in range(2 * LONGEST):
        detokenizer.add(tokenizer.eos_token_id)
    assert max(lengths) <= LONGEST + 1


def test_a_cleaned_up_contraction():
    tokenizer = word_piece(clean_up_tokenization_spaces=True)
    prompt = ids_of(tokenizer, ["the", "mill"])
    found = pieces(tokenizer, prompt, ids_of(tokenizer, ["'s", "old", "?", "'", "s", "n't", "n"]))
    assert (
        "".join(found)
        == "'s old?'sn't n"
        == decoded(tokenizer, prompt + ids_of(tokenizer, ["'s", "old", "?", "'", "s", "n't", "n"])).removeprefix(
            "the mill"
        )
    )
