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
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from helpers import (
    FILES,
    ROOT,
    SMALL_HPARAMS,
    copy_model,
    float64_gpt2,
    random_params,
    read_terminal,
    tiktoken_encoding,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from server import Server

import gpt2
import utils

N = 6  # tokens that a test asks for
END = 268  # the id of <|endoftext|> in the small vocabulary
ROMEO = (  # what transformers makes of "ROMEO:" with the tiny model
    "\nI'll not be a brave, and I'll be accounted\nTo see the body of my body.\n\nROMEO:\nO, I"
)
USAGE_LINES = 3


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
        mock.patch.object(sys, "stdin", stream(io.BytesIO(stdin), "utf-8")),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = gpt2.command_line(list(words))
    return Result(status, out.getvalue(), err.getvalue())


def start(*words, python=("-W", "error"), env=(), **streams):
    """Start the command line as a process."""
    environment = os.environ | dict(env)
    environment.pop("PYTHONUNBUFFERED", None)  # it would hide a missing flush
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | streams
    command = [sys.executable, *python, str(ROOT / "gpt2.py"), *words]
    return subprocess.Popen(command, env=environment, **streams)


def run_process(*words, stdin=b"", **kwargs):
    """Run the command line as a process -> Result with bytes."""
    with start(*words, **kwargs) as process:
        out, err = process.communicate(stdin, timeout=120)
    return Result(process.returncode, out, err)


def options_for(models_dir, model_size, n):
    return [
        f"--models_dir={models_dir}",
        f"--model_size={model_size}",
        f"--n_tokens_to_generate={n}",
    ]


@pytest.fixture(scope="module")
def small_dir(small_model):
    """The models_dir of the small model, which has been verified."""
    utils.load_encoder_hparams_and_params("small", str(small_model.parent))
    return str(small_model.parent)


@pytest.fixture(scope="module")
def small(small_dir):
    """The options for the small model."""
    return options_for(small_dir, "small", N)


@pytest.fixture(scope="module")
def oracle(small_dir):
    """A function that continues a prompt with tiktoken, the model in float64, and argmax."""
    encoding = tiktoken_encoding(small_dir, "small")
    params = random_params(SMALL_HPARAMS)

    @functools.cache
    def continue_text(prompt, special=False):
        ids = encoding.encode(
            prompt, allowed_special="all" if special else set(), disallowed_special=()
        )
        ids = ids or [END]
        new_ids = []
        while len(new_ids) < N:
            logits = float64_gpt2(ids + new_ids, params, SMALL_HPARAMS["n_head"])
            new_id = int(np.argmax(logits[-1]))
            if new_id == END:
                break
            new_ids.append(new_id)
        return encoding.decode(new_ids) + "\n"

    return continue_text


def assert_error(result, status, *parts):
    """It printed only one line, on standard error, with these parts."""
    assert (result.status, result.out) == (status, ""), result
    assert re.fullmatch(r"gpt2\.py: [^\n]+\n", result.err)
    for part in parts:
        assert part in result.err


def assert_usage_error(words, *parts):
    """It is refused before anything is loaded."""
    with mock.patch.object(utils, "load_encoder_hparams_and_params", side_effect=AssertionError):
        assert_error(run(*words), 2, *parts)


# Prompts


PROMPTS = (
    *("the", "1984", "1, 2, 3", "None", "a #b", "{x}", "[1]", "'q'", '"', "", " ", "x=1", "é\n"),
    *("-1", "True", "\\n", "- a", "--the", "-a", "--help me", "--", "a<|endoftext|>b"),
)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_are_taken_literally(small, oracle, prompt):
    expected = Result(0, oracle(prompt), "")
    assert run(f"--prompt={prompt}", *small) == expected
    if not re.match("--|-[a-z]", prompt):
        assert run(prompt, *small) == expected
        assert run("--prompt", prompt, *small) == expected


@pytest.mark.parametrize("words", [["-"], []])
@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("thé\n", "thé"),
        ("the", "the"),
        ("a\r\n", "a"),
        ("a\n\n", "a\n"),
        ("\ufeffthe\nand", "the\nand"),
    ],
)
def test_a_prompt_from_standard_input(small, oracle, words, content, prompt):
    assert run(*words, *small, stdin=content.encode()) == Result(0, oracle(prompt), "")


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf"])
def test_empty_standard_input(small, oracle, content):
    """It is an empty prompt only if it was asked for."""
    assert run("-", *small, stdin=content) == Result(0, oracle(""), "")
    assert_usage_is_shown(run(*small, stdin=content))


