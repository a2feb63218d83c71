"""Arrays of any library, seen as numpy or cupy arrays over the same memory."""

from gpuckpt.arrays.assemble import assembled
from gpuckpt.arrays.hollow import Filled, Hollow
from gpuckpt.arrays.make import KINDS, finish, make
from gpuckpt.arrays.probe import (
    LIBRARIES,
    Addresses,
    Facts,
    Library,
    addresses,
    are_apart,
    probed,
)
from gpuckpt.arrays.sharding import form_of, look, look_all
from gpuckpt.arrays.strided import gather, scatter
from gpuckpt.arrays.view import Array, Tensor, host_bytes, host_view
from gpuckpt.arrays.wrapped import WRAPPINGS, Wrapped, Wrapping, facts_of, locate_all, wrapping

__all__ = [
    "KINDS",
    "LIBRARIES",
    "WRAPPINGS",
    "Addresses",
    "Array",
    "Facts",
    "Filled",
    "Hollow",
    "Library",
    "Tensor",
    "Wrapped",
    "Wrapping",
    "addresses",
    "are_apart",
    "assembled",
    "facts_of",
    "finish",
    "form_of",
    "gather",
    "host_bytes",
    "host_view",
    "locate_all",
    "look",
    "look_all",
    "make",
    "probed",
    "scatter",
    "wrapping",
]
