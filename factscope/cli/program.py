"""The program ``factscope``: its commands, and what becomes of a failure."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from factscope.cli import comparing, editing, recall, serving, telling
from factscope.errors import Cancelled, FactScopeError

app = typer.Typer(
    name="factscope",
    help="See how a causal language model recalls a fact.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _commands() -> None:
    """See how a causal language model recalls a fact."""


for _command in (recall.predict, recall.flow, recall.lens):
    app.command()(_command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(comparing.compare)
for _command in (recall.trace, recall.enrich, recall.extract, recall.heads):
    app.command()(_command)
app.command("edit")(editing.edit_fact)
app.command("layers")(editing.edit_layers)
for _command in (serving.models, editing.export, editing.statistics, serving.serve):
    app.command()(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: every failure becomes one line and an exit status.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    telling.quieten_libraries()
    try:
        command = typer.main.get_command(app)
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            with command.make_context("factscope", list(given)) as context:
                command.invoke(context)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except FactScopeError as error:
        telling.fail(str(error), error.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        telling.fail(str(Cancelled()), Cancelled.exit_status)
    except TyperException as error:
        telling.fail(telling.usage(error, given), 2)
    except BrokenPipeError:  # whoever reads standard output has enough
        telling.forget_standard_output()
        sys.exit(0)
    except Exception:
        telling.fail(f"FactScope has a defect; please report it with the traceback in {telling.log_defect()}.", 1)
    sys.exit(0)
