"""The command ``sdzoo``: parsing and printing only.

Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 3 training diverged, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from sdzoo import __version__
from sdzoo.cli import deployment, hub, models, training
from sdzoo.cli.parser import Commands, Parser
from sdzoo.errors import InputError, ParityError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's own) and return its exit code."""
    arguments = _parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else list(argv)
    # What is heavy is imported by the command that needs it, so that --help answers at once.
    from sdzoo.training.distributed import LostProcess
    from sdzoo.training.engine import Diverged, Interrupted

    try:
        arguments.run(arguments)
    except InputError as error:
        return _fail(2, str(error))
    except Diverged as error:
        return _fail(3, str(error))
    except Interrupted as error:
        return _fail(130, str(error))
    except KeyboardInterrupt as error:
        return _fail(130, str(error) or "interrupted")
    except BrokenPipeError:  # the reader has seen enough; nor shall the interpreter's last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ParityError, LostProcess, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # none of our files is called so
            return _fail(2, f"{error.filename}: {error.strerror}")
        return _fail(1, str(error))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="sdzoo", description="ResNets with stochastic depth for timm: train, fold, export, verify.")
    parser.add_argument("--version", action="version", version=f"sdzoo {__version__}")
    commands = Commands(parser)
    for part in (models, training, deployment, hub):
        part.add_commands(commands)
    return parser


def _fail(code: int, message: str) -> int:
    print(f"sdzoo: {message}", file=sys.stderr)
    return code
