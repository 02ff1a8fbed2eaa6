r"""GPT-2's byte-level BPE: text <-> token ids, with the same ids as OpenAI's encoder and tiktoken.

A text becomes ids in four steps. This is what happens to " rôle" with GPT-2's vocabulary:

    words   split the text into words; a space belongs to the word after it    " rôle"
    bytes   encode the word as UTF-8                                           b" r\xc3\xb4le"
    chars   write each byte as one printable character (`bytes_to_unicode`)    "ĠrÃ´le"
    merges  join pairs of tokens, in the order in which vocab.bpe lists them   "Ġr" "Ã´" "le"

encoder.json gives the id of each of these tokens. Merges never cross the border between two
words, so each word is encoded on its own, and the ids of recent words are cached.

The way back is short: look up the bytes of each id, join them, and decode them as UTF-8.
"""

import codecs
import heapq
import json
import os
import re
from collections.abc import Iterable
from itertools import chain, pairwise
from typing import Any

import regex

# A word is the end of an English contraction; or letters, digits or other characters after at most
# one space; or white space, without the last character before a word.
WORD = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# The cache holds 128 thousand words of ordinary length in about 20 MB.
MAX_CACHED_WORDS = 2**17
MAX_CACHED_LENGTH = 64

Vocabulary = dict[str, int]  # {token: id}
Merges = list[tuple[str, str]]

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
    chars = {}
    n_others = 0
    for byte in range(256):
        if byte in printable:
            chars[byte] = chr(byte)
        else:
            chars[byte] = chr(256 + n_others)
            n_others += 1
    return chars


def inverse(mapping: dict) -> dict:
    """Return {value: key}."""
    return {value: key for key, value in mapping.items()}


BYTE_CHARS = "".join(bytes_to_unicode().values())


