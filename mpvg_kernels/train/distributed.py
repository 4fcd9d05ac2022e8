"""Many processes: where this one stands among them, and what they do together."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Number of this process on its machine, which is the number of its GPU."""
