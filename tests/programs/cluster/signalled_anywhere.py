"""Gets SIGTERM in each line of what `manta serve` does while it waits for one. Prints in how many."""

import faulthandler
import signal
import sys
from types import FrameType
from typing import Any

from cluster.commands.serve.command import _Stop

WAIT_S = 0.2


class Interruption:
    """In the line that is reached as the `number`th."""

    def __init__(self, number: int) -> None:
        self.left = number

    def trace(self, _frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGTERM)
        return self.trace


faulthandler.dump_traceback_later(60, exit=True)
number = 0
while True:
    interruption = Interruption(number + 1)
    stop = _Stop()
    sys.settrace(interruption.trace)
    was_requested = stop.requested.wait(WAIT_S)
    sys.settrace(None)
    if interruption.left > 0:
        break
    number += 1
    assert stop.requested.wait(0.0), number
print(number)
