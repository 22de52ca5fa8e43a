"""An evaluation whose pictures are drawn by the processes of a group, and measured by its main one."""

from __future__ import annotations

import socket
from collections.abc import Callable

from fastgen.errors import NotFinite, UserError
from fastgen.evaluation.extraction import Part
from fastgen.group import Alone
from fastgen.progress import Progress


def draw_parts(members: Alone, draw: Callable[[Part], object], progress: Progress) -> None:
    """Have each process draw its part of the chunks into the stores that all of them share: the same chunks, in the same batches, as of one process.

    Nothing is left to draw then when the main process measures; it draws what another could not, or says why that cannot be done. progress: is
    told of the former. One process draws nothing here.
    """
    if members.world_size == 1:
        return
    why = ""
    try:
        draw(Part(members.rank, members.world_size))
    except NotFinite:
        pass  # the main process will meet the same
    except UserError as error:
        why = str(error)
    (own, _), *others = members.each((why, socket.gethostname()))
    for rank, (theirs, host) in enumerate(others, 1):
        if theirs not in ("", own):
            progress.warn(f"warning: process {rank} on {host} has not drawn its part of the pictures, so process 0 draws it: {theirs}")
