"""Settings: what is given wins, what is wrong is one line, and --help is the dataclass itself."""

import io
import os
import re
import runpy
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from functools import cache
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from runs import ROOT

from experiments import arithmetic, gsm8k, lab, minutes, routers, switch

from bench import BenchOptions
from config import bad_input_exits, help_text, parse
from config import device as devices
from config.device import (
    REPAID_STEPS,
    decoding_threads,
    pick_compile,
    pick_compiled_decoding,
    pick_device,
    pick_dtype,
)
from router import ROUTERS
from sample import SampleConfig
from train import TrainConfig

ENV = os.environ | {"PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Shape:
    """Shape of the thing."""

    n_layer: int = 4  # layers, from the bottom up
    max_experts: int | None = None  # none = k + 2


@dataclass(frozen=True)
class Settings(Shape):
    """Settings of a test."""

    learning_rate: float = 3e-4  # step size
    grad_clip: float | None = 1.0  # none = no clipping
    flash: bool = False  # a switch
    out_dir: str = ""  # a text with a '#' in it: # stays
    resume: str | None = (  # a run to
        None  # go on with
    )


def given(*argv):
    return parse([str(arg) for arg in argv], Settings)[0]


def message(*argv):
    with pytest.raises(ValueError) as err:
        given(*argv)
    assert "\n" not in str(err.value)
    return str(err.value)


@pytest.fixture
def config(tmp_path):
    def write(text, name="a.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n_layer=1_000", 1000),
        ("n_layer=-3", -3),
        ("max_experts=none", None),
        ("max_experts=5", 5),
        ("learning_rate=1e-3", 1e-3),
        ("learning_rate=1e3", 1e3),
        ("learning_rate=2", 2.0),
        ("grad_clip=None", None),
        ("flash=TRUE", True),
        ("flash=false", False),
        ("out_dir=a b=c#1", "a b=c#1"),
        ("out_dir=", ""),
        ("out_dir=none", "none"),
        ("resume=none", "none"),
    ],
)
def test_text_becomes_the_type_of_its_field(text, value):
    """A value on the command line arrives with the type of its field; text is kept as it stands."""
    key = text.partition("=")[0]
    assert given(f"--{text}") == {key: value}
    assert type(given(f"--{text}")[key]) is type(value)


def test_bare_flag_is_true_for_bool_only():
    """--flash means --flash=true; any other key without a value is an error that shows how to write it."""
    assert given("--flash") == {"flash": True}
    assert "--n_layer=VALUE" in message("--n_layer", "8")


WRONG = "n_layer=4.0 n_layer=1e3 n_layer= n_layer=none learning_rate=fast learning_rate=nan learning_rate=inf"
WRONG += " flash=1 flash=yes flash= max_experts=2.5"


@pytest.mark.parametrize("text", WRONG.split())
def test_wrong_type_on_the_command_line(text):
    """A value of the wrong type is refused with the setting as it was written and what is allowed."""
    assert f"--{text} is not allowed; give " in message(f"--{text}")


WRONG = "n_layer=4.0 n_layer='4' n_layer=True n_layer=None learning_rate='1e-3' learning_rate=float('nan')"
WRONG += " learning_rate=10**400 flash=1 out_dir=3 out_dir=None resume=[]"


@pytest.mark.parametrize("line", WRONG.split())
def test_wrong_type_in_a_file(config, line):
    """A config file is as strict as the command line, and the error names the file and the key."""
    said = message(config(line))
    assert "a.py is not allowed; give " in said and line.partition("=")[0] in said


def test_file_values_take_the_types_of_their_fields(config):
    """An int stands for a float, None for none; modules and names with an underscore are not settings."""
    path = config(
        "import math\n_half = 0.5\nlearning_rate = 1\ngrad_clip = None\nmax_experts = math.floor(_half) + 3"
    )
    values, files = parse([str(path)], Settings)
    assert values == {"learning_rate": 1.0, "grad_clip": None, "max_experts": 3}
    assert type(values["learning_rate"]) is float and files == [path]


OWN = """
import math as flash
import shop
SCALE = [2.0]
class Rule: pass
def half(x): return x / SCALE[0]
def quarter(x): return half(half(x))
shop.quarter = quarter
n_layer = int(quarter(12))
"""