def test_no_prompt_at_a_terminal():
    assert_usage_is_shown(run(stream=Terminal))
    assert_usage_is_shown(run("--seed=1", stream=Terminal))


def assert_usage_is_shown(result):
    assert (result.status, result.out) == (2, "")
    lines = result.err.splitlines()
    assert len(lines) == USAGE_LINES
    assert "GPT-2" in lines[0]
    assert "gpt2.py --help" in lines[2]
    example = re.search(r'gpt2\.py "(.*)" (--model_size) (tiny)$', lines[1])
    offline = run(*example.groups(), "--n_tokens_to_generate=3")
    assert offline == Result(0, "\nI'll\n", "")


@pytest.mark.parametrize("words", [["-"], [], ["\udcff"], ["the", "--stop=\udcff"]])
def test_text_that_is_not_utf_8(small, words):
    status = 2 if any("\udcff" in word for word in words) else 1
    assert_error(run(*words, *small, stdin=b"the\xff"), status, "not UTF-8")


def test_special_tokens(small, oracle):
    prompt = "the<|endoftext|>and"
    as_text = oracle(prompt)
    as_token = oracle(prompt, special=True)
    assert as_text != as_token
    assert run(prompt, *small).out == as_text
    assert run(prompt, "--special_tokens", *small).out == as_token
    assert run("--special-tokens", prompt, *small).out == as_token
    lines = f"{prompt}\nthe\n{prompt}\n".encode()
    answers = as_token + oracle("the") + as_token
    assert run("--special_tokens", "--interactive", *small, stdin=lines).out == answers


# Options


@pytest.mark.parametrize(
    "words",
    [
        ["the", "6", "small", "DIR"],
        ["the", "6", "--model_size=small", "--models_dir=DIR"],
        ["the", "--n-tokens-to-generate", "6", "--model-size", "small", "--models-dir", "DIR"],
        ["-p", "the", "--n_tokens_to_generate=6", "--model_size", "small", "--models-dir=DIR"],
        ["-p=the", "6", "small", "DIR"],
        ["--models_dir=DIR", "the", "--model_size=small", "6"],
        ["--prompt", "the", "6", "small", "DIR"],
        ["the", "6", "--seed=1", "small", "--temperature=0", "DIR", "--seed", "2"],
    ],
    ids=" ".join,
)
def test_arguments_of_picogpt(small_dir, oracle, words):
    result = run(*(word.replace("DIR", small_dir) for word in words))
    assert (result.status, result.out) == (0, oracle("the"))


@pytest.mark.parametrize("words", [["--top_k=1"], ["--top-p", "1e-6"], ["--temperature", "1e-9"]])
def test_sampling_from_one_token_is_greedy(small, oracle, words):
    assert run("the", "--temperature=2", "--seed", "7", *words, *small).out == oracle("the")


def test_sampling(small, small_dir, oracle):
    words = ["the", "--temperature", "2.5", "--top_k", "50", "--top_p=.95", *small]
    first = run(*words, "--seed=1").out
    assert first == run(*words, "--seed", "1").out
    assert len({first, run(*words, "--seed=2").out, oracle("the")}) == 3
    options = {"temperature": 2.5, "top_k": 50, "top_p": 0.95, "seed": 1}
    assert first == gpt2.main("the", N, "small", small_dir, **options) + "\n"


def test_samples_have_headings(small, oracle):
    result = run("the", "--n_samples", "3", "--temperature=9", "--top_k=1", *small)
    line = "=" * 40
    headings = [f"{line} SAMPLE {number} {line}\n" for number in (1, 2, 3)]
    assert result == Result(0, "".join(heading + oracle("the") for heading in headings), "")


@pytest.mark.parametrize(
    ("stops", "end"),
    [
        (["\\n\\n"], "\n\n"),
        (["brave", "not"], "not"),
        (["not", "brave"], "not"),
        (["see\\tthe", "body\\n"], None),
        (["my body.\\n"], "my body.\n"),
        (["\\\\n", "a"], "a"),
        (["-", "True"], None),
    ],
)
def test_stop_texts(models_dir, stops, end):
    words = [word for stop in stops for word in ("--stop", stop)]
    text = ROMEO if end is None else ROMEO.partition(end)[0]
    assert run("ROMEO:", *words, *options_for(models_dir, "tiny", 40)) == Result(0, f"{text}\n", "")


