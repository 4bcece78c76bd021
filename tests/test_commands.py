"""lnfree: the commands by name, their help, what is missing, and what is clipped."""

import argparse
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from test_cli import HEAVY, answer

import lnfree_interp
from lnfree_interp import __main__ as lnfree
from lnfree_interp import cli, load_model

NAMES = [file.parent.name for file in sorted(Path(lnfree_interp.__path__[0]).glob("*/__main__.py"))]


@pytest.fixture
def script(tmp_path):
    """What pip writes for the console script."""
    file = tmp_path / "lnfree"
    file.write_text("from lnfree_interp.__main__ import main\nraise SystemExit(main())\n")
    return [str(file)]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_commands_are_listed_with_a_line_each(arguments, capsys):
    assert lnfree.main(arguments) == 0
    lines = re.findall(r"^  (\w+) +(\S.*)$", capsys.readouterr().out, re.M)
    assert [name for name, _ in lines] == NAMES and {"dla", "finetune"} <= set(NAMES)
    assert all(line.endswith((".", ".)")) and len(line) < 120 for _, line in lines)


@pytest.mark.parametrize("command", [["-m", "lnfree_interp"], "script"])
def test_answers_at_once(command, script):
    command = script if command == "script" else command
    called = "lnfree" if command == script else "python -m lnfree_interp"
    status, printed, imported = answer(command)
    assert status == 0 and printed.startswith(f"usage: {called} COMMAND") and not imported & HEAVY
    status, printed, imported = answer(command, "pathcing", "--model", "tiny")
    assert (status, printed) == (2, f"{called}: error: unknown command 'pathcing'; nearest known: patching")
    assert not imported & HEAVY


def test_a_command_is_called_as_it_was_started(script):
    status, printed, imported = answer(script, "dla", "--help")
    assert status == 0 and printed.startswith("usage: lnfree dla [-h]") and "\n  lnfree dla --model" in printed
    assert not imported & HEAVY
    status, printed, _ = answer(script, "dla", "--modle")
    assert (status, printed) == (2, "lnfree dla: error: unrecognized arguments: --modle")
    _, printed, _ = answer(["-m", "lnfree_interp"], "norms", "--help")
    assert printed.startswith("usage: python -m lnfree_interp.norms [-h]")


def test_what_is_nothing_like_a_command_sees_all(capsys):
    assert lnfree.main(["qqq"]) == 2
    assert capsys.readouterr().err.endswith(f"unknown command 'qqq'; known: {', '.join(NAMES)}\n")


def test_version(capsys):
    assert lnfree.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lnfree_interp {lnfree_interp.__version__}\n"
    root = Path(__file__).parents[1]
    said = [
        re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.M)[1],
        re.search(r"^## (\S+)", (root / "CHANGELOG.md").read_text(), re.M)[1],
    ]
    assert said == [lnfree_interp.__version__] * 2
    assert not re.search(r"^version", (root / "pyproject.toml").read_text().partition("[project.opt")[0], re.M)


class Parsed(Exception):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_of_flags_that_exist(name, monkeypatch, capsys):
    module = import_module(f"lnfree_interp.{name}.__main__")
    monkeypatch.setattr(cli, "guard", lambda run, args, *_, **__: seen.append(args) or 0)
    seen: list = []
    assert 2 <= len(module.EXAMPLES) <= 3
    for example in module.EXAMPLES:
        assert module.main(shlex.split(example)) == 0
    assert len(seen) == len(module.EXAMPLES)
    with pytest.raises(SystemExit):
        module.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"  python -m lnfree_interp.{name} {example}\n" in said for example in module.EXAMPLES)


@pytest.mark.parametrize("name", NAMES)
def test_help_states_defaults(name, monkeypatch):
    def stop(parser, *_):
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as stopped:
        import_module(f"lnfree_interp.{name}.__main__").main([])
    (parser,) = stopped.value.args
    stated = 0
    for action in parser._actions:
        default = action.default
        value = isinstance(default, (str, int, float, Path)) and not isinstance(default, bool)
        if not value or default == argparse.SUPPRESS:
            continue
        text = parser._get_formatter()._expand_help(action)
        said = re.search(r"\(([^()]*)\)(?:; [^()]*)?$", text)[1].replace(",", "")
        if not said.startswith("default: "):  # in words
            wanted = str(default).replace(",", "")
            assert float(said) == default if isinstance(default, (int, float)) else said == wanted, action.dest
        stated += 1
    assert stated >= 2


