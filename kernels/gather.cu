// gather_runs: pack runs of strided tensors, in C order.
//
//   runs    rows of strided.cuh on the device, 16-aligned; first_piece ascends from 0
//   rows    how many, at least 1
//   pieces  of all rows: the sum of count * itemsize / 16 KiB, each rounded up
//
// Each run's items, as they follow each other in C order, go to its packed bytes.  Nothing else is
// read or written; packed bytes overlap nothing, and nobody changes the tensors meanwhile.
// Launch: 256 threads a block, any grid; best is a block a piece.
// Reference: gather in gpuckpt/arrays/strided.py.  Inverse: scatter.cu.
//
// A thread finds its 16 packed bytes' first item by a division an axis, goes on along the last
// axis, and writes all by one store if the run's packed bytes begin at a multiple of 16.
//
// Roofline: each byte is read once and written once: 0.60 ms a GB at an H100's 3.35 TB/s, where 270
// instructions of a thread may go to 16 bytes.  What will stop it short of that: where neighbours
// in C order lie apart, as in a transposed matrix, every item costs a sector of 32 bytes from a
// cache.  These hold what other threads take of it soon after, so that memory is read about once;
// but of 4-byte items the second-level cache (some 5.5 TB/s) gives 8 times what is wanted: 0.7
// TB/s, 1.5 ms a GB, or worse where the rows of a piece don't stay in a cache.  A division of 32
// bits takes some 20 instructions, an axis of few items one each for its length.  All this is
// arithmetic: nothing has been measured on a GPU.
#include "table.cuh"
#include "strided.cuh"

struct Gather {
  template <class Item> __device__ __forceinline__ static void one(u64 from, u64 to) {
    __stcs(reinterpret_cast<Item *>(to), __ldg(reinterpret_cast<const Item *>(from)));
  }
  template <class Item> __device__ __forceinline__ static void unit(u64 from, u64 stride, u64 to) {
    Unit<Item> items;
#pragma unroll
    for (u32 k = 0; k < items.COUNT; ++k)
      items.set(k, __ldg(reinterpret_cast<const Item *>(from + k * stride)));
    if (to % UNIT == 0) {
      __stcs(reinterpret_cast<uint4 *>(to), items.all());
    } else {
#pragma unroll
      for (u32 k = 0; k < items.COUNT; ++k) __stcs(reinterpret_cast<Item *>(to) + k, items.get(k));
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 4)
gather_runs(const Run *__restrict__ runs, u64 rows, u64 pieces) {
  move_pieces<Gather>(runs, rows, pieces);
}