def test_a_file_has_functions_and_values_of_its_own(config, monkeypatch):
    """What is neither a setting nor a plain value is the file's own business. A function that it registers
    elsewhere works afterwards, also under torch.compile, which looks for its module."""
    shop = ModuleType("shop")
    monkeypatch.setitem(sys.modules, "shop", shop)
    assert given(config(OWN)) == {"n_layer": 3}
    assert given(config("from shutil import copy as flash", "b.py")) == {}  # whose name is also a setting
    compiled = torch.compile(lambda x: shop.quarter(x), backend="eager", fullgraph=True)
    assert compiled(torch.tensor(12.0)) == shop.quarter(12) == 3


def test_later_wins(config):
    """Files and keys apply in the order of the command line, whichever kind they are. Nothing else is
    returned, so that a script can tell a default from a choice."""
    assert parse([], Settings) == ({}, [])
    a, b = config("n_layer = 1\nflash = True"), config("n_layer = 2", "b.py")
    assert given(a, b) == {"n_layer": 2, "flash": True}
    assert given(b, a)["n_layer"] == 1
    assert given(a, "--n_layer=3", "--n_layer=4")["n_layer"] == 4
    assert given("--n_layer=3", a)["n_layer"] == 1


def test_a_file_can_build_on_another(config, tmp_path, monkeypatch):
    """`from x import *` in a config file layers it on x: what it does not mention comes from x."""
    monkeypatch.syspath_prepend(tmp_path)
    config("n_layer = 1\nlearning_rate = 0.1", "layer_base.py")
    assert given(config("from layer_base import *\nn_layer = 2")) == {"n_layer": 2, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--n_layers=2", "unknown key 'n_layers' on the command line; did you mean n_layer?; --help"),
        ("--learning-rate=2", "did you mean learning_rate?"),
        ("--zzz=1", "unknown key 'zzz' on the command line; --help lists all keys"),
        ("a.py", "unknown key 'n_lyer' in a.py; did you mean n_layer?; --help lists all keys"),
        *(
            (f"{i}.py", f"unknown key 'DECAY' in {i}.py; --help lists all keys; a file's own")
            for i in range(4)
        ),
        ("tiny_topk2.py", "config file 'tiny_topk2.py' does not exist; did you mean tiny_topk.py?"),
        ("nowhere/x.py", "config file 'nowhere/x.py' does not exist"),
        ("n_layer=2", "a setting is written --n_layer=2"),
        (".", "'.' is not a config file; give a .py file"),
        ("log.jsonl", "'log.jsonl' is not a config file; give a .py file"),
    ],
)
def test_unknown_key_or_file(config, tmp_path, monkeypatch, argv, words):
    """A typo in a key or in a file's name is refused with what it resembles. Refused are also
    a forgotten --, a plain value of a file that is no setting, a folder, and a file that is no .py."""
    monkeypatch.chdir(tmp_path)
    config("", "tiny_topk.py")
    config("n_lyer = 2", "a.py")
    config("n_layer = 2", "log.jsonl")
    for i, value in enumerate(("0.9", "'fast'", "True", "None")):
        config(f"DECAY = {value}", f"{i}.py")
    assert words in message(argv)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("n_layer = = 2", "SyntaxError"),
        ("n_layer = 1 +\n", "SyntaxError"),
        ("n_layer = two", "NameError: name 'two' is not defined"),
        ("raise RuntimeError('one\\ntwo')", "RuntimeError"),
        ("exit(3)", "SystemExit"),
        ("n_layer = 1\0", "SyntaxError"),
    ],
)
def test_config_file_that_fails(config, text, what):
    """A config file that cannot be run is one line naming the file and the Python error."""
    with pytest.raises(ValueError, match=r"config file .*a\.py fails with " + what):
        given(config(text))


