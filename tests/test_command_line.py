"""The command line, mostly in this process. Real processes are for what needs one."""

import contextlib
import functools
import inspect
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from helpers import (
    FILES,
    ROOT,
    python,
    tiktoken_encoding,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from server import Server

import gpt2
import gpt2_pico
import terminal
import utils

N = 6  # tokens that a test asks for
END = 1023  # the id of <|endoftext|> in the vocabulary of the tiny model
ROMEO = (  # what transformers makes of "ROMEO:" with the tiny model
    "\nI'll not believe thee, and I'll believe thee.\n\n"
    "ROMEO:\nI'll not believe thee, and I'll believe"
)


class Result(NamedTuple):
    status: int
    out: str
    err: str


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def run(*words, stdin=b"", stream=io.TextIOWrapper):
    """Run the command line in this process -> Result."""
    out = io.StringIO()
    err = io.StringIO()
    with (
        np.errstate(over="ignore", invalid="ignore"),  # as in a process
        mock.patch.object(sys, "stdin", stream(io.BytesIO(stdin), "utf-8")),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = terminal.run(gpt2.command, list(words), gpt2.Options)
    return Result(status, out.getvalue(), err.getvalue())


def run_process(*words, program="gpt2.py", **options):
    """Run a command line as a process -> Result."""
    return Result(*python("-W", "error", program, *words, **options))


def options_for(models_dir, n=N):
    """The options for the tiny model and n tokens."""
    return [f"--models_dir={models_dir}", "--model_size=tiny", f"--n_tokens_to_generate={n}"]


@pytest.fixture(scope="module")
def options(models_dir):
    return options_for(models_dir)


@pytest.fixture(scope="module")
def oracle(models_dir, tiny):
    """A function that continues a prompt with tiktoken and gpt2_pico.py."""
    encoding = tiktoken_encoding(models_dir, "tiny")
    _, hparams, params = tiny

    @functools.cache
    def continue_text(prompt, special=False):
        allowed = "all" if special else set()
        ids = encoding.encode(prompt, allowed_special=allowed, disallowed_special=()) or [END]
        new_ids = gpt2_pico.generate(ids, params, hparams["n_head"], N)
        return encoding.decode(new_ids).partition("<|endoftext|>")[0] + "\n"

    return continue_text


def assert_error(result, status, *parts):
    """It printed only one line, on standard error, with these parts -> the line."""
    assert (result.status, result.out) == (status, ""), result
    assert re.fullmatch(r"gpt2\.py: [^\n]+\n", result.err)
    for part in parts:
        assert part in result.err
    return result.err


def assert_usage_error(words, *parts):
    """It is refused with one line before anything is loaded -> the line."""
    with mock.patch.object(utils, "load_encoder_hparams_and_params", side_effect=AssertionError):
        return assert_error(run(*words), 2, *parts)


# Prompts


PROMPTS = (
    *("the", "1984", "1, 2", "None", "a #b", "{x}", "[1]", "'q'", "", " ", "x=1", "é\n", "True"),
    *("-1", "\\n", "- a", "--the", "-a", "--help me", "--", "a<|endoftext|>b"),
)


def test_prompts_are_taken_literally(options):
    for prompt in PROMPTS:
        forms = [[f"--prompt={prompt}"]]
        if not re.match("--|-[a-z]", prompt):
            forms += [[prompt], ["--prompt", prompt]]
        for words in forms:
            assert arguments_of_continuation(words + options)[0] == prompt


def arguments_of_continuation(words):
    """What the words of the command line make of the text and the options -> (text, options)."""
    with mock.patch.object(gpt2, "printed", return_value=()) as printed:
        assert run(*words) == Result(0, "\n", "")
    return printed.call_args.args[0], printed.call_args.kwargs


CONTENTS = {
    "thé\n": "thé",
    "a\r\n": "a",
    "a\n\n": "a\n",
    "\ufeffthe\nand": "the\nand",
    "a<|endoftext|>b": "a<|endoftext|>b",
}


@pytest.mark.parametrize("words", [["-"], []])
def test_a_prompt_from_standard_input(options, oracle, words):
    for content, prompt in CONTENTS.items():
        result = run(*words, *options, stdin=content.encode())
        assert result == Result(0, oracle(prompt), "")


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf"])
def test_empty_standard_input(options, oracle, content):
    """It is an empty prompt only if it was asked for."""
    assert run("-", *options, stdin=content) == Result(0, oracle(""), "")
    assert_error(run(*options, stdin=content), 2, "there is no prompt")


def test_no_prompt_at_a_terminal():
    line = assert_error(run("--seed=1", stdin=b"the", stream=Terminal), 2, "there is no prompt")
    example = re.search(r'gpt2\.py "(.*)" (--model_size) (tiny)$', line)
    assert run(*example.groups(), "--n_tokens_to_generate=3") == Result(0, "\nI'll\n", "")


@pytest.mark.parametrize("words", [["-"], [], ["\udcff"]])
def test_text_that_is_not_utf_8(options, words):
    assert_error(run(*words, *options, stdin=b"the\xff"), 1, "not UTF-8")


def test_special_tokens(options, oracle):
    prompt = "the<|endoftext|>and"
    answers = oracle(prompt, special=True) + oracle("the")
    words = ["--special-tokens", "--interactive", prompt, *options]
    assert run(*words, stdin=b"the\n") == Result(0, answers, "")
    assert oracle(prompt) not in answers


# Options


PICOGPTS = [
    "the 6 tiny DIR",
    "the 6 --model_size=tiny --models_dir=DIR",
    "the --n-tokens-to-generate 6 --model-size tiny --models-dir DIR",
    "-p=the 6 tiny DIR",
    "--models_dir=DIR the --model_size=tiny 6",
    "the 6 --seed=1 tiny --temperature=0 DIR --seed 2",
    "-p=the --temp 0 --model_s tiny --models-d DIR --n-t 6",
]


@pytest.mark.parametrize("words", PICOGPTS)
def test_arguments_of_picogpt(models_dir, oracle, words):
    result = run(*words.replace("DIR", models_dir).split())
    assert (result.status, result.out) == (0, oracle("the"))


def test_sampling(options):
    words = ["the", "--temperature", "2.5", "--top_k", "50", "--top_p=.95", "--seed=1", *options]
    sampling = {"temperature": 2.5, "top_k": 50, "top_p": 0.95, "seed": 1}
    assert sampling.items() <= arguments_of_continuation(words)[1].items()


def test_stop_texts(models_dir, options):
    words = ["ROMEO:", "--stop", "thee", "--stop=not", *options_for(models_dir, 40)]
    assert run(*words) == Result(0, ROMEO.partition("not")[0] + "\n", "")
    words = ["a", "--stop", r"\na\n\ ", "--stop=é", "--stop", "-", "--stop", "True"]
    stops = arguments_of_continuation(words + options)[1]["stop"]
    assert stops == ["\na\n\\ ", "é", "-", "True"]


@pytest.mark.parametrize("words", ["--seed 0", "--top-k=5 --temperature=0", "--n_samples 2"])
def test_options_without_effect_give_a_warning(options, oracle, words):
    result = run("the", *words.split(), *options)
    assert result.status == 0
    assert oracle("the") in result.out
    assert re.fullmatch(r"gpt2\.py: warning: at temperature 0, [^\n]+\n", result.err)
    assert run("the", "--top_k=1", "--temperature=1e-3", *options).err == ""


MISTYPED = {
    "Temperature": "temperature",
    "topp": "top_p",
    "interactve": "interactive",
    "nmodels_dir": "models_dir",
    "nope": "help",
}


@pytest.mark.parametrize("typed", MISTYPED)
def test_a_mistyped_option(typed):
    message = f"there is no option --{typed}; did you mean --{MISTYPED[typed]}"
    for words in ([f"--{typed}=1"], ["hi", f"--{typed}"]):
        assert_usage_error(words, message)


QUOTES = "put a text of several words in quotes"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["a", "b"], [QUOTES, "--n_tokens_to_generate must be a whole number, got 'b'"]),
        (["a", "1", "small", "models", "more"], [QUOTES, "'more'"]),
        (["-like this"], ["-like this"]),
        (["--prompt", "--like this"], ["--prompt needs a value", "--prompt=-x"]),
        (["a", "-n", "3"], ["option -n;", "--n_tokens_to_generate or --n_samples"]),
        (["a", "--", "--trace"], ["no option --;"]),
        (["a", "-1"], ["n_tokens_to_generate must be 0 or more, got -1"]),
        (["a", "--temperature", "hot"], ["--temperature must be a number, got 'hot'"]),
        (["a", "--interactive=true"], ["--interactive must be True or False, got 'true'"]),
        (["a", "--temperature", "nan"], ["temperature must be 0 or more, got nan"]),
    ],
    ids=str,
)
def test_unusable_words_are_one_line_before_any_work(words, parts):
    assert_usage_error(words, *parts)


