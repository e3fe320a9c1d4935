"""The `perfsim` command: its verbs, and one line and an exit code for every mistake of the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from perfsim import __version__
from perfsim.cli import doctor, estimate, list, schema, show, simulate
from perfsim.errors import InfeasibleError, PerfsimError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE

# Typer does not export the base of its usage errors (BadParameter -> UsageError -> ClickException), and where it lives
# differs between its versions.
_CommandLineError: type[typer.BadParameter] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="perfsim",
    help="What-if answers about LLM serving: how fast, how full, how dear, what binds, before anyone rents the GPUs.",
    epilog="Exit codes: 0 ok, 2 bad input, 3 does not fit (the binding constraint is named), 1 a bug in perfsim.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command("simulate")(simulate.simulate)
app.command("estimate")(estimate.estimate)
app.command("list")(list.list_names)
app.add_typer(show.app, name="show")
app.command("schema")(schema.schema)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"perfsim {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(context: typer.Context,
         version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True,
                                               help="Print the version and exit.")] = False) -> None:  # fmt: skip
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process) and return the exit code; a bug raises."""
    try:
        code = app(args=None if argv is None else [*argv], prog_name="perfsim", standalone_mode=False)
        sys.stdout.flush()
    except InfeasibleError as error:
        return _fail(f"{error} (binding constraint: {error.binding})", error.exit_code)
    except PerfsimError as error:
        return _fail(str(error), error.exit_code)
    except _CommandLineError as error:
        return _fail(error.format_message(), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except (BrokenPipeError, SystemExit):  # Typer meets a closed pipe with SystemExit, and raises it for nothing else
        # The reader (`| head`) has gone; point stdout elsewhere so that the interpreter's last flush cannot fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return PIPE_CLOSED
    if code == INTERRUPTED:  # how Typer reports Ctrl-C
        return _fail("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
