"""Arrays of any library, seen as numpy or cupy arrays over the same memory."""

from gpuckpt.arrays.make import KINDS, finish, make
from gpuckpt.arrays.strided import gather, scatter
from gpuckpt.arrays.view import Array, Tensor, look

__all__ = ["KINDS", "Array", "Tensor", "finish", "gather", "look", "make", "scatter"]