def test_help():
    page = inspect.getdoc(gpt2.command) + "\n"
    assert run("a", "--nope", "-h") == Result(0, page, "")
    assert run_process("--help") == Result(0, page, "")
    lines = page.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 40  # one screen
    for name in inspect.signature(gpt2.Options).parameters:
        assert f"--{name}" in page


# Errors after the arguments


def test_names_in_any_folder(tmp_path, monkeypatch):
    """tiny is found; other models are looked for there; 124M cannot belong to the prompt."""
    monkeypatch.chdir(tmp_path)
    assert run("ROMEO:", "40", "tiny") == Result(0, f"{ROMEO}\n", "")
    found = [str(tmp_path / "models"), "124M, 355M, 774M, 1558M", "tiny"]
    assert_error(run("hi", "--model_size=nope"), 1, *found)
    monkeypatch.setenv("GPT2_BASE_URL", "nonsense")
    error = run("a", "3", "124M")
    assert (error.status, error.out) == (1, "")
    assert "cannot download nonsense/124M/checkpoint" in error.err


def test_damaged_parameters(options, tiny):
    encoder, hparams, params = tiny
    damaged = params | {"ln_f": params["ln_f"] | {"g": np.full(128, np.nan, np.float32)}}
    model = encoder, hparams, damaged
    with mock.patch.object(utils, "load_encoder_hparams_and_params", return_value=model):
        assert_error(
            run("--interactive", *options, stdin=b"the\nand\n"), 1, "the logits are not finite"
        )


