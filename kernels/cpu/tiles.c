// A chunk's elements tile by tile, and back.  Reference: gpuckpt/tiling.py.
#include "native.h"

// Row by row of the box, so that one side is read or written from its first byte to its last; of the
// other one so many places are gone on with that they stay in the nearest cache.  The tiles of one
// column and one row of tiles follow each other, so that where they end doesn't matter.
void gpuckpt_tile(const u8 *from, u8 *to, size_t item, const u32 *counts, const u32 *ends,
                  u32 back) {
  const u32 *const a = ends, *const b = a + counts[0], *const c = b + counts[1];
  const size_t layers = a[counts[0] - 1], rows = b[counts[1] - 1];
  size_t place = 0;
  for (size_t x = 0; x < layers; ++x)
    for (u32 j = 0; j < counts[1]; ++j) {
      const size_t first = j ? b[j - 1] : 0;
      for (size_t y = first; y < b[j]; ++y) {
        const size_t before = first * layers + (b[j] - first) * x + (y - first);
        for (u32 k = 0; k < counts[2]; ++k) {
          const size_t begin = k ? c[k - 1] : 0, span = c[k] - begin;
          const size_t tiled = (begin * layers * rows + span * before) * item;
          memcpy(to + (back ? place : tiled), from + (back ? tiled : place), span * item);
          place += span * item;
        }
      }
    }
}
