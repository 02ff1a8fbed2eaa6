"""The command line, mostly as a subprocess. The library gives the expected texts."""

import contextlib
import functools
import http.server
import inspect
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import (
    ROOT,
    SMALL_HPARAMS,
    random_variables,
    read_terminal,
    save_variables,
    write_model,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpt2
from utils import load_encoder_hparams_and_params

N = 6  # tokens that a test asks for
GPT2_PY = str(ROOT / "gpt2.py")
NO_NETWORK = {"GPT2_BASE_URL": "http://127.0.0.1:9"}  # nothing answers there


@pytest.fixture(scope="module")
def models_dir(small_model):
    load_encoder_hparams_and_params("small", str(small_model.parent))
    return small_model.parent


def options_for(models_dir, model_size="small", n=N):
    return [
        "--models_dir",
        str(models_dir),
        "--model_size",
        model_size,
        "--n_tokens_to_generate",
        str(n),
    ]


def run(*arguments, models_dir=None, python=("-W", "error"), env=(), **kwargs):
    """Run the command line, by default with the small model if models_dir is given, and capture its output."""
    command = [
        sys.executable,
        *python,
        GPT2_PY,
        *arguments,
        *(options_for(models_dir) if models_dir else []),
    ]
    environment = {**os.environ, **dict(env)}
    environment.pop("PYTHONUNBUFFERED", None)  # it would hide a missing flush
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
    return subprocess.run(command, timeout=120, env=environment, **streams)


def expected(models_dir, prompt, **options):
    """The output for a prompt, by way of the library and all tokens at once."""
    encoder, hparams, params = load_encoder_hparams_and_params("small", str(models_dir))
    ids = encoder.encode(prompt) or [268]
    return (
        encoder.decode(
            gpt2.generate(ids, params, hparams["n_head"], N, stop_id=268, **options)
        ).encode()
        + b"\n"
    )


def assert_output(result, output):
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == output


def assert_one_line(result, status, *words):
    """It failed with one line on standard error that contains these words, and printed nothing else."""
    assert result.returncode == status, result.stderr
    assert result.stdout == b""
    assert re.fullmatch(rb"gpt2\.py: [^\n]+\n", result.stderr), result.stderr
    for word in words:
        assert word in result.stderr.decode()


# Prompts


PROMPTS = [
    *(
        "the",
        "1984",
        "1, 2, 3",
        "None",
        "a #b",
        "{x}",
        "[1]",
        "'q'",
        '"',
        "",
        " ",
        "x=1",
        "é\n",
        "-1",
        "True",
        "\\n",
    ),
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_are_taken_literally(models_dir, prompt):
    assert_output(run(prompt, models_dir=models_dir), expected(models_dir, prompt))


@pytest.mark.parametrize("prompt", ["--the", "-a", "--help me", "--"])
def test_a_prompt_that_starts_with_a_dash(models_dir, prompt):
    assert_output(run(f"--prompt={prompt}", models_dir=models_dir), expected(models_dir, prompt))


@pytest.mark.parametrize(
    ("text", "prompt"),
    [("thé\n", "thé"), ("the", "the"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("", "")],
)
def test_a_prompt_from_standard_input(models_dir, text, prompt):
    assert_output(
        run("-", models_dir=models_dir, input=text.encode()), expected(models_dir, prompt)
    )


def test_a_prompt_that_is_not_utf8_is_an_error(models_dir):
    assert_one_line(run("-", models_dir=models_dir, input=b"\xff"), 1, "not UTF-8")
    assert_one_line(run(b"\xff", models_dir=models_dir), 2, "not UTF-8")
    assert_one_line(run("the", b"--stop=\xff", models_dir=models_dir), 2, "not UTF-8")


def test_letters_outside_ascii_arrive_in_the_c_locale(models_dir):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    output = expected(models_dir, "é中").decode().encode("ascii", "replace")
    assert output != expected(models_dir, "\ufffd\ufffd").decode().encode("ascii", "replace")
    assert_output(run("é中", models_dir=models_dir, env=environment), output)


# Options


@pytest.mark.parametrize(
    "arguments",
    [
        ["the", "6", "small", "MODELS"],
        ["the", "6", "--model_size=small", "--models_dir=MODELS"],
        ["the", "--n-tokens-to-generate", "6", "--model-size", "small", "--models-dir", "MODELS"],
        ["-p", "the", "--n_tokens_to_generate=6", "--model_size", "small", "--models-dir=MODELS"],
        ["-p=the", "6", "small", "MODELS"],
        ["--models_dir=MODELS", "the", "--model_size=small", "6"],
        ["--prompt", "the", "6", "small", "MODELS"],
    ],
    ids=" ".join,
)
def test_arguments_of_picogpt(models_dir, arguments):
    result = run(*(argument.replace("MODELS", str(models_dir)) for argument in arguments))
    assert_output(result, expected(models_dir, "the"))


def test_sampling_options(models_dir):
    options = {"temperature": 2.0, "top_k": 50, "top_p": 0.95, "seed": 7}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert_output(
        run("the", *arguments, models_dir=models_dir), expected(models_dir, "the", **options)
    )
    result = run("the", *arguments, "--n_samples", "3", models_dir=models_dir)
    text = gpt2.main("the", N, "small", str(models_dir), **options, n_samples=3)
    assert re.findall(r"^=+ SAMPLE (\d) =+$", text, re.MULTILINE) == ["1", "2", "3"]
    assert_output(result, text.encode() + b"\n")  # a newline after the last sample, too


def test_stop_text(models_dir):
    text = expected(models_dir, "the").decode()
    assert_output(
        run("the", "--stop", text[3:5], models_dir=models_dir),
        text[: text.find(text[3:5])].encode() + b"\n",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "1"],
        ["--top-k=5"],
        ["--top_p=.5", "--seed=2"],
        ["--n_samples", "2", "--temperature=0"],
    ],
)
def test_options_without_effect_give_a_warning(models_dir, arguments):
    result = run("the", *arguments, models_dir=models_dir)
    assert result.returncode == 0
    assert expected(models_dir, "the") in result.stdout
    assert re.fullmatch(
        rb"gpt2\.py: warning: at temperature 0, these options have no effect: [^\n]*\n",
        result.stderr,
    )
    named = re.findall(r"--\w+", result.stderr.decode())
    given_names = [
        re.match(r"--[\w-]+", word)[0].replace("-k", "_k")
        for word in arguments
        if word.startswith("--")
    ]
    assert sorted(named) == sorted(set(given_names) - {"--temperature"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["prompt"]),
        (["a", "b"], ["n_tokens_to_generate must be a whole number", "'b'", "prompt in quotes"]),
        (
            ["a", "upper"],
            ["n_tokens_to_generate must be a whole number", "'upper'", "prompt in quotes"],
        ),
        (["a", "1", "small", "models", "more"], ["more", "prompt in quotes"]),
        (["a", "--nope", "1"], ["--nope"]),
        (["a", "--nope=1"], ["--nope"]),
        (
            ["a", "--n_tokens_to_generate", "x"],
            ["n_tokens_to_generate must be a whole number, 0 or more, got 'x'"],
        ),
        (["a", "--n_tokens_to_generate", "2.5"], ["a whole number, 0 or more, got '2.5'"]),
        (
            ["a", "--n_tokens_to_generate", "-1"],
            ["n_tokens_to_generate must be a whole number, 0 or more, got -1"],
        ),
        (["a", "--n_tokens_to_generate"], ["--n_tokens_to_generate"]),
        (["a", "-n", "3"], ["-n", "ambiguous", "n_tokens_to_generate", "n_samples"]),
        (["a", "--model-size", "--seed", "1"], ["--model-size"]),
        (["--prompt", "--like this"], ["--prompt"]),
        (["--prompt", "-like this"], ["--prompt"]),
        (["-like this"], ["prompt"]),
        (["a", "--no_color"], ["--no_color"]),
        (["--noprompt"], ["--noprompt"]),
        (["a", "--seed", "-x"], ["--seed"]),
        (["a", "--seed", "-3"], ["seed must be a whole number, 0 or more, got -3"]),
        (["a", "--temperature", "-0.5"], ["temperature must be a number, 0 or more, got -0.5"]),
        (["a", "--temperature", "nan"], ["temperature must be a number, 0 or more, got nan"]),
        (["a", "--temperature", "warm"], ["temperature must be a number, 0 or more, got 'warm'"]),
        (["a", "--top_p", "0"], ["top_p must be above 0 and at most 1, got 0.0"]),
        (["a", "--top_k", "-3"], ["top_k must be a whole number, 0 or more, got -3"]),
        (["a", "--n_samples", "0"], ["n_samples must be a whole number from 1 to 100000, got 0"]),
        (["a", "--stop", ""], ["stop must be a non-empty text, got ''"]),
        (["a", "--", "--trace"], ["--"]),
        (["a", "--interactive"], ["'a'"]),
        (["--interactive", "a"], ["'a'"]),
        (["-", "--", "--interactive"], ["--"]),
    ],
    ids=str,
)
def test_unusable_arguments_are_one_line_before_any_work(arguments, words):
    assert_one_line(run(*arguments, env=NO_NETWORK), 2, *words)


