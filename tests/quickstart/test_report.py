"""The report is one page that fetches nothing, runs nothing and escapes what it shows."""

import jinja2
import pytest
from PIL import Image

from visper.quickstart.report import Cell, curves, data_uri, render

CONTENT = {
    "seed": 3,
    "scores": {"header": ["kind"], "rows": [[Cell("<script>", "good")]]},
    "predictions": [(["a <b>"], [[data_uri(Image.new("RGB", (4, 4)))]])],
    "findings": {"header": ["layer"], "rows": []},
    "losses": [("PT", curves([{"step": 1, "loss": 2.0, "ntp": 5.0}, {"step": 2, "loss": 1.0}]))],
    "answers": [{"uri": "data:,", "kind": "count", "question": "<i>", "said": "two", "verdict": "right"}],
    "run": ["one line"],
}


def test_the_page_needs_nothing_from_outside_and_escapes_what_it_shows():
    page = render(**CONTENT)
    assert "http" not in page and "<script" not in page and "<i>" not in page
    assert "a &lt;b&gt;" in page and "data:image/png;base64," in page and "one line" in page


def test_a_value_that_the_page_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="findings"):
        render(**{name: value for name, value in CONTENT.items() if name != "findings"})


def test_a_curve_shows_its_range_and_single_points_none():
    (curve,) = curves([{"step": 1, "loss": 2.0, "ntp": 5.0}, {"step": 3, "loss": 1.0}])
    assert curve.name == "loss" and curve.range == "2 to 1 in 3 steps"
    assert curve.path == "4.0,4.0 236.0,92.0"
