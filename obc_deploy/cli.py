"""`obc-deploy`: the command line. It parses, calls and prints; what it calls does the work.

    obc-deploy compress MODEL --calibration DATA --scheme "block4@0.9+w8a8" -o RUN
    obc-deploy export RUN
    obc-deploy bench RUN

An error is one line on stderr and exit code 2 (3: slower than dense; 130: interrupted).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NoReturn

import typer

from obc_deploy import __version__
from obc_deploy.commands import bench, compress, curve, export, look, runtimes
from obc_deploy.commands.options import Command
from obc_deploy.errors import ObcDeployError

PROGRAM = "obc-deploy"
INTERRUPTED = 130
TERMINATED = 128 + signal.SIGTERM
BUG = 1
USAGE = 2
CHARACTERS = 600
"""Longest message that is printed."""

app = typer.Typer(
    name=PROGRAM,
    help="Compress trained PyTorch models, export them, and measure what it was worth.",
    epilog="Try it: obc-deploy demo. What works here: obc-deploy doctor.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
runtimes_app = typer.Typer(
    help="List, install and remove runtimes.", no_args_is_help=True, rich_markup_mode="rich"
)
app.add_typer(runtimes_app, name="runtimes")


def _examples(*lines: str) -> str:
    return "\n\n".join(("[bold]Examples[/bold]", *lines))


_COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (look.doctor, _examples("obc-deploy doctor", "obc-deploy doctor --json")),
    (
        look.inspect,
        _examples(
            "obc-deploy inspect torchvision:resnet18",
            "obc-deploy inspect mypackage.models:make_net --input-shape 3,32,32",
        ),
    ),
    (look.schemes, _examples("obc-deploy schemes")),
    (
        compress.compress,
        _examples(
            "obc-deploy compress torchvision:resnet18 --weights resnet18.pth -c photos/ "
            "-s block4@0.9+w8a8 --skip conv1 -o runs/resnet18",
            "obc-deploy compress mypackage.models:make_net -c calibration.npz -s w8a8 "
            "--layer head=w4g128 --eval test.npz -o runs/net",
            "obc-deploy compress net.pt2 -c calibration.npz -s 2:4+w8a8 --fallback w8a8 --dry-run",
            "obc-deploy compress net.pt2 -c calibration.npz --budget latency:4x -o runs/net",
            "obc-deploy compress net.pt2 -c calibration.npz --eval test.npz --max-drop 1.0 "
            "-t deepsparse -o runs/net",
        ),
    ),
    (
        curve.curve,
        _examples(
            "obc-deploy curve net.pt2 -c calibration.npz --eval test.npz -b latency:2x "
            "-b latency:4x -b latency:6x -o curves/net",
        ),
    ),
    (
        export.export,
        _examples(
            "obc-deploy export runs/net",
            "obc-deploy export runs/net -t onnxruntime -o net.onnx --dynamic-batch",
            "obc-deploy export runs/net -t tensorrt --engine --precision fp16",
        ),
    ),
    (
        bench.bench,
        _examples(
            "obc-deploy bench runs/net",
            "obc-deploy bench runs/a runs/b -r deepsparse --data test.npz --json results.json",
        ),
    ),
    (
        compress.run,
        _examples(
            "obc-deploy run torchvision:resnet18 --weights resnet18.pth -c photos/ "
            "-s block4@0.9+w8a8 --skip conv1 -o runs/resnet18",
            "obc-deploy run net.pt2 -c calibration.npz --eval test.npz --budget latency:4x "
            "-o runs/net",
        ),
    ),
    (bench.demo, _examples("obc-deploy demo", "obc-deploy demo --quick -o /tmp/demo --json -")),
    (
        export.audit,
        _examples(
            "obc-deploy audit runs/net --runtime deepsparse",
            "obc-deploy audit net.onnx --runtime onnxruntime",
            "obc-deploy audit net.onnx --runtime tensorrt",
        ),
    ),
    (bench.report, _examples("obc-deploy report runs/net", "obc-deploy report runs/net -o r.html")),
)
for _function, _epilog in _COMMANDS:
    app.command(cls=Command, epilog=_epilog)(_function)
runtimes_app.command("list", cls=Command)(runtimes.list_runtimes)
runtimes_app.command(
    "install", cls=Command, epilog=_examples("obc-deploy runtimes install deepsparse")
)(runtimes.install)
runtimes_app.command("remove", cls=Command)(runtimes.remove)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ..."


def _say(text: str) -> None:
    # Stderr may be a pipe that nobody reads any more.
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _usage_message(error: Any, given: Sequence[str]) -> str:
    """What is wrong with the command as typed, in one line, with the value that is wrong."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else PROGRAM
    message = " ".join(error.format_message().split()).rstrip(".")
    message = message.replace(": Value error, ", ": ")  # what a choice's validation begins with
    for name in getattr(getattr(error, "param", None), "opts", ()):
        for argument, following in itertools.pairwise((*given, "")):
            if argument == name and following and f"'{following}'" not in message:
                message += f" (not '{following}')"
    return f"{message}; see '{command} --help'"


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(TERMINATED)


@contextlib.contextmanager
def _without_chatter(wanted: bool) -> Iterator[None]:
    """Libraries warn about themselves and log what they then raise; ours to a user are results."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        if wanted:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """A polite kill unwinds the stack as Ctrl-C does: partial files go, workers end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; an error becomes one line on stderr.

    Args:
        arguments: what follows the program's name; the process's own where None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in given
    try:
        with _ending_cleanly(), _without_chatter(not debug):
            command = typer.main.get_command(app)
            code = command.main(args=given, prog_name=PROGRAM, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except ObcDeployError as error:
        if debug:
            raise
        _say(f"error: {_one_line(error)}")
        return error.exit_code
    except BrokenPipeError:
        # The reader has enough; nothing more can be printed, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BUG
    except Exception as error:
        if hasattr(error, "format_message"):
            _say(f"error: {_usage_message(error, given)}")
            return USAGE
        if debug:
            raise
        _say(
            f"error: unexpected {type(error).__name__}: {_one_line(error)}; "
            f"run '{PROGRAM} --debug ...' for the traceback"
        )
        return BUG
    if code == INTERRUPTED:
        _say("interrupted")
    return code if isinstance(code, int) else 0
