"""GPT-2's byte-level BPE: text <-> token ids, id for id as OpenAI's encoder and tiktoken give them.

A text goes through four steps. " rôle" shows them:

    words   the text is cut into words, a leading space belonging to its word   " rôle"
    bytes   each word is taken as its UTF-8 bytes                               b" r\\xc3\\xb4le"
    chars   each byte is written as one printable character (BYTE_CHARS)        "ĠrÃ´le"
    merges  neighbours are joined, first the pair that vocab.bpe lists first    "Ġr" "Ã´" "le"

and the ids are those of the joined pieces in encoder.json. No merge crosses the bounds of a word, so each word is
encoded once and remembered.
"""

import codecs
import heapq
import json
import operator
import os
import re
import sys
from itertools import chain, pairwise, repeat

import regex

# A word: an English contraction, or letters, or digits, or other signs, each with at most one space before it, or
# white space (which leaves its last space to the word that follows). The ++ never give back what they took; that
# changes no match, only the time.
WORD = regex.compile(r" ?\p{L}++|'(?:[sdmt]|ll|ve|re)| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")
# The same for ASCII alone, where Python's own re will do, in half the time; and pieces of a text that have the same
# words as the whole has, for they begin with a space or line end after something else.
ASCII_WORD = re.compile(r" ?[A-Za-z]+|'(?:[sdmt]|ll|ve|re)| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s", re.ASCII)
PIECE = re.compile(r".{250}.*?\S(?=[ \n])|.+", re.DOTALL)

# The character that stands for each of the 256 bytes: its own where Latin-1 prints one, else the next from U+0100.
# GPT-2 lists the printable ones first, so in its order the characters ascend. For Python this is a codec.
_PRINTABLE = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
_OTHERS = iter(range(256, 512))
BYTE_CHARS = "".join(chr(byte if byte in _PRINTABLE else next(_OTHERS)) for byte in range(256))
_CHAR_BYTES = codecs.charmap_build(BYTE_CHARS)

_NO_RANK, _NOTHING = sys.maxsize, object()
_CACHE_WORDS, _CACHE_WORD_CHARS = 2**17, 64  # what is remembered at most: so many words, none longer


class _WordIds(dict):
    """{word: its ids}, computed when first asked for; forgets everything rather than grow beyond its bound."""

    def __init__(self, compute):
        self.compute = compute

    def __missing__(self, word):
        ids = self.compute(word)
        if len(self) >= _CACHE_WORDS:
            self.clear()
        if len(word) <= _CACHE_WORD_CHARS:
            self[word] = ids
        return ids


