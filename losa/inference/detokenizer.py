"""Text from a stream of tokens: what each token adds to the text of all tokens before it."""

from __future__ import annotations

import os
from collections.abc import Sequence

# How many of the last tokens are decoded again for each new token: at least TAIL, at most LONGEST.
TAIL, LONGEST = 8, 256
# How ``clean_up_tokenization_spaces`` of transformers shortens text.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
# The most bytes of a character in UTF-8, and so the most tokens of a character.
_CHARACTER = 4


class Detokenizer:
    """Takes the tokens of the prompt, then new tokens by ``add``. The pieces that ``add`` and ``finish`` return, put
    together, are decode(prompt + new) without its beginning decode(prompt); special tokens are skipped in both.

    Tokens cannot be decoded one by one: spaces at the start of a text vanish, and a character can take several tokens.
    So a new token is decoded together with the tokens before it, enough of them to give the text of all tokens.
    """

    def __init__(self, tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._window = list(prompt)
        # The beginning of the window's text that belongs to the prompt or was returned.
        self._given = self._decode(self._window)
        self._waited = 0
        self._shorten(self._given)

    def add(self, token: int) -> str:
        """The new text that later tokens cannot change; "" in the middle of a character."""
        self._window.append(token)
        text = self._decode(self._window)
        # Bytes of an incomplete character may change the text before it, until the character is complete.
        waits = not text.startswith(self._given) and self._waited < _CHARACTER
        self._waited = self._waited + 1 if waits else 0
        piece = "" if waits else self._give(text, len(text) - self._unsure(text))
        self._shorten(text)
        return piece

    def finish(self) -> str:
        """The text that ``add`` held back, even if a character in it is incomplete."""
        text = self._decode(self._window)
        return self._give(text, len(text))

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _give(self, text: str, stop: int) -> str:
        start = len(os.path.commonprefix([self._given, text]))
        if stop <= start:
            return ""
        self._given = text[:stop]
        return text[start:stop]

    def _unsure(self, text: str) -> int:
        """How many characters at the end of the text the next token may change."""
        if text.endswith("\ufffd"):
            return min(_CHARACTER - 1, len(text) - len(text.rstrip("\ufffd")))
        if self._cleans:
            for count in (3, 2, 1):
                if any(len(text) >= count and pattern.startswith(text[-count:]) for pattern in _CLEANED):
                    return count
        return 0

    def _shorten(self, text: str) -> None:
        """Drop tokens at the start of the window, if the remaining tokens decode to the end of the same text."""
        if len(self._window) < 2 * TAIL or not text.startswith(self._given):
            return
        held, size = len(text) - len(self._given), TAIL
        while size < len(self._window):
            short = self._decode(self._window[-size:])
            if len(short) > held and text.endswith(short) and not short.startswith("\ufffd"):
                break
            size *= 2
        else:
            if len(self._window) <= LONGEST:
                return
            size = LONGEST // 2
            short = self._decode(self._window[-size:])
        self._window, self._given = self._window[-size:], short[: max(0, len(short) - held)]
