"""Rectangles: what users write, what lies inside, which latents are needed."""

import pytest

from codec.bitstream import Header
from codec.errors import UsageError
from codec.regions import Region, lost_pixels

HEADER = Header(stream_id="0" * 16, decoder_id="1" * 16, quality=50, width=1000, height=500, f=8, tile=64)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "a,b,c,d", "-1,0,5,5", "0,0,0,5", "1.5,0,2,2"])
def test_what_is_no_rectangle_is_one_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--region"):
        Region.parse(text)


def test_a_rectangle_must_lie_inside() -> None:
    Region.parse("990,490,10,10").check(1000, 500)
    for text in ("990,490,11,10", "990,490,10,11", "1000,0,1,1"):
        with pytest.raises(ValueError, match="1000x500"):
            Region.parse(text).check(1000, 500)


def test_a_network_that_sees_everywhere_needs_all_latents_and_another_only_those_within_reach() -> None:
    region = Region.parse("400,200,100,50")
    assert region.latents(HEADER, None) is None
    rows, columns = region.latents(HEADER, 20) or (slice(0), slice(0))
    assert (rows.start, rows.stop, columns.start, columns.stop) == (180 // 8, 34, 380 // 8, 65)
    everything = Region.parse("0,0,1000,500").latents(HEADER, 100)
    assert everything == (slice(0, 63), slice(0, 125))


def test_lost_tiles_are_named_in_pixels_of_the_image() -> None:
    places = [lost_pixels(HEADER, place) for place in HEADER.tiles()]
    assert places == ["x 0..511, y 0..499", "x 512..999, y 0..499"]