def test_a_backslash_in_a_stop_text(small):
    with mock.patch.object(gpt2, "continuation", return_value=()) as continuation:
        run("a", "--stop", r"\\n\n\t\a\\", "--stop=é", *small)
    assert continuation.call_args.kwargs["stop"] == ["\\n\n\t\\a\\", "é"]


@pytest.mark.parametrize(
    ("words", "warnings"),
    [
        (["--seed", "1"], ["no effect: --seed"]),
        (["--top-k=5", "--top_p=.5", "--temperature=0"], ["no effect: --top_k, --top_p"]),
        (["--n_samples", "2"], ["all samples are equal"]),
        (["--n_samples", "1"], []),
        (["--top_k=1", "--temperature=1e-3"], []),
    ],
)
def test_options_without_effect_give_a_warning(small, oracle, words, warnings):
    result = run("the", *words, *small)
    assert result.status == 0
    assert oracle("the") in result.out
    lines = result.err.splitlines()
    assert len(lines) == len(warnings)
    for line, warning in zip(lines, warnings, strict=True):
        assert line.startswith("gpt2.py: warning: at temperature 0, ")
        assert line.endswith(warning)


OTHER_WORDS = {
    "model": "model_size",
    "temp": "temperature",
    "length": "n_tokens_to_generate",
    "max_tokens": "n_tokens_to_generate",
    "max-new-tokens": "n_tokens_to_generate",
    "max_token": "n_tokens_to_generate",
    "num_samples": "n_samples",
    "nsamples": "n_samples",
    "models_dri": "models_dir",
    "modelsize": "model_size",
    "temprature": "temperature",
    "Temperature": "temperature",
    "topp": "top_p",
    "interactve": "interactive",
    "special": "special_tokens",
    "promt": "prompt",
    "noprompt": "prompt",
}


@pytest.mark.parametrize("typed", OTHER_WORDS)
def test_another_name_of_an_option(typed):
    words = [f"there is no option --{typed}; ", f"did you mean --{OTHER_WORDS[typed]}?\n"]
    assert_usage_error(["hi", f"--{typed}", "1"], *words)
    assert_usage_error([f"--{typed}=1"], *words)
    assert_usage_error(["hi", f"--{typed}"], *words)


QUOTES = "put the prompt in quotes"
WHOLE = "must be a whole number, 0 or more, got"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["a", "b"], [QUOTES, "'b' is taken for n_tokens_to_generate"]),
        (["a", "upper"], [QUOTES, "'upper'"]),
        (["a", "1", "small", "models", "more"], [QUOTES, "'more'"]),
        (["--prompt=a", "b"], [QUOTES, "'b'"]),
        (["-like this"], ["-like this", "--prompt="]),
        (["--prompt", "--like this"], ["--prompt needs a value", "--prompt=-x"]),
        (["--prompt", "-like this"], ["--prompt"]),
        (["a", "--nope", "1"], ["--nope", "--help"]),
        (["a", "--nope=1"], ["--nope;"]),
        (["a", "--no_color"], ["--no_color"]),
        (["a", "-n", "3"], ["-n is ambiguous", "--n_tokens_to_generate or --n_samples"]),
        (["a", "-t", "1"], ["-t is ambiguous", "--temperature, --top_k or --top_p"]),
        (["a", "-s=1"], ["-s is ambiguous", "--seed, --stop or --special_tokens"]),
        (["a", "-x"], ["no option -x"]),
        (["a", "--model-size", "--seed", "1"], ["--model-size needs a value"]),
        (["a", "--n_tokens_to_generate"], ["--n_tokens_to_generate needs a value"]),
        (["a", "--stop"], ["--stop needs a value"]),
        (["a", "--seed", "-x"], ["--seed needs a value"]),
        (["a", "--interactive=True"], ["--interactive takes no value"]),
        (["a", "--special-tokens=1"], ["--special-tokens takes no value"]),
        (["a", "--", "--trace"], ["no option --;"]),
        (["-", "--", "--interactive"], ["no option --;"]),
        (["a", "--n_tokens_to_generate", "x"], [f"n_tokens_to_generate {WHOLE} 'x'"]),
        (["a", "--n_tokens_to_generate=2.5"], [f"n_tokens_to_generate {WHOLE} '2.5'"]),
        (["a", "-1"], [f"n_tokens_to_generate {WHOLE} '-1'"]),
        (["a", "--seed", "-3"], [f"--seed {WHOLE} '-3'"]),
        (["a", "--top_k", "-3"], [f"--top_k {WHOLE} '-3'"]),
        (["a", "--temperature", "-0.5"], ["--temperature must be a number, 0 or more, got '-0.5'"]),
        (["a", "--temperature", "nan"], ["must be a number, 0 or more, got 'nan'"]),
        (["a", "--temperature", "hot"], ["must be a number, 0 or more, got 'hot'"]),
        (["a", "--top_p", "90"], ["--top_p must be above 0 and at most 1, got '90'", "90% is 0.9"]),
        (["a", "--n_samples", "0"], ["must be a whole number from 1 to 100000, got '0'"]),
        (["a", "--stop", ""], ["--stop must be a non-empty text, got ''"]),
    ],
    ids=str,
)
def test_unusable_words_are_one_line_before_any_work(words, parts):
    assert_usage_error(words, *parts)
    if QUOTES not in parts:
        with pytest.raises(AssertionError):
            assert_usage_error(words, QUOTES)


