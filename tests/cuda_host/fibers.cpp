// For tests: runs the threads of a block as fibers. See cuda_runtime.h, which says what this checks.
#include <sys/mman.h>

#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

// --- switching stacks ---

#if defined(__x86_64__)

// Keeps the callee-saved registers on the old stack and goes on with those of the new one. (swapcontext would make a system call.)
extern "C" void cuda_host_switch(void** save, void* load);
asm(R"(
.text
.type cuda_host_switch, @function
cuda_host_switch:
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
.size cuda_host_switch, .-cuda_host_switch
)");

struct Context {
  void* stack = nullptr;

  void prepare(char* base, size_t size, void (*entry)()) {
    void** top = reinterpret_cast<void**>(base + size);
    *--top = nullptr;  // where entry would return to; it does not, but leaves the stack as a call would
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack = top;
  }
  static void go(Context& from, Context& to) { cuda_host_switch(&from.stack, to.stack); }
};

#else

#include <ucontext.h>

struct Context {
  ucontext_t context;

  void prepare(char* base, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = base;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void go(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

namespace cuda_host {
namespace {

enum class State { ready, at_barrier, in_exchange, done };

struct Copy {
  char* to;
  const char* from;
  size_t size, zeros;
};

struct Fiber {
  Context context;
  State state;
  Site site;
  unsigned mask;  // in an exchange
  int source;
  uint64_t value;
  std::vector<Copy> copies;    // not yet done, oldest first
  std::vector<size_t> groups;  // copies in each committed group, oldest first
  size_t uncommitted;
};

constexpr size_t kStack = 256 << 10, kMostThreads = 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every dtype

std::mutex one_launch;
std::vector<Fiber> fibers(kMostThreads);
std::vector<int> ready;  // fibers that can go on
Context scheduler;
int current, threads, finished, waiting;
const std::function<void()>* body;
std::string error;  // of a fiber: thrown by the scheduler, as no exception may leave a fiber's stack
std::mt19937 order([] {
  const char* seed = std::getenv("CUDA_HOST_SEED");
  return seed ? unsigned(std::atol(seed)) : 0u;
}());

char* stacks() {
  static char* const memory = [] {
    void* p = mmap(nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("no memory for the stacks of fibers");
    return static_cast<char*>(p);
  }();
  return memory;
}

void unpoison(void* p, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(p, size);
#else
  (void)p, (void)size;
#endif
}
void out_of_bounds(void* p, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(p, size);
#else
  (void)p, (void)size;
#endif
}

std::string text(const Site& s) {
  std::string file = s.file;
  return std::string(s.what) + " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(s.line) + ")";
}
bool same(const Site& a, const Site& b) { return a.line == b.line && !std::strcmp(a.file, b.file) && !std::strcmp(a.what, b.what); }

void leave() { Context::go(fibers[current].context, scheduler); }

void entry() {
  (*body)();
  fibers[current].state = State::done;
  ++finished;
  leave();
}

void go_on(int fiber) {
  fibers[fiber].state = State::ready;
  ready.push_back(fiber);
}

// Once all threads wait at the barrier, they go on in a new order.
void check_barrier() {
  if (!waiting || waiting < threads) return;
  for (int i = 1; i < threads; ++i)
    if (!same(fibers[0].site, fibers[i].site)) {
      error = "divergent barrier: thread 0 is at " + text(fibers[0].site) + ", thread " + std::to_string(i) + " at " + text(fibers[i].site);
      return;
    }
  waiting = 0;
  for (int i = 0; i < threads; ++i) go_on(i);
  std::shuffle(ready.begin(), ready.end(), order);
}

std::string where_everybody_is() {
  std::string list;
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = fibers[i];
    const std::string here = f.state == State::done ? "has ended" : "waits at " + text(f.site);
    if (i && here == (fibers[i - 1].state == State::done ? "has ended" : "waits at " + text(fibers[i - 1].site))) continue;
    list += (list.empty() ? "" : "; from thread ") + (list.empty() ? "thread " : std::string()) + std::to_string(i) + " on: " + here;
  }
  return list;
}

void run_block(size_t shared_bytes) {
  std::memset(mpvg::cuda::dynamic_shared, kPoison, shared_bytes);
  ready.clear();
  finished = waiting = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.copies.clear(), f.groups.clear(), f.uncommitted = 0;
    f.context.prepare(stacks() + i * kStack, kStack, entry);
    go_on(i);
  }
  std::shuffle(ready.begin(), ready.end(), order);
  std::vector<int> turn;
  while (finished < threads) {
    turn.swap(ready);
    ready.clear();
    if (turn.empty()) {
      error = (waiting ? "divergent barrier: not all threads reach it: " : "deadlock: ") + where_everybody_is();
      break;
    }
    for (const int fiber : turn) {
      current = fiber;
      threadIdx.x = unsigned(fiber);
      Context::go(scheduler, fibers[fiber].context);
      if (!error.empty()) break;
    }
    if (!error.empty()) break;
  }
  if (!error.empty()) {
    unpoison(stacks(), kStack * kMostThreads);  // frames that are never left
    std::string message = "cuda_host: block " + std::to_string(blockIdx.x) + ": " + error;
    error.clear();
    throw std::runtime_error(message);
  }
}

}  // namespace

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  gridDim = grid, blockDim = block;
  threads = int(block.x);
  body = &thread;
  char* const shared = reinterpret_cast<char*>(mpvg::cuda::dynamic_shared);
  unpoison(shared, kSharedBytes);
  out_of_bounds(shared + shared_bytes, kSharedBytes - shared_bytes);
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(b, 0, 0);
    threadIdx = dim3(0, 0, 0);
    run_block(shared_bytes);
  }
}

