"""SVG files drawn in a bounded process: what is drawn, and what hostile files may not do."""

import io
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from datasets_scripts import svg_drawing
from datasets_scripts.svg_drawing import SvgDrawer


pytest.importorskip("resvg_py")
NAMES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
SIDE = 64


def svg(content, size='width="100" height="100"', before=""):
    return f"{before}<svg {NAMES} {size}>{content}</svg>".encode()


@pytest.fixture(scope="module")
def draw():
    with SvgDrawer(SIDE) as drawer:
        yield drawer


def pixels(drawing):
    return np.asarray(Image.open(io.BytesIO(drawing.png))).astype(int)


def test_the_ink_is_fitted_and_centred_on_white(draw):
    found = pixels(draw(svg('<rect x="70" y="80" width="20" height="10" fill="#f00"/>')))
    assert found.shape == (SIDE, SIDE, 3)
    red = (found[..., 0] > 200) & (found[..., 1] < 60)
    rows, columns = np.nonzero(red.any(1))[0], np.nonzero(red.any(0))[0]
    # 2 : 1, a sixteenth of the side free at both ends
    assert 4 <= columns.min() <= 7 and 56 <= columns.max() <= 59 and abs(len(rows) - len(columns) / 2) <= 2
    assert abs(rows.min() + rows.max() - (SIDE - 1)) <= 2
    assert (found[0] == 255).all() and (found[-1] == 255).all()


@pytest.mark.parametrize("size", ['width="10mm" height="20mm"', 'width="3pt" height="3pt"', 'viewBox="0 0 9 9"'])
def test_sizes_of_paper_and_of_none(draw, size):
    assert (pixels(draw(svg('<rect width="5" height="5"/>', size))) < 128).any()


def test_what_the_file_says(draw):
    metadata = """<metadata><rdf:RDF xmlns:rdf="r" xmlns:cc="c" xmlns:dc="http://purl.org/dc/elements/1.1/">
        <cc:Work><dc:title> A pear </dc:title><dc:subject><rdf:Bag><rdf:li>food</rdf:li><rdf:li/>
        <rdf:li>fruit</rdf:li></rdf:Bag>
        </dc:subject><dc:creator><cc:Agent><dc:title>Nobody</dc:title></cc:Agent></dc:creator>
        </cc:Work></rdf:RDF></metadata>"""
    drawing = draw(svg(metadata + '<rect width="5" height="5"/>'))
    assert (drawing.title, drawing.description, drawing.keywords) == ("A pear", "", ["food", "fruit"])
    nothing = draw(svg('<rect width="5" height="5"/>'))
    assert (nothing.title, nothing.description, nothing.keywords) == ("", "", [])


def test_references_into_the_file_alone_are_followed(draw, tmp_path):
    Image.new("RGB", (10, 10), "red").save(tmp_path / "secret.png")
    (tmp_path / "secret.svg").write_bytes(svg('<rect id="a" width="100" height="100" fill="#f00"/>'))
    own = '<defs><rect id="a" width="9" height="9" fill="#00f"/></defs><use xlink:href="#a"/>'
    assert tuple(pixels(draw(svg(own)))[32, 32]) == (0, 0, 255)
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for name in ("secret.png", "secret.svg"):
            for of in (
                f"{tmp_path}/{name}",
                f"file://{tmp_path}/{name}",
                f"http://127.0.0.1:{server.server_port}/{name}",
            ):
                for way in (
                    f'<image width="99" height="99" xlink:href="{of}"/>',
                    f'<image width="99" height="99" href="{of}"/>',
                    f'<use xlink:href="{of}#a"/>',
                    f'<filter id="f"><feImage xlink:href="{of}"/></filter><rect width="0" filter="url(#f)"/>',
                ):
                    with pytest.raises(ValueError, match="it draws nothing"):
                        draw(svg(way))
    finally:
        server.shutdown()
        server.server_close()
    assert not asked


UNFOLDED = "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9))
HOSTILE = {
    "entities": svg("<text>&j;</text>", before=f'<!DOCTYPE s [<!ENTITY a "{"a" * 99}">{UNFOLDED}]>'),
    "a file as an entity": svg("<text>&a;</text>", before='<!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]>'),
    "depth": svg("<g>" * 100_000 + "</g>" * 100_000),
    "uses of uses": svg(
        '<defs><rect id="a0" width="1" height="1"/>'
        + "".join(f'<g id="a{i + 1}">' + f'<use xlink:href="#a{i}"/>' * 10 + "</g>" for i in range(9))
        + '</defs><use xlink:href="#a9"/>'
    ),
    "nothing": svg(""),
    "no file": b"",
    "half a file": svg("<rect width='9' height='9'/>")[:-20],
    "another root": b"<html/>",
    "bytes": bytes(range(256)),
    "large": b" " * (svg_drawing.MAX_BYTES + 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_one_sentence_and_the_next_one_is_drawn(draw, name):
    with pytest.raises(ValueError) as error:
        draw(HOSTILE[name])
    assert str(error.value) and "\n" not in str(error.value)
    assert (pixels(draw(svg('<rect width="5" height="5"/>'))) < 128).any()


@pytest.mark.parametrize(
    "size",
    [
        'width="1000000" height="1000000"',
        'width="1000000" height="1"',
        'width="nan" height="1"',
        'width="-1" height="1"',
    ],
)
def test_pages_of_any_size_are_small_pictures(draw, size):
    try:
        assert pixels(draw(svg('<rect width="100%" height="100%"/>', size))).shape == (SIDE, SIDE, 3)
    except ValueError as error:  # a page of a pixel's breadth
        assert "draws nothing" in str(error) or "size" in str(error)


@pytest.mark.parametrize(
    "what", ["bytearray(2 << 30)", "[0 for _ in iter(int, 1)]"], ids=["more memory than it may have", "no end"]
)
def test_what_takes_too_much_ends_the_child_alone(tmp_path, what):
    # The child as it is, with a drawing that takes too much for some files, and one second at most.
    program = tmp_path / "child.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(svg_drawing.__file__)!r}.rsplit('/', 1)[0])\n"
        "import svg_drawing\n"
        "svg_drawing.SECONDS = 1\n"
        "def draw(data, side):\n"
        "    if data == b'much':\n"
        f"        {what}\n"
        "    return svg_drawing.draw(data, side)\n"
        "svg_drawing.serve(64, draw)\n"
    )
    with SvgDrawer(SIDE, [sys.executable, "-I", str(program)]) as drawer:
        with pytest.raises(ValueError, match="takes more than 10 s or 1024 MiB"):
            drawer(b"much")
        assert (pixels(drawer(svg('<rect width="5" height="5"/>'))) < 128).any()


def test_without_resvg_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(svg_drawing.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[clipart\]"'):
        SvgDrawer(SIDE)