@pytest.mark.parametrize("python", [[], ["-OO"]])
def test_help_matches_the_signature(python):
    page = run_process("a", "--nope", "-h", python=python).out.decode()
    assert page == run("--help").out
    shown = dict(re.findall(r"^ *--(\w+) +(\S+)?(?=  |\n)", page, re.MULTILINE))
    defaults = {}
    for name, parameter in inspect.signature(gpt2.main).parameters.items():
        if name not in ("prompt", "special_tokens"):
            defaults[name] = "" if parameter.default is None else str(parameter.default)
    assert {name: shown.pop(name) for name in defaults} == defaults
    assert shown == {"special_tokens": "", "interactive": "", "help": ""}
    assert max(map(len, page.splitlines())) <= 100


# Errors after the arguments


def test_a_model_that_does_not_exist(small_dir):
    found = ["there is no model", "124M, 355M, 774M, 1558M"]
    assert_error(run("a", "--model_size", "nope", "--models_dir", small_dir), 1, *found, "small")
    hint = f"'poems' is taken for model_size (if it belongs to the prompt, {QUOTES}): there is no"
    assert_error(run("write", "40", "poems", "--models_dir", small_dir), 1, hint, *found, "small")
    assert_error(run("write", "40", "poems", "there"), 1, hint)
    for words in (["--model_size=poems"], ["40", "--model_size", "poems"]):
        result = run("a", *words, "--models_dir", small_dir)
        assert_error(result, 1, *found)
        assert QUOTES not in result.err


@pytest.mark.parametrize(
    ("name", "size"),
    [("gpt2", "124M"), ("gpt2-medium", "355M"), ("gpt2-large", "774M"), ("gpt2-xl", "1558M")],
)
def test_another_name_of_a_published_size(small_dir, name, size):
    words = ["hi", "--model_size", name, "--models_dir", small_dir]
    assert_error(run(*words), 1, f"did you mean {size}", f"{small_dir}/{name}")


def test_the_bundled_model_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model_size", "tiny", "--n_tokens_to_generate"]
    assert run("ROMEO:", *words, "40") == Result(0, f"{ROMEO}\n", "")
    assert_error(run("hi", "--model_size=nope"), 1, str(tmp_path / "models"))


def test_a_folder_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", "nonsense")
    words = ["a", "3", "124M", str(tmp_path)]
    result = run(*words)
    assert_error(result, 1, "GPT2_BASE_URL", "'nonsense'")
    assert QUOTES not in result.err  # 124M is a model's name
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")
    (tmp_path / "124M").write_text("a file where a folder should be")
    assert_error(run(*words), 1, "124M")


@pytest.mark.parametrize("name", [b"m\xff", b"[a]*?", "é".encode()])
def test_a_folder_with_any_name(tmp_path, name):
    folder = tmp_path / os.fsdecode(name)
    copy_model(ROOT / "models" / "tiny", folder / "tiny")
    assert run("ROMEO:", "40", "tiny", str(folder)) == Result(0, f"{ROMEO}\n", "")


