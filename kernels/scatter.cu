// scatter_runs: put packed runs, in C order, back into strided tensors.
//
// The inverse of gather.cu, with its arguments, its table and its launch: here the packed bytes are
// read and the tensors' items written, and nothing else.  No two items may lie at one address, as
// they would with a stride of 0.
// Reference: scatter in gpuckpt/arrays/strided.py.
//
// A thread reads its 16 packed bytes by one load if the run's begin at a multiple of 16.  Roofline
// as gather.cu, but worse where neighbours lie apart: parts of sectors are written, which wait in
// the second-level cache for the others.
#include "table.cuh"
#include "strided.cuh"

struct Scatter {
  template <class Item> __device__ __forceinline__ static void one(u64 to, u64 from) {
    __stwb(reinterpret_cast<Item *>(to), __ldcs(reinterpret_cast<const Item *>(from)));
  }
  template <class Item> __device__ __forceinline__ static void unit(u64 to, u64 stride, u64 from) {
    Unit<Item> items;
    if (from % UNIT == 0) {
      items.set_all(__ldcs(reinterpret_cast<const uint4 *>(from)));
    } else {
#pragma unroll
      for (u32 k = 0; k < items.COUNT; ++k)
        items.set(k, __ldcs(reinterpret_cast<const Item *>(from) + k));
    }
#pragma unroll
    for (u32 k = 0; k < items.COUNT; ++k)
      __stwb(reinterpret_cast<Item *>(to + k * stride), items.get(k));
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 4)
scatter_runs(const Run *__restrict__ runs, u64 rows, u64 pieces) {
  move_pieces<Scatter>(runs, rows, pieces);
}
