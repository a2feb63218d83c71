// stubcuda.cpp - a stand-in for libcuda.so.1 that executes on the CPU.
//
// It implements the documented CUDA driver API calls that CuPy makes for
// memory, streams, events, modules and launches; stubcudart.cpp adds the
// documented runtime API on top.  "Device memory" is host memory behind a protection key, so code
// running outside a stream's worker thread faults when it touches it; every
// stream has a worker thread; modules are host libraries built by cuemu.
//
// Environment: STUBCUDA_DEVICES, STUBCUDA_MEM_MB, STUBCUDA_CC (e.g. 90),
// STUBCUDA_MODE=async|eager|lazy, STUBCUDA_H2D_GBPS, STUBCUDA_D2H_GBPS,
// STUBCUDA_JITTER_US, STUBCUDA_SEED, STUBCUDA_TRACE=1|2, STUBCUDA_PKEY=0|1,
// STUBCUDA_ORDER (thread order in a block: 0 forward, 1 reverse, n random),
// STUBCUDA_ALIASED=1 (all streams of a device share a queue, see streams.inc).
#include <cuda.h>
#include <dlfcn.h>
#include <signal.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace {
using Clock = std::chrono::steady_clock;
long long env_num(const char *k, long long d) { const char *v = getenv(k); return v && *v ? atoll(v) : d; }
double env_dbl(const char *k, double d) { const char *v = getenv(k); return v && *v ? atof(v) : d; }

// ---- settings ----------------------------------------------------------------
enum Mode { ASYNC, EAGER, LAZY };
struct Config {
  int devices = (int)env_num("STUBCUDA_DEVICES", 1), cc = (int)env_num("STUBCUDA_CC", 90);
  size_t mem = (size_t)env_num("STUBCUDA_MEM_MB", 4096) << 20;
  Mode mode = ASYNC;
  double h2d = env_dbl("STUBCUDA_H2D_GBPS", 0), d2h = env_dbl("STUBCUDA_D2H_GBPS", 0);
  long long jitter = env_num("STUBCUDA_JITTER_US", 0), trace = env_num("STUBCUDA_TRACE", 0), order = env_num("STUBCUDA_ORDER", 0);
  unsigned seed = (unsigned)env_num("STUBCUDA_SEED", 1);
  int pkey = -1;
  Config() {
    const char *m = getenv("STUBCUDA_MODE");
    if (m && !strcmp(m, "eager")) mode = EAGER;
    if (m && !strcmp(m, "lazy")) mode = LAZY;
  }
} C;
void trace(const char *fmt, ...) {
  if (C.trace < 2) return;
  va_list ap;
  va_start(ap, fmt);
  fputs("[stubcuda] ", stderr);
  vfprintf(stderr, fmt, ap);
  fputc('\n', stderr);
  va_end(ap);
}

// ---- state -------------------------------------------------------------------
struct Stream;
using Place = std::pair<std::shared_ptr<Stream>, uint64_t>;   // a stream, and how far
struct Op {
  std::function<void()> run;
  std::vector<Place> deps;
  uint64_t ticket = 0;                 // among its stream's
};
struct Stream {
  struct CUctx_st *ctx; bool nonblocking = false; int priority = 0; unsigned long long id = 0;
  std::deque<Op> q; uint64_t enq = 0, done = 0, wanted = 0; bool stop = false;
  std::thread th;
};
struct Event { std::shared_ptr<Stream> s; uint64_t ticket = 0; bool recorded = false; unsigned flags = 0; struct Time { Clock::time_point t; }; std::shared_ptr<Time> time; };
struct Alloc { size_t size, mapped; char *base; int dev; bool device; unsigned flags; };
struct Kernel { struct Module *mod; int index; std::string name; int smem_attr = 48 << 10; };
struct Module { void *dl = nullptr; int fd = -1; std::map<std::string, std::unique_ptr<Kernel>> k; };

