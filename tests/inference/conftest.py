"""Two dual encoders and a folder of images to embed."""

import pytest
from conftest import make_student
from image_files import encoded, picture
from teacher_families import make_clip, save
from tiny_towers import scatter
from vector_folders import COUNT


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model, processor = make_student()
    for part in (scatter(model), processor):
        part.save_pretrained(folder / "student")
    save(make_clip, folder / "clip_alone", None)
    return folder


@pytest.fixture
def images(tmp_path):
    for i in range(COUNT):
        path = tmp_path / "images" / ("", "a")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i), "PNG"))
    return tmp_path / "images"
