"""A rectangle of an image, and the latents that it is decoded from."""

from dataclasses import dataclass

from codec.bitstream import Header
from codec.errors import UsageError


@dataclass(frozen=True)
class Region:
    """A rectangle in pixels."""

    left: int
    top: int
    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> "Region":
        """Read "LEFT,TOP,WIDTH,HEIGHT"; raises UsageError."""
        try:
            left, top, width, height = (int(part) for part in text.split(","))
        except ValueError as exception:
            raise UsageError(f"--region {text}: expected LEFT,TOP,WIDTH,HEIGHT in pixels") from exception
        if min(left, top) < 0 or min(width, height) < 1:
            raise UsageError(f"--region {text}: expected LEFT and TOP from 0, WIDTH and HEIGHT from 1")
        return cls(left, top, width, height)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, width, height)."""
        return self.left, self.top, self.width, self.height

    def check(self, width: int, height: int) -> None:
        """Raise ValueError unless the region lies inside an image of width x height pixels."""
        if self.left + self.width > width or self.top + self.height > height:
            named = ",".join(map(str, self.box))
            raise ValueError(f"region {named} is not inside the image of {width}x{height} pixels")

    def latents(self, header: Header, receptive_field: int | None) -> tuple[slice, slice] | None:
        """Return rows and columns of the latents that the region is decoded from; None = all.

        Args:
            header: of the file.
            receptive_field: how far, in pixels, a pixel of the network's output can see at most; None = everywhere.
        """
        if receptive_field is None:
            return None
        f, (h, w) = header.f, header.grid

        def span(start: int, length: int, limit: int) -> slice:
            return slice(
                max(0, (start - receptive_field) // f), min(limit, -(-(start + length + receptive_field) // f))
            )

        return span(self.top, self.height, h), span(self.left, self.width, w)


def lost_pixels(header: Header, lost: tuple[slice, slice]) -> str:
    """Say in pixels where latents are lost: "x 0..511, y 0..511"."""
    rows, columns = lost
    right, bottom = min(columns.stop * header.f, header.width), min(rows.stop * header.f, header.height)
    return f"x {columns.start * header.f}..{right - 1}, y {rows.start * header.f}..{bottom - 1}"