void fail(const char* message, Site site) {
  error = "thread " + std::to_string(current) + ", " + text(site) + ": " + message;
  leave();  // for good
}

void barrier(Site site) {
  Fiber& f = fibers[current];
  f.state = State::at_barrier, f.site = site;
  ++waiting;
  check_barrier();
  leave();
}

uint64_t exchange(unsigned mask, uint64_t value, int source, Site site) {
  const int lane = current % 32, first = current - lane;
  Fiber& f = fibers[current];
  if (!(mask >> lane & 1)) fail("the mask leaves out the lane that calls", site);
  if (source >= 0 && !(mask >> source & 1)) fail("reads a lane that its mask leaves out", site);
  f.state = State::in_exchange, f.site = site, f.mask = mask, f.value = value, f.source = source;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (first + l >= threads) fail("the mask names a lane that the block does not have", site);
    const Fiber& other = fibers[first + l];
    if (other.state == State::done) fail("the mask names a lane that has ended", site);
    if (other.state == State::in_exchange && other.mask == mask && !same(other.site, site)) {
      error = "lanes of a warp meet at different places: thread " + std::to_string(current) + " is at " + text(site) + ", thread " +
              std::to_string(first + l) + " at " + text(other.site);
      leave();
    }
    if (other.state != State::in_exchange || other.mask != mask) {  // somebody is still to come, and lets this fiber go on
      leave();
      return f.value;
    }
  }
  // The last one gives everybody their result.
  uint64_t results[32], votes = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1 && fibers[first + l].value) votes |= uint64_t(1) << l;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) {
      const Fiber& other = fibers[first + l];
      results[l] = other.source < 0 ? votes : fibers[first + other.source].value;
    }
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) {
      fibers[first + l].value = results[l];
      if (l != lane) go_on(first + l);
    }
  f.state = State::ready;
  return results[lane];
}

void copy_async(void* to, const void* from, size_t size, size_t zeros) {
  const Site site{"__pipeline_memcpy_async", "", 0};
  if (size != 4 && size != 8 && size != 16) fail("copies 4, 8 or 16 bytes", site);
  if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size) fail("a copy is not aligned to its size", site);
  std::memset(to, kPoison, size);
  fibers[current].copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), size, zeros});
  ++fibers[current].uncommitted;
}
void copy_commit() {
  Fiber& f = fibers[current];
  f.groups.push_back(f.uncommitted);
  f.uncommitted = 0;
}
void copy_wait(size_t prior) {
  Fiber& f = fibers[current];
  size_t copies = 0;
  while (f.groups.size() > prior) {
    copies += f.groups.front();
    f.groups.erase(f.groups.begin());
  }
  for (size_t i = 0; i < copies; ++i) {
    const Copy& c = f.copies[i];
    std::memcpy(c.to, c.from, c.size - c.zeros);
    std::memset(c.to + c.size - c.zeros, 0, c.zeros);
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + copies);
}

}  // namespace cuda_host
