"""What makes a command robust: its streams, its errors, its exit status, its progress bars."""

import io
import re
import shlex
import sys

import pytest
from helpers import ROOT, Terminal, bash

import terminal


class Writer:
    """The least that may stand in place of standard output or standard error."""

    def __init__(self):
        stream = io.StringIO()
        self.write = stream.write
        self.flush = stream.flush
        self.getvalue = stream.getvalue


def nothing():
    """Return what a stream is when the process was started without it."""
    return None


def binary(content, encoding="utf-8"):
    """A stream like the real ones, which has a buffer of bytes below."""
    return io.TextIOWrapper(io.BytesIO(content), encoding)


def run(program):
    return terminal.run(program, [])


def program_that_raises(error):
    def program():
        yield "output\n"
        raise error

    return program


# Errors


@pytest.mark.parametrize(
    ("error", "status", "pattern"),
    [
        (terminal.UsageError("no prompt"), 2, "test_terminal.py: no prompt\n"),
        (ValueError("two\nlines\r\nor three"), 1, "test_terminal.py: two lines or three\n"),
        (
            FileNotFoundError(2, "No such file", "x"),
            1,
            r"test_terminal.py: \[Errno 2\] No such file: 'x'\n",
        ),
        (MemoryError(), 1, "test_terminal.py: out of memory\n"),
        (ImportError("no TensorFlow"), 1, "test_terminal.py: no TensorFlow\n"),
        (ModuleNotFoundError("no tqdm", name="tqdm"), 1, ".*: no tqdm; .* pip install tqdm\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_errors(capsys, error, status, pattern):
    assert run(program_that_raises(error)) == status
    written = capsys.readouterr()
    assert written.out == "output\n"
    assert re.fullmatch(pattern, written.err)


@pytest.mark.parametrize("error", [TypeError("a mistake in the program"), SystemExit(3)])
def test_other_exceptions_are_passed_on(error):
    with pytest.raises(type(error)) as caught:
        run(program_that_raises(error))
    assert caught.value is error


# The words of a command line


def test_arguments():
    def program(
        text: str,
        n: int = 3,
        *,
        rate: float = 0.5,
        each: tuple[str, ...] = (),
        loud: bool = False,
    ):
        """Help."""
        seen.append((text, n, rate, each, loud))

    seen = []
    lines = {
        "a": ("a", 3, 0.5, (), False),
        "--rate .25 a 4": ("a", 4, 0.25, (), False),
        "5 --text=-a --loud": ("-a", 5, 0.5, (), True),
        "a --each=b --each -- --lo": None,
        "-n=-7 --text= --each=b --each c=d --lo": ("", -7, 0.5, ("b", "c=d"), True),
        "a --rate 1 --r=2": ("a", 3, 2.0, (), False),
        "": None,
        "a 1 2": None,
        "a --loud=False": ("a", 3, 0.5, (), False),
        "a --loud=true": None,
        "a --loud=": None,
    }
    for line, expected in lines.items():
        assert terminal.run(program, line.split()) == (0 if expected else 2)
        if expected:
            assert seen.pop() == expected
    assert seen == []


# Streams


@pytest.mark.parametrize("stream", [io.StringIO, Writer])
def test_replaced_streams(monkeypatch, stream):
    out = stream()
    err = stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    terminal.note("before")
    assert run(program_that_raises(ValueError("wrong"))) == 1
    assert out.getvalue() == "output\n"
    assert err.getvalue() == "before\ntest_terminal.py: wrong\n"


def test_characters_that_the_streams_cannot_encode(monkeypatch):
    monkeypatch.setattr(sys, "stdout", binary(b"", "ascii"))
    assert run(lambda: ["ü"]) == 0
    assert sys.stdout.buffer.getvalue() == b"?"


# Texts


TEXTS = {  # the text, or the offset of the first byte that is not UTF-8
    b"": "",
    b"\xef\xbb\xbf\xef\xbb\xbftwice": "\ufefftwice",
    b"later \xef\xbb\xbf": "later \ufeff",
    b"\r\n and \r stay\n": "\r\n and \r stay\n",
    "ä€😀".encode(): "ä€😀",
    "ä€".encode()[:-1]: 2,
    b"\xef\xbb\xbfab\xff": 5,
}


@pytest.fixture(params=["file", "standard input"])
def written(request, tmp_path, monkeypatch):
    """A function that writes bytes to a file or to standard input and returns its path."""

    def write(content):
        path = tmp_path / "text"
        path.write_bytes(content)
        if request.param == "file":
            return str(path)
        monkeypatch.setattr(sys, "stdin", binary(content))
        return "-"

    return write


@pytest.mark.parametrize("content", TEXTS)
def test_read_text(written, content):
    path = written(content)
    if isinstance(TEXTS[content], str):
        assert terminal.read_text(path) == TEXTS[content]
        return
    name = "standard input" if path == "-" else path
    with pytest.raises(ValueError, match=f"{name} is not UTF-8: .* at byte {TEXTS[content]}$"):
        terminal.read_text(path)


def test_read_text_from_nothing(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            terminal.read_text(str(path))


# Progress bars


@pytest.mark.parametrize("stream", [Terminal, io.StringIO, nothing])
def test_progress_bars_are_shown_on_a_terminal(monkeypatch, stream):
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    with terminal.progress_bar(total=3, desc="three") as bar:
        bar.update(3)
    if stream is Terminal:
        assert "three: 100%" in err.getvalue()
    elif stream is not nothing:
        assert err.getvalue() == ""


# Processes: Python flushes the streams when it exits


PROGRAM = """
import sys, terminal

def program(word: str):
    print("output")
    if word == "fail":
        raise ValueError("wrong")
    if word == "-":
        print(terminal.given_text("-"))

sys.exit(terminal.run(program, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("script", "status", "err"),
    [
        ("prog print >/dev/full", 1, "prog.py: [Errno 28] No space left on device\n"),
        ("prog fail >/dev/full", 1, "prog.py: wrong\n"),
        ("exec 3> >(true); wait $!; prog print >&3", 0, ""),  # nobody reads the pipe
        ("prog print >&-", 0, ""),
        ("prog print 2>&- <&- >/dev/null", 0, ""),
        ("prog - <&- >/dev/null", 0, ""),
        ('test "$(prog fail 2>&-)" = output', 0, ""),
    ],
)
def test_processes(tmp_path, script, status, err):
    (tmp_path / "prog.py").write_text(PROGRAM)
    program = f'prog() {{ PYTHONPATH={shlex.quote(str(ROOT))} python prog.py "$@"; }}'
    result = bash(f"{program}; {script}", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (status, "", err)
