// The machine that host_cuda.h tells of, and what the tests set and read of it.
#include "host_cuda.h"

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__ELF__)
#define HOST_CUDA_SWITCH 1  // in a few instructions of its own
#else
#define HOST_CUDA_SWITCH 0
#include <setjmp.h>
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace host_cuda {

struct Settings {
  uint64_t seed = 0;                    // 0: blocks and threads in their natural order
  int device = 0;                       // current
  int devices = 2;                      // there are
  int multiprocessors = 4;              // of each
  int64_t launches = 0;                 // since the program began
  std::set<void*> kernels;              // launched since this was last cleared
  int shared_limit = 227 * 1024;        // bytes of shared memory a block may ask for
  std::map<void*, int> shared_allowed;  // that kernels have been allowed
  std::string message;                  // of the last failure
};
Settings settings;

// Where a stack that does not run goes on.
#if HOST_CUDA_SWITCH
using Place = void*;  // the top of it
#else
struct Place {
  ucontext_t context;
  jmp_buf jump;
  bool left = false;  // there is a jump back to it
};
#endif

struct Fiber {
  static constexpr size_t stack_bytes = 256 * 1024;
  Place place{};
  Wait wait = Wait::none;
  int line = 0;  // of the barrier it waits at
  uint3 index{};
  bool started = false;
  unsigned exchanges = 0;          // votes and shuffles it has taken part in
  const void* arrivals = nullptr;  // the barrier, if it waits for those
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

struct Block {
  std::vector<Fiber> fibers;      // kept from launch to launch
  std::vector<uint64_t> held[2];  // what threads hold at votes and shuffles, which take the two in turns
  Place scheduler{};
#if defined(__SANITIZE_ADDRESS__)
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
#endif
  void (*call)(const void*) = nullptr;
  const void* arguments = nullptr;
  unsigned threads = 0, current = 0;
  unsigned waited = 0;  // threads that have waited for the kernels before
  void* shared = nullptr;
  // Of the warp that runs: its threads, the order in which its lanes take turns, and whose turn it is.
  unsigned begin = 0, end = 0, turn = 0;
  std::vector<unsigned> lanes;
};
Block block;

// A small generator of its own, so that an order is the same everywhere (splitmix64).
uint64_t random_bits(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}
std::vector<unsigned> order_of(unsigned count, uint64_t salt) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  if (settings.seed != 0) {
    uint64_t state = settings.seed * 0x2545f4914f6cdd1dull + salt;
    for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[random_bits(state) % i]);
  }
  return order;
}

// ---- Switching between stacks. The C library's swapcontext asks the kernel for the signal mask each time and would take most
// of a run: it serves where AddressSanitizer, which looks at jumps, leaves no other way.
#if HOST_CUDA_SWITCH
extern "C" void host_cuda_switch(Place* from, Place to);
// Keeps what a function must leave as it was (System V ABI) on the stack and the stack's top in *from; goes on where `to` was
// left.
asm(R"(
.text
.globl host_cuda_switch
.hidden host_cuda_switch
.type host_cuda_switch, @function
host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_cuda_switch, . - host_cuda_switch
)");
#elif defined(__SANITIZE_ADDRESS__)
void host_cuda_switch(Place* from, Place& to) { swapcontext(&from->context, &to.context); }
#else
void host_cuda_switch(Place* from, Place& to) {
  if (_setjmp(from->jump) != 0) return;
  from->left = true;
  if (to.left) _longjmp(to.jump, 1);
  setcontext(&to.context);
}
#endif

constexpr unsigned no_thread = ~0u;  // the scheduler