def test_help_matches_the_signature():
    page = run("--help")
    assert (page.returncode, page.stderr) == (0, b"")
    shown = dict(re.findall(r"^ *--(\w+) +(\S+)?(?=  |\n)", page.stdout.decode(), re.MULTILINE))
    defaults = {
        name: "" if parameter.default is None else str(parameter.default)
        for name, parameter in inspect.signature(gpt2.main).parameters.items()
        if name != "prompt"
    }
    assert {name: shown[name] for name in defaults} == defaults
    assert shown.keys() - defaults.keys() == {"interactive", "help"}
    assert "python gpt2.py " in page.stdout.decode()
    assert max(map(len, page.stdout.decode().splitlines())) <= 120


# Errors after the arguments


def test_errors_are_one_line(tmp_path):
    assert_one_line(
        run("a", "--model_size", "nope"), 1, "no model", "nope", "124M, 355M, 774M, 1558M"
    )
    assert_one_line(run("a", "--model_size", "../x"), 1, "'../x'")
    environment = {"GPT2_BASE_URL": "nonsense"}
    assert_one_line(
        run("a", "--models_dir", str(tmp_path), env=environment), 1, "GPT2_BASE_URL", "'nonsense'"
    )
    (tmp_path / "124M").write_text("a file where a folder should be")
    assert_one_line(run("a", "--models_dir", str(tmp_path)), 1, "124M")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (OverflowError("too large"), "too large"),
        (ImportError("no x"), "no x"),
    ],
)
def test_exceptions_are_one_line(models_dir, monkeypatch, capfdbinary, error, words):
    def continuation(*_, **__):
        raise error

    monkeypatch.setattr(gpt2, "continuation", continuation)
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert gpt2.command_line(["the", *options_for(models_dir)]) == 1
    assert capfdbinary.readouterr() == (b"", f"gpt2.py: {words}\n".encode())