class Encoder:
    """Byte-level BPE over a vocabulary and its merges.

    encoder: {token: id}, the tokens written in BYTE_CHARS
    bpe_merges: pairs of tokens, the one to join first first
    errors: what `decode` does with bytes that are not UTF-8, as in `bytes.decode`

    >>> encoder = get_encoder("124M", "models")  # doctest: +SKIP
    >>> encoder.encode("Hello world")  # doctest: +SKIP
    [15496, 995]
    """

    def __init__(self, encoder: dict[str, int], bpe_merges: list[tuple[str, str]], errors: str = "replace"):
        self.encoder = encoder
        self.decoder = dict(zip(encoder.values(), encoder, strict=True))
        self.errors = errors
        self.bpe_ranks = dict(zip(bpe_merges, range(len(bpe_merges)), strict=True))
        self._word_ids = _WordIds(self._encode_word)
        # {id: the token's bytes, as Latin-1: to join them is much faster than to join bytes}
        self._pieces = {_NOTHING: ""}

    def bpe(self, chars: str) -> list[str]:
        """Join a word's characters (of BYTE_CHARS) into tokens: again and again the pair that ranks first, leftmost."""
        if len(chars) > 100:
            return self._bpe_of_many(chars)
        tokens, rank = list(chars), self.bpe_ranks.get
        ranks = list(map(rank, pairwise(tokens), repeat(_NO_RANK)))
        while ranks and (least := min(ranks)) < _NO_RANK:
            i = ranks.index(least)
            tokens[i] += tokens.pop(i + 1)
            del ranks[i]
            if i < len(ranks):
                ranks[i] = rank((tokens[i], tokens[i + 1]), _NO_RANK)
            if i > 0:
                ranks[i - 1] = rank((tokens[i - 1], tokens[i]), _NO_RANK)
        return tokens

    def _bpe_of_many(self, chars: str) -> list[str]:
        """Do the same in O(n log n) for n characters, where looking for the least rank each time would take O(n^2).

        A heap gives the pair to join next. It may be out of date: of a token that another join has taken.
        """
        tokens, ranks, n = list(chars), self.bpe_ranks, len(chars)
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))  # of a joined token, only the first place counts
        heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(tokens)) if pair in ranks]
        heapq.heapify(heap)
        while heap:
            rank, left = heapq.heappop(heap)
            right = after[left]
            if right == n or ranks.get((tokens[left], tokens[right])) != rank:
                continue
            tokens[left] += tokens[right]
            tokens[right] = ""
            after[left] = after[right]
            if after[left] < n:
                before[after[left]] = left
            for start, end in (before[left], left), (left, after[left]):
                if start >= 0 and end < n and (pair := (tokens[start], tokens[end])) in ranks:
                    heapq.heappush(heap, (ranks[pair], start))
        return [token for token in tokens if token]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        chars = codecs.charmap_decode(word.encode("utf-8"), "strict", BYTE_CHARS)[0]
        if chars in self.encoder:  # as tiktoken does; the merges would lead there, too
            return (self.encoder[chars],)
        return tuple([self.encoder[token] for token in self.bpe(chars)])

    def encode(self, text: str) -> list[int]:
        """Turn any text into token ids; `<|endoftext|>` in it is ordinary text.

        Lone surrogates, which no encoding has bytes for, count as U+FFFD; pairs of them as the character they mean.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        pieces = [text] if text.isascii() else PIECE.findall(text)
        words = ((ASCII_WORD if piece.isascii() else WORD).findall(piece) for piece in pieces)
        return list(chain.from_iterable(map(self._word_ids.__getitem__, chain.from_iterable(words))))

    def decode(self, ids: list[int]) -> str:
        """Turn token ids into text, the inverse of `encode`. Raises ValueError for an id that is not there."""
        ids = (*ids, _NOTHING, _NOTHING)
        look_up = operator.itemgetter(*ids)  # the fastest way, which takes two or more
        try:
            pieces = look_up(self._pieces)
        except KeyError:
            for id in set(ids) - self._pieces.keys():
                if id not in self.decoder:
                    raise ValueError(f"{id!r} is no token id: the vocabulary has {len(self.decoder)} tokens") from None
                self._pieces[id] = codecs.charmap_encode(self.decoder[id], "strict", _CHAR_BYTES)[0].decode("latin-1")
            pieces = look_up(self._pieces)
        return "".join(pieces).encode("latin-1").decode("utf-8", self.errors)


def _check_tokens(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Raise ValueError unless, by id, the bytes and then what each merge makes are there, special tokens around."""
    tokens = sorted(vocabulary, key=vocabulary.get)
    expected = sorted(BYTE_CHARS) + list(map("".join, merges))
    start = vocabulary.get(expected[0], 0)
    end = start + len(expected)
    if tokens[start:end] != expected:
        raise ValueError("its tokens have other ids there, or are not there")
    for token in tokens[:start] + tokens[end:]:
        if any(token[:i] in vocabulary and token[i:] in vocabulary for i in range(1, len(token))):
            raise ValueError(f"it does not say how {token!r} is made")
        if not set(token) <= set(BYTE_CHARS):
            raise ValueError(f"{token!r} has characters that stand for no byte")


def get_encoder(model_name: str, models_dir: str) -> Encoder:
    """Read the vocabulary in models_dir/model_name: encoder.json ({token: id}) and vocab.bpe (a version line, then
    one merge a line: two tokens and a space between them).

    Raises ValueError, with the file's name, where the two do not make a vocabulary: ids 0 to n - 1, the 256 bytes in
    GPT-2's order, then the tokens of the merges in theirs; before or after these only tokens that no merge could make.
    """
    vocabulary_path = os.path.join(models_dir, model_name, "encoder.json")
    merges_path = os.path.join(models_dir, model_name, "vocab.bpe")
    try:
        with open(vocabulary_path, encoding="utf-8") as file:
            vocabulary = json.load(file)
        ids = list(vocabulary.values())
        if set(map(type, ids)) != {int} or sorted(ids) != list(range(len(ids))):
            raise ValueError("it does not give its tokens the ids from 0 up, each once")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{vocabulary_path} is not a vocabulary: {error}; replace it") from None
    try:
        with open(merges_path, encoding="utf-8") as file:
            version, _, lines = file.read().removesuffix("\n").partition("\n")
        if not version.startswith("#version"):
            raise ValueError("its first line is no #version")
        parts = lines.replace("\n", " ").split(" ") if lines else []
        if len(parts) % 2 or "" in parts:  # an even number out of step would not make the tokens
            raise ValueError("it is not two tokens a line")
        merges = list(zip(parts[::2], parts[1::2], strict=True))
        _check_tokens(vocabulary, merges)
    except ValueError as error:
        raise ValueError(f"{merges_path} does not fit {vocabulary_path}: {error}; replace both") from None
    return Encoder(vocabulary, merges)