void switch_stacks(unsigned from, unsigned to) {
  Place& here = from == no_thread ? block.scheduler : block.fibers[from].place;
  Place& there = to == no_thread ? block.scheduler : block.fibers[to].place;
  if (to != no_thread) {
    block.current = to;
    threadIdx = block.fibers[to].index;
  }
#if defined(__SANITIZE_ADDRESS__)
  // It must be told of each switch.
  void*& fake_stack = from == no_thread ? block.scheduler_fake_stack : block.fibers[from].fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, to == no_thread ? block.scheduler_stack : block.fibers[to].stack.get(),
                                 to == no_thread ? block.scheduler_stack_bytes : Fiber::stack_bytes);
  host_cuda_switch(&here, there);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  host_cuda_switch(&here, there);
#endif
}

// Opens the barrier at which all of threads [begin, end) wait, if they do.
bool open_barrier(Wait wait, unsigned begin, unsigned end) {
  const int line = block.fibers[begin].line;
  for (unsigned t = begin; t < end; ++t)
    if (block.fibers[t].wait != wait || block.fibers[t].line != line) return false;
  for (unsigned t = begin; t < end; ++t) block.fibers[t].wait = Wait::none;
  return true;
}

// The thread of the warp whose turn it is: the next lane in order that does not wait, and the first again where all have met at
// a barrier of the warp.
unsigned next_thread() {
  do {
    while (block.turn < 32) {
      const unsigned t = block.begin + block.lanes[block.turn++];
      if (t < block.end && block.fibers[t].wait == Wait::none) return t;
    }
    block.turn = 0;
  } while (open_barrier(Wait::warp, block.begin, block.end));
  return no_thread;
}

// Waits, or ends: the next thread goes on.
void wait_at(Wait wait, int line) {
  const unsigned me = block.current;
  block.fibers[me].wait = wait;
  block.fibers[me].line = line;
  const unsigned next = next_thread();
  if (next != me) switch_stacks(me, next);
}

// A fiber outlives its thread: it runs one body after the other. The first time it comes from the scheduler, and goes back.
void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
  switch_stacks(block.current, no_thread);
  for (;;) {
    block.call(block.arguments);
    wait_at(Wait::ended, 0);
  }
}
void start_fiber(unsigned thread) {
  Fiber& fiber = block.fibers[thread];
#if HOST_CUDA_SWITCH
  // Each begins in another part of a page, or all would want the same few lines of the cache.
  constexpr size_t page = 4096, apart = 5 * 64;
  char* const top = fiber.stack.get() + Fiber::stack_bytes - thread * apart % page;
  void** const words = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
  fiber.place = words - 8;  // six registers, where to go on, and where from that: never
  std::fill(words - 8, words, nullptr);
  words[-2] = reinterpret_cast<void*>(fiber_main);
#else
  ucontext_t& context = fiber.place.context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = Fiber::stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  fiber.place.left = false;
#endif
  switch_stacks(no_thread, thread);
  fiber.started = true;
}

// A barrier in shared memory at which some threads arrive, and go on, and others wait until its first phase has ended, as an
// mbarrier: so many arrivals end a phase.
struct Arrivals {
  static constexpr uint16_t unset = 0xffff;  // as shared memory is filled
  uint16_t expected, missing;
  uint32_t phase;
};
static_assert(sizeof(Arrivals) == 8, "an mbarrier's size");
Arrivals arrivals_at(const void* barrier) {
  Arrivals state;
  std::memcpy(&state, barrier, sizeof state);
  return state;
}
void expect_arrivals(void* barrier, int count) {
  const Arrivals state{uint16_t(count), uint16_t(count), 0};
  std::memcpy(barrier, &state, sizeof state);
}
// Before it is set up it is lost: those who wait are stuck.
void arrive(void* barrier) {
  Arrivals state = arrivals_at(barrier);
  if (state.expected == Arrivals::unset) return;
  if (--state.missing == 0) state = {state.expected, state.expected, state.phase + 1};
  std::memcpy(barrier, &state, sizeof state);
}
// With the parity of the phase that a GPU looks at: after a second phase the first seems not to have ended.
bool have_arrived(const void* barrier) {
  const Arrivals state = arrivals_at(barrier);
  return state.expected != Arrivals::unset && state.phase % 2 == 1;
}
void wait_for_arrivals(const void* barrier, int line) {
  block.fibers[block.current].arrivals = barrier;
  if (!have_arrived(barrier)) wait_at(Wait::arrivals, line);
}