def test_damaged_parameters(small, small_dir):
    encoder, hparams, params = utils.load_encoder_hparams_and_params("small", small_dir)
    for value in (np.nan, np.inf):
        for key, array in params["ln_f"].items():
            damaged = params | {"ln_f": params["ln_f"] | {key: np.full_like(array, value)}}
            model = encoder, hparams, damaged
            with mock.patch.object(utils, "load_encoder_hparams_and_params", return_value=model):
                assert_error(run("the", *small), 1, "the logits are not finite")
                result = run("--interactive", *small, stdin=b"the\nand\n")
            assert (result.status, result.out) == (1, "")
            assert result.err.count("gpt2.py: the logits are not finite") == 2


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("too large"), OSError("no x")])
def test_exceptions_are_one_line(small, error):
    with mock.patch.object(gpt2, "continuation", side_effect=error):
        assert_error(run("the", *small), 1, str(error) or "out of memory")


def test_from_a_server_to_the_text(small_model, tmp_path, monkeypatch, oracle):
    words = ["the", str(N), "--models_dir"]
    with Server({name: (small_model / name).read_bytes() for name in FILES}) as server:
        monkeypatch.setenv("GPT2_BASE_URL", server.address)
        monkeypatch.setenv("no_proxy", "*")
        assert_error(run(*words, str(tmp_path / "other")), 1, "/124M/", "sha256")
        server.heal()
        monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", "1")
        first = run(*words, str(tmp_path))
        second = run(*words, str(tmp_path))
        assert len(server.requests) == len(FILES)
    assert (first.status, first.out) == (0, oracle("the"))
    assert re.fullmatch(r"warning: GPT2_ALLOW_UNVERIFIED [^\n]+\n", first.err)
    assert second == Result(0, oracle("the"), "")


# Interactive use


def test_interactive_from_a_pipe_prints_only_the_answers(small, oracle):
    lines = "\ufeffthe\n\r\n\nand\r\nthé".encode()
    answers = oracle("the") + oracle("and") + oracle("thé")
    assert run("--interactive", *small, stdin=lines) == Result(0, answers, "")
    assert run("in", "-i", *small, stdin=lines) == Result(0, oracle("in") + answers, "")
    assert run("--interactive", "-", *small, stdin=b"the\nand\n").out == oracle("the\nand")
    assert run("--interactive", *small, stdin=b"") == Result(0, "", "")


def test_interactive_from_a_pipe_goes_on_after_an_error(small, oracle):
    result = run("--interactive", *small, stdin=b"the\na\xffb\nand\n")
    assert result == Result(1, oracle("the") + oracle("and"), "gpt2.py: the prompt is not UTF-8\n")


def status_after_talk(words, talk):
    """Run the command line on a pseudo-terminal, with talk(send, wait_for, process) -> status."""
    terminal, end = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), end)
    process = start(*words, env={"TERM": "dumb"}, **streams)  # no escape sequences
    os.close(end)
    shown = b""

    def wait_for(text):
        """Read until the text is shown -> what is shown before it."""
        nonlocal shown
        while text not in shown:
            ready, _, _ = select.select([terminal], [], [], 60)
            assert ready, f"{text} did not appear: {shown}"
            shown += os.read(terminal, 1000)
        before, _, shown = shown.partition(text)
        return before

    try:
        talk(lambda data: os.write(terminal, data), wait_for, process)
        shown += read_terminal(terminal)
        assert b"Traceback" not in shown
        return process.wait(timeout=60)
    finally:
        process.kill()


def test_interactive_at_a_terminal(models_dir):
    """The answers have 100,000 tokens, so each one is interrupted."""
    beginning = ROMEO.partition(" and")[0].encode().replace(b"\n", b"\r\n")

    def talk(send, wait_for, process):
        def interrupt():
            process.send_signal(signal.SIGINT)

        assert b"Ctrl-D" in wait_for(beginning)  # the answer to the prompt in the arguments
        interrupt()
        wait_for(b"\r\n> ")
        send(b"\n")
        assert wait_for(b"> ") == b"\r\n"  # an empty line is no prompt
        send(b"a\xffb\n")
        wait_for(b"\r\ngpt2.py: the prompt is not UTF-8\r\n> ")
        interrupt()
        send(b"\n")  # readline needs a key if the signal came before it began to wait
        wait_for(b"> ")
        send(b"ROMEO:\n")
        wait_for(beginning)
        interrupt()
        wait_for(b"\r\n> ")
        send(b"\x04")

    words = ["ROMEO:", "--interactive", *options_for(models_dir, "tiny", 100_000)]
    assert status_after_talk(words, talk) == 0


# Processes


