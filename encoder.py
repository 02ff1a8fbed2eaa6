r"""GPT-2's byte-level BPE: text <-> token ids, with the same ids as OpenAI's encoder and tiktoken.

A text becomes ids in four steps. This is what happens to " rôle" with GPT-2's vocabulary:

    words   split the text into words; a space belongs to the word after it    " rôle"
    bytes   encode the word as UTF-8                                           b" r\xc3\xb4le"
    chars   write each byte as one printable character (`bytes_to_unicode`)    "ĠrÃ´le"
    merges  join pairs of tokens, in the order in which vocab.bpe lists them   "Ġr" "Ã´" "le"

encoder.json gives the id of each of these tokens. Merges never cross the border between two
words, so each word is encoded on its own, and the ids of the last words are remembered.

The way back is short: look up the bytes of each id, join them, and decode them as UTF-8.
"""

import codecs
import heapq
import json
import os
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import regex

# A word is letters, digits or other characters after at most one space; or the end of an English
# contraction; or white space, without the last space before a word. GPT-2's own pattern lists the
# contractions first, which finds the same words more slowly. ++ never gives back what it matched,
# which is faster as well.
WORD = regex.compile(
    r" ?\p{L}++|'(?:[sdmt]|ll|ve|re)| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)

# The cache holds 128 thousand words of ordinary length, about 30 MB.
MAX_CACHED_WORDS = 2**17
MAX_CACHED_LENGTH = 64

END_OF_TEXT = "<|endoftext|>"
GIT_LFS_POINTER = "version https://git-lfs"


def bytes_to_unicode() -> dict[int, str]:
    """Return the printable character that stands for each of the 256 bytes.

    A byte stands for itself if it is printable in Latin-1. The others take the characters from
    U+0100 on, in turn: the space (byte 32) is "Ġ". So every token can be written in a text file.
    """
    printable = [*range(ord("!"), ord("~") + 1)]
    printable += range(ord("¡"), ord("¬") + 1)
    printable += range(ord("®"), ord("ÿ") + 1)
    chars = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in chars:
            chars[byte] = chr(256 + len(chars) - len(printable))
    return chars


BYTE_CHARS = "".join(char for _, char in sorted(bytes_to_unicode().items()))


class Encoder:
    """Byte-level BPE with a vocabulary and merges.

    encoder: {token: id}, with the tokens written in the characters of `bytes_to_unicode`.
    bpe_merges: pairs of tokens; the pair to join first comes first.
    errors: how to decode invalid UTF-8, as in `bytes.decode`.
    ignore_merges: take a whole word that is a token without merging, as tiktoken does.

    >>> get_encoder("tiny", "models").encode("ROMEO:")
    [813, 25]
    """

    def __init__(
        self,
        encoder: dict[str, int],
        bpe_merges: Iterable[tuple[str, str]],
        errors: str = "replace",
        *,
        ignore_merges: bool = True,
    ):
        self.encoder = encoder
        self.decoder = {token_id: token for token, token_id in encoder.items()}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {char: byte for byte, char in self.byte_encoder.items()}
        self.pat = WORD
        self.errors = errors
        self.ignore_merges = ignore_merges
        self.bpe_ranks = {pair: rank for rank, pair in enumerate(bpe_merges)}
        self.cache: dict[str, list[int]] = {}
        self.token_bytes: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. `<|endoftext|>` in it is ordinary text.

        A surrogate pair is encoded as the character that it means, and a lone surrogate as
        U+FFFD, because UTF-8 has neither.
        """
        ids = []
        for word in self.pat.findall(without_surrogates(text)):
            word_ids = self.cache.get(word)
            if word_ids is None:
                word_ids = self.encode_word(word)
            ids += word_ids
        return ids

    def encode_word(self, word: str) -> list[int]:
        """Return the ids of a word, and remember them: " rôle" -> "ĠrÃ´le" -> [374, 27083, 293]."""
        chars = "".join([self.byte_encoder[byte] for byte in word.encode("utf-8")])
        is_token = self.ignore_merges and chars in self.encoder
        tokens = [chars] if is_token else self.bpe(chars)
        ids = [self.encoder[token] for token in tokens]
        if len(word) <= MAX_CACHED_LENGTH:
            if len(self.cache) >= MAX_CACHED_WORDS:
                self.cache.clear()
            self.cache[word] = ids
        return ids

    def bpe(self, chars: str) -> list[str]:
        """Merge the characters of a word into tokens.

        The pair that comes first in the list of merges (the one of the lowest rank) is joined
        first; if it occurs several times, the leftmost one:

            "Ġ" "r" "Ã" "´" "l" "e"
            "Ġ" "r" "Ã" "´" "le"       rank 37: l e
            "Ġr" "Ã" "´" "le"          rank 118: Ġ r
            "Ġr" "Ã´" "le"             rank 26827: Ã ´

        All pairs wait in a heap, so that a word of n characters takes O(n log n) steps.
        """
        ranks = self.bpe_ranks
        tokens = [*chars, ""]  # the token that starts at each place; "" where none starts
        before = [*range(-1, len(chars))]  # where the token before it starts
        heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(chars)) if pair in ranks]
        heapq.heapify(heap)
        while heap:
            rank, start = heapq.heappop(heap)
            middle = start + len(tokens[start])
            if ranks.get((tokens[start], tokens[middle])) != rank:
                continue  # one of the two tokens has been merged with another since
            tokens[start] += tokens[middle]
            tokens[middle] = ""
            end = start + len(tokens[start])
            before[end] = start
            # The new token makes a pair with each of its neighbours. At both ends of the word the
            # neighbour is the last element of tokens, "", and no merge has an empty part.
            for left, right in ((before[start], start), (start, end)):
                pair = (tokens[left], tokens[right])
                if pair in ranks:
                    heapq.heappush(heap, (ranks[pair], left))
        return [token for token in tokens if token]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, the inverse of `encode`.

        Raises ValueError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", self.errors)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the text of ids. A token may end inside a character's bytes."""
        parts = []
        for token_id in ids:
            part = self.token_bytes.get(token_id)
            if part is None:
                part = self.decode_token(token_id)
            parts.append(part)
        return b"".join(parts)

    def decode_token(self, token_id: int) -> bytes:
        """Return the bytes of a token, and remember them: 293 -> "le" -> b"le"."""
        if token_id not in self.decoder:
            n_tokens = len(self.decoder)
            raise ValueError(
                f"{token_id!r} is not a token id: the vocabulary has {n_tokens} tokens"
            )
        token = self.decoder[token_id]
        if all(char in self.byte_decoder for char in token):
            data = bytes([self.byte_decoder[char] for char in token])
        else:
            data = token.encode("utf-8")  # a special token, written as it is
        self.token_bytes[token_id] = data
        return data


def without_surrogates(text: str) -> str:
    """Return text with surrogate pairs joined to characters and lone surrogates as U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class TextDecoder:
    """Decodes the ids of a text piece by piece, up to the first stop text in it.

    stop: a text or several texts. Whichever comes first in the text ends it.

    Together, the pieces equal `encoder.decode` of all ids, up to the first stop text. `stopped`
    tells whether it has been found.
    """

    def __init__(self, encoder: Encoder, stop: str | Iterable[str] | None = None):
        stops = [stop] if isinstance(stop, str) else stop or []
        self.encoder = encoder
        self.stops = [text for text in stops if text]
        self.stopped = False
        self.utf8_decoder = codecs.getincrementaldecoder("utf-8")(encoder.errors)
        self.held_back = ""  # text that may begin a stop text

    def decode(self, ids: Iterable[int], final: bool = False) -> str:
        """Return the next piece, without an incomplete character or stop text at its end.

        final: no ids follow, so nothing is held back.
        """
        if self.stopped:
            return ""
        text = self.held_back + self.utf8_decoder.decode(self.encoder.decode_bytes(ids), final)
        found = self.find_stop(text)
        end = len(text) if final else self.find_beginning(text)
        self.stopped = found < len(text) and found <= end
        end = min(found, end)
        self.held_back = text[end:]
        return text[:end]

    def find_stop(self, text: str) -> int:
        """Return where the first stop text in text starts, or the length of text."""
        starts = [text.find(stop) for stop in self.stops]
        return min([start for start in starts if start >= 0], default=len(text))

    def find_beginning(self, text: str) -> int:
        """Return from where on the end of text may begin a stop text, or the length of text."""
        longest = max(map(len, self.stops), default=0)
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self.stops):
                return start
        return len(text)


def get_encoder(model_name: str, models_dir: str) -> Encoder:
    """Read the vocabulary in the folder models_dir/model_name.

    OpenAI's layout is encoder.json ({token: id}) and vocab.bpe (one merge per line). A folder in
    Hugging Face's layout is read by hugging_face.py.

    Raises ValueError, naming the file, if the files are damaged or do not belong together.
    """
    model_dir = os.path.join(models_dir, model_name)
    path = os.path.join(model_dir, "encoder.json")
    if not os.path.isfile(path) and is_hugging_face(model_dir):
        from hugging_face import read_encoder

        return read_encoder(model_dir)
    merges_path = os.path.join(model_dir, "vocab.bpe")
    vocabulary = read_json(path)
    merges = read_merges(merges_path)
    check_vocabulary(vocabulary, merges, path, merges_path)
    check_all_merged(vocabulary, merges, merges_path)
    return Encoder(vocabulary, merges)


def is_hugging_face(model_dir: str) -> bool:
    """Tell whether a folder has one of the files of Hugging Face's layout."""
    names = ("config.json", "vocab.json", "tokenizer.json")
    return any(os.path.isfile(os.path.join(model_dir, name)) for name in names)


def read_utf8(path: str) -> str:
    """Return the text of a file, without a byte order mark. Line ends become newlines.

    Raises ValueError for a file that is not UTF-8 or is a Git LFS pointer.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not UTF-8 ({error})") from None
    if text.startswith(GIT_LFS_POINTER):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"
        )
    return text


def read_json(path: str) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises ValueError, naming the file, if it holds anything else.
    """
    text = read_utf8(path)
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is damaged: its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_merges(path: str) -> list[tuple[str, str]]:
    """Return the merges of a file with one merge per line: two tokens and a space between them.

    A first line that starts with "#version" is skipped. Raises ValueError for any other line.
    """
    lines = read_utf8(path).rstrip("\n").split("\n")
    n_skipped = 1 if lines[0].startswith("#version") or lines == [""] else 0
    merges = []
    for number, line in enumerate(lines[n_skipped:], n_skipped + 1):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ValueError(f"{path} is damaged: line {number} is not two tokens: {line!r}")
        merges.append((left, right))
    return merges


def check_vocabulary(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], path: str, merges_path: str
) -> None:
    """Raise ValueError, naming the file, unless all ids and merges can be used.

    The ids must be 0 to n - 1, each used once. The parts and the result of each merge must be
    tokens, and no merge may be listed twice.
    """
    ids = list(vocabulary.values())
    if set(map(type, ids)) != {int} or sorted(ids) != list(range(len(ids))):
        raise ValueError(
            f"{path} is damaged: the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}"
        )
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise ValueError(
                    f"{merges_path} does not fit {path}: the merge '{left} {right}' needs the "
                    f"token '{token}', which is not in the vocabulary"
                )
    if len(set(merges)) < len(merges):
        raise ValueError(f"{merges_path} is damaged: a merge is listed twice")


def check_all_merged(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], merges_path: str
) -> None:
    """Raise ValueError if no merge makes some token, which shows that merges are missing.

    Tokens of one character are bytes, and special tokens are written as <...> or [...].
    """
    merged = {left + right for left, right in merges}
    for token in vocabulary.keys() - merged:
        if len(token) > 1 and not re.fullmatch(r"<.*>|\[.*\]", token):
            raise ValueError(f"{merges_path} is damaged: no merge makes the token '{token}'")
