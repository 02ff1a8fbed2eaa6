r"""GPT-2's byte-level BPE: text <-> token ids, with the same ids as OpenAI's encoder and tiktoken.

A text becomes ids in four steps, shown here for " rôle":

    words   split the text into words; a space belongs to the word after it   " rôle"
    bytes   encode each word as UTF-8                                         b" r\xc3\xb4le"
    chars   write each byte as one printable character (BYTE_CHARS)           "ĠrÃ´le"
    merges  repeatedly join the adjacent pair that is first in vocab.bpe      "Ġr" "Ã´" "le"

encoder.json maps these tokens to ids. Merges do not cross words, so each word is encoded once and remembered.
"""

import codecs
import heapq
import json
import os
import re
import sys
from itertools import chain, pairwise

import regex

# A word is an English contraction; or letters, digits or other characters after at most one space; or white space,
# without the last space before a word. ++ is possessive: it does not backtrack, which is faster and matches the same.
WORD = regex.compile(
    r" ?\p{L}++|'(?:[sdmt]|ll|ve|re)| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)
# Python's re is twice as fast, but only for ASCII. So a text is cut into pieces before a space or newline that follows
# another character: the words stay the same, and many pieces are ASCII.
ASCII_WORD = re.compile(
    r" ?[A-Za-z]+|'(?:[sdmt]|ll|ve|re)| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s", re.ASCII
)
PIECE = re.compile(r".{250}.*?\S(?=[ \n])|.+", re.DOTALL)

# The character for each of the 256 bytes: the same as in Latin-1 if that is printable, else the next one from U+0100.
_PRINTABLE = {
    *range(ord("!"), ord("~") + 1),
    *range(ord("¡"), ord("¬") + 1),
    *range(ord("®"), ord("ÿ") + 1),
}
_OTHERS = iter(range(256, 512))
BYTE_CHARS = "".join(chr(byte if byte in _PRINTABLE else next(_OTHERS)) for byte in range(256))
_CHAR_BYTES, _CHARS = codecs.charmap_build(BYTE_CHARS), set(BYTE_CHARS)

_NO_RANK = sys.maxsize
_CACHE_WORDS, _CACHE_WORD_CHARS = (
    2**17,
    64,
)  # cache at most this many words, and only words up to this length


def _chars(text: str) -> str:
    return codecs.charmap_decode(text.encode("utf-8"), "strict", BYTE_CHARS)[0]


class _Computed(dict):
    """{key: compute(key)}, computed on first use. It is emptied when it reaches _CACHE_WORDS, and skips long words."""

    def __init__(self, compute):
        self.compute = compute

    def __missing__(self, key):
        value = self.compute(key)
        if len(self) >= _CACHE_WORDS:
            self.clear()
        return self.setdefault(key, value) if len(str(key)) <= _CACHE_WORD_CHARS else value


class Encoder:
    """Byte-level BPE with a vocabulary and merges.

    encoder: {token: id}, with tokens written in BYTE_CHARS. bpe_merges: pairs of tokens, the first to join first.
    errors: how to decode invalid UTF-8, as in `bytes.decode`.
    ignore_merges: if a whole word is a token, use it without applying merges (as tiktoken does).

    >>> get_encoder("tiny", "models").encode("ROMEO:")
    [813, 25]
    """

    def __init__(
        self,
        encoder: dict[str, int],
        bpe_merges: list[tuple],
        errors: str = "replace",
        ignore_merges=True,
    ):
        self.encoder = encoder
        self.ignore_merges = ignore_merges
        self.decoder = dict(zip(encoder.values(), encoder, strict=True))
        self.errors = errors
        self.bpe_ranks = dict(zip(bpe_merges, range(len(bpe_merges)), strict=True))
        self._word_ids = _Computed(self._encode_word)
        self._token_bytes = _Computed(self._decode_token)

    def bpe(self, chars: str) -> list[str]:
        """Merge the characters of a word into tokens: repeatedly join the leftmost pair of the lowest rank."""
        if len(chars) > 100:
            return self._bpe_long(chars)
        tokens, rank = list(chars), self.bpe_ranks.get
        ranks = [rank(pair, _NO_RANK) for pair in pairwise(tokens)]
        while ranks and (least := min(ranks)) < _NO_RANK:
            i = ranks.index(least)
            tokens[i] += tokens.pop(i + 1)
            del ranks[i]
            if i < len(ranks):
                ranks[i] = rank((tokens[i], tokens[i + 1]), _NO_RANK)
            if i > 0:
                ranks[i - 1] = rank((tokens[i - 1], tokens[i]), _NO_RANK)
        return tokens

    def _bpe_long(self, chars: str) -> list[str]:
        """bpe in O(n log n), with a heap of pairs. The loop in bpe is quadratic, but faster for short words."""
        tokens, ranks, n = list(chars), self.bpe_ranks, len(chars)
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))  # indices of the neighbours
        heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(tokens)) if pair in ranks]
        heapq.heapify(heap)
        while heap:
            rank, left = heapq.heappop(heap)
            right = after[left]
            if right == n or ranks.get((tokens[left], tokens[right])) != rank:
                continue  # outdated: one of the two has been joined since
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
        chars = _chars(word)
        if self.ignore_merges and chars in self.encoder:
            return (self.encoder[chars],)
        return tuple([self.encoder[token] for token in self.bpe(chars)])

    def _decode_token(self, token_id: int) -> str:
        """Return the bytes of a token as Latin-1 characters. Strings join faster than bytes."""
        if token_id not in self.decoder:
            raise ValueError(
                f"{token_id!r} is not a token id: the vocabulary has {len(self.decoder)} tokens"
            )
        return codecs.charmap_encode(self.decoder[token_id], "strict", _CHAR_BYTES)[0].decode(
            "latin-1"
        )

    def encode(self, text: str) -> list[int]:
        """Turn any text into token ids. `<|endoftext|>` in it is ordinary text.

        A surrogate pair is encoded as its character, a lone surrogate as U+FFFD: UTF-8 has neither.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        pieces = [text] if text.isascii() else PIECE.findall(text)
        words = ((ASCII_WORD if piece.isascii() else WORD).findall(piece) for piece in pieces)
        return list(
            chain.from_iterable(map(self._word_ids.__getitem__, chain.from_iterable(words)))
        )

    def decode(self, ids: list[int]) -> str:
        """Turn token ids into text, the inverse of `encode`. Raises ValueError for an id outside the vocabulary."""
        return self.decode_bytes(ids).decode("utf-8", self.errors)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Turn token ids into the bytes of their text. A token may end inside a multi-byte character."""
        return "".join(map(self._token_bytes.__getitem__, ids)).encode("latin-1")


