"""The figures of the study that this book examines."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from chassis_utils import ChassisError


def reported(experiment: str) -> dict[str, Any] | list[dict[str, Any]]:
    """The study's figures for one experiment, as published (TinyLlama-1.1B-Chat, one consumer GPU).

    Raises:
        ChassisError: the study has no such experiment; the message lists those it has.
    """
    figures = json.loads((files("chassis_utils") / "reference_results.json").read_text(encoding="utf-8"))
    figures.pop("source")
    if experiment not in figures:
        raise ChassisError(f"the study reports nothing as {experiment!r}: it has {', '.join(figures)}")
    return figures[experiment]