// Never destroyed: worker threads still use them while the process exits.
std::mutex &g = *new std::mutex;    // protects all of the state
std::condition_variable &cv = *new std::condition_variable;
std::mutex &launch_mu = *new std::mutex;   // kernels of all streams run one at a time
auto &allocs = *new std::map<uintptr_t, Alloc>;   // device and pinned host memory by address
size_t used[64];
auto &streams = *new std::map<Stream *, std::shared_ptr<Stream>>;
auto &draining = *new std::set<std::shared_ptr<Stream>>;   // destroyed, with work left
unsigned long long next_id = 1;
thread_local bool in_worker = false, in_callback = false;
bool inited = false;
}  // namespace
struct CUctx_st { int dev; int refs = 0; unsigned flags = 0; CUresult sticky = CUDA_SUCCESS; std::string why; bool told = false; std::shared_ptr<Stream> null_stream;
};
namespace {
CUctx_st *const primary = new CUctx_st[64];
thread_local std::vector<CUctx_st *> ctx_stack;
CUctx_st *cur() { return ctx_stack.empty() ? nullptr : ctx_stack.back(); }

// ---- faults in kernels and copies become sticky context errors ------------------
thread_local sigjmp_buf *fault_jmp = nullptr;
thread_local void *fault_addr = nullptr;
thread_local int fault_code = 0;
struct sigaction old_segv, old_bus;
void on_fault(int sig, siginfo_t *si, void *uc) {
  if (fault_jmp) { fault_addr = si->si_addr; fault_code = si->si_code; siglongjmp(*fault_jmp, sig); }
  struct sigaction &o = sig == SIGBUS ? old_bus : old_segv;
  bool dev = false;
  for (auto &a : allocs) if (a.second.device && (char *)si->si_addr >= a.second.base && (char *)si->si_addr < a.second.base + a.second.mapped) dev = true;
  if (dev) { static const char m[] = "[stubcuda] host code touched device memory\n"; (void)!write(2, m, sizeof m - 1); }
  if (o.sa_flags & SA_SIGINFO && o.sa_sigaction) { o.sa_sigaction(sig, si, uc); return; }
  if (o.sa_handler != SIG_DFL && o.sa_handler != SIG_IGN && o.sa_handler) { o.sa_handler(sig); return; }
  signal(sig, SIG_DFL);
}
void fail_ctx(CUctx_st *c, CUresult r, const std::string &why, bool told = false) {
  std::lock_guard<std::mutex> l(g);
  if (c->sticky == CUDA_SUCCESS) { c->sticky = r; c->why = why; c->told = told; }
  cv.notify_all();
  fprintf(stderr, "[stubcuda] context error %d: %s\n", (int)r, why.c_str());
}
bool guarded(CUctx_st *c, const char *what, const std::function<void()> &f) {
  sigjmp_buf jb;
  if (int sig = sigsetjmp(jb, 1)) {
    fault_jmp = nullptr;
    char b[256];
    snprintf(b, sizeof b, "%s faulted (signal %d, code %d) at address %p", what, sig, fault_code, fault_addr);
    fail_ctx(c, CUDA_ERROR_ILLEGAL_ADDRESS, b);
    return false;
  }
  fault_jmp = &jb;
  f();
  fault_jmp = nullptr;
  return true;
}

#include "streams.inc"
#include "hooks.inc"

#define NEED_CTX                                                        \
  if (!inited) return CUDA_ERROR_NOT_INITIALIZED;                       \
  if (in_callback) return CUDA_ERROR_NOT_PERMITTED;                     \
  CUctx_st *c = cur();                                                  \
  if (!c) return CUDA_ERROR_INVALID_CONTEXT;                            \
  std::unique_lock<std::mutex> l(g);                                    \
  if (c->sticky != CUDA_SUCCESS) return c->sticky;
#define NEED MAY_FAIL NEED_CTX

// ---- memory -----------------------------------------------------------------------
const Alloc *find_alloc(uintptr_t p, uintptr_t *base) {                  // g held
  auto it = allocs.upper_bound(p);
  if (it == allocs.begin()) return nullptr;
  --it;
  if (p >= it->first + it->second.size) return nullptr;
  *base = it->first;
  return &it->second;
}
constexpr size_t PAGE = 4096;
// The end of an allocation is put as close to a guard page as 256-byte
// alignment allows; the slack carries a pattern that cuMemFree checks.
CUresult map_memory(size_t n, bool device, int dev, unsigned flags, uintptr_t *out) {   // g held
  if (device && used[dev] + n > C.mem) return CUDA_ERROR_OUT_OF_MEMORY;
  const size_t span = (n + PAGE - 1) / PAGE * PAGE, mapped = span + 2 * PAGE;
  char *m = (char *)mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  if (device && C.pkey >= 0) pkey_mprotect(m + PAGE, span, PROT_READ | PROT_WRITE, C.pkey);
  else mprotect(m + PAGE, span, PROT_READ | PROT_WRITE);
  const size_t off = (span - n) / 256 * 256;
  *out = (uintptr_t)m + PAGE + off;
  allocs[*out] = Alloc{n, mapped, m, dev, device, flags};
  if (device) used[dev] += n;
  if (device) {                       // device memory starts as garbage, not zeros
    if (C.pkey >= 0) pkey_set(C.pkey, 0);
    memset(m + PAGE, 0xA5, span <= (64u << 20) ? span : PAGE);
    memset((char *)*out + n, 0xA5, span - off - n);
    if (C.pkey >= 0 && !in_worker) pkey_set(C.pkey, PKEY_DISABLE_ACCESS);
  } else memset((char *)*out + n, 0xA5, span - off - n);
  return CUDA_SUCCESS;
}
bool unmap_memory(uintptr_t p, bool device) {                            // g held
  auto it = allocs.find(p);
  if (it == allocs.end() || it->second.device != device) return false;
  Alloc a = it->second;
  const size_t span = a.mapped - 2 * PAGE;
  if (C.pkey >= 0) pkey_set(C.pkey, 0);
  for (unsigned char *q = (unsigned char *)p + a.size; q < (unsigned char *)a.base + PAGE + span; ++q)
    if (*q != 0xA5) { fprintf(stderr, "[stubcuda] write past the end of a %zu-byte allocation (offset +%zu)\n", a.size, (size_t)(q - (unsigned char *)p - a.size)); break; }
  if (C.pkey >= 0 && !in_worker) pkey_set(C.pkey, PKEY_DISABLE_ACCESS);
  munmap(a.base, a.mapped);
  if (device) used[a.dev] -= a.size;
  allocs.erase(it);
  return true;
}
void throttle(size_t n, double gbps, Clock::time_point t0) {
  if (gbps > 0) std::this_thread::sleep_until(t0 + std::chrono::nanoseconds((long long)(n / gbps)));
}
enum Kind { HOST_PAGEABLE, HOST_PINNED, DEVICE };
Kind kind_of(uintptr_t p) { uintptr_t b; const Alloc *a = find_alloc(p, &b); return !a ? HOST_PAGEABLE : a->device ? DEVICE : HOST_PINNED; }
bool range_ok(uintptr_t p, size_t n) {
  uintptr_t b;
  const Alloc *a = find_alloc(p, &b);
  return !a || p + n <= b + a->size;
}
void do_copy(CUctx_st *c, void *d, const void *s, size_t n, Kind kd, Kind ks) {
  const auto t0 = Clock::now();
  const double gbps = kd == DEVICE && ks != DEVICE ? C.h2d : ks == DEVICE && kd != DEVICE ? C.d2h : 0;
  const size_t step = gbps > 0 ? n / 8 + 1 : n;      // a slow copy reads its source bit by bit
  for (size_t o = 0; o < n; o += step) {
    const size_t k = std::min(step, n - o);
    if (!guarded(c, "memory copy", [&] { memmove((char *)d + o, (const char *)s + o, k); })) return;
    throttle(o + k, gbps, t0);
  }
}
CUresult copy(const char *call, uintptr_t d, uintptr_t s, size_t n, CUstream h, bool async, int expect) {
  if (CUresult told = injected(call, async ? "cuMemcpyAsync" : "cuMemcpy")) return told;
  NEED_CTX
  auto st = find(h, c);
  if (!st) return CUDA_ERROR_INVALID_HANDLE;
  if (n == 0) return CUDA_SUCCESS;
  const Kind kd = kind_of(d), ks = kind_of(s);
  if (!range_ok(d, n) || !range_ok(s, n)) return CUDA_ERROR_INVALID_VALUE;
  if ((expect == 1 && kd != DEVICE) || (expect == 2 && ks != DEVICE) || (expect == 3 && (kd != DEVICE || ks != DEVICE))) return CUDA_ERROR_INVALID_VALUE;
  trace("copy %#lx <- %#lx %zu %s stream %llu kinds %d<-%d", d, s, n, async ? "async" : "sync", st->id, kd, ks);
  count(COPY);
  if (!async || kd == HOST_PAGEABLE || ks == HOST_PAGEABLE) count(HOST_SYNC);
  Op op;
  op.run = [=] { do_copy(c, (void *)d, (void *)s, n, kd, ks); };
  if (!async) {
    uint64_t t = push(st, std::move(op));
    wait_ticket(l, st, t);
    return c->sticky;
  }
  if (kd == DEVICE && ks == HOST_PAGEABLE) {       // staged: the source may be reused on return
    if (in_callback) return CUDA_ERROR_NOT_PERMITTED;
    auto buf = std::shared_ptr<char>((char *)malloc(n), free);
    l.unlock();
    memcpy(buf.get(), (void *)s, n);
    l.lock();
    op.run = [=] { do_copy(c, (void *)d, buf.get(), n, kd, ks); };
    uint64_t t = push(st, std::move(op));
    after_push(l, st, t);
  } else {
    uint64_t t = push(st, std::move(op));
    if (ks == DEVICE && kd == HOST_PAGEABLE) wait_ticket(l, st, t);   // returns when the copy has been made
    else after_push(l, st, t);
  }
  return c->sticky;
}
CUresult set_mem(const char *call, uintptr_t d, unsigned v, size_t width, size_t n, CUstream h, bool async) {
  if (CUresult told = injected(call)) return told;
  NEED_CTX
  auto st = find(h, c);
  if (!st) return CUDA_ERROR_INVALID_HANDLE;
  if (!range_ok(d, n * width)) return CUDA_ERROR_INVALID_VALUE;
  count(COPY);
  Op op;
  op.run = [=] {
    guarded(c, "memset", [&] {
      if (width == 1) memset((void *)d, (int)v, n);
      else for (size_t i = 0; i < n; ++i) memcpy((char *)d + i * width, &v, width);
    });
  };
  uint64_t t = push(st, std::move(op));
  if (!async) wait_ticket(l, st, t); else after_push(l, st, t);
  return c->sticky;
}

// ---- modules ------------------------------------------------------------------------
struct Dims { unsigned gx, gy, gz, bx, by, bz, shared; };
const char MAGIC[8] = {'C', 'U', 'E', 'M', 'U', 'S', 'O', '1'};   // then uint64 size, then a host ELF
template <class T> T sym(void *dl, const char *n) { return (T)dlsym(dl, n); }

const std::map<int, std::pair<const char *, const char *>> ERR = {
  {0, {"CUDA_SUCCESS", "no error"}}, {1, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}}, {2, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
  {3, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}}, {100, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
  {101, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}}, {200, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
  {201, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}}, {209, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
  {214, {"CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"}},
  {400, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}}, {500, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
  {600, {"CUDA_ERROR_NOT_READY", "device not ready"}}, {700, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
  {701, {"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"}}, {712, {"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"}},
  {713, {"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"}},
  {719, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}}, {800, {"CUDA_ERROR_NOT_PERMITTED", "operation not permitted"}},
  {801, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}}, {999, {"CUDA_ERROR_UNKNOWN", "unknown error"}}};
}  // namespace

