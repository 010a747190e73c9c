import zlib

import pytest

from codec import bitstream
from codec.bitstream import Header
from codec.errors import FormatError

HEADER = Header(stream_id="0123456789abcdef", decoder_id="fedcba9876543210", quality=50, width=300, height=7)


def test_known_bytes() -> None:
    data = bitstream.pack(HEADER, b"payload")
    body = (
        b"\x89LCX\x00"
        + bytes.fromhex("0123456789abcdeffedcba9876543210")
        + b"\x32"
        + b"\xac\x02"
        + b"\x07"
        + b"payload"
    )
    assert data == body + zlib.crc32(body).to_bytes(4, "little")


@pytest.mark.parametrize("size", [(1, 1), (127, 128), (65535, 1), (1, 65535), (16384, 16384)])
def test_round_trip_of_sizes(size: tuple[int, int]) -> None:
    header = Header(stream_id="00" * 8, decoder_id="ff" * 8, quality=100, width=size[0], height=size[1])
    assert bitstream.unpack(bitstream.pack(header, b"")) == (header, b"")


@pytest.mark.parametrize("size", [(0, 1), (1, 65536), (65535, 65535)])
def test_sizes_that_the_format_cannot_hold(size: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="image size"):
        bitstream.check_size(*size)


def test_every_flipped_byte_and_every_truncation_is_a_format_error() -> None:
    data = bitstream.pack(HEADER, bytes(range(40)))
    for n in range(len(data)):
        with pytest.raises(FormatError):
            bitstream.unpack(data[:n])
        for flip in (1, 0x80, 0xFF):
            with pytest.raises(FormatError):
                bitstream.unpack(data[:n] + bytes([data[n] ^ flip]) + data[n + 1 :])


def with_crc(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\x89LCX\x01" + bytes(30), "version 1"),
        (b"\x89LCX\x00" + bytes(16) + b"\x65\x01\x01", "quality 101"),
        (b"\x89LCX\x00" + bytes(16) + b"\x32\x00\x01", "image size 0x1"),
        (b"\x89LCX\x00" + bytes(16) + b"\x32\xff\xff\xff\xff", "too long"),
        (b"\x89LCX\x00" + bytes(16) + b"\x32\x81\x80", "too long"),
        (b"GIF89a" + bytes(40), "not a latent-codec file"),
        (b"", "empty"),
    ],
)
def test_each_kind_of_wrong_file_has_its_own_message(body: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        bitstream.unpack(with_crc(body) if body else body)
