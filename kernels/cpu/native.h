// Loops of the CPU side, for one thread each.  C11; a compiler's -O3 turns them into vectors.
//
// Callers see to it that lengths and buffers are what is said; nothing is checked but that
// unpack_sparse stays within its buffers, whatever they hold.  Any address is fine.  Nothing is
// allocated or kept.  With GPUCKPT_PLAIN a machine's own instructions are left to the compiler, as
// they are where there is no code for them.  gpuckpt/native.py calls these; numpy's versions beside its callers are the
// reference, which gives the same bytes.
#ifndef GPUCKPT_NATIVE_H
#define GPUCKPT_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "elements are little-endian here; numpy does it elsewhere"
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

// No iteration depends on another: what is written lies where it was read, or elsewhere altogether.
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

// Bytes that are done in two passes: they stay in the nearest cache.
enum { TILE = 4096 };

// gpuckpt/native.py expects this number.  It changes with any signature or meaning.
EXPORT u32 gpuckpt_version(void);

// Byte k of element i of `raw` (`count` of `width` bytes) goes to out[k * stride + i].
EXPORT void gpuckpt_split(const u8 *raw, size_t count, size_t width, u8 *out, size_t stride);
// Byte i of planes[k] goes to byte k of element i of `out`, for `count` elements.
EXPORT void gpuckpt_join(const u8 *const *planes, size_t count, size_t width, u8 *out);

// The same of elements that are turned: as little-endian integers, left by one bit, the highest one
// becoming the lowest.  `width` is 2, 4 or 8.
EXPORT void gpuckpt_split_turned(const u8 *raw, size_t count, size_t width, u8 *out,
                                 size_t stride);
EXPORT void gpuckpt_join_turned(const u8 *const *planes, size_t count, size_t width, u8 *out);

// Folded differences of `count` elements.  `out` is `cur`, `base`, or overlaps neither.
EXPORT void gpuckpt_delta(const u8 *cur, const u8 *base, size_t count, size_t width, u8 *out);
// Undoes it.  `out` is `folded`, `base`, or overlaps neither.
EXPORT void gpuckpt_undelta(const u8 *folded, const u8 *base, size_t count, size_t width, u8 *out);
// delta, then split.
EXPORT void gpuckpt_delta_split(const u8 *cur, const u8 *base, size_t count, size_t width, u8 *out);
// join, then undelta.  `out` is `base`, or overlaps nothing.
EXPORT void gpuckpt_join_undelta(const u8 *const *planes, const u8 *base, size_t count,
                                 size_t width, u8 *out);

// How many of `size` bytes aren't zero.
EXPORT size_t gpuckpt_count_nonzero(const u8 *plane, size_t size);
// Bits of bytes that aren't zero, to (size + 7) / 8 bytes of bitmap, and these bytes, to `packed`.
// Returns their number.  Writes no more than `room` bytes of `packed`, even if that is too few.
EXPORT size_t gpuckpt_pack_sparse(const u8 *plane, size_t size, u8 *bitmap, u8 *packed,
                                  size_t room);
// Undoes it; 0 if `size` and `count` aren't those of the bitmap, which has (size + 7) / 8 bytes.
EXPORT int gpuckpt_unpack_sparse(const u8 *bitmap, const u8 *packed, size_t count, u8 *out,
                                 size_t size);

// A plane as a Zstandard frame without matches, in `out`.  Returns its length, or 0 if it may not
// fit `room` bytes, all of which may be written to.
EXPORT size_t gpuckpt_huffman(const u8 *plane, size_t size, u8 *out, size_t room);
// A plane that consists of `count` tiles of 1 byte and more, as a frame of which the first block has
// FIRST_BLOCK bytes and the codes, and what follows of every tile has its own blocks, which need no
// other one but the first.  ends[0]: where the first block ends, ends[t + 1]: where tile t does.
// Returns the length, or 0 if it may not fit `room` bytes, all of which may be written to.
enum { FIRST_BLOCK = 64 };
EXPORT size_t gpuckpt_huffman_tiles(const u8 *plane, const u32 *sizes, size_t count, u8 *out,
                                    size_t room, u32 *ends);
// Elements of `item` bytes of a box of three axes, to tiles, of which the first axis' number is the
// fastest, or `back`.  counts[k]: tiles along axis k; ends: where they end, axis after axis.
EXPORT void gpuckpt_tile(const u8 *from, u8 *to, size_t item, const u32 *counts, const u32 *ends,
                         u32 back);
// 8 bytes of each tile's XXH3-128, filled up with zeros as in `gpuckpt_look`.  A tile has 64 KiB at
// most, and 1 at least.
EXPORT void gpuckpt_check_tiles(const u8 *bytes, const u32 *sizes, size_t count, u8 *checks);
// In how many of a plane's pieces of 256 bytes the first 8 are all the same.
EXPORT size_t gpuckpt_count_runs(const u8 *plane, size_t size);

// Squares of elements: kind 1: float16, 2: bfloat16, 5: bytes, whose bits in `mask`, shifted left
// by `shift`, are a float16 without its sign.  Added to lanes[1024], which are zeros: code i of two
// bytes to lane i % 1024.  A lane becomes infinite or NaN if an element is: of bytes, one whose bits
// in `mask` are above `top`, or that is `odd`.
EXPORT void gpuckpt_squares(const u8 *raw, size_t size, u32 kind, u32 mask, u32 shift, u32 top,
                            u32 odd, double *lanes);

// `count` float32 rounded to the nearest of kind 1: float16, 2: bfloat16; a tie to the even one.
EXPORT void gpuckpt_round(const u8 *raw, size_t count, u32 kind, u8 *out);

// XXH3-128 of each 64 KiB of `raw`, to 16 bytes each of digests: what is left at the end is filled
// up with zeros to a multiple of 256.  XXH3-64 of all of it to *check if `size` is more than 240,
// else 0.  Squares as above if `kind` is 1, 2 or 5; or kind 3: float32,
// of which the sum is returned, infinite or NaN if an element is.  Unless `out` is null, planes as
// `gpuckpt_split` makes them, or `gpuckpt_split_turned`, one after the other.
EXPORT double gpuckpt_look(const u8 *raw, size_t size, u32 kind, u32 mask, u32 shift, u32 top,
                           u32 odd, double *lanes, u8 *digests, u64 *check,
                           size_t width, u32 turned, u8 *out);

// Fills `out` from byte `offset` of an open file on, and looks at it part by part, as above: digests
// of each 64 KiB, and *check.  Returns how many bytes there were, or the system's error below zero;
// unless that is `size`, what was said means nothing.
EXPORT ptrdiff_t gpuckpt_read(int file, u64 offset, u8 *out, size_t size, u8 *digests, u64 *check);

#endif