// Lets those of threads [begin, end) go on for whom all have arrived; whether there are any.
bool open_arrivals(unsigned begin, unsigned end) {
  bool any = false;
  for (unsigned t = begin; t < end; ++t) {
    Fiber& fiber = block.fibers[t];
    if (fiber.wait != Wait::arrivals || !have_arrived(fiber.arrivals)) continue;
    fiber.wait = Wait::none;
    any = true;
  }
  return any;
}

std::string describe_stuck() {
  std::string text = "threads of a block do not meet:";
  const char* separator = " ";
  for (unsigned t = 0; t < block.threads; ++t) {
    const Fiber& fiber = block.fibers[t];
    if (t && block.fibers[t - 1].wait == fiber.wait && block.fibers[t - 1].line == fiber.line) continue;
    text += separator + ("from thread " + std::to_string(t)) +
            (fiber.wait == Wait::ended ? " ended"
                                       : " wait " +
                                             std::string(fiber.wait == Wait::arrivals ? "for arrivals"
                                                         : fiber.wait == Wait::warp   ? "at a warp barrier"
                                                                                      : "at a block barrier") +
                                             " in line " + std::to_string(fiber.line));
    separator = ", ";
  }
  return text;
}

// Runs one block, in an order drawn with `salt`; false where its threads do not meet.
bool run_block(uint64_t salt) {
  for (unsigned t = 0; t < block.threads; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.wait = Wait::none;
    fiber.exchanges = 0;
    fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
  }
  const unsigned warps = (block.threads + 31) / 32;
  const std::vector<unsigned> warp_order = order_of(warps, salt);
  block.lanes = order_of(32, salt + 1);
  for (;;) {
    bool alive = false;
    // Each warp runs until it ends or needs another: as far ahead of the rest as a barrier lets it.
    for (unsigned warp : warp_order) {
      block.begin = warp * 32;
      block.end = std::min(block.begin + 32, block.threads);
      block.turn = 0;
      const unsigned first = next_thread();
      if (first != no_thread) switch_stacks(no_thread, first);
      for (unsigned t = block.begin; t < block.end; ++t) alive |= block.fibers[t].wait != Wait::ended;
    }
    if (!alive) return true;
    if (!open_arrivals(0, block.threads) && !open_barrier(Wait::block, 0, block.threads)) {
      settings.message = describe_stuck();
      // What is left of these fibers must not run on.
      for (Fiber& fiber : block.fibers) fiber.started = false;
      return false;
    }
  }
}

cudaError_t refuse(const std::string& message) {
  settings.message = message;
  return cudaErrorInvalidConfiguration;
}

