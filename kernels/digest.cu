// digest_chunks: take the digests of chunks' leaves.
//
//   chunks   rows of chunks.cuh on the device, 16-aligned; first_leaf ascends from 0; tensor,
//            nbytes and first_leaf are looked at
//   rows     how many, at least 1
//   leaves   of all rows: the sum of nbytes / 64 KiB, each rounded up
//   digests  two words a leaf: the 16 bytes of its XXH3-128 digest, most significant first
//
// Tensors may begin at any address.  Nothing but the rows' bytes is read, nothing but the digests
// written.  Launch: 256 threads a block, any grid; best is a block a leaf.
// Reference: fingerprint in gpuckpt/fingerprint.py, whose root, over digests and length, is the
// host's.  Equal to those of filter.cu: so a second look tells whether memory stayed as it was.
//
// Roofline: each byte is read once; 80 bytes of table and 16 of digest come to a leaf.  At an
// H100's 3.35 TB/s that is 0.30 ms a GB, or 20 ns a leaf.  A unit of 16 bytes may then cost some
// 135 instructions of a thread (132 SMs x 128 lanes x 1.7 GHz).  It takes 46 of an aligned full
// tile in sm_90's machine code.  As in filter.cu it is latency that could stop it: each leaf's
// chain.  All this is arithmetic: nothing has been measured on a GPU.
#include "table.cuh"
#include "chunks.cuh"
#include "xxh3.cuh"
#include "block.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 4)
digest_chunks(const Chunk *__restrict__ chunks, u64 rows, u64 leaves, u64 *__restrict__ digests) {
  __shared__ Block block;
  begin_block(block);
  for (u64 at = blockIdx.x; at < leaves;) {
    begin_leaf(block, chunks, rows, at);
    const Leaf &leaf = block.leaf;
    const u8 *from = reinterpret_cast<const u8 *>(block.row.tensor + leaf.begin);
    for (u32 in = threadIdx.x / 32 * TILE; in < leaf.padded; in += WARPS * TILE) {
      uint4 v[UNITS];
      load_tile(from + in, bytes_of(leaf, in), block.tile(), v);
      digest_tile(v, block.keys, in / STRIPE, leaf.padded / STRIPE - 1, block.sums);
    }
    __syncthreads();
    if (threadIdx.x < 32)
      write_digest(block.sums, block.keys, leaf.padded, digests + 2 * leaf.number);
    at = block.leaf.number + gridDim.x;
    __syncthreads();
  }
}
