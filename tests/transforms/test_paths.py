"""Names of layers that differ by indices alone."""

from lowmem.transforms.paths import group_name, indices, role_of
from tests.selection import rows_in_one_case


def test_layers_of_one_role_differ_by_indices_alone():
    assert role_of("layers.0.up") == role_of("layers.12.up") == ("layers", None, "up")
    assert role_of("layers.0.up") != role_of("layers.0.down")
    assert role_of("layers.0") != role_of("layers.0.0")
    assert role_of("block1.up") != role_of("block2.up")  # a name with a digit is no index


def test_one_name_stands_for_all_paths():
    assert group_name([f"layers.{n}.mlp.up" for n in range(30)]) == "layers.0-29.mlp.up"
    assert group_name(["blocks.0.heads.1", "blocks.0.heads.2", "blocks.1.heads.1"]) == "blocks.0,1.heads.1,2"
    assert group_name(["head"]) == "head"


@rows_in_one_case(
    ("found", "text"),
    [
        ([3], "3"),
        ([0, 1], "0,1"),
        ([0, 1, 2], "0-2"),
        (range(30), "0-29"),
        ([0, 2, 5], "0,2,5"),
        ([0, 2, 4, 7], "0...7"),
    ],
)
def test_indices_are_written_short(found, text):
    assert indices(found) == text
