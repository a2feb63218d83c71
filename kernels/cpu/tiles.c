// A chunk's elements tile by tile, and back.  Reference: gpuckpt/tiling.py.
#include "native.h"

void gpuckpt_tile(const u8 *from, u8 *to, size_t item, const u32 *counts, const u32 *ends,
                  u32 back) {
  const u32 *const a = ends, *const b = a + counts[0], *const c = b + counts[1];
  const size_t rows = b[counts[1] - 1], columns = c[counts[2] - 1];
  for (u32 k = 0; k < counts[2]; ++k) {
    const size_t first = k ? c[k - 1] : 0, run = (c[k] - first) * item;
    for (u32 j = 0; j < counts[1]; ++j)
      for (u32 i = 0; i < counts[0]; ++i)
        for (size_t x = i ? a[i - 1] : 0; x < a[i]; ++x)
          for (size_t y = j ? b[j - 1] : 0; y < b[j]; ++y) {
            const size_t place = ((x * rows + y) * columns + first) * item;
            if (back) {
              memcpy(to + place, from, run);
              from += run;
            } else {
              memcpy(to, from + place, run);
              to += run;
            }
          }
  }
}
