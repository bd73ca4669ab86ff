"""A KITTI folder that several files convert."""

import pytest
from kitti_builder import KittiFolder, label_line


@pytest.fixture
def data(tmp_path):
    """Two sequences: seven images with one car each, three with two objects."""
    folder = KittiFolder(tmp_path / "data")
    for number in range(7):
        folder.add("a", f"frame{number}", label_line("Car", (number, 0, number + 2.5, 4)))
    for number in range(3):
        folder.add("b", f"frame{number}", label_line("person", (0, 0, 10, 10)) + "\n" + label_line("Truck"))
    return folder
