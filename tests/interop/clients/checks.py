"""Named checks, run one after the other; prints each with its time and ends with a count. Exit 1 if any failed."""

import sys
import time
import traceback

# The tiny model draws any token, and these have no text: unknown, the begin and the end. A reply that is counted bars them.
NO_END = {"0": -100, "1": -100, "2": -100}


class Checks:
    def __init__(self, title):
        self.title = title
        self.all = []

    def __call__(self, function):
        self.all.append(function)
        return function

    def run(self, *arguments):
        failed = []
        for check in self.all:
            name, began = check.__name__.replace("_", " "), time.monotonic()
            try:
                check(*arguments)
                print(f"  ok      {name} ({time.monotonic() - began:.1f} s)")
            except Exception:  # noqa: BLE001 whatever a client raises is a finding
                failed.append(name)
                print(f"  FAILED  {name}\n{traceback.format_exc()}")
        print(f"{self.title}: {len(self.all) - len(failed)} passed, {len(failed)} failed")
        sys.stdout.flush()
        sys.exit(1 if failed else 0)
