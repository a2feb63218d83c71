"""Arrays of any library, seen as numpy or cupy arrays over the same memory."""

from gpuckpt.arrays.make import KINDS, finish, make
from gpuckpt.arrays.probe import (
    LIBRARIES,
    Addresses,
    Facts,
    Library,
    facts,
    locate,
    probed,
)
from gpuckpt.arrays.strided import gather, scatter
from gpuckpt.arrays.view import Array, Tensor, host_view, look, look_all

__all__ = [
    "KINDS",
    "LIBRARIES",
    "Addresses",
    "Array",
    "Facts",
    "Library",
    "Tensor",
    "facts",
    "finish",
    "gather",
    "host_view",
    "locate",
    "look",
    "look_all",
    "make",
    "probed",
    "scatter",
]
