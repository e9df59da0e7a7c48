"""The page computes what Python does: pictures, tokens and the search; what it cannot run it refuses."""

import base64
import functools
import io
import json
import shutil

import numpy as np
import pytest
from conftest import WORDS
from image_files import file_of, picture
from PIL import Image
from tiny_tokenizers import KINDS, full

from inference.web_check import embed_in_python, run_page


pytestmark = pytest.mark.browser  # Chromium and npm are there only for `make browser_test`
MANY = 10_000  # rows of the search that is timed
WIDE = 512  # numbers of an embedding
MOST_MILLISECONDS = 50


IN_PAGE = """
const { loadTextTower, loadVisionTower } = await import("./model.js");
const { readPicture } = await import("./pictures.js");
const about = await (await fetch("data/site.json")).json();
const bytes = async (path) => new Uint8Array(await (await fetch(path)).arrayBuffer());
const decoded = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
const read = await loadVisionTower(await bytes(about.student.vision.file), about.image);
return [...(await read(await readPicture(new Blob([decoded])))).embedding];
"""
# How far an entry of the page's embedding may be from Python's of the same file.
MODES = {"RGB": 1e-3, "L": 1e-3, "LA": 1e-3, "P": 1e-3, "P, transparent": 1e-3, "1": 1e-3, "RGBA": 1e-3}


def test_pictures_of_every_mode_give_pythons_embedding(page, serve, site, capsys):
    page.open(serve(site))
    differences = {}
    for mode in [*MODES, "CMYK", "I;16"]:  # the last two only told: the browser converts them in its own way
        data = file_of(mode)
        expected = embed_in_python(site, ["a"], [Image.open(io.BytesIO(data))])["pictures"][0]
        actual = page.run_async(IN_PAGE, base64.b64encode(data).decode())
        differences[mode] = float(np.abs(np.array(actual) - expected).max())
    with capsys.disabled():
        print("\nThe page and Python, largest difference:", {m: f"{d:.1e}" for m, d in differences.items()})
    assert all(differences[mode] <= most for mode, most in MODES.items()), differences


def test_pillows_filters_to_the_bit(page, serve, site):
    page.open(serve(site))
    rng = np.random.default_rng(0)
    for width, height, to, resample in (
        (301, 277, (48, 40), 2), (20, 30, (64, 65), 3), (5, 900, (48, 48), 3), (700, 3, (3, 7), 1),
        (64, 64, (48, 48), 4), (1, 1, (8, 8), 3), (90, 600, (33, 190), 5), (48, 48, (48, 48), 1),
    ):  # fmt: skip
        pixels = rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
        image = Image.fromarray(pixels)
        actual = page.run_async(
            """const { resize } = await import("./pictures.js");
            const [data, width, height, to, resample] = arguments;
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const rows = (y, count) => bytes.subarray(4 * width * y, 4 * width * (y + count));
            return btoa(String.fromCharCode(...resize({ width, height, rows }, ...to, resample)));""",
            base64.b64encode(image.convert("RGBA").tobytes()).decode(), width, height, list(to), resample,
        )  # fmt: skip
        assert base64.b64decode(actual) == image.resize(to, resample).tobytes(), (width, height, to, resample)


@functools.cache
def odd_texts() -> list[str]:
    """Short texts of letters, signs and spaces of many scripts; none newer than the Rust package's tables."""
    rng = np.random.default_rng(0)
    letters = list("abcXYZ 019'.,-_!?\t\n") + list(
        "éßİſςΣ猫犬あア한नع\u0301\u200b\u200d\ufeff\u00ad\u2028\u00a0\u3000☃👩🏽🇩🇪①ﬁ"
    )
    texts = [
        "",
        " ",
        "[CLS] arrow [SEP]",
        "<cls>x<unk>",
        "don't WE'LL 1984",
        "the unhappiest houses",
        "x" * 300,
        "a " * 99,
    ]
    return texts + ["".join(rng.choice(letters, rng.integers(1, 14))) for _ in range(400)]


