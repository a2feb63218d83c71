"""Checkpoints of other formats: read, and written, tensor by tensor."""

from gpuckpt.conversion.report import Conversion, Moved
from gpuckpt.conversion.run import convert

__all__ = ["Conversion", "Moved", "convert"]