extern "C" {
#define API __attribute__((visibility("default"))) CUresult
// ---- init, devices --------------------------------------------------------------------
API cuInit(unsigned flags) {
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> l(g);
  if (inited) return CUDA_SUCCESS;
  if (C.devices <= 0) return CUDA_ERROR_NO_DEVICE;
  if (env_num("STUBCUDA_PKEY", 1)) C.pkey = pkey_alloc(0, PKEY_DISABLE_ACCESS);
  struct sigaction sa{};
  sa.sa_sigaction = on_fault;
  sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &sa, &old_segv);
  sigaction(SIGBUS, &sa, &old_bus);
  for (int i = 0; i < C.devices && i < 64; ++i) primary[i].dev = i;
  inited = true;
  return CUDA_SUCCESS;
}
API cuDriverGetVersion(int *v) { *v = 13020; return CUDA_SUCCESS; }
API cuGetErrorName(CUresult r, const char **p) { auto it = ERR.find(r); *p = it == ERR.end() ? "CUDA_ERROR_UNKNOWN" : it->second.first; return CUDA_SUCCESS; }
API cuGetErrorString(CUresult r, const char **p) { auto it = ERR.find(r); *p = it == ERR.end() ? "unknown error" : it->second.second; return CUDA_SUCCESS; }
API cuDeviceGetCount(int *n) { if (!inited) return CUDA_ERROR_NOT_INITIALIZED; *n = C.devices; return CUDA_SUCCESS; }
API cuDeviceGet(CUdevice *d, int i) { if (i < 0 || i >= C.devices) return CUDA_ERROR_INVALID_DEVICE; *d = i; return CUDA_SUCCESS; }
API cuDeviceGetName(char *s, int n, CUdevice d) { snprintf(s, n, "Stub CPU device %d", d); return CUDA_SUCCESS; }
API cuDeviceTotalMem(size_t *b, CUdevice) { *b = C.mem; return CUDA_SUCCESS; }
API cuDeviceGetUuid(CUuuid *u, CUdevice d) { memset(u, 0, 16); u->bytes[0] = 'S'; u->bytes[15] = (char)d; return CUDA_SUCCESS; }
API cuDeviceGetPCIBusId(char *s, int n, CUdevice d) { snprintf(s, n, "0000:%02X:00.0", d + 1); return CUDA_SUCCESS; }
API cuDeviceGetByPCIBusId(CUdevice *d, const char *s) { unsigned a, b; if (sscanf(s, "%x:%x:", &a, &b) != 2 || b < 1 || (int)b > C.devices) return CUDA_ERROR_INVALID_VALUE; *d = (int)b - 1; return CUDA_SUCCESS; }
API cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  if (d < 0 || d >= C.devices) return CUDA_ERROR_INVALID_DEVICE;
  switch ((int)a) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *v = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: *v = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: *v = 64; break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: *v = 2147483647; break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: *v = 65535; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *v = 48 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *v = 227 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *v = 228 << 10; break;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: *v = 64 << 10; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *v = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: *v = 65536; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *v = 1000000; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *v = 1000000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *v = 128; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *v = 4 << 20; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = 4; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *v = 2048; break;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: *v = 32; break;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *v = 2; break;
    case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP: case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS: case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED: case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR: case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED: case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM: *v = 1; break;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: *v = 512; break;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_PITCH_ALIGNMENT: *v = 32; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *v = C.cc / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *v = C.cc % 10; break;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: *v = d + 1; break;
    default: *v = 0;
  }
  return CUDA_SUCCESS;
}
API cuDeviceGetP2PAttribute(int *v, CUdevice_P2PAttribute, CUdevice, CUdevice) { *v = 0; return CUDA_SUCCESS; }
API cuDeviceCanAccessPeer(int *v, CUdevice, CUdevice) { *v = 0; return CUDA_SUCCESS; }

