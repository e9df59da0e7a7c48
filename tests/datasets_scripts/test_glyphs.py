"""Packages whose fonts are read: another version or none is named, with the command that helps."""

from importlib import metadata

import pytest

from datasets_scripts import emoji, icons


@pytest.mark.parametrize("version", ["1.4.1", "0.1.0", None])
@pytest.mark.parametrize(
    ("build", "command"),
    [
        (icons.build_icons, "pip install .*--no-deps qtawesome==1.4.2"),
        (emoji.emoji_rows, "pip install .*--no-deps emoji==2.16.0"),
    ],
)
def test_wrong_or_missing_package(build, command, version, monkeypatch):
    def answer(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", answer)
    with pytest.raises(ImportError, match=f"{version or 'not installed'}.*; run: {command}"):
        build()
