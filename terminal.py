"""What the programs share: words -> arguments, one-line errors, exit status, texts, progress bars.

A program is a function. Its signature is the command line, and its docstring is the help.
"""

import contextlib
import difflib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_origin

QUOTES = "put a text of several words in quotes"


class UsageError(ValueError):
    """The words of the command line cannot be used."""


def run(program: Callable, words: list[str], options: Callable = lambda: None) -> int:
    """Run a program with the words of its command line -> exit status.

    The program may return pieces of text, which are printed as they come. --help prints its
    docstring. An error becomes one line on standard error. options: see `arguments`.

    The status is 0, also if the reader of the output has closed the pipe; 1 after an error; 2 after
    a UsageError; 130 after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # what cannot be encoded becomes a ?
    sys.stdin = sys.stdin or io.TextIOWrapper(io.BytesIO())  # None if it is closed
    status = 0
    try:
        if {"-h", "--help"} & set(words):
            show([inspect.getdoc(program), "\n"])
        else:
            show(program(**arguments(program, words, options)) or [])
        show([""])  # flushes what the program itself has printed
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        pass
    except (ValueError, OSError, ImportError, MemoryError) as error:
        message = str(error) or "out of memory"
        if isinstance(error, ModuleNotFoundError):
            message += f"; install it with: python -m pip install {error.name}"
        note(f"{Path(inspect.getfile(program)).name}: {message}")
        status = 2 if isinstance(error, UsageError) else 1
    try:
        show([""])
    except OSError:  # Python would try again when it exits, and change the status
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return status


def arguments(program, words, options):
    """Turn words into the arguments of a program. Raises UsageError.

    options: a function of the program's other keyword arguments. It raises ValueError if one is out
    of range.
    """
    own = inspect.signature(program).parameters
    more = inspect.signature(options).parameters
    parameters = {**own, **more, **own}  # in the order of the program's
    parameters.pop("options", None)
    values = {}
    for name, text in split(words, parameters):
        annotation = parameters[name].annotation
        value = converted(text, annotation, name)
        if get_origin(annotation) is tuple:  # the option may be repeated
            value = (*values.get(name, ()), value)
        values[name] = value
    try:
        inspect.signature(program).bind(**values)
        options(**{name: values[name] for name in more if name in values})
    except (TypeError, ValueError) as error:
        raise UsageError(f"{error}; --help shows the command line") from None
    return values


def split(words, parameters):
    """Split words into the name and the text of each argument. Raises UsageError."""
    texts = []
    named = []
    rest = iter(words)
    for word in rest:
        if not is_option(word):
            texts.append(word)
            continue
        typed, equals, text = word.partition("=")
        name = full_name(typed, parameters)
        if not equals and parameters[name].annotation is bool:
            text = "True"
        elif not equals:
            text = next(rest, "--")
            if is_option(text):
                raise UsageError(f"{typed} needs a value; {typed}=-x is one with a dash")
        named.append((name, text))
    places = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    free = [name for name in places if name not in dict(named)]
    if len(texts) > len(free):
        raise UsageError(f"{texts[len(free)]!r} is one word too many; {QUOTES}")
    return [*zip(free, texts, strict=False), *named]


def is_option(word):
    """Tell an option from a lone dash and from a negative number."""
    return re.match("--|-[a-zA-Z]", word) is not None


def full_name(typed, names):
    """Return the option that a word such as --top-k, --temp or -p means. Raises UsageError."""
    name = typed.lstrip("-").replace("-", "_")
    if name in names:
        return name
    possible = [each for each in names if each.startswith(name)]
    if len(possible) == 1:
        return possible[0]
    similar = possible or difflib.get_close_matches(name, names) or ["help"]
    raise UsageError(f"there is no option {typed}; did you mean --{' or --'.join(similar)}?")


def converted(text, annotation, name):
    """Convert the text of an argument to the first type of its annotation. Raises UsageError."""
    kind = next(iter(get_args(annotation)), annotation)
    try:
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        rule = {int: "a whole number", float: "a number", bool: "True or False"}[kind]
        raise UsageError(f"--{name} must be {rule}, got {text!r}; {QUOTES}") from None


# Texts


def given_text(word: str) -> str:
    """Return the text that a word of the command line means: itself, or for - standard input.

    The final newline of standard input is removed. Raises ValueError if the text is not UTF-8.
    """
    if word == "-":
        return re.sub("\r?\n\\Z", "", read_text("-"))
    return decoded(os.fsencode(word), "the text")


def read_text(path: str) -> str:
    """Read a UTF-8 text without its byte order mark. The path - means standard input.

    Raises ValueError if the text is not UTF-8, and OSError if it cannot be read.
    """
    if path == "-":
        return decoded(sys.stdin.buffer.read(), "standard input")
    return decoded(Path(path).read_bytes(), path)


def decoded(content, name):
    """Decode UTF-8 without a byte order mark. Raises ValueError, naming where it comes from."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None


def answer_lines(answer, text):
    """Answer a text, if there is one, and then each line of standard input that is not empty.

    At a terminal, Ctrl-C and an error end only the answer.
    """
    sign = ""
    if sys.stdin.isatty():
        note("Each line is a prompt of its own. Ctrl-C stops an answer, Ctrl-D exits.")
        sign = "> "
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  gives input() line editing and a history
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    while True:
        try:
            if text in ("quit", "exit"):
                note("This is a prompt like others. Ctrl-D exits.")
            if text:
                show(answer(text))
            text = decoded(input(sign).encode("utf-8", "surrogateescape"), "the prompt")
        except EOFError:
            return
        except (KeyboardInterrupt, ValueError) as error:
            if not sign:
                raise
            note(str(error) or "Ctrl-D exits.")
            text = None


def show(pieces):
    """Print pieces of text as they come."""
    for piece in pieces:
        print(piece, end="", flush=True)


def note(message: str) -> None:
    """Print one line on standard error, if that is possible."""
    with contextlib.suppress(OSError, AttributeError):  # it is None if it is closed
        sys.stderr.write(" ".join(message.splitlines()) + "\n")


def progress_bar(*args, **kwargs):
    """Return a tqdm bar, which is shown on a terminal, but not in a log file."""
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # or tqdm would start a thread

    is_shown = sys.stderr is not None and sys.stderr.isatty()
    return Bar(*args, disable=not is_shown, **kwargs)
