// What the kernels of deltas share: their table, and how a warp takes differences.
//
// Two copies of a chunk lie in planes, as filter.cu wrote them: the one of now and the one before.
// Four elements at a time are put together out of their planes, turned back if they are turned
// (turn.cuh), folded as in delta.cuh, and taken apart again; so planes of differences never lie in
// memory as a whole.  Differences aren't turned.
//
// A segment is 4096 elements, which a warp takes; a piece is the 8 segments of a block.
constexpr u32 SEGMENT = 4096, STEP = 4 * 32;  // elements
constexpr u32 PIECE = WARPS * SEGMENT;

// A row of the table.  gpuckpt/devices/pairs.py has the same as PAIR.
struct Pair {
  u64 now;          //   0  address of plane 0: a multiple of 16
  u64 before;       //   8  the same of the copy before
  u64 count;        //  16  elements, and so bytes of each plane: at least 1
  u64 stride;       //  24  from a plane to the next, in both: a multiple of 16, at least count
  u64 first_piece;  //  32  pieces of all rows before
  u64 found;        //  40  address of what is said of each segment and plane: 8-aligned
  u64 histograms;   //  48  address of a u16 for each side, plane and value
  u32 width;        //  56  bytes of an element, and so planes: 1, 2, 4 or 8
  u32 every;        //  60  a sample's distance, in elements
  u64 out[8];       //  64  addresses where planes of differences go: multiples of 16
  u64 sparse;       // 128  bit k: plane k goes there as a bitmap and its bytes that aren't zero
  u64 turned;       // 136  whether the copies' planes are of turned elements; 0 unless width is 2 or 4
};
static_assert(sizeof(Pair) == 144 && alignof(Pair) == 8, "");
#define AT(field, at) LIES(Pair, field, at)
static_assert(AT(now, 0) && AT(before, 8) && AT(count, 16) && AT(stride, 24), "");
static_assert(AT(first_piece, 32) && AT(found, 40) && AT(histograms, 48), "");
static_assert(AT(width, 56) && AT(every, 60) && AT(out, 64) && AT(sparse, 128), "");
static_assert(AT(turned, 136), "");
#undef AT

__device__ __forceinline__ u32 word_at(u64 address) {
  return __ldcs(reinterpret_cast<const u32 *>(address));
}