class TextDecoder:
    """Decodes the ids of a text piece by piece, up to the first `stop` in it. `stopped` tells whether it was found.

    Together, the pieces equal encoder.decode of all ids, up to stop.
    """

    def __init__(self, encoder: Encoder, stop: str | None = None):
        self.encoder, self.stop, self.stopped = encoder, stop or "", False
        self._characters = codecs.getincrementaldecoder("utf-8")(encoder.errors)
        self._held = ""  # text that may be the beginning of stop

    def decode(self, ids: list[int], final: bool = False) -> str:
        """Return the next piece. Holds back an incomplete character and a possible beginning of stop."""
        if self.stopped:
            return ""
        text = self._held + self._characters.decode(self.encoder.decode_bytes(ids), final)
        if self.stop and self.stop in text:
            self.stopped = True
            return text[: text.index(self.stop)]
        starts = (n for n in range(len(self.stop)) if not final and text.endswith(self.stop[:n]))
        n_held = max(starts, default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def get_encoder(model_name: str, models_dir: str) -> Encoder:
    """Read the vocabulary in the folder models_dir/model_name.

    OpenAI's layout is encoder.json ({token: id}) and vocab.bpe (a version line, then one merge per line: two tokens and
    a space between them). Hugging Face's is the same under the names vocab.json and merges.txt, or tokenizer.json.

    Raises ValueError, naming the file, unless the ids are 0 to n - 1 and the 256 bytes in GPT-2's order are followed by
    the merged tokens in the order of the merges. Special tokens may come before or after these.
    """
    names = {
        "encoder.json": "vocab.bpe",
        "vocab.json": "merges.txt",
        "tokenizer.json": "tokenizer.json",
    }
    name = next(
        (name for name in names if os.path.isfile(os.path.join(models_dir, model_name, name))),
        "encoder.json",
    )
    path, merges_path = (os.path.join(models_dir, model_name, file) for file in (name, names[name]))
    try:
        with open(path, encoding="utf-8") as file:
            vocabulary = json.load(file)
        if name == "tokenizer.json":
            vocabulary, merges = _read_tokenizer(vocabulary)
        if name != "encoder.json":  # write special tokens with other characters in BYTE_CHARS, too
            vocabulary = {
                token if set(token) <= _CHARS else _chars(token): i
                for token, i in vocabulary.items()
            }
        ids = list(vocabulary.values())
        if set(map(type, ids)) != {int} or sorted(ids) != list(range(len(ids))):
            raise ValueError("the ids are not 0 to n - 1, each used once")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a GPT-2 vocabulary: {error}; replace it with an intact copy"
        ) from None
    try:
        if name != "tokenizer.json":
            with open(merges_path, encoding="utf-8") as file:
                version, _, lines = file.read().removesuffix("\n").partition("\n")
            parts = lines.replace("\n", " ").split(" ") if lines else []
            if not version.startswith("#version") or len(parts) % 2 or "" in parts:
                raise ValueError("expected a #version line, then two tokens per line")
            merges = list(zip(parts[::2], parts[1::2], strict=True))
        _check_tokens(vocabulary, merges, can_be_cut=name != "tokenizer.json")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{merges_path} does not fit {path}: {error}; replace both with intact copies"
        ) from None
    return Encoder(vocabulary, merges, ignore_merges=name == "encoder.json")