def test_from_a_server_to_the_text(models_dir, tmp_path, monkeypatch, oracle):
    with Server({name: Path(models_dir, "tiny", name).read_bytes() for name in FILES}) as server:
        monkeypatch.setenv("GPT2_BASE_URL", server.address)
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", "1")
        for note in (f"downloading 124M from {server.address}\n", ""):
            result = run("the", str(N), "--models_dir", str(tmp_path))
            assert result == Result(0, oracle("the"), note)
        assert len(server.requests) == len(FILES)


def test_a_prompt_that_is_cut_gives_a_warning(options, oracle):
    result = run("the " * 300, *options)
    assert result.status == 0
    assert re.fullmatch(r"gpt2\.py: warning: the first \d+ tokens [^\n]*\n", result.err)
    assert run("--interactive", *options, stdin=b"quit\n").err.count("Ctrl-D exits") == 1


def test_the_model_on_one_screen(oracle):
    """gpt2_pico.py prints what gpt2.py prints. No prompt is taken for a number or a comment."""
    result = run_process("ROMEO:", "--model_size", "tiny", program="gpt2_pico.py")
    assert result == Result(0, f"{ROMEO}\n", "")
    for prompt in "Speak, Romeo", "1597", "the # and":
        result = run_process(prompt, str(N), "tiny", program="gpt2_pico.py")
        assert result == Result(0, oracle(prompt), "")


# Interactive use


def test_interactive_from_a_pipe_prints_only_the_answers(options, oracle):
    lines = "\ufeffthe\n\r\n\nand\r\nthé".encode()
    answers = oracle("in") + oracle("the") + oracle("and") + oracle("thé")
    assert run("in", "-i", *options, stdin=lines) == Result(0, answers, "")
    assert run("--interactive", "-", *options, stdin=b"the\nand\n").out == oracle("the\nand")
    lines = "a \ufffd b\n".encode()  # a character that stands for damage elsewhere is no damage
    assert run("--interactive", *options, stdin=lines) == Result(0, oracle("a \ufffd b"), "")
    result = run("--interactive", *options, stdin=b"the\na\xffb\nand\n")
    assert (result.status, result.out) == (1, oracle("the"))
    assert re.fullmatch(r"gpt2\.py: the prompt is not UTF-8[^\n]*\n", result.err)