// ---- contexts ---------------------------------------------------------------------------
API cuDevicePrimaryCtxRetain(CUcontext *p, CUdevice d) { if (d < 0 || d >= C.devices) return CUDA_ERROR_INVALID_DEVICE; std::lock_guard<std::mutex> l(g); ++primary[d].refs; *p = &primary[d]; return CUDA_SUCCESS; }
API cuDevicePrimaryCtxRelease(CUdevice d) { std::lock_guard<std::mutex> l(g); if (primary[d].refs) --primary[d].refs; return CUDA_SUCCESS; }
API cuDevicePrimaryCtxReset(CUdevice d) { std::lock_guard<std::mutex> l(g); primary[d].sticky = CUDA_SUCCESS; return CUDA_SUCCESS; }
API cuDevicePrimaryCtxSetFlags(CUdevice d, unsigned f) { primary[d].flags = f; return CUDA_SUCCESS; }
API cuDevicePrimaryCtxGetState(CUdevice d, unsigned *f, int *active) { std::lock_guard<std::mutex> l(g); *f = primary[d].flags; *active = primary[d].refs > 0; return CUDA_SUCCESS; }
API cuCtxGetCurrent(CUcontext *p) { *p = cur(); return CUDA_SUCCESS; }
API cuCtxSetCurrent(CUcontext p) { if (!ctx_stack.empty()) ctx_stack.pop_back(); if (p) ctx_stack.push_back(p); return CUDA_SUCCESS; }
API cuCtxPushCurrent(CUcontext p) { ctx_stack.push_back(p); return CUDA_SUCCESS; }
API cuCtxPopCurrent(CUcontext *p) { if (ctx_stack.empty()) return CUDA_ERROR_INVALID_CONTEXT; if (p) *p = ctx_stack.back(); ctx_stack.pop_back(); return CUDA_SUCCESS; }
API cuCtxGetDevice(CUdevice *d) { if (!cur()) return CUDA_ERROR_INVALID_CONTEXT; *d = cur()->dev; return CUDA_SUCCESS; }
API cuCtxGetDevice_v2(CUdevice *d, CUcontext x) { if (!x) x = cur(); if (!x) return CUDA_ERROR_INVALID_CONTEXT; *d = x->dev; return CUDA_SUCCESS; }
API cuCtxGetFlags(unsigned *f) { *f = 0; return CUDA_SUCCESS; }
API cuCtxGetApiVersion(CUcontext, unsigned *v) { *v = 13020; return CUDA_SUCCESS; }
API cuCtxGetLimit(size_t *v, CUlimit) { *v = 8 << 20; return CUDA_SUCCESS; }
API cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API cuCtxGetStreamPriorityRange(int *lo, int *hi) { if (lo) *lo = 0; if (hi) *hi = -5; return CUDA_SUCCESS; }
API cuCtxSynchronize() { NEED count(HOST_SYNC); wait_ctx(l, c); return c->sticky; }
API cuCtxSynchronize_v2(CUcontext x) { if (x && x != cur()) return CUDA_ERROR_NOT_SUPPORTED; return cuCtxSynchronize(); }

