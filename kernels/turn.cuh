// Elements that are turned left by one bit, the highest one becoming the lowest, as filter.cu writes
// and unfilter.cu reads planes of floats: the exponent is then in one plane.
// Reference: turn in gpuckpt/planes.py.

// A word's elements of `width` bytes, 2 or 4, turned (BACK: turned back).
template <bool BACK> __device__ __forceinline__ u32 turned(u32 word, u32 width) {
  if (width == 4) return __funnelshift_l(word, word, BACK ? 31 : 1);
  if (BACK) return word >> 1 & 0x7fff7fff | (word & 0x00010001) << 15;
  return word << 1 & 0xfffefffe | word >> 15 & 0x00010001;
}
// This lane's units turned (BACK: turned back); `width` is 2, 4 or 8.
template <bool BACK> __device__ __forceinline__ void turn_tile(u32 width, uint4 *v) {
#pragma unroll
  for (u32 u = 0; u < UNITS; ++u) {
    const uint4 w = v[u];
    if (width < 8)
      v[u] = make_uint4(turned<BACK>(w.x, width), turned<BACK>(w.y, width),
                        turned<BACK>(w.z, width), turned<BACK>(w.w, width));
    else if (BACK)
      v[u] = make_uint4(__funnelshift_r(w.x, w.y, 1), __funnelshift_r(w.y, w.x, 1),
                        __funnelshift_r(w.z, w.w, 1), __funnelshift_r(w.w, w.z, 1));
    else
      v[u] = make_uint4(__funnelshift_l(w.y, w.x, 1), __funnelshift_l(w.x, w.y, 1),
                        __funnelshift_l(w.w, w.z, 1), __funnelshift_l(w.z, w.w, 1));
  }
}
