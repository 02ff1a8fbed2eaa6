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
import hashlib
import heapq
import json
from collections.abc import Iterable
from pathlib import Path

import regex

# A word is the end of an English contraction; or letters, digits or other characters after at most
# one space; or white space, without the last character before a word.
WORD = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# The cache holds 128 thousand words of ordinary length in about 20 MB.
MAX_CACHED_WORDS = 131_072
MAX_CACHED_LENGTH = 64

Vocabulary = dict[str, int]  # {token: id}
Merges = list[tuple[str, ...]]  # of two tokens each

END_OF_TEXT = "<|endoftext|>"
GIT_LFS_POINTER = "version https://git-lfs"


def bytes_to_unicode() -> dict[int, str]:
    """Return the printable character that stands for each of the 256 bytes.

    A byte stands for itself if it is printable in Latin-1. The others take the characters from
    U+0100 on, in turn: the space (byte 32) is "Ġ". So every token can be written in a text file.
    """
    chars = {}
    next_code = 256
    for byte in range(256):
        char = chr(byte)
        if char == " " or not char.isprintable():
            char = chr(next_code)
            next_code += 1
        chars[byte] = char
    return chars


class Encoder:
    """Byte-level BPE with a vocabulary and merges.

    encoder: {token: id}, with the tokens written in the characters of `bytes_to_unicode`.
    bpe_merges: pairs of tokens; the pair to join first comes first.
    errors: how to decode invalid UTF-8, as in `bytes.decode`.

    special_tokens, {name: id}, holds `<|endoftext|>` if the vocabulary has it. Its id is start_id,
    the id to start from when there is no text (else None), and the only one of end_ids, which end a
    text.

    >>> get_encoder("tiny", "models").encode("ROMEO:")
    [813, 25]
    """

    def __init__(self, encoder: Vocabulary, bpe_merges: Merges, errors: str = "replace"):
        self.encoder = encoder
        self.decoder = {token_id: token for token, token_id in encoder.items()}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {char: byte for byte, char in self.byte_encoder.items()}
        self.bpe_ranks = {(left, right): rank for rank, (left, right) in enumerate(bpe_merges)}
        self.pat = WORD
        self.errors = errors
        self.whole_words = encoder  # words that become one token, whatever the merges say
        self.unknown_id = None  # for bytes that are not in the vocabulary
        self.start_id = encoder.get(END_OF_TEXT)
        self.special_tokens = {} if self.start_id is None else {END_OF_TEXT: self.start_id}
        self.end_ids = frozenset(self.special_tokens.values())
        self.cache = {}  # {word: ids}
        self.token_bytes = {}  # {id: bytes}, as far as they have been decoded

    def encode(self, text: str, allowed_special: Iterable[str] = ()) -> list[int]:
        """Return the ids of a text.

        allowed_special: names of the special tokens to make where the text has these names, or
        "all". The names of other special tokens are ordinary text.

        A surrogate pair is encoded as the character that it means, and a lone surrogate as
        U+FFFD, because UTF-8 has neither. Raises TypeError if text is not a str, and ValueError
        for a name that is not a special token or a character that the vocabulary cannot write.
        """
        text = valid_text(text)
        parts = [text]
        if self.allowed_names(allowed_special):
            parts = text.split(END_OF_TEXT)
        ids = self.encode_ordinary(parts[0])
        for part in parts[1:]:
            ids += [self.start_id, *self.encode_ordinary(part)]
        return ids

    def allowed_names(self, allowed_special):
        """Return the names of the special tokens to make; see `encode`."""
        names = set(self.special_tokens if allowed_special == "all" else allowed_special)
        if not names <= self.special_tokens.keys():
            possible = f"'all' or a list of names from {list(self.special_tokens)}"
            raise ValueError(f"allowed_special must be {possible}, got {allowed_special!r}")
        return names

    def encode_ordinary(self, text):
        """Return the ids of a text without special tokens."""
        ids = []
        for word in self.pat.findall(text):
            ids += self.cache.get(word) or self.encode_word(word)  # no word is without ids
        return ids

    def encode_word(self, word):
        """Return the ids of a word, and remember them: " rôle" -> "ĠrÃ´le" -> (374, 27083, 293)."""
        chars = "".join([self.byte_encoder[byte] for byte in word.encode()])
        tokens = [chars] if chars in self.whole_words else self.bpe(chars)
        ids = tuple([self.encoder.get(token, self.unknown_id) for token in tokens])
        if None in ids:
            raise ValueError(f"the vocabulary has no tokens for a character of {word!r}")
        if len(word) <= MAX_CACHED_LENGTH:
            if len(self.cache) >= MAX_CACHED_WORDS:
                self.cache.clear()
            self.cache[word] = ids
        return ids

    def bpe(self, chars):
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
        heap = []  # pairs to join: their rank, and where they start

        def push(left, right):
            pair = (tokens[left], tokens[right])
            if pair in ranks:
                heapq.heappush(heap, (ranks[pair], left))

        for start in range(len(chars)):
            push(start, start + 1)
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
            push(before[start], start)
            push(start, end)
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
        for token_id in set(ids).difference(self.token_bytes):
            self.token_bytes[token_id] = self.decode_token(token_id)
        return b"".join([self.token_bytes[token_id] for token_id in ids])

    def decode_token(self, token_id):
        """Return the bytes of one token: 293 -> "le" -> b"le"."""
        if token_id not in self.decoder:
            raise ValueError(
                f"{token_id!r} is not a token id: there are {len(self.decoder)} tokens"
            )
        token = self.decoder[token_id]
        try:
            return bytes([self.byte_decoder[char] for char in token])
        except KeyError:  # a special token with a space in its name, for example
            return token.encode()

    def identity(self) -> str:
        """Return a digest of all that decides which ids a text gets."""
        state = vars(self) | {"cache": None, "token_bytes": None}
        return hashlib.sha256(repr(state).encode()).hexdigest()