def test_defaults_that_are_not_written_are_added(capsys):
    parser = cli.OneLineParser(prog="p", description="A line.", epilog="The end.")
    parser.add_argument("--n", type=int, default=3, help="how many")
    parser.add_argument("--m", type=int, default=4, help="how many (4)")
    parser.add_argument("--path", default=Path("out"))
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--none", help="nothing")
    parser.add_argument("what", nargs="?", default="x", help="a thing")
    said = parser.format_help()
    assert "how many (3)\n" in said and "how many (4)\n" in said and said.count("(4)") == 1
    assert (
        "all of them\n" in said and "nothing\n" in said and said.endswith("\n\nThe end.\n") and "examples" not in said
    )


@pytest.mark.parametrize(
    ("given", "context", "shape", "said"),
    [
        (["--tokens", "256"], 4096, (1, 256), "sequences of 256 tokens, not 4096: its context holds no more"),
        (["--tokens", "300"], None, (1, 256), "256 tokens, not 300: sequences are of 256"),
        (["--tokens", "300"], 64, (4, 64), "256 tokens, not 300: sequences are of 64"),
        (["--tokens", "100"], None, (1, 256), "256 tokens, not 100: sequences are of 256"),
        (["--tokens", "256"], 64, (4, 64), ""),
        (["--tokens", "4096", "--text", "TEXT"], None, (3, 256), "768 tokens, not 4,096: the text has no more"),
        (["--text", "TEXT"], None, (3, 256), ""),  # of the default nothing is said but in the report
    ],
)
def test_what_is_clipped_of_a_text_is_said(given, context, shape, said, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    given = [str(tmp_path / "text.txt") if word == "TEXT" else word for word in given]
    args = cli.parsed(cli.parser("dla", ""), given, "dla")
    rows = cli.load_tokens(args, load_model("tiny-noLN"), context=context)
    printed = capsys.readouterr().err
    assert tuple(rows.shape) == shape and printed.count("\n") == bool(said) and said in printed
    (of_text,) = args.asked.notes["text"]
    assert f"reads {shape[0]} sequences of {shape[1]} tokens" in of_text
    assert [*args.asked.notes.get("other than asked", [])] == printed.splitlines()


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("given", [None, True, False])
def test_rows_of_text_begin_as_prompts_do(default, given, monkeypatch):
    model = load_model("tiny-noLN")
    monkeypatch.setattr(model.cfg, "default_prepend_bos", default)
    args = cli.parser("dla", "").parse_args(["--tokens", "200"])
    rows = cli.load_tokens(args, model, context=20, prepend_bos=given)
    text = model.tokenizer("".join(cli.documents(args)))["input_ids"]
    begins = given if given is not None else bool(model.to_tokens("a")[0, 0] == model.tokenizer.bos_token_id)
    assert begins == (default if given is None else given) and bool((rows[:, 0] == text[0]).all()) == begins
    assert rows[0, int(begins) :].tolist() == text[1 : 21 - begins]


@pytest.mark.parametrize("name", ["graph", "patching"])
def test_a_command_that_reads_no_text_has_no_flag_for_it(name, capsys):
    main = import_module(f"lnfree_interp.{name}.__main__").main
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert "--prompt" in said or "--pairs" in said
    for flag in ("--text", "--data", "--tokens"):
        assert not re.search(rf"{flag}\b", said)
        with pytest.raises(SystemExit) as stopped:
            main([flag, "5"])
        assert stopped.value.code == 2 and f"unrecognized arguments: {flag} 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "extra"), [("plotly", "plot"), ("datasets", "train"), ("accelerate", "train"), ("gguf", "gguf")]
)
def test_a_missing_extra_is_one_line_that_names_it(package, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    args = cli.parser("dla", "").parse_args(["--model", "tiny"])
    assert cli.guard(lambda args: import_module(f"{package}.anything"), args, "dla") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"pip install 'lnfree_interp[{extra}]'" in said and package in said


def test_a_bug_of_ours_is_no_missing_extra():
    args = cli.parser("dla", "").parse_args(["--model", "tiny"])
    with pytest.raises(ModuleNotFoundError):
        cli.guard(lambda args: import_module("lnfree_interp.no_such_module"), args, "dla")


def test_a_light_install_says_at_once_what_a_command_needs(tmp_path):
    code = "import sys; sys.modules['plotly'] = None; from lnfree_interp.__main__ import main; sys.exit(main())"
    flags = ["dla", "--model", "tiny-noLN", "--tokens", "256", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.count("\n") == 1 and "pip install 'lnfree_interp[plot]'" in done.stderr