def test_interactive_at_a_terminal(models_dir):
    """The answers have 100,000 tokens, so each one is interrupted."""
    beginning = ROMEO.partition(" and")[0].encode().replace(b"\n", b"\r\n")
    terminal, end = pty.openpty()
    words = ["gpt2.py", "ROMEO:", "--interactive", *options_for(models_dir, 100_000)]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), end)
    environment = os.environ | {"TERM": "dumb", "PYTHONUNBUFFERED": ""}  # no escape sequences
    shown = b""

    def wait_for(text):
        """Read until the text is shown -> what is shown before it."""
        nonlocal shown
        while text not in shown:
            ready, _, _ = select.select([terminal], [], [], 120)
            assert ready, f"{text} did not appear: {shown}"
            shown += os.read(terminal, 1000)
        before, _, shown = shown.partition(text)
        assert b"Traceback" not in before
        return before

    command = [sys.executable, "-W", "error", *words]
    with subprocess.Popen(command, cwd=ROOT, env=environment, **streams) as process:
        os.close(end)
        try:
            assert b"Ctrl-D" in wait_for(beginning)  # the answer to the prompt in the arguments
            process.send_signal(signal.SIGINT)
            wait_for(b"\r\n> ")
            os.write(terminal, b"\n")
            assert wait_for(b"> ") == b"\r\n"  # an empty line is no prompt
            os.write(terminal, b"a\xffb\n")
            wait_for(b"\r\nthe prompt is not UTF-8")
            wait_for(b"\r\n> ")
            process.send_signal(signal.SIGINT)
            os.write(terminal, b"\n")  # readline needs a key if it did not wait yet
            wait_for(b"> ")
            os.write(terminal, b"ROMEO:\n")
            wait_for(beginning)
            process.send_signal(signal.SIGINT)
            wait_for(b"\r\n> ")
            os.write(terminal, b"\x04")
            assert process.wait(timeout=120) == 0
        finally:
            process.kill()
            os.close(terminal)


# Processes


def test_the_c_locale(options):
    """The arguments are UTF-8 all the same. Characters that cannot be shown become ?."""
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["é中", "--temperature=9", "--seed=6", *options]
    text = run(*words).out
    assert not text.isascii()
    expected = Result(0, text.encode("ascii", "replace").decode(), "")
    assert run_process(*words, env=os.environ | environment) == expected
    words = ["--interactive", *words[1:]]
    assert run_process(*words, env=os.environ | environment, input="é中\n") == expected


# Random words


WORDS = (
    *("-", "--", "---", "--=", "-h", "-i", "-v", "-p", "-p=a", "-n", "-s", "--no", "2", "3"),
    *("--prompt", "--interactive", "--special_tokens", "--seed", "--top_k=1", "--n_samples"),
    *("--n-samples=1", "--temperature=1", "--stop", "--stop=", "--stop=a"),
    *("--separator", "--trace", "--verbose", "--completion"),  # fire's own
)


@pytest.mark.parametrize("n", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_words(tiny, n):
    """An exception here would be a traceback in a process."""
    texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)

    @settings(max_examples=n, deadline=None, derandomize=True)
    @given(words=st.lists(texts | st.sampled_from(WORDS), max_size=5))
    def check(words):
        with mock.patch.object(utils, "load_encoder_hparams_and_params", return_value=tiny):
            result = run(*words, "--n_tokens_to_generate=1")
        assert result.out == "" or result.status == 0
        lines = result.err.splitlines()
        assert result.err.count("\n") == len(lines)
        errors = [line for line in lines if not line.startswith("gpt2.py: warning: ")]
        assert (result.status, len(errors)) in ((0, 0), (1, 1), (2, 1))

    check()
