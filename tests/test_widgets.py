"""The shell around a drawing function, run in a real kernel: with controls, and headless as in the book."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
import pytest
from nbclient import NotebookClient

from chassis_utils.errors import ChassisError
from widgets import explore

DRAW = """
import plotly.graph_objects as go
from chassis_utils.errors import ChassisError
from widgets import explore
def draw(method, rank, log):
    if method == "none":
        raise ChassisError(f"no figure for rank {rank}")
    return go.Figure(go.Scatter(y=[1, rank], name=method))
"""
# Finds the controls as a reader would: through what is on the page.
MOVE = """
import gc, ipywidgets
(box,) = [thing for thing in gc.get_objects() if type(thing) is ipywidgets.VBox]
method, rank, log = box.children[0].children
print([type(control).__name__ for control in (method, rank, log)])
"""
PLOTLY, VIEW = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"


def run(monkeypatch: pytest.MonkeyPatch, headless: bool, *cells: str) -> tuple[list[Any], list[dict[str, Any]]]:
    """Outputs of every cell after the first, and what stands in the explorer's output area at the end."""
    monkeypatch.setenv("CHASSIS_HEADLESS", "1" if headless else "0")
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{root / 'notebooks'}")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (DRAW, *cells)])
    # The reply to a cell that shows or moves a control is now and then noticed only when the wait for it ends.
    client = NotebookClient(notebook, timeout_func=lambda cell: 60 if cell.source == DRAW else 15)
    client.execute()
    areas = [state for state in client.widget_state.values() if state.get("_model_name") == "OutputModel"]
    return [output for cell in notebook.cells[1:] for output in cell.outputs], areas[0]["outputs"] if areas else []


SHOW = "explore(draw, method=['v1', 'none'], rank=(4, 64, 4), log=True)"


def test_headless_shows_the_figure_of_the_first_options_and_no_widget(monkeypatch: pytest.MonkeyPatch) -> None:
    (output,), areas = run(monkeypatch, True, SHOW)
    assert VIEW not in output.data and not areas
    assert output.data[PLOTLY]["data"][0]["y"] == [1, 4] and output.data[PLOTLY]["data"][0]["name"] == "v1"


def test_a_caption_stands_below_a_figure_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "import plots\ndraw('v1', 4, True).update_layout(meta={'caption': 'Look left.'})"
    figure, caption = run(monkeypatch, False, told)[0]
    assert PLOTLY in figure.data and caption.data["text/markdown"] == "Look left."
    # On a page it is part of the figure, so that a page that quotes the figure has it too.
    (figure,), _ = run(monkeypatch, True, told)
    assert figure.data[PLOTLY]["layout"]["meta"]["caption"] == "Look left."
    (figure,), _ = run(monkeypatch, False, "import plots\ndraw('v1', 4, True)")
    assert PLOTLY in figure.data


def test_a_moved_control_redraws_and_an_impossible_choice_leaves_its_message_and_no_figure(
        monkeypatch: pytest.MonkeyPatch) -> None:
    (view, kinds), (shown,) = run(monkeypatch, False, SHOW, MOVE + "rank.value = 16")
    assert VIEW in view.data and PLOTLY not in view.data
    assert kinds.text == "['Dropdown', 'IntSlider', 'Checkbox']\n"
    assert shown["data"][PLOTLY]["data"][0]["y"] == [1, 16]
    _, (shown,) = run(monkeypatch, False, SHOW)
    assert shown["data"][PLOTLY]["data"][0]["y"] == [1, 4], "what is shown first is what a page shows"
    _, (shown,) = run(monkeypatch, False, SHOW, MOVE + "rank.value = 16; method.value = 'none'")
    assert shown == {"output_type": "stream", "name": "stdout", "text": "no figure for rank 16\n"}


def test_a_text_is_drawn_anew_when_it_was_written_and_not_at_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    written = MOVE.split("method, rank, log")[0] + "(text,) = box.children[0].children\nprint(text.continuous_update)\n"
    shown = "explore(lambda words: draw(words, 4, True), words='first')"
    (_, told), (figure,) = run(monkeypatch, False, shown, written + "text.value = 'a prompt'")
    assert told.text == "False\n" and figure["data"][PLOTLY]["data"][0]["name"] == "a prompt"


@pytest.mark.parametrize("headless", ["0", "1"])
@pytest.mark.parametrize("options", [[], (), 3, (1,), (1, 2, 3, 4), ("a", "b"), (8, 4), (1, 8, 0), None])
def test_options_of_no_known_kind_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, headless: str,
                                                          options: Any) -> None:
    monkeypatch.setenv("CHASSIS_HEADLESS", headless)
    with pytest.raises(ChassisError, match="control 'rank' needs") as error:
        explore(lambda rank: go.Figure(), rank=options)
    assert "\n" not in str(error.value)
