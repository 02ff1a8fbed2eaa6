"""What makes a command robust: its streams, its errors, its exit status, its progress bars."""

import contextlib
import errno
import importlib
import io
import os
import subprocess
import sys
import types
import warnings

import pytest
import tqdm
from helpers import ROOT

import utils


class Writer:
    """The least that may stand in place of standard output or standard error."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        """There is nothing to do."""

    def getvalue(self):
        return self.text


class Full(io.StringIO):
    """A stream without room and without a descriptor."""

    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Terminal(io.StringIO):
    def isatty(self):
        return True


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


def no_module(name):
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


# Errors


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (utils.UsageError("no prompt"), 2, "prog: no prompt\n"),
        (ValueError("two\nlines\r\nor three"), 1, "prog: two lines or three\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "prog: [Errno 2] No such file: 'x'\n"),
        (MemoryError(), 1, "prog: out of memory\n"),
        (MemoryError("no 9 GB"), 1, "prog: no 9 GB\n"),
        (OverflowError("too large"), 1, "prog: too large\n"),
        (ImportError("no TensorFlow"), 1, "prog: no TensorFlow\n"),
        (no_module("mine"), 1, "prog: No module named 'mine'\n"),
        (
            no_module("tqdm.auto"),
            1,
            "prog: the package tqdm is not installed; .*pip install tqdm\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_errors(capsys, error, status, message):
    assert run(command_that_raises(error)) == status
    written = capsys.readouterr()
    assert written.out == "output\n"
    if ".*" in message:
        start, _, end = message.partition(".*")
        assert written.err.startswith(start)
        assert written.err.endswith(end)
        assert written.err.count("\n") == 1
    else:
        assert written.err == message


@pytest.mark.parametrize("error", [TypeError("a mistake in the program"), SystemExit(3)])
def test_other_exceptions_are_passed_on(error):
    with pytest.raises(type(error)) as caught:
        run(command_that_raises(error))
    assert caught.value is error


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_status(returned, status):
    assert run(lambda arguments: returned if arguments == ["a", "b"] else 99, "a", "b") == status


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
@pytest.mark.parametrize("stdout", [nothing, closed, io.StringIO, Writer])
def test_replaced_streams(monkeypatch, stdout, stderr):
    """The text of an error goes to standard error or nowhere."""
    out = stdout()
    err = stderr()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert run(command_that_raises(ValueError("wrong"))) == 1
    if stdout not in (nothing, closed):
        assert out.getvalue() == "output\n"
    if stderr not in (nothing, closed):
        assert err.getvalue() == "prog: wrong\n"


@pytest.mark.parametrize("stderr", [nothing, closed])
def test_an_error_text_without_standard_error(monkeypatch, stderr):
    """The library prints warnings outside run_command, too."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", stderr())
    utils.complain("prog", "wrong")
    assert out.getvalue() == ""


def test_redirected_output():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(lambda arguments: print("output")) == 0
    assert out.getvalue() == "output\n"


def test_output_that_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Full())
    assert run(lambda arguments: print("output")) == 1
    assert capsys.readouterr().err == "prog: [Errno 28] No space left on device\n"


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


TEXTS = {
    b"": "",
    b"plain\n": "plain\n",
    b"\xef\xbb\xbfmarked": "marked",
    b"\xef\xbb\xbf\xef\xbb\xbftwice": "\ufefftwice",
    b"later \xef\xbb\xbf": "later \ufeff",
    b"\r\n and \r stay": "\r\n and \r stay",
    "ä€😀".encode(): "ä€😀",
}
NO_TEXTS = {  # the offset of the first wrong byte
    b"\xff": 0,
    b"ab\xff": 2,
    b"\xef\xbb\xbfab\xff": 5,
    "ä€".encode()[:-1]: 2,
    "ä".encode("utf-16"): 0,
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
    assert utils.read_text(written(content)) == TEXTS[content]


@pytest.mark.parametrize("content", NO_TEXTS)
def test_read_text_that_is_not_utf_8(written, content):
    path = written(content)
    with pytest.raises(
        ValueError, match=rf"is not UTF-8: .* at byte {NO_TEXTS[content]}$"
    ) as caught:
        utils.read_text(path)
    assert str(caught.value).startswith("standard input" if path == "-" else path)


def test_read_text_without_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert utils.read_text("-") == ""
    with utils.robust_streams():
        assert utils.read_text("-") == ""


@pytest.mark.parametrize("path", ["missing", ""])
def test_read_text_from_no_file(tmp_path, path):
    with pytest.raises(OSError, match=str(tmp_path)):
        utils.read_text(str(tmp_path / path))


# Progress bars


@pytest.mark.parametrize(
    ("stream", "is_shown"),
    [(Terminal, True), (io.StringIO, False), (Writer, False), (nothing, False), (closed, False)],
)
def test_progress_bars_are_shown_on_a_terminal(monkeypatch, stream, is_shown):
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    with utils.progress_bar(total=3, desc="three") as bar:
        bar.update(3)
    if stream in (Terminal, io.StringIO, Writer):
        assert ("three: 100%" in err.getvalue()) == is_shown
        assert bool(err.getvalue()) == is_shown


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


# Processes


PROGRAM = """
import argparse, os, sys, utils

def command(arguments):
    parser = argparse.ArgumentParser("prog")
    parser.add_argument("what")
    what = parser.parse_args(arguments).what
    print("output")
    if what == "fail":
        raise ValueError("wrong")
    if what == "read":
        print(repr(utils.read_text("-")))
    if what == "save":
        with open("saved", "w") as file:
            os.write(1, b"one")
            os.write(2, b"two")
            file.write("three")

sys.exit(utils.run_command("prog", command, sys.argv[1:]))
"""
NO_SPACE = "prog: [Errno 28] No space left on device\n"


@pytest.fixture
def process(tmp_path):
    """A function that runs PROGRAM in bash, where it is called prog."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)

    def run_script(script, stdout=subprocess.PIPE):
        return subprocess.run(
            ["bash", "-c", f'prog() {{ "$PYTHON" program.py "$@"; }}; {script}'],
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=tmp_path,
            text=True,
        )

    return run_script


@pytest.mark.parametrize(
    ("script", "status", "out", "err"),
    [
        ("prog fail 2>&-", 1, "output\n", ""),
        ("prog fail >&-", 1, "", "prog: wrong\n"),
        ("prog read <&-", 0, "output\n''\n", ""),
        ("prog print >/dev/full", 1, "", NO_SPACE),
        ("prog --help >/dev/full", 1, "", NO_SPACE),
        ("prog fail >/dev/full 2>/dev/full", 1, "", ""),
    ],
)
def test_processes(process, script, status, out, err):
    result = process(script)
    assert (result.returncode, result.stdout, result.stderr) == (status, out, err)


def test_a_process_without_streams_writes_its_file(process, tmp_path):
    """The file does not get the descriptor of a stream, and with it the stream's text."""
    assert process("prog save <&- >&- 2>&-").returncode == 0
    assert (tmp_path / "saved").read_text() == "three"


@pytest.mark.parametrize("argument", ["print", "--help"])
def test_a_pipe_without_a_reader(process, argument):
    reader, writer = os.pipe()
    os.close(reader)
    result = process(f"prog {argument}", stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")