class Encoder:
    """Byte-level BPE with a vocabulary and merges.

    encoder: {token: id}, with the tokens written in the characters of `bytes_to_unicode`.
    bpe_merges: pairs of tokens; the pair to join first comes first.
    errors: how to decode invalid UTF-8, as in `bytes.decode`.
    ignore_merges: turn a word that is itself a token into that token, without merging, as
        tiktoken does.
    special_tokens: {name: id} of tokens that `encode` makes only where it is allowed to. They may
        lie beyond the vocabulary. The default is `<|endoftext|>`, if the vocabulary has it.
    added_tokens: {name: id} of tokens that `encode` makes wherever the text has their names.
    add_prefix_space: start each text, and each text after a special or added token, with a space.
    first_ids: ids that `encode` puts before those of every text.
    unknown_id: the id for each token that the vocabulary lacks; without it, `encode` raises
        ValueError.
    start_id: the id to start from when there is no text; `encode` does not add it. The default is
        the id of `<|endoftext|>`, or None.
    end_ids: the ids that end a text; by default the id of `<|endoftext|>`, or none.

    >>> get_encoder("tiny", "models").encode("ROMEO:")
    [813, 25]
    """

    def __init__(
        self,
        encoder: Vocabulary,
        bpe_merges: Merges,
        errors: str = "replace",
        *,
        ignore_merges: bool = True,
        special_tokens: Vocabulary | None = None,
        added_tokens: Vocabulary | None = None,
        add_prefix_space: bool = False,
        first_ids: Iterable[int] = (),
        unknown_id: int | None = None,
        start_id: int | None = None,
        end_ids: Iterable[int] | None = None,
    ):
        if special_tokens is None:
            special_tokens = end_of_text(encoder)
        end_id = special_tokens.get(END_OF_TEXT, encoder.get(END_OF_TEXT))
        if end_ids is None:
            end_ids = []
            if end_id is not None:
                end_ids = [end_id]
        self.encoder = encoder
        self.special_tokens = special_tokens
        self.added_tokens = added_tokens or {}
        declared = inverse(special_tokens) | inverse(self.added_tokens)  # {id: name}
        self.decoder = inverse(encoder) | declared
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = inverse(self.byte_encoder)
        self.bpe_ranks = {pair: rank for rank, pair in enumerate(bpe_merges)}
        self.pat = WORD
        self.errors = errors
        self.ignore_merges = ignore_merges
        self.add_prefix_space = add_prefix_space
        self.first_ids = list(first_ids)
        self.unknown_id = unknown_id
        self.start_id = end_id if start_id is None else start_id
        self.end_ids = frozenset(end_ids)
        self.cache: dict[str, tuple[int, ...]] = {}
        self.token_bytes = {token_id: name.encode("utf-8") for token_id, name in declared.items()}

    def encode(self, text: str, allowed_special: Iterable[str] = ()) -> list[int]:
        """Return the ids of a text.

        allowed_special: names of the special tokens to make where the text has these names, or
        "all". The names of other special tokens are ordinary text.

        A surrogate pair is encoded as the character that it means, and a lone surrogate as
        U+FFFD, because UTF-8 has neither. Raises TypeError if text is not a str, and ValueError
        for a name that is not a special token or a character that the vocabulary cannot write.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes a text of type str, not {type(text).__name__}")
        names = self.added_tokens | self.allowed_tokens(allowed_special)
        ids = list(self.first_ids)
        for part in split_at_names(without_surrogates(text), names):
            if part in names:
                ids.append(names[part])
            else:
                ids += self.encode_ordinary(part)
        return ids

    def allowed_tokens(self, allowed_special: Iterable[str]) -> Vocabulary:
        """Return {name: id} of the special tokens with these names, or of all for "all"."""
        if allowed_special == "all":
            return self.special_tokens
        allowed = {}
        for name in allowed_special:
            if name not in self.special_tokens:
                known = ", ".join(self.special_tokens) or "none"
                raise ValueError(f"{name!r} is not a special token; the vocabulary has: {known}")
            allowed[name] = self.special_tokens[name]
        return allowed

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text without any special or added tokens."""
        if self.add_prefix_space and not text.startswith(" "):
            text = " " + text
        ids: list[int] = []
        for word in self.pat.findall(text):
            try:
                ids += self.cache[word]
            except KeyError:
                ids += self.encode_word(word)
        return ids

    def encode_word(self, word: str) -> tuple[int, ...]:
        """Return the ids of a word, and remember them: " rôle" -> "ĠrÃ´le" -> (374, 27083, 293)."""
        chars = "".join([self.byte_encoder[byte] for byte in word.encode("utf-8")])
        is_token = chars in self.encoder and chars not in self.special_tokens
        tokens = [chars] if is_token and self.ignore_merges else self.bpe(chars)
        try:
            ids = tuple([self.encoder[token] for token in tokens])
        except KeyError:
            ids = self.encode_unknown(word, tokens)
        if len(word) <= MAX_CACHED_LENGTH:
            if len(self.cache) >= MAX_CACHED_WORDS:
                self.cache.clear()
            self.cache[word] = ids
        return ids

    def encode_unknown(self, word: str, tokens: list[str]) -> tuple[int, ...]:
        """Return the ids of a word's tokens, with unknown_id for those that do not exist."""
        if self.unknown_id is None:
            lacking = next(filter(self.lacks, word), word)
            raise ValueError(f"the vocabulary has no tokens for the character {lacking!r}")
        return tuple([self.encoder.get(token, self.unknown_id) for token in tokens])

    def lacks(self, character: str) -> bool:
        """Tell whether a byte of a character is not in the vocabulary."""
        chars = [self.byte_encoder[byte] for byte in character.encode("utf-8")]
        return any(char not in self.encoder for char in chars)

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
        heap = []  # the rank of each pair that can be joined, and where its first token starts
        for start, pair in enumerate(pairwise(chars)):
            if pair in ranks:
                heap.append((ranks[pair], start))
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
        """Return the bytes of the text of ids. A token may end inside a character's bytes.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = list(ids)
        for token_id in set(ids):
            if token_id not in self.token_bytes:
                self.token_bytes[token_id] = self.decode_token(token_id)
        return b"".join([self.token_bytes[token_id] for token_id in ids])

    def decode_token(self, token_id: int) -> bytes:
        """Return the bytes of one token: 293 -> "le" -> b"le"."""
        if token_id not in self.decoder:
            size = len(self.decoder)
            raise ValueError(f"{token_id!r} is not a token id: the vocabulary has {size} tokens")
        token = self.decoder[token_id]
        try:
            return bytes([self.byte_decoder[char] for char in token])
        except KeyError:  # a special token that nobody declared as one
            return token.encode("utf-8")


def end_of_text(vocabulary: Vocabulary) -> Vocabulary:
    """Return {name: id} of `<|endoftext|>`, or {} if the vocabulary lacks it."""
    if END_OF_TEXT not in vocabulary:
        return {}
    return {END_OF_TEXT: vocabulary[END_OF_TEXT]}


def split_at_names(text: str, names: Iterable[str]) -> list[str]:
    """Split a text before and after each name. Where two names start alike, the longest wins."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = "|".join([re.escape(name) for name in longest_first if name])
    parts = re.split(f"({pattern})", text) if pattern else [text]
    return [part for part in parts if part]


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
        data = self.encoder.decode_bytes(ids)
        text = self.held_back + self.utf8_decoder.decode(data, final)
        found = self.find_stop(text)
        end = len(text) if final else self.find_beginning(text)
        # A stop text that starts after `end` has to wait: a longer one may have begun before it.
        self.stopped = found < len(text) and found <= end
        end = min(found, end)
        self.held_back = text[end:]
        return text[:end]

    def find_stop(self, text: str) -> int:
        """Return where the first stop text in text starts, or the length of text."""
        starts = [text.find(stop) for stop in self.stops]
        return min([start for start in starts if start >= 0], default=len(text))

    def find_beginning(self, text: str) -> int:
        """Return the start of the longest end of text with which a stop text begins.

        It is the length of text if there is none.
        """
        longest = max(map(len, self.stops), default=0)
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self.stops):
                return start
        return len(text)


