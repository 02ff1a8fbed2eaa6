"""What makes a command robust: its streams, its errors, its exit status, its progress bars."""

import errno
import importlib
import io
import os
import re
import shlex
import sys
import types
import warnings

import pytest
import tqdm
from helpers import ROOT, Terminal, bash

import utils


class Writer:
    """The least that may stand in place of standard output or standard error."""

    def __init__(self):
        stream = io.StringIO()
        self.write = stream.write
        self.flush = stream.flush
        self.getvalue = stream.getvalue


class Full(io.StringIO):
    """A stream without room and without a descriptor."""

    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def nothing():
    """Return what a stream is when the process was started without it."""
    return None


def binary(content, encoding="utf-8"):
    """A stream like the real ones, which has a buffer of bytes below."""
    return io.TextIOWrapper(io.BytesIO(content), encoding)


def run(command, *arguments):
    return utils.run_command("prog", command, list(arguments))


def command_that_raises(error):
    def command(arguments):
        print("output")
        raise error

    return command


NO_SPACE = "prog: [Errno 28] No space left on device\n"


# Errors


@pytest.mark.parametrize(
    ("error", "status", "pattern"),
    [
        (utils.UsageError("no prompt"), 2, "prog: no prompt\n"),
        (ValueError("two\nlines\r\nor three"), 1, "prog: two lines or three\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, r"prog: \[Errno 2\] No such file: 'x'\n"),
        (MemoryError(), 1, "prog: out of memory\n"),
        (OverflowError("too large"), 1, "prog: too large\n"),
        (ImportError("no TensorFlow"), 1, "prog: no TensorFlow\n"),
        (ModuleNotFoundError("no mine", name="mine"), 1, "prog: no mine\n"),
        (ModuleNotFoundError(name="tqdm.auto"), 1, "prog: .* tqdm is not .* pip install tqdm\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_errors(capsys, error, status, pattern):
    assert run(command_that_raises(error)) == status
    written = capsys.readouterr()
    assert written.out == "output\n"
    assert re.fullmatch(pattern, written.err)


@pytest.mark.parametrize("error", [TypeError("a mistake in the program"), SystemExit(3)])
def test_other_exceptions_are_passed_on(error):
    with pytest.raises(type(error)) as caught:
        run(command_that_raises(error))
    assert caught.value is error


def test_status():
    assert run(lambda arguments: None) == 0
    assert run(lambda arguments: 3 if arguments == ["a", "b"] else 99, "a", "b") == 3


@pytest.mark.parametrize("package", ["requests", "tqdm"])
def test_a_package_that_is_not_installed(monkeypatch, capsys, tmp_path, package):
    def command(arguments):
        utils.progress_bar()
        utils.download_gpt2_files("124M", str(tmp_path / "124M"))

    monkeypatch.setitem(sys.modules, package, None)
    assert run(command) == 1
    message = f"prog: the package {package} is not installed; install it with: pip install "
    assert capsys.readouterr().err == f"{message}{package}\n"
    assert list(tmp_path.iterdir()) == []


# Streams


@pytest.mark.parametrize("stderr", [nothing, closed, io.StringIO, Writer, Full])
@pytest.mark.parametrize("stdout", [nothing, closed, io.StringIO, Writer, Full])
def test_replaced_streams(monkeypatch, stdout, stderr):
    """The text of an error goes to standard error or nowhere."""
    out = stdout()
    err = stderr()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    utils.complain("prog", "before")  # the library prints warnings outside run_command, too
    assert run(command_that_raises(ValueError("wrong"))) == 1
    if stdout not in (nothing, closed):
        assert out.getvalue() == "output\n"
    if stderr not in (nothing, closed):
        assert err.getvalue() == "prog: before\nprog: wrong\n"


@pytest.mark.parametrize("finish", [bool, sys.exit])
def test_output_that_cannot_be_written(monkeypatch, capsys, finish):
    """argparse exits after it has printed the help."""
    monkeypatch.setattr(sys, "stdout", Full())
    assert run(lambda arguments: finish(print("output"))) == 1
    assert capsys.readouterr().err == NO_SPACE


def test_output_that_the_command_closes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", binary(b""))
    assert run(lambda arguments: sys.stdout.close()) == 1
    assert capsys.readouterr().err.startswith("prog: I/O operation on closed file")


def test_characters_that_the_streams_cannot_encode(monkeypatch):
    monkeypatch.setattr(sys, "stdout", binary(b"", "ascii"))
    monkeypatch.setattr(sys, "stderr", binary(b"", "ascii"))
    command = command_that_raises(ValueError("no model 'é\udcff'"))
    assert run(lambda arguments: print("ü") or command(arguments)) == 1
    assert sys.stdout.buffer.getvalue() == b"?\noutput\n"
    assert sys.stderr.buffer.getvalue() == b"prog: no model '??'\n"


def test_input_that_is_not_utf_8(monkeypatch):
    monkeypatch.setattr(sys, "stdin", binary(b"a\xffb\n"))
    with utils.robust_streams():
        assert input() == "a\ufffdb"


def test_input_of_which_something_was_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", binary(b"one\ntwo\n"))
    assert input() == "one"
    with utils.robust_streams():
        assert input() == "two"


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


@pytest.fixture(params=["file", "buffer", "text"])
def written(request, tmp_path, monkeypatch):
    """A function that writes bytes to a file or to standard input and returns its path."""

    def write(content):
        if request.param == "file":
            path = tmp_path / "text"
            path.write_bytes(content)
            return str(path)
        stream = binary(content)
        if request.param == "text":
            stream = io.StringIO(content.decode("utf-8", "surrogateescape"), newline="")
        monkeypatch.setattr(sys, "stdin", stream)
        return "-"

    return write


@pytest.mark.parametrize("content", TEXTS)
def test_read_text(written, content):
    path = written(content)
    if isinstance(TEXTS[content], str):
        assert utils.read_text(path) == TEXTS[content]
        return
    name = "standard input" if path == "-" else path
    with pytest.raises(ValueError, match=f"{name} is not UTF-8: .* at byte {TEXTS[content]}$"):
        utils.read_text(path)


def test_read_text_from_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", None)
    assert utils.read_text("-") == ""
    with utils.robust_streams():
        assert utils.read_text("-") == ""
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            utils.read_text(str(path))


# Progress bars


@pytest.mark.parametrize("stream", [Terminal, io.StringIO, Writer, nothing, closed])
def test_progress_bars_are_shown_on_a_terminal(monkeypatch, stream):
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    with utils.progress_bar(total=3, desc="three") as bar:
        bar.update(3)
    if stream is Terminal:
        assert "three: 100%" in err.getvalue()
    elif stream not in (nothing, closed):
        assert err.getvalue() == ""


def test_progress_bar_in_a_notebook_without_widgets(monkeypatch):
    """tqdm.auto warns there. It is imported anew, as in a notebook that was just started."""
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    ipython = types.SimpleNamespace(get_ipython=lambda: shell, display=None)
    for name in ("IPython", "IPython.display", "ipykernel", "ipykernel.zmqshell"):
        monkeypatch.setitem(sys.modules, name, ipython)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    def forget():
        for name in ("auto", "autonotebook", "notebook"):
            monkeypatch.delitem(sys.modules, f"tqdm.{name}", raising=False)

    forget()
    with pytest.warns(tqdm.TqdmWarning, match="IProgress"):
        importlib.import_module("tqdm.auto")
    forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with utils.progress_bar(total=3, desc="three") as bar:
            bar.update(3)
    assert caught == []
    assert "three: 100%" in sys.stderr.getvalue()


# Processes: Python flushes the streams when it exits, and descriptors may be closed


PROGRAM = """
import os, sys, utils

def command(arguments):
    print("output")
    if arguments == ["fail"]:
        raise ValueError("wrong")
    if arguments == ["save"]:
        with open("saved", "w") as file:
            os.write(1, b"one")
            os.write(2, b"two")
            file.write("three" + utils.read_text("-"))

sys.exit(utils.run_command("prog", command, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("script", "status", "err"),
    [
        ("prog print >/dev/full", 1, NO_SPACE),
        ("prog fail >/dev/full 2>/dev/full", 1, ""),
        ("exec 3> >(true); wait $!; prog print >&3", 0, ""),  # nobody reads the pipe
        ("prog save <&- >&- 2>&-", 0, ""),
    ],
)
def test_processes(tmp_path, script, status, err):
    (tmp_path / "prog.py").write_text(PROGRAM)
    program = f'prog() {{ PYTHONPATH={shlex.quote(str(ROOT))} python prog.py "$@"; }}'
    result = bash(f"{program}; {script}", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (status, "", err)
    if "save" in script:  # the file does not get the descriptor of a stream, and so its text
        assert (tmp_path / "saved").read_text() == "three"
