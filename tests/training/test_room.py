"""Room for what is kept is taken in few pieces, which are freed with their last view."""

import gc
import weakref

import torch

from lowmem.training.room import Room


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