// Four elements' differences, out of words of their planes and into them: w[k] has byte k of each.
template <u32 WIDTH> struct Words {
  u32 w[WIDTH];
  __device__ __forceinline__ static Words load(u64 plane, u64 stride) {
    Words words;
#pragma unroll
    for (u32 k = 0; k < WIDTH; ++k) words.w[k] = word_at(plane + k * stride);
    return words;
  }
};
// A word's elements, 2 or 4 bytes wide, as they were before they were turned, if they are.
__device__ __forceinline__ u32 plain(u32 word, u32 width, bool is_turned) {
  return is_turned ? turned<true>(word, width) : word;
}
__device__ __forceinline__ Words<1> less(const Words<1> &a, const Words<1> &b, bool) {
  return {{folded(fields_of(1), a.w[0], b.w[0])}};
}
__device__ __forceinline__ Words<2> less(const Words<2> &a, const Words<2> &b, bool is_turned) {
  const Fields f = fields_of(2);
  const u32 x = folded(f, plain(__byte_perm(a.w[0], a.w[1], 0x5140), 2, is_turned),
                       plain(__byte_perm(b.w[0], b.w[1], 0x5140), 2, is_turned));
  const u32 y = folded(f, plain(__byte_perm(a.w[0], a.w[1], 0x7362), 2, is_turned),
                       plain(__byte_perm(b.w[0], b.w[1], 0x7362), 2, is_turned));
  return {{__byte_perm(x, y, 0x6420), __byte_perm(x, y, 0x7531)}};
}
// Four elements of 4 bytes out of words of their planes.
__device__ __forceinline__ uint4 elements(const Words<4> &a, bool is_turned) {
  const uint4 v = transposed(make_uint4(a.w[0], a.w[1], a.w[2], a.w[3]));
  return make_uint4(plain(v.x, 4, is_turned), plain(v.y, 4, is_turned), plain(v.z, 4, is_turned),
                    plain(v.w, 4, is_turned));
}
__device__ __forceinline__ Words<4> less(const Words<4> &a, const Words<4> &b, bool is_turned) {
  const Fields f = fields_of(4);
  const uint4 p = elements(a, is_turned), q = elements(b, is_turned);
  const uint4 d = transposed(make_uint4(folded(f, p.x, q.x), folded(f, p.y, q.y),
                                        folded(f, p.z, q.z), folded(f, p.w, q.w)));
  return {{d.x, d.y, d.z, d.w}};
}
__device__ __forceinline__ Words<8> less(const Words<8> &a, const Words<8> &b, bool) {
  const uint4 al = transposed(make_uint4(a.w[0], a.w[1], a.w[2], a.w[3]));
  const uint4 ah = transposed(make_uint4(a.w[4], a.w[5], a.w[6], a.w[7]));
  const uint4 bl = transposed(make_uint4(b.w[0], b.w[1], b.w[2], b.w[3]));
  const uint4 bh = transposed(make_uint4(b.w[4], b.w[5], b.w[6], b.w[7]));
  const u64 x = folded((u64)ah.x << 32 | al.x, (u64)bh.x << 32 | bl.x);
  const u64 y = folded((u64)ah.y << 32 | al.y, (u64)bh.y << 32 | bl.y);
  const u64 z = folded((u64)ah.z << 32 | al.z, (u64)bh.z << 32 | bl.z);
  const u64 w = folded((u64)ah.w << 32 | al.w, (u64)bh.w << 32 | bl.w);
  const uint4 l = transposed(make_uint4((u32)x, (u32)y, (u32)z, (u32)w));
  const uint4 h = transposed(
      make_uint4((u32)(x >> 32), (u32)(y >> 32), (u32)(z >> 32), (u32)(w >> 32)));
  return {{l.x, l.y, l.z, l.w, h.x, h.y, h.z, h.w}};
}

// The differences of the four elements from `at` on, a multiple of 4 below `count`; zeros for those
// that aren't there.  Up to three bytes of padding behind a plane are read.
template <u32 WIDTH> __device__ __forceinline__ Words<WIDTH> differences(const Pair &pair, u64 at) {
  const u64 stride = pair.stride, left = pair.count - at;
  Words<WIDTH> d = less(Words<WIDTH>::load(pair.now + at, stride),
                        Words<WIDTH>::load(pair.before + at, stride), pair.turned);
  if (left < 4) {
#pragma unroll
    for (u32 k = 0; k < WIDTH; ++k) d.w[k] &= ~0u >> (32 - 8 * (u32)left);
  }
  return d;
}

// Bit j: byte j of a word isn't zero.
__device__ __forceinline__ u32 set_bits(u32 word) {
  const u32 set = ((word & 0x7f7f7f7f) + 0x7f7f7f7f | word) >> 7 & 0x01010101;
  return (set | set >> 7 | set >> 14 | set >> 21) & 15;
}

// Each piece of the work by a block, each segment by a warp: TASK::segment<WIDTH>(pair, number).
template <class TASK>
__device__ __forceinline__ void take_pieces(const Pair *__restrict__ pairs, u64 rows, u64 pieces) {
  for (u64 at = blockIdx.x; at < pieces; at += gridDim.x) {
    const Pair &pair = pairs[row_of<Pair, &Pair::first_piece>(pairs, rows, at)];
    const u64 segment = (at - pair.first_piece) * WARPS + threadIdx.x / 32;
    if (segment * SEGMENT < pair.count) {
      switch (pair.width) {
        case 1: TASK::template segment<1>(pair, segment); break;
        case 2: TASK::template segment<2>(pair, segment); break;
        case 4: TASK::template segment<4>(pair, segment); break;
        case 8: TASK::template segment<8>(pair, segment); break;
      }
    }
  }
}