def valid_text(text):
    """Return text with surrogate pairs joined to characters and lone surrogates as U+FFFD."""
    if not isinstance(text, str):
        raise TypeError(f"expected a text of type str, not {type(text).__name__}")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TextDecoder:
    """Decodes the ids of a text piece by piece, up to the first stop text in it.

    stop: a text or several texts. Whichever comes first in the text ends it.

    Together, the pieces equal `encoder.decode` of all ids, up to the first stop text. `stopped`
    tells whether it has been found.
    """

    def __init__(self, encoder: Encoder, stop: str | Iterable[str] = ()):
        self.encoder = encoder
        self.stops = [valid_text(each) for each in ([stop] if isinstance(stop, str) else stop)]
        self.longest = max(map(len, self.stops), default=1)
        self.stopped = False
        self.utf8_decoder = codecs.getincrementaldecoder("utf-8")(encoder.errors)
        self.held_back = ""  # text in which a stop text may have begun
        if "" in self.stops:
            raise ValueError("a stop text must not be empty")

    def decode(self, ids: Iterable[int], final: bool = False) -> str:
        """Return the next piece, without an incomplete character or stop text at its end.

        final: no ids follow, so nothing is held back.
        """
        if self.stopped:
            return ""
        data = self.encoder.decode_bytes(ids)
        text = self.held_back + self.utf8_decoder.decode(data, final)
        end = len(text)
        if not final:  # a stop text that starts before this would be complete
            end = max(0, end + 1 - self.longest)
        for stop in self.stops:
            start = text.find(stop)
            if 0 <= start <= end:
                end = start
                self.stopped = True
        self.held_back = text[end:]
        return text[:end]


def get_encoder(model_name: str, models_dir: str) -> Encoder:
    """Read the vocabulary in the folder models_dir/model_name, in OpenAI's layout.

    The files are encoder.json ({token: id}) and vocab.bpe (one merge per line).

    Raises FileNotFoundError if a file is missing, and ValueError, naming the file, if the files are
    damaged or do not belong together.
    """
    path = Path(models_dir, model_name, "encoder.json")
    merges_path = path.with_name("vocab.bpe")
    vocabulary = read_json(path)
    merges = read_merges(merges_path)
    check_vocabulary(vocabulary, merges, path, merges_path)
    # A token that no merge makes shows that merges are missing. Tokens of one character are bytes,
    # and special tokens are written as <...> or [...].
    for token in vocabulary.keys() - map("".join, merges):
        if len(token) > 1 and token[0] + token[-1] not in ("<>", "[]"):
            raise ValueError(f"{merges_path} is damaged: no merge makes the token {token!r}")
    return Encoder(vocabulary, merges)


def read_utf8(path):
    """Return the text of a file, without a byte order mark. Line ends become newlines.

    Raises ValueError for a file that is not UTF-8 or is a Git LFS pointer.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged: it is not UTF-8") from None
    if text.startswith(GIT_LFS_POINTER):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"
        )
    return text


def read_json(path):
    """Return the content of a JSON file that holds an object.

    Raises ValueError, naming the file, if it holds anything else.
    """
    text = read_utf8(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_merges(path):
    """Return the merges of a file with one merge per line: two tokens and a space between them.

    A line that starts with "#version" is skipped.
    """
    lines = read_utf8(path).rstrip("\n").split("\n")
    return [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]


def check_vocabulary(vocabulary, merges, path, merges_path):
    """Raise ValueError, naming the file, unless all ids and merges can be used.

    The ids must be 0 to n - 1, each used once. The parts and the result of a merge must be tokens,
    and no merge may be listed twice.
    """
    ids = list(vocabulary.values())
    if set(map(type, ids)) != {int} or set(ids) != set(range(len(ids))):
        raise ValueError(f"{path} is damaged: its ids are not 0 to {len(ids) - 1}, each used once")
    for merge in merges:
        tokens = {*merge, "".join(merge)}
        if len(merge) != 2 or not all(merge) or not tokens <= vocabulary.keys():
            raise ValueError(f"{merges_path} does not fit {path}: {merge} do not make a token")
    if len(set(merges)) < len(merges):
        raise ValueError(f"{merges_path} is damaged: a merge is listed twice")
