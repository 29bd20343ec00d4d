"""Room for what is kept is taken in few pieces, which are freed with their last view."""

import gc
import weakref

import torch

from lowmem.training.room import Heap, Room


def test_views_do_not_overlap_and_pieces_grow_with_what_is_kept():
    room, sizes = Room(), [1000, 70, 64, 4096, 1] * 40
    views = [room.take(size) for size in sizes]
    for number, view in enumerate(views):
        view.fill_(number % 100)
    assert all(
        view.shape == (size,) and view.data_ptr() % 64 == views[0].data_ptr() % 64
        for view, size in zip(views, sizes, strict=True)
    )
    assert all(bool((view == number % 100).all()) for number, view in enumerate(views))
    pieces = {view.untyped_storage()._cdata: view.untyped_storage().nbytes() for view in views}
    assert sum(pieces.values()) <= 1.25 * (
        sum(sizes) + 32 * len(sizes)
    )  # an eighth, and what the next view does not fit in
    assert len(pieces) < len(sizes) / 3
    assert all(view[: len(view) // 4 * 4].view(torch.float32).numel() == len(view) // 4 for view in views)


def test_what_is_given_back_is_taken_again_and_pieces_are_freed():
    room = Room()
    for _ in range(20):
        room.take(512)
    first = room.take(256).data_ptr()
    room.give_back()
    assert room.take(128).data_ptr() == first
    view = Room().take(64)
    piece = weakref.ref(view.untyped_storage())
    del view
    gc.collect()
    assert piece() is None


def test_holes_are_returned_only_before_the_process_grows_beyond_what_it_had_to_be():
    # A heap of 100 MiB in use, with holes that grow: what is resident counts both.
    used, holes, trimmed, mib = 100, 0, [], 2**20

    def trim(_):
        nonlocal holes
        trimmed.append(holes)
        holes = 0

    heap = Heap(trim, lambda: (used + holes) * mib)
    heap.return_holes(3 * mib)  # too little to walk over the heap
    assert trimmed == []
    heap.return_holes(10 * mib)  # 110 are needed: the mark
    holes = 5
    heap.return_holes(5 * mib)  # 110 with the holes
    assert trimmed == [0]
    holes = 20
    heap.return_holes(5 * mib)  # 125 with the holes, 105 without
    assert trimmed == [0, 20]
    used, holes = 60, 40
    heap.return_holes(10 * mib)  # the mark stayed at 110
    assert trimmed == [0, 20]
    used = 120
    heap.return_holes(10 * mib)
    used, holes = 110, 15
    heap.return_holes(5 * mib)  # 130 is the new mark
    assert trimmed == [0, 20, 40]