@pytest.mark.parametrize("kind", ["the student's", *KINDS])
def test_tokens_are_those_of_python(page, serve, site, kind):
    from tokenizers import Tokenizer

    page.open(serve(site))
    if kind == "the student's":
        tokenizer = Tokenizer.from_file(str(site / "data/tokenizer.json"))
    else:
        tokenizer = Tokenizer.from_str(full(kind).backend_tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.enable_truncation(20)
    code = """const { makeTokenizer } = await import("./tokenizer.js");
    const tokenize = makeTokenizer(JSON.parse(arguments[0]));
    return arguments[1].map((text) => tokenize(text).ids);"""
    actual = page.run_async(code, tokenizer.to_str(), odd_texts())
    assert actual == [encoding.ids for encoding in tokenizer.encode_batch(odd_texts())]


def test_a_tokenizer_that_the_page_cannot_run_is_named(page, serve, site):
    page.open(serve(site))
    settings = json.loads((site / "data/tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}
    code = """const { makeTokenizer } = await import("./tokenizer.js"); makeTokenizer(JSON.parse(arguments[0]));"""
    assert "cannot run the student's tokenizer: it has the normalizer Precompiled" in page.run_async(
        code, json.dumps(settings)
    )


def test_ten_thousand_pictures_are_searched_in_fifty_milliseconds(page, serve, site, tmp_path, capsys):
    """Timed in the page, from the text to the results in the document; the least of nine."""
    from inference.web_files import write_index

    many = tmp_path / "many"
    shutil.copytree(site, many)
    about = json.loads((many / "data/site.json").read_text())
    rows = np.random.default_rng(0).normal(size=(MANY, about["index"]["dim"])).astype(np.float32)
    write_index(rows / np.linalg.norm(rows, axis=1, keepdims=True), many / "data/index.bin")
    about["index"]["rows"], about["thumbnails"]["sheets"] = MANY, about["thumbnails"]["sheets"] * MANY
    (many / "data/site.json").write_text(json.dumps(about))
    (many / "data/labels.json").write_text(json.dumps([f"picture {i}" for i in range(MANY)]))
    page.open(serve(many))
    times = []
    for word in WORDS[:9]:
        page.search(word)
        times.append(float(page.run("return document.body.dataset.milliseconds")))
    # A wide index has more numbers to multiply than this tiny student's.
    wide = page.run_async(
        """const { readIndex } = await import("./search.js");
        const [rows, dim] = arguments;
        const bytes = new Int8Array(4 * rows + rows * dim).map((_, i) => (i < 4 * rows ? 0 : (i * 7919) % 127));
        new Float32Array(bytes.buffer, 0, rows).fill(1 / 127);
        const index = readIndex(bytes.buffer, rows, dim);
        const query = Float32Array.from({ length: dim }, (_, i) => Math.sin(i));
        const times = [];
        for (let i = 0; i < 9; i++) {
          const start = performance.now();
          if (index.search(query, 240).length !== 240) throw new Error("not as many rows");
          times.push(performance.now() - start);
        }
        return times;""",
        MANY, WIDE,
    )  # fmt: skip
    # The least: what it takes where no other program has the processor. The medians are told too.
    whole, compared = min(times), min(wide)
    with capsys.disabled():
        print(
            f"\n{MANY:,} pictures: {whole:.1f} ms from the text to the results in the page, with 16 numbers a picture;"
        )
        print(f"to compare with {WIDE} numbers a picture: {compared:.1f} ms")
        print(f"medians of nine: {np.median(times):.1f} and {np.median(wide):.1f} ms")
    assert whole + compared < MOST_MILLISECONDS


def test_a_student_with_operators_that_the_runtime_lacks_is_refused(page, serve, site, tmp_path):
    """When the site is written, and by the page."""
    import onnx
    from onnx import TensorProto, helper

    other = tmp_path / "other"
    shutil.copytree(site, other)
    ids, mask = (
        helper.make_tensor_value_info(name, TensorProto.INT64, ["C", "L"]) for name in ("input_ids", "attention_mask")
    )
    output = helper.make_tensor_value_info("text_embeds", TensorProto.FLOAT, ["C", "D"])
    node = helper.make_node("NeverHeardOf", ["input_ids", "attention_mask"], ["text_embeds"], domain="com.example")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    graph = helper.make_graph([node], "text", [ids, mask], [output])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), other / "data/text_model.onnx")
    with pytest.raises(ValueError, match="The runtime cannot run this student: .*NeverHeardOf"):
        run_page(other, ["a"], [picture(1)])
    page.open(serve(other))
    assert "The runtime cannot run this student" in page.text("#status")