cudaError_t run_grid(const cudaLaunchConfig_t& config, void* kernel, void (*call)(const void*), const void* arguments) {
  settings.kernels.insert(kernel);
  const auto found = settings.shared_allowed.find(kernel);
  const int shared_allowed = found == settings.shared_allowed.end() ? 48 * 1024 : found->second;
  const dim3 grid = config.gridDim, size = config.blockDim;
  const uint64_t threads = uint64_t(size.x) * size.y * size.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads < 1 || threads > 1024) return refuse("a block of " + std::to_string(threads) + " threads");
  if (blocks < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return refuse("a grid of " + std::to_string(blocks) + " blocks");
  if (config.dynamicSmemBytes > size_t(shared_allowed))
    return refuse(std::to_string(config.dynamicSmemBytes) + " bytes of shared memory");
  ++settings.launches;
  block.call = call;
  block.arguments = arguments;
  blockDim = size;
  gridDim = grid;
  block.threads = unsigned(threads);
  for (auto& held : block.held) held.assign(threads, 0);
  block.fibers.reserve(1024);  // a place may point into itself: they must not move
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  for (unsigned t = 0; t < threads; ++t)
    if (!block.fibers[t].started) start_fiber(t);
  // Of the exact size, so that AddressSanitizer sees an overrun.
  const size_t shared_bytes = config.dynamicSmemBytes;
  if (posix_memalign(&block.shared, 16, std::max<size_t>(shared_bytes, 1)) != 0) return refuse("no memory for shared memory");
  bool good = true;
  for (unsigned b : order_of(unsigned(blocks), uint64_t(settings.launches))) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    std::memset(block.shared, 0xff, shared_bytes);  // NaN as a number, out of range as an index
    block.waited = 0;
    if (!(good = run_block(b))) break;
    if (config.numAttrs != 0 && block.waited != threads) {
      settings.message = "a kernel starts early, and some of its threads do not wait for those before it, or do so twice";
      good = false;
      break;
    }
  }
  std::free(block.shared);
  block.shared = nullptr;
  return good ? cudaSuccess : cudaErrorLaunchFailure;
}

void* dynamic_shared() { return block.shared; }
unsigned current_thread() { return block.current; }
void wait_for_earlier() { ++block.waited; }

// One barrier is enough: where the next one opens all have read, and what is written before that lies elsewhere.
Held exchange(uint64_t bits, int line) {
  const unsigned me = block.current, warp = me & ~31u;
  auto& held = block.held[block.fibers[me].exchanges++ % 2];
  held[me] = bits;
  wait_at(Wait::warp, line);
  return {held.data() + warp, std::min(32u, block.threads - warp), me - warp};
}

cudaError_t allow_shared(void* kernel, int bytes) {
  // A smaller one would take back what another thread has just allowed.
  if (bytes != settings.shared_limit) return cudaErrorInvalidValue;
  settings.shared_allowed[kernel] = bytes;
  return cudaSuccess;
}

}  // namespace host_cuda

// ---- Host functions.
cudaError_t cudaGetDevice(int* device) {
  *device = host_cuda::settings.device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= host_cuda::settings.devices) return cudaErrorInvalidDevice;
  host_cuda::settings.device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using host_cuda::settings;
  *value = attribute == cudaDevAttrMultiProcessorCount ? settings.multiprocessors : settings.shared_limit;
  if (attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor) *value += 1024;
  if (attribute == cudaDevAttrL2CacheSize) *value = 48 << 20;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset2DAsync(void* pointer, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  if (width > pitch) return cudaErrorInvalidValue;
  for (size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(pointer) + row * pitch, value, width);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure   ? "cudaErrorLaunchFailure"
         : error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice"
                                           : "cudaError";
}
const char* cudaGetErrorString(cudaError_t) { return host_cuda::settings.message.c_str(); }

// ---- For the tests.
extern "C" {
// Blocks and threads run in an order drawn from the seed; 0 is the natural one.
__attribute__((visibility("default"))) void emulation_order(uint64_t seed) { host_cuda::settings.seed = seed; }
__attribute__((visibility("default"))) void emulation_multiprocessors(int32_t count) {
  host_cuda::settings.multiprocessors = count;
}
__attribute__((visibility("default"))) int32_t emulation_device() { return host_cuda::settings.device; }
__attribute__((visibility("default"))) int64_t emulation_launches() { return host_cuda::settings.launches; }
// Addresses of the kernels launched since the last call, at most `room` of them; returns how many there are.
__attribute__((visibility("default"))) int32_t emulation_kernels(void** addresses, int32_t room) {
  int32_t count = 0;
  for (void* kernel : host_cuda::settings.kernels)
    if (count++ < room) addresses[count - 1] = kernel;
  host_cuda::settings.kernels.clear();
  return count;
}
}
