"""Counts the updates that were skipped for a loss or a gradient that is not finite, without waiting for the device."""

import torch
from torch import Tensor


class SkippedUpdates:
    """How many updates in a row were skipped, now and at most, and with which they began; on the device.

    `add` is called at every update and starts a handful of operations on single numbers; only `read` waits.
    """

    def __init__(self, device: torch.device):
        # How many were skipped in a row up to here, the first of them, whether its loss (not only a gradient) was not
        # finite on this process; then the same of the longest row.
        self.state = torch.zeros(6, dtype=torch.int64, device=device)

    def add(self, skipped: Tensor, bad_loss: Tensor, update: int) -> None:
        """Count update number `update` (from 0): was it skipped, was its loss not finite here (scalars, bool)."""
        if skipped.device.type == "cpu" and not skipped:  # there is nothing to wait for, and nearly always this to do
            self.state[0] = 0
            return
        now, first, loss, *longest = self.state.unbind()
        goes_on = now > 0
        row = torch.stack(
            [
                torch.where(skipped, now + 1, 0),
                torch.where(goes_on, first, update),
                torch.where(goes_on, loss, bad_loss.long()),
            ]
        )
        self.state = torch.cat([row, torch.where(row[0] > longest[0], row, torch.stack(longest))])

    def read(self) -> tuple[int, int, bool]:
        """Of the longest row: how many, the first of them, whether its loss was not finite on this process."""
        _, _, _, count, first, loss = self.state.tolist()
        return count, first, bool(loss)
