"""Started by tests in several processes: the commands named by a file of arguments, in one group."""

import json
import sys
from importlib import import_module

from lnfree_interp import cli, distributed


def fail_in(rank):
    """What is asked for of the group alone, without the commands: one process is wrong, the others wait."""
    if distributed.rank() == rank:
        raise ValueError(f"wrong in {rank}")
    distributed.gather(1)


def sums(_):
    values, names = distributed.gather(distributed.rank() + 1), distributed.exchange("abc"[distributed.rank()])
    without = distributed.gather(None if distributed.rank() == 0 else "there")
    print(json.dumps([distributed.rank(), values, names, without]))


def commands(arguments):
    """Each command's own run, on its own arguments."""
    guard, asked = cli.guard, []
    cli.guard = lambda run, args, *_, **__: asked.append((run, args))
    for name, flags in arguments:
        import_module(f"lnfree_interp.{name}.__main__").main(flags)
    cli.guard = guard
    for run, args in asked:
        run(args)


class Arguments:
    device = "cpu"


if __name__ == "__main__":
    what, given = sys.argv[1], json.loads(sys.argv[2])
    act = {"fail": fail_in, "sums": sums, "commands": commands}[what]
    raise SystemExit(cli.guard(lambda _: act(given), Arguments(), "test", check=lambda _: None, several=True))
