"""Signals that ask a run to stop: it saves at the next update and exits with 75; a second one ends it at once (130).

Ctrl-C, a scheduler's SIGTERM, and SIGUSR1, which Slurm sends before a job's time is over (`sbatch --signal=USR1@120`).
"""

import os
import signal
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_SAVED, EXIT_AT_ONCE = 75, 130
PASSED_ON = ("TORCHELASTIC_RUN_ID", "MPVG_STUDY")
"""Variables of processes that torchrun or `mpvg study` started, which pass on a signal that a terminal or a scheduler
may have sent to all."""
GRACE_S = 5.0
"""There what comes within so many seconds is one signal."""


class Signals:
    """Inside `with Signals() as signals`, `signals.received` is the name of the first that came, or None."""

    def __init__(self):
        self.received: str | None = None
        self._time = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        try:
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:  # not in the main thread, which alone may do so: signals act as they did
            pass
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _) -> None:
        grace = GRACE_S if any(name in os.environ for name in PASSED_ON) else 0.0
        if self.received is None:
            self.received, self._time = signal.Signals(number).name, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                text = f"\nmpvg: {self.received}: saving at the next update, then stopping; once more ends at once\n"
                os.write(2, text.encode())  # print is not safe in a handler
        elif time.monotonic() - self._time >= grace:
            os._exit(EXIT_AT_ONCE)  # nothing is saved, and nothing on disk is left half-written