def _read_tokenizer(content: dict) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read the vocabulary and the merges of a tokenizer.json of the tokenizers package."""
    splitter, model = content.get("pre_tokenizer") or {}, content["model"]
    is_gpt2s = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    if (
        not is_gpt2s
        or splitter.get("add_prefix_space")
        or content.get("normalizer")
        or model.get("ignore_merges")
    ):
        raise ValueError("its normalizer, pre_tokenizer or model differs from GPT-2's")
    vocabulary = model["vocab"] | {
        token["content"]: token["id"] for token in content.get("added_tokens", [])
    }
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return vocabulary, [(left, right) for left, right in merges]


def _check_tokens(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], can_be_cut: bool
) -> None:
    """Raise ValueError unless the 256 bytes are followed by the tokens that the merges make, by id.

    can_be_cut: whether the file may lack its last merges. Then any other token that looks merged is an error.
    """
    tokens = sorted(vocabulary, key=vocabulary.get)
    expected = list(
        dict.fromkeys(chain(sorted(BYTE_CHARS), map("".join, merges)))
    )  # two merges can make the same token
    start = vocabulary.get(expected[0], 0)
    end = start + len(expected)
    if tokens[start:end] != expected or len(set(merges)) < len(merges):
        raise ValueError(
            "the tokens of its merges are missing or have other ids, or a merge is listed twice"
        )
    for token in tokens[:start] + tokens[end:]:
        may_be_merged = can_be_cut and not re.fullmatch(r"<.*>|\[.*\]", token)
        if may_be_merged and any(
            token[:i] in vocabulary and token[i:] in vocabulary for i in range(1, len(token))
        ):
            raise ValueError(f"no merge makes the token {token!r}")
        if not set(token) <= _CHARS:
            raise ValueError(f"{token!r} has characters outside BYTE_CHARS")
