"""What is learned: `create_task(config)` gives the part of a run that differs between tasks."""

from ..config import Config
from .base import Task

__all__ = ["Task", "create_task"]


def create_task(config: Config) -> Task:
    """The config's task; what it needs is imported now and not before."""
    match config.task:
        case "detection":
            from .detection import Detection as kind
        case "segmentation":
            from .segmentation import Segmentation as kind
        case _:
            from .classification import Classification as kind
    return kind(config)
