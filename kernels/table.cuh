// What every kernel starts with: types, the shape of a block, and how a block finds its row.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Whether a member lies where the host puts it.  NVRTC can't say before CUDA 13.5, and holds all to
// be well: it lays out as the host's compiler does, which the emulation asks.
#if defined(__CUDACC_RTC__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1305
#define LIES(Row, field, at) true
#else
#define LIES(Row, field, at) (__builtin_offsetof(Row, field) == (at))
#endif

constexpr u32 THREADS = 256, WARPS = THREADS / 32, UNIT = 16, ALL = 0xffffffffu;

// The row that has piece `at` of the work, found by the whole block: the last one whose FIRST isn't
// above it.  Each round leaves 1/256 of the rows.
template <class Row, u64 Row::*FIRST>
__device__ __forceinline__ u64 row_of(const Row *__restrict__ table, u64 rows, u64 at) {
  u64 low = 0;
  while (rows > 1) {
    const u64 step = (rows + THREADS - 1) / THREADS, mine = threadIdx.x * step;
    const bool below = mine < rows && table[low + mine].*FIRST <= at;
    const u64 found = (u64)(__syncthreads_count(below) - 1) * step;
    low += found;
    rows = rows - found < step ? rows - found : step;
  }
  return low;
}