// ---- memory -----------------------------------------------------------------------------
API cuMemGetInfo(size_t *f, size_t *t) { NEED *t = C.mem; *f = C.mem - used[c->dev]; return CUDA_SUCCESS; }
API cuMemAlloc(CUdeviceptr *p, size_t n) {
  NEED
  if (!n) return CUDA_ERROR_INVALID_VALUE;
  uintptr_t q;
  CUresult r = map_memory(n, true, c->dev, 0, &q);
  if (r == CUDA_SUCCESS) { *p = q; count(ALLOC); }
  trace("cuMemAlloc %zu -> %#llx (%d)", n, r ? 0 : *p, (int)r);
  return r;
}
API cuMemFree(CUdeviceptr p) {
  if (!p) return CUDA_SUCCESS;
  NEED
  trace("cuMemFree %#llx", p);
  count(FREE);
  wait_ctx(l, c);                       // cuMemFree synchronizes
  if (!unmap_memory(p, true)) return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}
API cuMemAllocAsync(CUdeviceptr *p, size_t n, CUstream) { MAY_FAIL return cuMemAlloc(p, n); }
API cuMemFreeAsync(CUdeviceptr p, CUstream h) {
  NEED
  auto st = find(h, c);
  if (!st) return CUDA_ERROR_INVALID_HANDLE;
  count(FREE);
  uint64_t t = push(st, Op{[=] { std::lock_guard<std::mutex> l2(g); unmap_memory(p, true); }, {}});
  after_push(l, st, t);
  return CUDA_SUCCESS;
}
API cuMemHostAlloc(void **p, size_t n, unsigned flags) {
  NEED
  if (!n) return CUDA_ERROR_INVALID_VALUE;
  uintptr_t q;
  CUresult r = map_memory(n, false, c->dev, flags, &q);
  if (r == CUDA_SUCCESS) { *p = (void *)q; count(HOST_ALLOC); }
  return r;
}
API cuMemAllocHost(void **p, size_t n) { MAY_FAIL return cuMemHostAlloc(p, n, 0); }
API cuMemFreeHost(void *p) { NEED trace("cuMemFreeHost %p", p); count(HOST_FREE); wait_ctx(l, c); return unmap_memory((uintptr_t)p, false) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
API cuMemHostGetDevicePointer(CUdeviceptr *d, void *p, unsigned) { *d = (CUdeviceptr)p; return CUDA_SUCCESS; }
API cuMemHostGetFlags(unsigned *f, void *p) { NEED uintptr_t b; const Alloc *a = find_alloc((uintptr_t)p, &b); if (!a) return CUDA_ERROR_INVALID_VALUE; *f = a->flags; return CUDA_SUCCESS; }
API cuMemHostRegister(void *p, size_t n, unsigned flags) {
  NEED
  uintptr_t b;
  if (find_alloc((uintptr_t)p, &b)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  count(HOST_ALLOC);
  allocs[(uintptr_t)p] = Alloc{n, 0, nullptr, c->dev, false, flags};
  return CUDA_SUCCESS;
}
API cuMemHostUnregister(void *p) {
  NEED
  auto it = allocs.find((uintptr_t)p);
  if (it == allocs.end() || it->second.base) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
  count(HOST_FREE);
  wait_ctx(l, c);
  allocs.erase((uintptr_t)p);
  return CUDA_SUCCESS;
}
API cuMemGetAddressRange(CUdeviceptr *b, size_t *n, CUdeviceptr p) { NEED uintptr_t q; const Alloc *a = find_alloc(p, &q); if (!a) return CUDA_ERROR_NOT_FOUND; if (b) *b = q; if (n) *n = a->size; return CUDA_SUCCESS; }
API cuPointerGetAttribute(void *out, CUpointer_attribute k, CUdeviceptr p) {
  NEED
  uintptr_t b = 0;
  const Alloc *a = find_alloc(p, &b);
  switch ((int)k) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: if (!a) return CUDA_ERROR_INVALID_VALUE; *(CUcontext *)out = &primary[a->dev]; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: if (!a) return CUDA_ERROR_INVALID_VALUE; *(unsigned *)out = a->device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: if (!a) return CUDA_ERROR_INVALID_VALUE; *(CUdeviceptr *)out = p; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER: if (!a || a->device) return CUDA_ERROR_INVALID_VALUE; *(void **)out = (void *)p; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)out = 0; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)out = a ? a->dev : -2; return a ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: if (!a) return CUDA_ERROR_INVALID_VALUE; *(CUdeviceptr *)out = b; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: if (!a) return CUDA_ERROR_INVALID_VALUE; *(size_t *)out = a->size; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MAPPED: *(unsigned *)out = a != nullptr; return CUDA_SUCCESS;
    default: trace("pointer attribute %d", (int)k); return CUDA_ERROR_NOT_SUPPORTED;
  }
}
API cuPointerGetAttributes(unsigned n, CUpointer_attribute *k, void **out, CUdeviceptr p) {
  for (unsigned i = 0; i < n; ++i) {
    CUresult r = cuPointerGetAttribute(out[i], k[i], p);
    if (r == CUDA_ERROR_INVALID_VALUE) {   // documented: unknown pointers give NULL / defaults
      switch ((int)k[i]) {
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)out[i] = 0; break;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)out[i] = -2; break;
        default: *(void **)out[i] = nullptr;
      }
    } else if (r != CUDA_SUCCESS) return r;
  }
  return CUDA_SUCCESS;
}
#define D(x) ((uintptr_t)(x))
API cuMemcpy(CUdeviceptr d, CUdeviceptr s, size_t n) { return copy(__func__, d, s, n, nullptr, false, 0); }
API cuMemcpyAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream h) { return copy(__func__, d, s, n, h, true, 0); }
API cuMemcpyHtoD(CUdeviceptr d, const void *s, size_t n) { return copy(__func__, d, D(s), n, nullptr, false, 1); }
API cuMemcpyDtoH(void *d, CUdeviceptr s, size_t n) { return copy(__func__, D(d), s, n, nullptr, false, 2); }
API cuMemcpyDtoD(CUdeviceptr d, CUdeviceptr s, size_t n) { return copy(__func__, d, s, n, nullptr, true, 3); }
API cuMemcpyHtoDAsync(CUdeviceptr d, const void *s, size_t n, CUstream h) { return copy(__func__, d, D(s), n, h, true, 1); }
API cuMemcpyDtoHAsync(void *d, CUdeviceptr s, size_t n, CUstream h) { return copy(__func__, D(d), s, n, h, true, 2); }
API cuMemcpyDtoDAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream h) { return copy(__func__, d, s, n, h, true, 3); }
API cuMemcpyPeer(CUdeviceptr d, CUcontext, CUdeviceptr s, CUcontext, size_t n) { return copy(__func__, d, s, n, nullptr, false, 3); }
API cuMemcpyPeerAsync(CUdeviceptr d, CUcontext, CUdeviceptr s, CUcontext, size_t n, CUstream h) { return copy(__func__, d, s, n, h, true, 3); }
API cuMemsetD8(CUdeviceptr d, unsigned char v, size_t n) { return set_mem(__func__, d, v, 1, n, nullptr, true); }
API cuMemsetD8Async(CUdeviceptr d, unsigned char v, size_t n, CUstream h) { return set_mem(__func__, d, v, 1, n, h, true); }
API cuMemsetD32(CUdeviceptr d, unsigned v, size_t n) { return set_mem(__func__, d, v, 4, n, nullptr, true); }
API cuMemsetD32Async(CUdeviceptr d, unsigned v, size_t n, CUstream h) { return set_mem(__func__, d, v, 4, n, h, true); }