def test_help_shows_every_key(capsys):
    """--help prints each key with type, default and the comment beside its field, by class, and exits 0."""
    with pytest.raises(SystemExit) as stop:
        parse(["--n_layer=2", "--help"], Settings)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert stop.value.code == 0
    assert lines[1:] == [
        "",
        "Shape of the thing.",
        "--n_layer=int 4 layers, from the bottom up",
        "--max_experts=int | None none none = k + 2",
        "",
        "Settings of a test.",
        "--learning_rate=float 0.0003 step size",
        "--grad_clip=float | None 1.0 none = no clipping",
        "--flash=bool false a switch",
        "--out_dir=str '' a text with a '#' in it: # stays",
        "--resume=str | None none a run to go on with",
    ]


def test_help_of_a_redeclared_field():
    """A class that changes the default of an inherited key shows the new default, once, with a meaning."""

    @dataclass(frozen=True)
    class Deep(Settings):
        """Deeper."""

        n_layer: int = 40

    rows = [line.split() for line in help_text(Deep).splitlines() if "--n_layer" in line]
    assert rows == ["--n_layer=int 40 layers, from the bottom up".split()]


@pytest.mark.parametrize(
    "cls",
    [TrainConfig, SampleConfig, BenchOptions, lab.OptionsWithK, routers.RouterOptions]
    + [minutes.MinutesOptions, arithmetic.Options, gsm8k.Options, switch.Options],
    ids=lambda cls: f"{cls.__module__}.{cls.__name__}",
)
def test_help_explains_every_key_of_a_script(cls):
    """Each has its type, its default and its meaning beside it."""
    rows = [line.strip() for line in help_text(cls).splitlines() if line.startswith("  --")]
    assert {row.split("=")[0] for row in rows} == {f"--{field.name}" for field in fields(cls)}
    assert len(rows) == len(fields(cls)) and all(len(re.split(r" {2,}", row)) == 3 for row in rows)


@cache
def keys_of(script):
    """The settings that its --help lists."""
    out = io.TextIOWrapper(io.BytesIO())
    patched = patch.object(sys, "argv", [script, "--help"]), patch.dict(ROUTERS)
    with patched[0], patched[1], redirect_stdout(out), pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out.seek(0)
    return {*re.findall(r"^  --(\w+)=", out.read(), re.M), "help"}


def test_commands_that_are_shown_are_accepted():
    """A line `python SCRIPT.py FILE.py --key=value` of a text names files that are there, and known keys."""
    texts, shown = "*.md *.py config/*.py data/*/*.py experiments/*.md experiments/*.py".split(), 0
    for path in (path for pattern in texts for path in ROOT.glob(pattern)):
        text = re.sub(r"\\?\n\s*(?=--\w)", " ", path.read_text())  # a command may go on in the next line
        for script, rest in re.findall(r"(?:python|nproc_per_node=\w+)\s+([a-z0-9_/]+\.py)([^`\n]*)", text):
            files, keys = re.findall(r" ([a-z]+/\w+\.py)", rest), {*re.findall(r" --(\w+)", rest)}
            assert all((ROOT / file).is_file() for file in [script, *files]), (path, script, files)
            assert not keys or keys <= keys_of(script), (path, script, keys)
            shown += 1
    assert shown > 50


@pytest.mark.parametrize("err", [ValueError("k = 9\nis too large"), FileNotFoundError(2, "No file", "x.pt")])
def test_bad_input_exits_with_one_line(capsys, err):
    """What a user did wrong is one line on stderr, nothing on stdout, and exit code 2."""
    with pytest.raises(SystemExit) as stop, bad_input_exits():
        raise err
    out, said = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith("\n")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, AssertionError])
def test_bad_input_exits_hides_no_bug(kind):
    """Ctrl-C and errors that only a bug can cause pass through."""
    with pytest.raises(kind), bad_input_exits():
        raise kind("no")


@pytest.fixture
def script(tmp_path):
    def write(text):
        (tmp_path / "script.py").write_text(text)
        return [sys.executable, tmp_path / "script.py"]

    return write


def test_a_script_ends_with_code_2_and_no_traceback(script):
    """Seen from a shell: exit code 2 and exactly one line."""
    command = script(
        "import sys\nfrom dataclasses import dataclass\nfrom config import bad_input_exits, parse\n"
        "@dataclass(frozen=True)\nclass Options:\n    steps: int = 1  # how many\n"
        "with bad_input_exits():\n    print(parse(sys.argv[1:], Options))\n"
    )
    run = subprocess.run([*command, "--step=2"], capture_output=True, text=True, env=ENV)
    said = "error: unknown key 'step' on the command line; did you mean steps?; --help lists all keys\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", said)
    run = subprocess.run([*command, "--help"], capture_output=True, text=True, env=ENV)
    assert run.returncode == 0 and "--steps=int  1  how many" in run.stdout


