"""What serving promises, measured: python -m tests.benchmarks.serving [--only swap,overhead,page,multi_lora,votes] …

swap        clients chat through the whole server, real vLLM included, while new versions are published
overhead    the same streams through our endpoint and straight to vLLM
page        many page sessions at once before a stand-in for vLLM
multi_lora  tokens/s of vLLM with many adapters, with its own operators and ours; see tests/benchmarks/multi_lora.py
votes       many votes at once, and the server killed in their midst

How each measures stands at the head of its file, serving_PART.py. The last line printed is JSON, of which `overhead`
holds ratios, ours over direct, of time to first token and of tokens/s: both 1 where our layer costs nothing.
Exit code 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence

from tests.benchmarks import serving_overhead, serving_page, serving_swap, serving_votes
from tests.benchmarks.findings import Findings, allow_many_connections
from tests.benchmarks.training import machine, say


def multi_lora(options: argparse.Namespace) -> Findings:
    """See tests/benchmarks/multi_lora.py."""
    from tests.benchmarks import multi_lora as part

    found = part.measure(options.lora_tokens, options.lora_rounds)
    return Findings(found, part.table(found).strip("\n").splitlines(), part.judge(found))


PARTS = {
    "swap": serving_swap.measure,
    "overhead": serving_overhead.measure,
    "page": serving_page.measure,
    "multi_lora": multi_lora,
    "votes": serving_votes.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # Ends by SIGTERM as by Ctrl-C: the processes that this one started are ended on the way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    allow_many_connections()
    say(f"machine    {machine('cpu')}, {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f} before this began")
    found = {}
    for name in options.only:
        found[name] = PARTS[name](options)
        say("\n".join([f"\n{name}", *(f"  {line}" for line in found[name].lines)]) + "\n")
    wrong = [line for part in found.values() for line in part.wrong]
    for line in wrong:
        say(f"WRONG      {line}")
    print(json.dumps({name: part.summary for name, part in found.items()}))
    return 1 if wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, in this order; default: %(default)s")
    swap = parser.add_argument_group("swap")
    swap.add_argument("--clients", type=int, default=8)
    swap.add_argument("--seconds", type=float, default=60)
    swap.add_argument("--versions", type=int, default=10, help="published in that time")
    swap.add_argument("--tokens", type=int, default=24, help="of a reply")
    overhead = parser.add_argument_group("overhead")
    overhead.add_argument("--streams", type=int, default=8)
    overhead.add_argument("--rounds", type=int, default=10)
    overhead.add_argument("--reply-tokens", type=int, default=64)
    page = parser.add_argument_group("page")
    page.add_argument("--sessions", type=int, default=200)
    page.add_argument("--messages", type=int, default=2, help="of each session")
    page.add_argument("--pause", type=float, default=40, help="seconds before a message, on average")
    page.add_argument("--ramp", type=float, default=60, help="seconds in which all sessions begin")
    lora = parser.add_argument_group("multi_lora")
    lora.add_argument("--lora-tokens", type=int, default=64, help="of a reply")
    lora.add_argument("--lora-rounds", type=int, default=5)
    votes = parser.add_argument_group("votes")
    votes.add_argument("--votes", type=int, default=10_000)
    votes.add_argument("--kills", type=int, default=5)
    votes.add_argument("--at-once", type=int, default=10_000, help="voters at the same time, a connection each")
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    if unknown := sorted(set(options.only) - set(PARTS)):
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    counts = ("clients", "versions", "tokens", "streams", "rounds", "reply_tokens", "sessions", "messages", "votes")
    if min(getattr(options, name) for name in counts) < 1 or options.kills < 0 or options.at_once < 1:
        parser.error("at least one of everything, but kills")
    return options


if __name__ == "__main__":
    sys.exit(main())
