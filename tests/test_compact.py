"""SVGs with fewer bytes: the same picture, and other people's text as it was."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from chela_bench.reports import figures as drawn
from chela_bench.reports.compact import compact
from chela_bench.reports.figures import figures, render
from chela_bench.reports.style import LOOKS
from tests.factories import HOSTILE, h100_sweep, make_point, make_run

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
INHERITED = "{http://www.w3.org/2000/svg}use"


def shapes(svg: bytes) -> list[tuple[str, list[float], str, str]]:
    """What is drawn, in order: tag, numbers, style with what is inherited, text."""
    found = []

    def walk(element: ElementTree.Element, style: str) -> None:
        own = element.get("style", "")
        style = own if own else style if element.tag == INHERITED else ""
        places = " ".join(element.get(name, "") for name in ("d", "x", "y"))
        if places.strip():
            numbers = [float(number) for number in NUMBER.findall(places)]
            found.append((element.tag, numbers, style, element.text or ""))
        for child in element:
            walk(child, own if element.tag.endswith("}g") or own else "")

    walk(ElementTree.fromstring(svg), "")
    return found


@pytest.mark.parametrize("look", LOOKS)
def test_the_same_is_drawn_with_fewer_bytes(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "linear_attention-fwd-bf16-B1-H16-K128-V128-time"
    points = [*h100_sweep(), make_point(impl=HOSTILE)]
    [figure] = figures(make_run(), points, LOOKS[look], only={name}).values()
    short = render(figure, "svg", LOOKS[look])
    monkeypatch.setattr(drawn, "compact", lambda svg: svg)
    whole = render(figure, "svg", LOOKS[look])
    assert len(short) < (0.76 if look == "screen" else 0.9) * len(whole)
    for one, other in zip(shapes(short), shapes(whole), strict=True):
        assert (one[0], one[2], one[3]) == (other[0], other[2], other[3])
        assert one[1] == pytest.approx(other[1], abs=0.00501)


def test_texts_are_left_alone() -> None:
    text = '<text x="1.23456" y="2">  d="1.23456" x="7.654321" &lt;a x="1.23456"&gt;</text>'
    assert compact(text) == text.replace('<text x="1.23456"', '<text x="1.23"')
    assert compact('<g transform="scale(0.095 -0.095)"/>') == '<g transform="scale(0.095 -0.095)"/>'
    assert compact('<text transform="rotate(-90 1.23456 2)"/>').count("1.23456") == 1
    assert (
        compact('<path d="M 100.001 -0.001 \nL 0.125 20 "/>') == '<path d="M 100 -0 \nL 0.12 20 "/>'
    )


def test_markers_of_two_styles_keep_them() -> None:
    two = '<use x="1" style="fill: red"/>\n<use x="2" style="fill: blue"/>'
    mixed = f'<g clip-path="url(#p)">\n{two}\n</g>'
    assert compact(mixed) == mixed
    assert compact(mixed.replace("blue", "red")) == (
        '<g clip-path="url(#p)" style="fill: red">\n<use x="1"/>\n<use x="2"/>\n</g>'
    )