def test_a_closed_pipe_is_no_error(script):
    """When the reader of stdout goes away (`| head -1`) the script ends without a word."""
    command = script(
        "from config import bad_input_exits\n"
        "with bad_input_exits():\n    while True:\n        print('line', flush=True)\n"
    )
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV)
    assert run.stdout.readline() == b"line\n"
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 1
    run.stderr.close()


@pytest.mark.parametrize("text", ["False", "false"])
def test_compile_is_written_as_switches_are(text):
    """In any case."""
    assert pick_compile(text, torch.device("cpu"), torch.float32) == (False, "as asked")


@pytest.mark.parametrize("capability, dtype", [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_auto_on_a_gpu(monkeypatch, capability, dtype):
    """bfloat16 from compute capability 8.0 on, and there the compiler; float16 and none before."""
    gpu = {"is_available": True, "get_device_name": "X", "get_device_capability": capability}
    for name, value in gpu.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    device, why = pick_device("auto")
    found, _ = pick_dtype("auto", device)
    assert (device.type, why, found) == ("cuda", "X", getattr(torch, dtype))
    assert pick_compile("auto", device, found)[0] == (dtype == "bfloat16")
    monkeypatch.setenv("CXX", sys.executable)
    assert pick_compiled_decoding("auto", REPAID_STEPS, device, found)[0] == (dtype == "bfloat16")
    with pytest.raises(ValueError, match=r"compile is true, .*float16: grouped_mm compiles in bfloat16"):
        pick_compiled_decoding("true", 1, device, torch.float16)


def test_auto_without_a_gpu(monkeypatch):
    """float32, uncompiled; but decoding is compiled where there is a compiler, which so many tokens repay."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, _ = pick_device("auto")
    assert device.type == "cpu" and pick_dtype("auto", device)[0] == torch.float32
    assert not pick_compile("auto", device, torch.bfloat16)[0]
    for compiler, chosen in ((sys.executable, [False, True]), ("no-compiler", [False, False])):
        monkeypatch.setenv("CXX", compiler)
        steps = (REPAID_STEPS - 1, REPAID_STEPS)
        assert [pick_compiled_decoding("auto", n, device, torch.float32)[0] for n in steps] == chosen
    with pytest.raises(ValueError, match=r"compile is true, .* where there is no C.. compiler"):
        pick_compiled_decoding("true", 1, device, torch.float32)


def test_what_training_and_writing_need():
    """train.py and sample.py do without the optional packages, router.py without the model."""
    others = ("transformers", "tokenizers", "safetensors", "huggingface_hub", "matplotlib")
    code = f"import sys; sys.modules |= dict.fromkeys({others}); import router"
    code += "; assert 'model' not in sys.modules; import train, sample"
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True)


LOADS = {f"2.5 1.2 0.8 {running}/345 6789\n": n for running, n in ((0, 3), (1, 3), (2, 3), (3, 2), (9, 1))}
LOADS |= dict.fromkeys((None, "", "a b c d e"), 3)


@pytest.mark.parametrize("text, threads", LOADS.items())
def test_decoding_leaves_the_cores_that_others_use(text, threads, monkeypatch, tmp_path):
    """Of four cores and three threads. This thread runs, too; all where the system does not tell (None)."""
    load = tmp_path / "loadavg"
    if text is not None:
        load.write_text(text)
    monkeypatch.setattr(devices, "LOAD", load)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with decoding_threads(torch.device("cpu")) as found:
            assert found == torch.get_num_threads() == threads
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_a_file_says_does_not_steer_the_terminal(capsys):
    """In a message its control characters are replaced."""
    with pytest.raises(SystemExit), bad_input_exits():
        raise ValueError("a\x1b[2Jb")
    assert capsys.readouterr().err == "error: a\ufffd[2Jb\n"