// ---- streams ----------------------------------------------------------------------------
API cuStreamCreateWithPriority(CUstream *p, unsigned flags, int prio) { NEED *p = (CUstream)make_stream(c, flags & CU_STREAM_NON_BLOCKING, std::max(-5, std::min(0, prio))).get(); return CUDA_SUCCESS; }
API cuStreamCreate(CUstream *p, unsigned flags) { MAY_FAIL return cuStreamCreateWithPriority(p, flags, 0); }
API cuStreamDestroy(CUstream h) {
  NEED
  return retire_stream((Stream *)h) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
API cuStreamSynchronize(CUstream h) {
  NEED
  auto s = find(h, c);
  if (!s) return CUDA_ERROR_INVALID_HANDLE;
  count(HOST_SYNC);
  if (s == c->null_stream) wait_ticket(l, s, push(s, Op{}));   // legacy stream: also after blocking streams
  else wait_ticket(l, s, s->enq);
  return c->sticky;
}
API cuStreamQuery(CUstream h) {
  NEED
  auto s = find(h, c);
  if (!s) return CUDA_ERROR_INVALID_HANDLE;
  if (C.mode == LAZY && s->done < s->enq && s->wanted <= s->done) { s->wanted = s->done + 1; cv.notify_all(); }
  return s->done >= s->enq ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
API cuStreamGetPriority(CUstream h, int *p) { NEED auto s = find(h, c); if (!s) return CUDA_ERROR_INVALID_HANDLE; *p = s->priority; return CUDA_SUCCESS; }
API cuStreamGetFlags(CUstream h, unsigned *p) { NEED auto s = find(h, c); if (!s) return CUDA_ERROR_INVALID_HANDLE; *p = s->nonblocking ? CU_STREAM_NON_BLOCKING : 0; return CUDA_SUCCESS; }
API cuStreamGetCtx(CUstream h, CUcontext *p) { NEED auto s = find(h, c); if (!s) return CUDA_ERROR_INVALID_HANDLE; *p = s->ctx; return CUDA_SUCCESS; }
API cuStreamGetId(CUstream h, unsigned long long *p) { NEED auto s = find(h, c); if (!s) return CUDA_ERROR_INVALID_HANDLE; *p = s->id; return CUDA_SUCCESS; }
API cuStreamGetDevice(CUstream h, CUdevice *p) { NEED auto s = find(h, c); if (!s) return CUDA_ERROR_INVALID_HANDLE; *p = s->ctx->dev; return CUDA_SUCCESS; }
API cuStreamIsCapturing(CUstream, CUstreamCaptureStatus *p) { *p = CU_STREAM_CAPTURE_STATUS_NONE; return CUDA_SUCCESS; }
API cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *m) { static thread_local CUstreamCaptureMode cur_mode = CU_STREAM_CAPTURE_MODE_GLOBAL; std::swap(*m, cur_mode); return CUDA_SUCCESS; }
API cuStreamWaitEvent(CUstream h, CUevent ev, unsigned) {
  NEED
  auto s = find(h, c);
  Event *e = (Event *)ev;
  if (!s || !e) return CUDA_ERROR_INVALID_HANDLE;
  count(STREAM_WAIT);
  if (!e->recorded) return CUDA_SUCCESS;
  Op op;
  op.deps.push_back({e->s, e->ticket});
  after_push(l, s, push(s, std::move(op)));
  return CUDA_SUCCESS;
}
API cuLaunchHostFunc(CUstream h, CUhostFn fn, void *arg) {
  NEED
  auto s = find(h, c);
  if (!s) return CUDA_ERROR_INVALID_HANDLE;
  push(s, Op{[=] { in_callback = true; if (C.pkey >= 0) pkey_set(C.pkey, PKEY_DISABLE_ACCESS); fn(arg); if (C.pkey >= 0) pkey_set(C.pkey, 0); in_callback = false; }, {}});
  return CUDA_SUCCESS;
}
API cuStreamAddCallback(CUstream h, CUstreamCallback fn, void *arg, unsigned) {
  NEED
  auto s = find(h, c);
  if (!s) return CUDA_ERROR_INVALID_HANDLE;
  push(s, Op{[=] { in_callback = true; fn(h, CUDA_SUCCESS, arg); in_callback = false; }, {}});
  return CUDA_SUCCESS;
}

// ---- events -----------------------------------------------------------------------------
API cuEventCreate(CUevent *p, unsigned flags) { NEED auto e = new Event; e->flags = flags; *p = (CUevent)e; return CUDA_SUCCESS; }
API cuEventDestroy(CUevent ev) { std::lock_guard<std::mutex> l(g); delete (Event *)ev; return CUDA_SUCCESS; }
API cuEventRecord(CUevent ev, CUstream h) {
  NEED
  auto s = find(h, c);
  Event *e = (Event *)ev;
  if (!s || !e) return CUDA_ERROR_INVALID_HANDLE;
  count(EVENT_RECORD);
  auto tm = std::make_shared<Event::Time>();
  uint64_t t = push(s, Op{[tm] { tm->t = Clock::now(); }, {}});
  e->s = s; e->ticket = t; e->recorded = true; e->time = tm;
  after_push(l, s, t);
  return CUDA_SUCCESS;
}
API cuEventRecordWithFlags(CUevent e, CUstream h, unsigned) { MAY_FAIL return cuEventRecord(e, h); }
API cuEventQuery(CUevent ev) {
  NEED
  Event *e = (Event *)ev;
  if (!e->recorded || e->s->done >= e->ticket) return CUDA_SUCCESS;
  if (C.mode == LAZY && e->s->wanted <= e->s->done) { e->s->wanted = e->s->done + 1; cv.notify_all(); }
  return CUDA_ERROR_NOT_READY;
}
API cuEventSynchronize(CUevent ev) { NEED Event *e = (Event *)ev; count(HOST_SYNC); if (e->recorded) { auto s = e->s; wait_ticket(l, s, e->ticket); } return c->sticky; }
API cuEventElapsedTime(float *ms, CUevent a, CUevent b) {
  NEED
  Event *x = (Event *)a, *y = (Event *)b;
  if (!x->recorded || !y->recorded || (x->flags | y->flags) & CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_HANDLE;
  if (x->s->done < x->ticket || y->s->done < y->ticket) return CUDA_ERROR_NOT_READY;
  *ms = std::chrono::duration<float, std::milli>(y->time->t - x->time->t).count();
  return CUDA_SUCCESS;
}

// ---- modules and launches -----------------------------------------------------------------
API cuModuleGetLoadingMode(CUmoduleLoadingMode *m) { *m = CU_MODULE_EAGER_LOADING; return CUDA_SUCCESS; }
API cuModuleLoadData(CUmodule *out, const void *image) {
  NEED
  uint64_t n;
  if (memcmp(image, MAGIC, 8)) return memcmp(image, "\x7f" "ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_ERROR_NO_BINARY_FOR_GPU;
  memcpy(&n, (const char *)image + 8, 8);
  int fd = (int)syscall(SYS_memfd_create, "cuemu-module", 0);
  const char *p = (const char *)image + 16;
  for (uint64_t o = 0; o < n;) { ssize_t k = write(fd, p + o, n - o); if (k <= 0) { close(fd); return CUDA_ERROR_OUT_OF_MEMORY; } o += (uint64_t)k; }
  char path[64];
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  void *dl = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  // fd stays open: glibc takes two libraries with one path name for the same
  if (!dl) { fprintf(stderr, "[stubcuda] %s\n", dlerror()); close(fd); return CUDA_ERROR_INVALID_IMAGE; }
  auto m = new Module;
  m->dl = dl;
  m->fd = fd;
  auto set = sym<void (*)(const char *, long long)>(dl, "cuemu_set");
  if (set) set("order", C.order);
  *out = (CUmodule)m;
  return CUDA_SUCCESS;
}
API cuModuleLoadDataEx(CUmodule *out, const void *image, unsigned, CUjit_option *, void **) { return cuModuleLoadData(out, image); }
API cuModuleUnload(CUmodule h) { auto m = (Module *)h; std::lock_guard<std::mutex> l(launch_mu); dlclose(m->dl); close(m->fd); delete m; return CUDA_SUCCESS; }
API cuModuleGetFunction(CUfunction *out, CUmodule h, const char *name) {
  NEED
  auto m = (Module *)h;
  auto &slot = m->k[name];
  if (!slot) {
    auto nm = sym<const char *(*)(int)>(m->dl, "cuemu_name");
    for (int i = 0; const char *s = nm(i); ++i)
      if (!strcmp(s, name)) { slot.reset(new Kernel{m, i, name}); break; }
    if (!slot) { m->k.erase(name); return CUDA_ERROR_NOT_FOUND; }
  }
  *out = (CUfunction)slot.get();
  return CUDA_SUCCESS;
}
API cuModuleGetGlobal(CUdeviceptr *, size_t *, CUmodule, const char *) { return CUDA_ERROR_NOT_FOUND; }
API cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  auto k = (Kernel *)f;
  switch ((int)a) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: { int m = sym<int (*)(int)>(k->mod->dl, "cuemu_max_threads")(k->index); *v = m ? m : 1024; break; }
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *v = 32; break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION: case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *v = C.cc; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *v = k->smem_attr; break;
    default: *v = 0;
  }
  return CUDA_SUCCESS;
}
API cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { if (a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) { if (v > 227 << 10) return CUDA_ERROR_INVALID_VALUE; ((Kernel *)f)->smem_attr = v; } return CUDA_SUCCESS; }
API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, CUfunction, int bs, size_t, unsigned) { *n = std::max(1, 2048 / std::max(1, bs)); return CUDA_SUCCESS; }
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int bs, size_t s) { return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, bs, s, 0); }
API cuOccupancyMaxPotentialBlockSize(int *grid, int *block, CUfunction, CUoccupancyB2DSize, size_t, int) { *grid = 8; *block = 256; return CUDA_SUCCESS; }
API cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream h, void **params, void **extra) {
  NEED
  auto k = (Kernel *)f;
  auto st = find(h, c);
  if (!st || !k) return CUDA_ERROR_INVALID_HANDLE;
  if (extra) return CUDA_ERROR_NOT_SUPPORTED;
  if (!gx || !gy || !gz || !bx || !by || !bz || gx > 2147483647u || gy > 65535 || gz > 65535 || bx > 1024 || by > 1024 || bz > 64 || bx * by * bz > 1024) return CUDA_ERROR_INVALID_VALUE;
  if ((int)shared > k->smem_attr) return CUDA_ERROR_INVALID_VALUE;
  int mt = sym<int (*)(int)>(k->mod->dl, "cuemu_max_threads")(k->index);
  if (mt && bx * by * bz > (unsigned)mt) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  // arguments are read now, as the driver does
  const int n = sym<int (*)(int)>(k->mod->dl, "cuemu_nparams")(k->index);
  auto psize = sym<unsigned (*)(int, int)>(k->mod->dl, "cuemu_param_size");
  auto args = std::make_shared<std::vector<std::vector<std::max_align_t>>>(n);
  for (int i = 0; i < n; ++i) {
    const unsigned z = psize(k->index, i);
    (*args)[i].resize(z / sizeof(std::max_align_t) + 1);
    memcpy((*args)[i].data(), params[i], z);
  }
  trace("launch %s grid %u,%u,%u block %u,%u,%u stream %llu", k->name.c_str(), gx, gy, gz, bx, by, bz, st->id);
  count(LAUNCH);
  uint64_t t = push(st, Op{[=] {
    std::vector<void *> p;
    for (auto &a : *args) p.push_back(a.data());
    p.push_back(nullptr);
    Dims d{gx, gy, gz, bx, by, bz, shared};
    int rc = 0;
    std::unique_lock<std::mutex> ll(launch_mu);
    if (auto regions = sym<void (*)(const unsigned long long *, int)>(k->mod->dl, "cuemu_regions")) {   // checked build
      std::vector<unsigned long long> rec;
      { std::lock_guard<std::mutex> lg(g); for (auto &a : allocs) if (!a.second.device || a.second.dev == c->dev) rec.insert(rec.end(), {a.first, a.second.size, 1}); }
      regions(rec.data(), (int)rec.size() / 3);
    }
    bool ok = guarded(c, ("kernel " + k->name).c_str(), [&] { rc = sym<int (*)(int, const Dims *, void *const *)>(k->mod->dl, "cuemu_launch")(k->index, &d, p.data()); });
    std::string why = ok && rc ? sym<const char *(*)()>(k->mod->dl, "cuemu_error")() : "";
    ll.unlock();
    if (ok && rc) fail_ctx(c, CUDA_ERROR_LAUNCH_FAILED, why);
  }, {}});
  after_push(l, st, t);
  return CUDA_SUCCESS;
}

