"""A thin ipywidgets shell around a pure function that draws a figure."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go

from chassis_utils.errors import ChassisError


def _first(name: str, options: Any) -> Any:
    """The value a control starts with; options that no control can show are refused here."""
    numbers = isinstance(options, tuple) and all(isinstance(value, int | float) for value in options)
    if isinstance(options, bool | str):
        return options
    if isinstance(options, list) and options or (
            numbers and len(options) in (2, 3) and options[0] < options[1] and (*options, 1)[2] > 0):
        return options[0]
    raise ChassisError(f"control {name!r} needs a list of options, a (low, high) or (low, high, step) tuple of "
                       f"numbers, a text, or True or False, not {options!r}")


def explore(draw: Callable[..., go.Figure], **controls: Any) -> None:
    """Show `draw(**choices)` with one control a keyword, and draw anew when one is moved.

    With `CHASSIS_HEADLESS=1`, as under papermill, only the figure of the first options is shown: a page has no kernel.

    Args:
        draw: a pure function of the choices; a `ChassisError` it raises is shown in the figure's place.
        **controls: a list of options (dropdown), a `(low, high)` or `(low, high, step)` tuple (slider), a bool, or a
            text (a box to write in: drawn anew on Enter, or when it is left).

    Raises:
        ChassisError: options of another kind, or ipywidgets is not installed.
    """
    from IPython.display import display

    first = {name: _first(name, options) for name, options in controls.items()}
    if os.environ.get("CHASSIS_HEADLESS") == "1":
        return display(draw(**first))
    try:
        import ipywidgets as widgets
    except ImportError:
        raise ChassisError("ipywidgets is missing: pip install ipywidgets, or set CHASSIS_HEADLESS=1") from None

    def show(**choices: Any) -> None:
        try:
            display(draw(**choices))
        except ChassisError as error:
            print(error)

    boxes = {name: widgets.interactive.widget_from_abbrev(controls[name], first[name]) for name in controls}
    for name, box in boxes.items():
        box.description = name.replace("_", " ")
        if isinstance(box, widgets.Text):
            box.continuous_update = False
    output = widgets.interactive_output(show, boxes)
    display(widgets.VBox([widgets.HBox(list(boxes.values()), layout={"flex_flow": "row wrap"}), output]))
