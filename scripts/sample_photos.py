"""Copy the photographs that come with scikit-image's wheel to FOLDER/train and FOLDER/test; no download.

python scripts/sample_photos.py FOLDER
"""

import shutil
import sys
from pathlib import Path

import skimage

TEST = ("astronaut.png", "chelsea.png", "coffee.png")
TRAIN = (
    "brick.png",
    "camera.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)


def main(folder: Path) -> int:
    """Copy what is not there yet; return an exit code."""
    source = Path(skimage.__file__).parent / "data"
    for part, names in (("train", TRAIN), ("test", TEST)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            if not (folder / part / name).exists():
                shutil.copyfile(source / name, folder / part / name)
    print(f"{len(TRAIN)} photographs to train on, {len(TEST)} to test with, in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
