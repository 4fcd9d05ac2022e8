"""Trains the library's models: `mpvg train`, `mpvg recipes`; tools/ has what is done with a run afterwards.

One file a concern: config (what can be set), recipes/ (values that work), data/ (images and their order), model, optim
and losses (what is trained, how, and on what), loop (the training itself), distributed (many processes), signals,
run_folder (the folder and the weights in it), checkpoint (what a run goes on from), metrics (logs and progress), record
(what a run's folder tells), curves (pictures and tables of the log), table (Markdown), report (report.md), smoke
(a run cut to seconds).
This file imports nothing heavy, so that the command line can name a missing extra instead of failing on it.
"""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """What the user asked for can't be done; the message is one sentence that says what is wrong and what to do."""


class TrainingError(Exception):
    """Training can't go on; the message says where it stopped and why."""


class Stopped(Exception):
    """A signal stopped the run, which is saved; the message says where, and how it goes on."""


def near_matches(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?` for a mistyped name, or nothing when no choice is close."""
    near = difflib.get_close_matches(name, list(choices), 3, 0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