// ---- symbol lookup ----------------------------------------------------------------------------
}  // extern "C"
namespace {
// A call that is not implemented says its name and returns NOT_SUPPORTED.
constexpr int NSTUB = 1500;
std::string stub_names[NSTUB];
std::map<std::string, int> stub_index;
template <int I> CUresult stub_call() { fprintf(stderr, "[stubcuda] %s is not implemented\n", stub_names[I].c_str()); return CUDA_ERROR_NOT_SUPPORTED; }
template <size_t... I> std::array<CUresult (*)(), sizeof...(I)> stubs(std::index_sequence<I...>) { return {{&stub_call<(int)I>...}}; }
const auto stub_table = stubs(std::make_index_sequence<NSTUB>());
}  // namespace
// The undocumented tables are not offered: a program with NVIDIA's static
// cudart inside cannot run on this library (it reports an error at its first call).
extern "C" API cuGetExportTable(const void **table, const CUuuid *) { *table = nullptr; return CUDA_ERROR_NOT_SUPPORTED; }
extern "C" API cuGetProcAddress(const char *name, void **out, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *st) {
  static void *self = dlopen(nullptr, RTLD_NOW);
  Dl_info di;
  static void *me = dladdr((void *)&cuInit, &di) ? dlopen(di.dli_fname, RTLD_NOW | RTLD_NOLOAD) : self;
  // signatures that changed with a version: name, first version, exported symbol
  static const struct { const char *n; int v; const char *sym; } VER[] = {
    {"cuCtxGetDevice", 13000, "cuCtxGetDevice_v2"}, {"cuCtxSynchronize", 13000, "cuCtxSynchronize_v2"}, {"cuLaunchHostFunc", 13010, nullptr}};
  void *p = nullptr;
  bool decided = false;
  for (auto &v : VER)
    if (!strcmp(v.n, name) && version >= v.v) { decided = true; if (v.sym) p = dlsym(me, v.sym); }
  if (!decided && *name) {
    p = dlsym(me, (std::string(name) + "_v2").c_str());
    if (!p || !strcmp(name, "cuCtxGetDevice") || !strcmp(name, "cuCtxSynchronize")) if (void *q = dlsym(me, name)) p = q;
  }
  if (!p) {
    std::lock_guard<std::mutex> l(g);
    std::string key = std::string(name) + "@" + std::to_string(version);
    auto it = stub_index.find(key);
    int i;
    if (it != stub_index.end()) i = it->second;
    else { i = (int)stub_index.size() % NSTUB; stub_index[key] = i; stub_names[i] = key; }
    p = (void *)stub_table[i];
  }
  *out = p;
  if (st) *st = CU_GET_PROC_ADDRESS_SUCCESS;
  (void)flags;
  return CUDA_SUCCESS;
}
