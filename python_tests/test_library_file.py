"""What was compiled, as the file of the library says it without being loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bayes_kernels as bk
from bayes_kernels import _library
from bayes_kernels.library_file import EMULATOR, LIBRARY, find_library, read_build_info


def library(name: str = LIBRARY) -> Path:
    path = find_library(name)
    if path is None:
        pytest.skip(f"{name} is not built")
    return path


def test_the_file_says_what_the_loaded_library_says():
    loaded = bk.build_info()
    assert loaded.pop("cpu_path") and read_build_info(library()) == loaded


def test_so_does_the_emulator():
    found = read_build_info(library(EMULATOR))
    loaded = json.loads(_library.load_simulator().build_info())
    assert loaded.pop("cpu_path") and found == loaded
    assert found["cuda"] == found["cuda_architectures"] == ""
    assert found["compiler"] == bk.build_info()["compiler"]


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF\x02\x01" + bytes(60)])
def test_other_files_are_no_libraries(content: bytes, tmp_path: Path):
    file = tmp_path / LIBRARY
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"libbayes_kernels.so: expected a library of this release"
    ):
        read_build_info(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'{"version": ', b'{"fashion": '),  # another library
        (b'"torch_target": ', b'"torch_version":'),
        (b'"compiler": "', b'"compiler": \xff'),
        (b'"compiler": "', b'"compiler": \0'),
    ],
)
def test_a_library_that_does_not_say_it(old: bytes, new: bytes, tmp_path: Path):
    content = library().read_bytes()
    assert old in content and len(old) == len(new)
    file = tmp_path / LIBRARY
    file.write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match="does not say what was compiled"):
        read_build_info(file)


@pytest.mark.parametrize("share", [0.1, 0.999])
def test_a_copy_that_broke_off(share: float, tmp_path: Path):
    """Also one that has the words: it could not be loaded."""
    content = library().read_bytes()
    file = tmp_path / LIBRARY
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"expected [\d,]+ bytes by its own header, got [\d,]+$"):
        read_build_info(file)


def test_pieces_of_the_text_are_passed_over(tmp_path: Path):
    """Wherever a compiler puts them: before the text, and without its end or some of its fields."""
    header = library().read_bytes()[:40] + bytes(24)  # of a file without a table of sections
    whole = json.dumps(read_build_info(library())).encode()
    file = tmp_path / LIBRARY
    pieces = (whole[:60], whole[:60] + b"}", b'{"version": "1"}', bytes(3), whole)
    file.write_bytes(header + b"".join(pieces) + whole[:40])
    assert read_build_info(file) == read_build_info(library())
