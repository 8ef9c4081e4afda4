"""Which files of a listing are the model: tables of real-looking repositories, and properties over any."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbomoe.errors import ModelReferenceError
from turbomoe.files.hub_choice import RemoteFile, check_listing, choose_companions, choose_gguf, human, is_safe_path

REPO = "org/repo"
USUAL = ["Qwen3-8B-Q4_K_M.gguf", "Qwen3-8B-Q8_0.gguf", "Qwen3-8B-IQ4_XS.gguf", "Qwen3-8B-BF16.gguf", "README.md"]
UNSLOTH = ["M-Q4_K_M.gguf", "M-UD-Q4_K_XL.gguf", "M-UD-Q2_K_XL.gguf", "BF16/M-BF16-00001-of-00001.gguf"]
FOLDERS = [f"Q{bits}_K_M/M-Q{bits}_K_M-0000{n}-of-00003.gguf" for bits in (4, 6) for n in (2, 1, 3)]
LOWER = ["model.q4_k_m.gguf", "model.q5_0.gguf"]
VISION = ["m-Q4_K_M.gguf", "mmproj-m-f16.gguf", "mmproj-F32.GGUF", "m.imatrix.gguf", "imatrix_unsloth.gguf"]
ONE = ["whatever.gguf"]
WEIGHTS = ["config.json", "model.safetensors"]


def listing(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1000 + place) for place, path in enumerate(paths)]


@pytest.mark.parametrize(
    ("paths", "quant", "chosen"),
    [
        (USUAL, "", ["Qwen3-8B-Q4_K_M.gguf"]),
        (USUAL, "q8_0", ["Qwen3-8B-Q8_0.gguf"]),
        (USUAL, "IQ4_XS", ["Qwen3-8B-IQ4_XS.gguf"]),
        (USUAL, "bf16", ["Qwen3-8B-BF16.gguf"]),
        (USUAL, "Qwen3-8B-Q8_0", ["Qwen3-8B-Q8_0.gguf"]),
        (USUAL, "qwen3-8b-q8_0.gguf", ["Qwen3-8B-Q8_0.gguf"]),
        (UNSLOTH, "", ["M-Q4_K_M.gguf"]),
        (UNSLOTH, "Q4_K_XL", ["M-UD-Q4_K_XL.gguf"]),
        (UNSLOTH, "UD-Q2_K_XL", ["M-UD-Q2_K_XL.gguf"]),
        (UNSLOTH, "BF16", ["BF16/M-BF16-00001-of-00001.gguf"]),
        (FOLDERS, "", [f"Q4_K_M/M-Q4_K_M-0000{n}-of-00003.gguf" for n in (1, 2, 3)]),
        (FOLDERS, "q6_k_m", [f"Q6_K_M/M-Q6_K_M-0000{n}-of-00003.gguf" for n in (1, 2, 3)]),
        (LOWER, "", ["model.q4_k_m.gguf"]),
        (LOWER, "Q5_0", ["model.q5_0.gguf"]),
        (VISION, "", ["m-Q4_K_M.gguf"]),
        (["MMPROJ-Q4_K_M.gguf", *ONE], "", ONE),
        (ONE, "", ONE),
        (["UPPER-Q4_0.GGUF"], "Q4_0", ["UPPER-Q4_0.GGUF"]),
        (["m-Q4_K_M-v2.gguf", "m-Q8_0-v2.gguf"], "Q8_0", ["m-Q8_0-v2.gguf"]),
        ([*ONE, *WEIGHTS], "", ONE),
        (["m-Q5_0.gguf", "m-Q8_0.gguf", *WEIGHTS], "", []),
        (WEIGHTS, "", []),
        ([], "", []),
    ],
)
def test_the_right_files_are_chosen(paths: list[str], quant: str, chosen: list[str]) -> None:
    assert [file.path for file in choose_gguf(REPO, listing(*paths), quant)] == chosen


@pytest.mark.parametrize(
    ("paths", "quant", "message"),
    [
        (["a-Q5_0.gguf", "a-Q8_0.gguf"], "", "2 models that fit. Choose one: hf:org/repo:Q5_0 .*, hf:org/repo:Q8_0"),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "", "Choose one: hf:org/repo:a-Q4_K_M .*, hf:org/repo:b-Q4_K_M"),
        (["x/m-Q4_0.gguf", "y/m-Q4_0.gguf"], "q4_0", "Choose one: hf:org/repo:x/m-Q4_0 .*, hf:org/repo:y/m-Q4_0"),
        (USUAL, "Q4_XS", "has no 'Q4_XS'. It has hf:org/repo:BF16"),
        (USUAL, "F16", "has no 'F16'"),
        (USUAL, "4_K_M", "has no '4_K_M'"),
        (USUAL, "Q4_K", "has no 'Q4_K'"),
        (USUAL, ".*", r"has no '\.\*'"),
        (VISION, "mmproj-m-f16", "has no 'mmproj-m-f16'"),
        (WEIGHTS, "Q4_K_M", "has no 'Q4_K_M'. It has no GGUF files"),
        (FOLDERS[1:], "", "is incomplete. It holds 2 of the 3 files of Q4_K_M/M-Q4_K_M"),
        (["m-00001-of-00002.gguf", "m-00003-of-00002.gguf"], "", "is incomplete. It holds 2 of the 2 files of m"),
        (["m-00002-of-00002.gguf"], "", "is incomplete. It holds 1 of the 2 files of m"),
    ],
)
def test_what_is_unclear_is_asked_about(paths: list[str], quant: str, message: str) -> None:
    with pytest.raises(ModelReferenceError, match=message):
        choose_gguf(REPO, listing(*paths), quant)


@pytest.mark.parametrize(
    "paths", [USUAL, UNSLOTH, FOLDERS, LOWER, ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "x/b-Q4_K_M.gguf"]]
)
def test_every_choice_that_an_error_offers_works(paths: list[str]) -> None:
    with pytest.raises(ModelReferenceError) as caught:
        choose_gguf(REPO, listing(*paths), "no-such-quant")
    offers = [offer.split(" (")[0] for offer in caught.value.fix.removeprefix("It has ").split(", ")]
    chosen = [choose_gguf(REPO, listing(*paths), offer.removeprefix(f"hf:{REPO}:")) for offer in offers]
    assert sorted(file.path for files in chosen for file in files) == sorted(p for p in paths if p.endswith(".gguf"))


def test_companions_are_never_code_and_a_single_file_needs_no_index() -> None:
    paths = [
        "config.json",
        "modeling_x.py",
        "tokenizer.json",
        "model.safetensors.index.json",
        "sub/config.json",
        "a.bin",
    ]
    names = [file.path for file in choose_companions(listing(*paths))]
    assert names == ["config.json", "tokenizer.json", "model.safetensors.index.json"]
    names = [file.path for file in choose_companions(listing(*paths, "model.safetensors"))]
    assert names == ["config.json", "tokenizer.json"]


@given(
    st.lists(
        st.from_regex(r"[a-zA-Z0-9_./-]{1,20}(-0000\d-of-0000\d)?\.gguf", fullmatch=True), max_size=6, unique=True
    ),
    st.text(max_size=8),
)
def test_any_listing_gives_files_of_it_or_one_error(paths: list[str], quant: str) -> None:
    files = listing(*paths)
    try:
        chosen = choose_gguf(REPO, files, quant)
    except ModelReferenceError:
        return
    assert set(chosen) <= set(files)
    assert len({file.path for file in chosen}) == len(chosen)


@given(st.text("ab./\\:-\0\n é", max_size=20))
def test_safe_paths_stay_inside(path: str) -> None:
    if is_safe_path(path):
        assert os.path.normpath(os.path.join("/cache/snapshot", path)) == f"/cache/snapshot/{path}"


@pytest.mark.parametrize(
    "path", ["a", "a/b.gguf", "Q4_K_M/m-00001-of-00002.gguf", ".gitattributes", "größe.gguf", "a b"]
)
def test_ordinary_paths_are_safe(path: str) -> None:
    assert is_safe_path(path)
    check_listing(REPO, [RemoteFile(path, 0, "a" * 64)])


def test_sizes_are_for_people() -> None:
    assert [human(size) for size in (0, 1_500_000, 999_999_999, 5_200_000_000)] == [
        "0.0 MB",
        "1.5 MB",
        "1000.0 MB",
        "5.2 GB",
    ]