@pytest.mark.parametrize("words", [["ROMEO:"], ["--interactive"]])
def test_ctrl_c_exits_with_130_and_no_message(models_dir, words):
    with start(*words, *options_for(models_dir, "tiny", 100_000)) as process:
        process.stdin.write(b"ROMEO:\nJULIET:\n")
        process.stdin.close()
        assert process.stdout.read(10) == ROMEO[:10].encode()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read() == b""


def test_the_c_locale(small, oracle):
    """The arguments are UTF-8 all the same. Characters that cannot be shown become ?."""
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    prompt = next(chars for chars in ("é中", "ü", "ñ", "中") if not oracle(chars).isascii())
    result = run_process(prompt, *small, env=environment)
    assert result == Result(0, oracle(prompt).encode("ascii", "replace"), b"")


def test_output_under_the_profiler_and_before_python_i(small, oracle):
    text = oracle("the").encode()
    result = run_process("the", *small, python=["-m", "cProfile"])
    assert result.status == 0
    assert result.out.startswith(text)
    assert b"function calls" in result.out
    result = run_process("the", *small, python=["-i"], stdin=b"print(main.__name__)\n")
    assert result.out == text + b"main\n"


def test_a_warm_run_loads_neither_tensorflow_nor_requests(small):
    code = (
        "import sys, gpt2; status = gpt2.command_line(sys.argv[1:]);"
        "print(status, {'tensorflow', 'requests'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, "the", *small]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert result.stdout.endswith(b"\n0 set()\n")


@pytest.mark.parametrize("package", ["fire", "regex", "requests"])
def test_a_missing_package(tmp_path, package):
    error = f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')\n"
    (tmp_path / f"{package}.py").write_text(error)
    words = ["a", f"--models_dir={tmp_path}"]
    result = run_process(*words, env={"PYTHONPATH": str(tmp_path)})
    assert (result.status, result.out) == (1, b"")
    assert re.fullmatch(rf"gpt2\.py: .*pip install .*{package}.*\n", result.err.decode())


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "2>/dev/full", "| head -c 1"])
def test_closed_streams(small, oracle, redirection):
    """Standard input that is closed counts as empty."""
    words = [sys.executable, str(ROOT / "gpt2.py"), "-", *small]
    script = f'set -o pipefail; "$@" {redirection}'
    command = ["bash", "-c", script, "bash", *words]
    result = subprocess.run(command, input=b"the", capture_output=True, timeout=120)
    expected = oracle("" if redirection == "<&-" else "the").encode()
    if redirection == ">&-":
        expected = b""
    if redirection == "| head -c 1":
        expected = expected[:1]
    assert (result.returncode, result.stdout, result.stderr) == (0, expected, b"")


def test_output_that_cannot_be_written(small):
    with open("/dev/full", "wb") as full:
        result = run_process("the", *small, stdout=full)
        usage = run_process(stderr=full)
    assert result.status == 1
    assert re.fullmatch(rb"gpt2\.py: [^\n]+\n", result.err)
    assert (usage.status, usage.out) == (2, b"")


# Random words


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
WORDS = (
    *("-", "--", "---", "--=", "-h", "-i", "-v", "-p", "-p=a", "-n", "-s", "--no", "2", "3"),
    *("--prompt", "--interactive", "--special_tokens", "--seed", "--top_k=1", "--n_samples"),
    *("--n-samples=1", "--temperature=1", "--stop", "--stop=", "--stop=a"),
    *("--separator", "--trace", "--verbose", "--completion"),  # fire's own
)


def check_any_words(small, words):
    """An exception here would be a traceback in a process."""
    result = run(*words, *small[:2], "--n_tokens_to_generate=1")
    assert result.status in (0, 1, 2)
    assert result.out == "" or result.status == 0
    lines = result.err.splitlines()
    if len(lines) == USAGE_LINES and "GPT-2" in lines[0]:
        assert result.status == 2
        return
    assert result.err.count("\n") == len(lines)
    warnings = [line for line in lines if line.startswith("gpt2.py: warning: ")]
    assert len(warnings) <= 2
    assert len(lines) - len(warnings) == (result.status != 0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(words=st.lists(TEXT | st.sampled_from(WORDS), max_size=5))
def test_any_words(small, words):
    check_any_words(small, words)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, derandomize=True)
@given(words=st.lists(TEXT | st.sampled_from(WORDS), max_size=5))
def test_many_words(small, words):
    check_any_words(small, words)