def get_encoder(model_name: str, models_dir: str) -> Encoder:
    """Read the vocabulary in the folder models_dir/model_name.

    OpenAI's layout is encoder.json ({token: id}) and vocab.bpe (one merge per line). A folder in
    Hugging Face's layout is read by hugging_face.py.

    Raises FileNotFoundError if a file is missing, and ValueError, naming the file, if the files are
    damaged or do not belong together.
    """
    model_dir = os.path.join(models_dir, model_name)
    path = os.path.join(model_dir, "encoder.json")
    if not os.path.isfile(path) and has_hugging_face_files(model_dir):
        from hugging_face import read_encoder

        return read_encoder(model_dir)
    merges_path = os.path.join(model_dir, "vocab.bpe")
    vocabulary = read_json(path)
    merges = read_merges(merges_path)
    check_vocabulary(vocabulary, merges, path, merges_path)
    check_all_merged(vocabulary, merges, merges_path)
    return Encoder(vocabulary, merges)


def has_hugging_face_files(model_dir: str) -> bool:
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


def read_merges(path: str) -> Merges:
    """Return the merges of a file with one merge per line: two tokens and a space between them.

    A first line that starts with "#version" is skipped. Raises ValueError for a malformed line.
    """
    merges = []
    lines = read_utf8(path).rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if number == 1 and line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or "" in pair:
            raise ValueError(f"{path} is damaged: line {number} is not two tokens: {line!r}")
        merges.append(pair)
    return merges


def check_vocabulary(vocabulary: Vocabulary, merges: Merges, path: str, merges_path: str) -> None:
    """Raise ValueError, naming the file, unless all ids and merges can be used.

    The ids must be 0 to n - 1, each used once. The parts and the result of each merge must be
    tokens, and no merge may be listed twice.
    """
    size = len(vocabulary)
    ids = list(vocabulary.values())
    are_integers = set(map(type, ids)) == {int}
    if not are_integers or set(ids) != set(range(size)):
        raise ValueError(
            f"{path} is damaged: the ids of its {size} tokens are not 0 to {size - 1}, "
            "each used once"
        )
    tokens = set(chain.from_iterable(merges))
    tokens.update(map("".join, merges))
    lacking = tokens - vocabulary.keys() or tokens & {""}  # an empty token cannot be merged
    if lacking:
        token = min(lacking, key=len)
        problem = f"which lacks the token {token!r} of a merge"
        raise ValueError(f"{merges_path} does not fit {path}, {problem}")
    if len(set(merges)) < len(merges):
        raise ValueError(f"{merges_path} is damaged: a merge is listed twice")


def check_all_merged(vocabulary: Vocabulary, merges: Merges, merges_path: str) -> None:
    """Raise ValueError if there is a token that no merge makes: then merges are missing.

    Tokens of one character are bytes, and special tokens are written as <...> or [...].
    """
    merged = {left + right for left, right in merges}
    for token in vocabulary.keys() - merged:
        is_special = re.fullmatch(r"<.*>|\[.*\]", token)
        if len(token) > 1 and not is_special:
            raise ValueError(f"{merges_path} is damaged: no merge makes the token {token!r}")