@pytest.mark.parametrize("name", ["model/wte", "model/h0/mlp/c_fc/w", "model/h1/ln_1/b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_parameters_are_one_line(tmp_path, name, value):
    model_dir, variables = write_model(tmp_path / "small"), random_variables(SMALL_HPARAMS)
    variables[name][..., 1] = value
    save_variables(model_dir / "model.ckpt", variables)
    load_encoder_hparams_and_params("small", str(tmp_path))
    assert_one_line(
        run("the", models_dir=tmp_path), 1, "the logits are not finite: the parameters are damaged"
    )


@pytest.fixture
def server(tmp_path):
    """A server with a small model under the name 124M -> its address and the list of paths that were requested."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    write_model(tmp_path / "served" / "124M")
    handler = functools.partial(Handler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()
        thread.join()


def test_from_a_server_to_the_text(models_dir, server, tmp_path):
    address, asked = server
    environment = {"GPT2_BASE_URL": address, "GPT2_ALLOW_UNVERIFIED": "1"}
    arguments = ["the", "--models_dir", str(tmp_path / "models"), "--n_tokens_to_generate", str(N)]
    first, second = run(*arguments, env=environment), run(*arguments, env=environment)
    assert first.stdout == second.stdout == expected(models_dir, "the")
    assert (first.returncode, second.returncode) == (0, 0)
    assert re.fullmatch(rb"warning: GPT2_ALLOW_UNVERIFIED [^\n]+\n", first.stderr)
    assert second.stderr == b""
    assert len(asked) == 7
    environment = {"GPT2_BASE_URL": address}
    assert_one_line(
        run("the", "--models_dir", str(tmp_path / "other"), env=environment), 1, "/124M/", "sha256"
    )


def test_a_warm_run_loads_neither_tensorflow_nor_requests(models_dir):
    code = (
        "import sys, gpt2; status = gpt2.command_line(sys.argv[1:]);"
        "print(status, {'tensorflow', 'requests'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, "the", *options_for(models_dir)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert result.stdout.endswith(b"\n0 set()\n")


# Streams


@contextlib.contextmanager
def pipe_without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_nobody_reads_the_output(models_dir):
    with pipe_without_reader() as writer:
        result = run("the", models_dir=models_dir, stdout=writer)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "status"), [(["a", "--nope"], 2), (["a", "--model_size", "nope"], 1)]
)
def test_nobody_reads_the_error(arguments, status):
    with pipe_without_reader() as writer:
        assert run(*arguments, stderr=writer).returncode == status
        assert run(*arguments, stdout=writer, stderr=writer).returncode == status


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written(models_dir):
    for arguments in (
        ["the", *options_for(models_dir)],
        ["the", *options_for(models_dir, n=0)],
        ["--help"],
    ):
        with open("/dev/full", "wb") as full:
            result = run(*arguments, stdout=full)
        assert result.returncode == 1
        assert re.fullmatch(rb"gpt2\.py: [^\n]+\n", result.stderr)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_error_that_cannot_be_written_keeps_its_status():
    with open("/dev/full", "wb") as full:
        assert run("a", "--nope", stderr=full).returncode == 2


@pytest.mark.parametrize("redirection", ["<&-", "2>&-", ">&-"])
def test_a_closed_stream(tmp_path, redirection):
    """In a first load, which redirects standard error, and in a later one. Closed input counts as empty."""
    write_model(tmp_path / "small")
    arguments = " ".join(options_for(tmp_path))
    for _ in range(2):
        command = f"{sys.executable} {GPT2_PY} - {arguments} {redirection}"
        result = subprocess.run(command, shell=True, capture_output=True, input=b"the")
        shown = expected(tmp_path, "" if redirection == "<&-" else "the")
        assert_output(result, b"" if redirection == ">&-" else shown)
    interactive = f"{sys.executable} {GPT2_PY} --interactive {arguments} <&-"
    assert subprocess.run(interactive, shell=True, capture_output=True).stderr == b""


def test_characters_that_the_output_cannot_show(models_dir):
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    text = expected(models_dir, "the", seed=1, temperature=9.0).decode()
    assert not text.isascii()
    result = run("the", "--seed=1", "--temperature=9", models_dir=models_dir, env=environment)
    assert_output(result, text.encode("ascii", "replace"))


def test_output_under_the_profiler_and_before_python_i(models_dir):
    result = run("the", models_dir=models_dir, python=["-m", "cProfile"])
    assert result.returncode == 0
    assert result.stdout.startswith(expected(models_dir, "the"))
    assert b"function calls" in result.stdout
    result = run("the", models_dir=models_dir, python=["-i"], input=b"print(main.__name__)\n")
    assert result.stdout == expected(models_dir, "the") + b"main\n"


# Interactive use


def at_terminal(arguments, talk):
    """Run the command line on a pseudo-terminal, driven by talk(send, wait_for, process) -> (output, status)."""
    terminal, end = pty.openpty()
    streams = {"stdin": end, "stdout": end, "stderr": end}
    environment = {**os.environ, "TERM": "dumb"}  # no escape sequences
    process = subprocess.Popen(
        [sys.executable, GPT2_PY, *arguments], **streams, env=environment, start_new_session=True
    )
    os.close(end)
    shown, position = b"", 0

    def wait_for(text):
        """Read until the text appears after the last text that was waited for -> what comes before it."""
        nonlocal shown, position
        while text not in shown[position:]:
            ready, _, _ = select.select([terminal], [], [], 60)
            assert ready, f"{text} did not appear: {shown}"
            shown += os.read(terminal, 1000)
        start, found = position, shown.index(text, position)
        position = found + len(text)
        return shown[start:found]

    talk(lambda data: os.write(terminal, data), wait_for, process)
    shown += read_terminal(terminal)
    return shown.decode(), process.wait(timeout=60)


@pytest.fixture(scope="module")
def fragile_model(tmp_path_factory):
    """The models_dir of a small model that answers only while there are at most 20 tokens."""
    model_dir, variables = (
        write_model(tmp_path_factory.mktemp("models") / "small"),
        random_variables(SMALL_HPARAMS),
    )
    variables["model/wpe"][20:] = float("nan")
    save_variables(model_dir / "model.ckpt", variables)
    load_encoder_hparams_and_params("small", str(model_dir.parent))
    return model_dir.parent


def test_interactive(fragile_model):
    def talk(send, wait_for, process):
        assert b"Ctrl-D" in wait_for(b"> ")
        for prompt in ("the", "and"):
            send(prompt.encode() + b"\n")
            wait_for(
                prompt.encode() + b"\r\n" + expected(fragile_model, prompt).replace(b"\n", b"\r\n")
            )
            assert wait_for(b"> ") == b""
        send(b"\n")
        assert wait_for(b"> ") == b"\r\n"  # an empty line is no prompt
        send(b"x" * 30 + b"\n")
        wait_for(b"gpt2.py: the logits are not finite")
        wait_for(b"> ")
        time.sleep(0.5)  # readline shows its prompt shortly before it handles signals
        process.send_signal(signal.SIGINT)
        wait_for(b"> ")
        send(b"\x04")

    shown, status = at_terminal(["--interactive", *options_for(fragile_model)], talk)
    assert status == 0
    assert "Traceback" not in shown
    assert shown.endswith("> \r\n")  # Ctrl-D ends the line


def test_interactive_from_a_pipe_prints_only_the_answers(models_dir):
    result = run("--interactive", models_dir=models_dir, input=b"the\n\r\n\nand")
    assert_output(result, expected(models_dir, "the") + expected(models_dir, "and"))


def test_interactive_from_a_pipe_fails_if_a_prompt_failed(fragile_model):
    result = run("--interactive", models_dir=fragile_model, input=b"x" * 30 + b"\nthe\n")
    assert result.returncode == 1
    assert result.stdout == expected(fragile_model, "the")
    assert re.fullmatch(rb"gpt2\.py: the logits are not finite[^\n]*\n", result.stderr)


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory):
    """The options for a model whose answer takes long and has no token that ends it."""
    hparams = {"n_vocab": 268, "n_ctx": 100_000, "n_embd": 4, "n_head": 1, "n_layer": 1}
    model_dir = write_model(tmp_path_factory.mktemp("models") / "endless", hparams)
    path = model_dir / "encoder.json"
    path.write_text(path.read_text().replace(', "<|endoftext|>": 268', ""))
    load_encoder_hparams_and_params("endless", str(model_dir.parent))
    return options_for(model_dir.parent, "endless", 99990)


def test_ctrl_c_stops_only_the_answer(endless_model):
    def talk(send, wait_for, process):
        wait_for(b"> ")
        send(b"the\n")
        wait_for(b"\n")
        wait_for(b"e")
        process.send_signal(signal.SIGINT)
        wait_for(b"> ")
        send(b"\x04")

    shown, status = at_terminal(
        ["--interactive", "--seed=1", "--temperature=3", *endless_model], talk
    )
    assert status == 0
    assert "Traceback" not in shown


def test_ctrl_c_exits_with_130_and_no_message(endless_model):
    command = [sys.executable, GPT2_PY, "the", "--seed=1", "--temperature=3", *endless_model]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")


# Random arguments


@settings(
    max_examples=int(os.environ.get("NPGPT_COMMAND_LINES", 40)),
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture
    ],  # capfdbinary, which each example reads
)
@given(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
            st.sampled_from(
                [
                    "-",
                    "--",
                    "-h",
                    "--prompt",
                    "--interactive",
                    "--seed",
                    "--top_k=1",
                    "--n_samples",
                    "2",
                ]
            ),
            st.sampled_from(
                [
                    "--separator",
                    "--trace",
                    "--verbose",
                    "--completion",
                    "-i",
                    "-v",
                    "--no",
                    "--=",
                    "---",
                ]
            ),
            st.sampled_from(
                [
                    "-p",
                    "-p=a",
                    "-n",
                    "-s",
                    "--stop",
                    "--stop=",
                    "--n-samples=1",
                    "3",
                    "--temperature=1",
                ]
            ),
        ),
        max_size=5,
    )
)
def test_any_arguments(models_dir, capfdbinary, arguments):
    """In this process, which is faster. An exception here would be a traceback there."""
    with open(os.devnull) as nothing, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", nothing)
        status = gpt2.command_line([*arguments, *options_for(models_dir, n=1)])
    out, errors = capfdbinary.readouterr()
    assert status in (0, 1, 2)
    assert out == b"" or status == 0
    *lines, rest = errors.split(b"\n")
    warnings = [line for line in lines if line.startswith(b"gpt2.py: warning: ")]
    assert rest == b""
    assert len(warnings) <= 1
    assert len(lines) - len(warnings) == (status != 0)
