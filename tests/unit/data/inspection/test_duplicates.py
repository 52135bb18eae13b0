"""Near pairs of hashes: all of them and no others, at a fraction of the comparisons; groups; real photographs."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm.data.inspection import duplicates
from cloc_mllm.data.inspection.duplicates import bit_distance, equal_groups, near_groups, near_matches, near_pairs
from cloc_mllm.data.inspection.pictures import look_at, look_hash
from cloc_mllm.errors import ClocError

COCO50 = Path(os.environ.get("CLOC_COCO50", Path(__file__).resolve().parents[5] / "shared" / "data" / "coco50"))


@st.composite
def hashes(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Hashes with many near ones among them: a few at random, others a few flipped bits away from those."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    flips = st.lists(st.integers(0, 63), max_size=12)
    members = draw(st.lists(st.tuples(st.sampled_from(centres), flips), max_size=14))
    found = list(centres)
    for centre, bits in members:
        for bit in bits:
            centre ^= 1 << bit
        found.append(centre)
    return np.array(found, np.uint64)


def brute(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any], distance: int) -> set[tuple[int, int, int]]:
    pairs = ((i, j, (int(a) ^ int(b)).bit_count()) for i, a in enumerate(left) for j, b in enumerate(right))
    return {(i, j, away) for i, j, away in pairs if away <= distance}


def listed(blocks: Any) -> list[tuple[int, int, int]]:
    return [pair for block in blocks for pair in zip(*(column.tolist() for column in block), strict=True)]


@given(hashes(), hashes(), st.integers(0, duplicates.LARGEST_DISTANCE), st.sampled_from([1, 7, 1 << 21]))
@settings(deadline=None)
def test_near_matches_are_those_of_brute_force(left: Any, right: Any, distance: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_BLOCK", block)
        found = listed(near_matches(left, right, distance))
    assert len(found) == len(set(found))
    assert set(found) == brute(left, right, distance)


@given(hashes(), st.integers(0, duplicates.LARGEST_DISTANCE))
@settings(deadline=None)
def test_near_pairs_name_each_pair_once(values: Any, distance: int) -> None:
    found = listed(near_pairs(values, distance))
    assert sorted(found) == sorted(pair for pair in brute(values, values, distance) if pair[0] < pair[1])


@given(hashes(), st.integers(0, 8))
@settings(deadline=None)
def test_groups_are_connected_and_complete(values: Any, distance: int) -> None:
    groups, _ = near_groups(values, distance)
    label = {int(k): number for number, group in enumerate(groups) for k in group}
    near = {(i, j) for i, j, _ in brute(values, values, distance) if i != j}
    assert all(label.get(i, -1) == label.get(j, -2) for i, j in near)
    assert set(label) == {i for pair in near for i in pair}
    for group in groups:  # by steps of near pairs, every member is reached from the first
        reached, fresh = {int(group[0])}, {int(group[0])}
        while fresh:
            fresh = {j for i, j in near if i in fresh} - reached
            reached |= fresh
        assert reached == {int(k) for k in group}


def test_few_of_all_pairs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    def counted(left: Any, right: Any) -> Any:
        nonlocal compared
        compared += len(left)
        return bit_distance(left, right)

    monkeypatch.setattr(duplicates, "bit_distance", counted)
    values = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    assert near_groups(values, 4) == ([], 0)
    assert compared < 0.002 * len(values) ** 2


@pytest.mark.parametrize("distance", [-1, 16])
def test_a_distance_that_cannot_be_searched_for(distance: int) -> None:
    with pytest.raises(ClocError, match="cannot be searched for"):
        next(near_matches(np.zeros(1, np.uint64), np.zeros(1, np.uint64), distance))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12))
def test_equal_rows_are_grouped(rows: list[tuple[int, int]]) -> None:
    groups = equal_groups(np.array(rows, np.int64).reshape(-1, 2))
    wanted = {row: [k for k, other in enumerate(rows) if other == row] for row in rows}
    assert [group.tolist() for group in groups] == [places for places in wanted.values() if len(places) > 1]


def encoded(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, **options)
    return buffer.getvalue()


def test_a_thumbnail_has_the_hash_of_its_picture_and_a_flat_one_no_looks() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((300, 210), Image.Resampling.BICUBIC)
    found = look_at(encoded(picture, format="PNG"), None, hashes=True)
    assert found.look == look_hash(picture)
    assert found.mirrored == look_hash(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert (found.size, found.format, found.flat) == ((300, 210), "PNG", False)
    assert look_at(encoded(Image.new("RGB", (50, 50), "red"), format="PNG"), None, hashes=True).flat


@pytest.mark.skipif(not COCO50.is_dir(), reason=f"the 50 photographs of COCO are not at {COCO50} (set CLOC_COCO50)")
def test_photographs_are_told_from_one_another_and_known_again() -> None:
    pictures = [Image.open(file).convert("RGB") for file in sorted((COCO50 / "train2017").glob("*.jpg"))[:25]]
    looks = [look_at(encoded(picture, format="BMP"), None, hashes=True) for picture in pictures]
    own = np.array([look.look for look in looks], np.uint64)
    assert listed(near_pairs(own, 4)) == []
    copies = {
        "quality 50": [encoded(picture, format="JPEG", quality=50) for picture in pictures],
        "half the size": [
            encoded(p.resize((p.width // 2, p.height // 2)), format="JPEG", quality=90) for p in pictures
        ],
    }
    for name, files in copies.items():
        again = np.array([look_at(file, None, hashes=True).look for file in files], np.uint64)
        assert {(i, j) for i, j, _ in listed(near_matches(again, own, 4))} == {(k, k) for k in range(25)}, name
    mirrored = [
        look_at(encoded(p.transpose(Image.Transpose.FLIP_LEFT_RIGHT), format="BMP"), None, True) for p in pictures
    ]
    again = np.array([look.mirrored for look in mirrored], np.uint64)
    assert {(i, j) for i, j, _ in listed(near_matches(again, own, 4))} == {(k, k) for k in range(25)}
