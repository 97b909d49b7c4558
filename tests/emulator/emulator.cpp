#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "fiber.h"
#define QIF_ISA host
#include "common/vec.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

ThreadIndices now;
std::vector<std::pair<uintptr_t, size_t>> ranges;

namespace {

// A copy to shared memory that its thread has not waited for.
struct Copy {
  SharedSpan span;
  ptrdiff_t offset;
  Bytes16 data;
  uint32_t group;
};

enum class State { kReady, kBarrier, kMeeting, kDone };

struct Fiber {
  Context context;
  dim3 thread;
  State state;
  Site site;
  // Epochs: barriers passed by the block and by the fiber's warp. Accesses in different epochs are ordered.
  uint32_t warp_epoch;
  uint32_t mask;
  void* payload;
  WarpOperation run;
  const char* operation;
  std::vector<Copy> copies;
  uint32_t group;  // of the next copy
};

// ---- the running block

struct Access {
  uint32_t epoch = 0, warp_epoch = 0;  // epoch 0: none in this block
  int thread = -1;
};
constexpr size_t kCellBytes = 2;
struct Cell {
  Access write, read, other_read;  // the last reads by two different threads, of different warps where there are such
  bool in_flight = false;          // an asynchronous copy to it has not been waited for
};

struct Block {
  const std::function<void()>* kernel = nullptr;
  std::vector<Fiber> fibers;
  std::vector<int> meeting;  // lanes of each warp that wait in `meet`
  size_t running = 0;
  uint32_t epoch = 1;
  std::vector<unsigned char> arena;
  std::vector<Cell> cells;
  size_t arena_used = 0, dynamic_bytes = 0;
  std::vector<std::pair<const SharedKey*, SharedSpan>> arrays;
  std::string error;
};
Block block;
Context scheduler;
std::vector<unsigned char*> stacks;

constexpr size_t kArenaBytes = 232448;  // what a block can have on sm_90

std::string place(size_t thread) {
  const dim3 t = block.fibers[thread].thread, b = now.block;
  char text[96];
  std::snprintf(text, sizeof(text), "block (%u, %u, %u) thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
  return text;
}

std::string describe(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer is told of every switch; null `save`: the fiber that is left never comes back.
const void* scheduler_stack;
size_t scheduler_stack_bytes;
#define QIF_LEAVE(save, stack, bytes) __sanitizer_start_switch_fiber(save, stack, bytes)
#define QIF_ARRIVE(saved, stack, bytes) __sanitizer_finish_switch_fiber(saved, stack, bytes)
#else
#define QIF_LEAVE(save, stack, bytes) (void)(save)
#define QIF_ARRIVE(saved, stack, bytes) (void)(saved)
#endif

void to_scheduler() {
  Fiber& f = block.fibers[block.running];
  void* fake = nullptr;
  QIF_LEAVE(f.state == State::kDone ? nullptr : &fake, scheduler_stack, scheduler_stack_bytes);
  switch_context(f.context, scheduler);
  QIF_ARRIVE(fake, &scheduler_stack, &scheduler_stack_bytes);
  now.thread = f.thread;
}

void fiber_main() {
  QIF_ARRIVE(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  try {
    (*block.kernel)();
    if (!block.fibers[block.running].copies.empty()) fail("returns while copies to shared memory are in flight");
  } catch (const std::exception& e) {
    block.error = e.what();
  }
  block.fibers[block.running].state = State::kDone;
  to_scheduler();
}

void run_until_it_waits(size_t i) {
  block.running = i;
  now.thread = block.fibers[i].thread;
  void* fake = nullptr;
  QIF_LEAVE(&fake, stacks[i], kStackBytes);
  switch_context(scheduler, block.fibers[i].context);
  QIF_ARRIVE(fake, nullptr, nullptr);
}

// All wait: open the barrier, or say who never came.
void open_barrier() {
  size_t waiting = block.fibers.size(), stuck = block.fibers.size(), exited = block.fibers.size();
  for (size_t i = 0; i < block.fibers.size(); ++i) {
    const State s = block.fibers[i].state;
    if (s == State::kBarrier) waiting = i;
    if (s == State::kMeeting) stuck = i;
    if (s == State::kDone) exited = i;
  }
  const size_t none = block.fibers.size();
  if (stuck != none) {
    const Fiber& f = block.fibers[stuck];
    char mask[16];
    std::snprintf(mask, sizeof(mask), "0x%08x", f.mask);
    throw std::runtime_error(std::string(f.operation) + " at " + describe(f.site) + " in " + place(stuck) +
                             " waits for lanes of its mask " + mask + " that never come");
  }
  if (exited != none)
    throw std::runtime_error("divergent barrier: " + place(waiting) + " waits at " +
                             describe(block.fibers[waiting].site) + ", " + place(exited) + " has returned");
  for (size_t i = 0; i < none; ++i) {
    const Site a = block.fibers[0].site, b = block.fibers[i].site;
    if (a.line != b.line || std::strcmp(a.file, b.file))
      throw std::runtime_error("divergent barrier: " + place(0) + " waits at " + describe(a) + ", " + place(i) +
                               " at " + describe(b));
  }
  for (Fiber& f : block.fibers) f.state = State::kReady;
  ++block.epoch;
}

void run_block(dim3 dims, size_t shared_bytes) {
  const size_t threads = size_t{dims.x} * dims.y * dims.z;
  block.fibers.resize(threads);
  block.meeting.assign((threads + 31) / 32, 0);
  while (stacks.size() < threads) {
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<unsigned char*>(p));
  }
  for (size_t i = 0; i < threads; ++i) {
    Fiber& f = block.fibers[i] = Fiber{};
    f.thread = dim3(i % dims.x, i / dims.x % dims.y, i / dims.x / dims.y);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks[i], kStackBytes);
#endif
    prepare(f.context, stacks[i], fiber_main);
  }
  const size_t touched = std::max(block.arena_used, shared_bytes);
  std::fill_n(block.cells.begin(), (touched + kCellBytes - 1) / kCellBytes, Cell{});
  block.epoch = 1;
  block.arrays.clear();
  block.arena_used = block.dynamic_bytes = shared_bytes;
  block.error.clear();

  for (;;) {
    bool progress = false, done = true;
    for (size_t i = 0; i < threads; ++i) {
      if (block.fibers[i].state == State::kReady) {
        progress = true;
        run_until_it_waits(i);
        if (!block.error.empty()) throw std::runtime_error(block.error);
      }
      done = done && block.fibers[i].state == State::kDone;
    }
    if (done) return;
    if (!progress) open_barrier();
  }
}

bool ordered(const Access& before, const Fiber& f, int thread) {
  if (before.epoch == 0 || before.thread == thread || before.epoch < block.epoch) return true;
  return before.thread / 32 == thread / 32 && before.warp_epoch < f.warp_epoch;
}

[[noreturn]] void race(const SharedSpan& span, ptrdiff_t offset, int first, const char* how) {
  fail(std::string("race on shared `") + span.name + "`, byte " +
       std::to_string(offset - static_cast<ptrdiff_t>(span.begin)) + ": " + how + " thread " + std::to_string(first) +
       " without a barrier between them");
}

}  // namespace

void fail(const std::string& what) { throw std::runtime_error(place(block.running) + ": " + what); }

void run_grid(dim3 grid, dim3 dims, size_t shared_bytes, const std::function<void()>& kernel) {
  const size_t threads = size_t{dims.x} * dims.y * dims.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("launch: bad grid or block size");
  if (shared_bytes > kArenaBytes) throw std::runtime_error("launch: more shared memory than a block can have");
  block.arena.resize(kArenaBytes);
  block.cells.resize(kArenaBytes / kCellBytes + 1);
  block.kernel = &kernel;
  now.block_dim = dims;
  now.grid_dim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        now.block = dim3(x, y, z);
        run_block(dims, shared_bytes);
      }
}

int lane() { return static_cast<int>(block.running % 32); }

void block_barrier(Site site) {
  Fiber& f = block.fibers[block.running];
  f.state = State::kBarrier;
  f.site = site;
  to_scheduler();
}

void meet(uint32_t mask, void* payload, WarpOperation run, const char* name, Site site) {
  Fiber& own = block.fibers[block.running];
  if (!(mask >> lane() & 1)) fail(std::string(name) + " at " + describe(site) + ": the mask misses the calling lane");
  own.state = State::kMeeting;
  own.site = site;
  own.mask = mask;
  own.payload = payload;
  own.run = run;
  own.operation = name;
  const size_t first = block.running / 32 * 32, there = std::min<size_t>(32, block.fibers.size() - first);
  const uint32_t existing = there == 32 ? ~0u : (1u << there) - 1;
  int& waiting = block.meeting[block.running / 32];
  if (++waiting < __builtin_popcount(mask & existing)) return to_scheduler();
  void* payloads[32] = {};
  for (size_t l = 0; l < there; ++l) {
    if (!(mask >> l & 1)) continue;
    const Fiber& f = block.fibers[first + l];
    if (f.state != State::kMeeting || f.mask != mask || f.run != run) return to_scheduler();
    payloads[l] = f.payload;
  }
  for (size_t l = 0; l < there; ++l)
    if (payloads[l]) {
      block.fibers[first + l].state = State::kReady;
      --waiting;
    }
  run(payloads, mask);
}

void warp_barrier(uint32_t mask, Site site) {
  meet(
      mask, &block.fibers[block.running],
      [](void* const* fibers, uint32_t) {
        uint32_t epoch = 0;
        for (int l = 0; l < 32; ++l)
          if (fibers[l]) epoch = std::max(epoch, static_cast<Fiber*>(fibers[l])->warp_epoch);
        for (int l = 0; l < 32; ++l)
          if (fibers[l]) static_cast<Fiber*>(fibers[l])->warp_epoch = epoch + 1;
      },
      "__syncwarp", site);
}

int shuffle_source(int own, int argument, int width, char kind) {
  const int base = own / width * width, inside = own - base;
  int source = inside;
  if (kind == 'i') source = argument & (width - 1);
  if (kind == 'x') source = inside ^ argument;
  if (kind == 'd') source = inside + argument;
  if (kind == 'u') source = inside - argument;
  return source < 0 || source >= width ? own : base + source;
}

uint32_t vote(uint32_t mask, bool predicate, Site site) {
  struct Vote {
    bool predicate;
    uint32_t result;
  } own{predicate, 0};
  meet(
      mask, &own,
      [](void* const* votes, uint32_t) {
        uint32_t bits = 0;
        for (int l = 0; l < 32; ++l)
          if (votes[l] && static_cast<Vote*>(votes[l])->predicate) bits |= 1u << l;
        for (int l = 0; l < 32; ++l)
          if (votes[l]) static_cast<Vote*>(votes[l])->result = bits;
      },
      "vote", site);
  return own.result;
}

// ---- memory

void check_global(const void* p, size_t bytes, const char* action) {
  const auto a = reinterpret_cast<uintptr_t>(p);
  if (a % bytes) fail(std::string("misaligned ") + action + " of " + std::to_string(bytes) + " bytes of global memory");
  for (auto& range : ranges)
    if (a >= range.first && a + bytes <= range.first + range.second) {
      std::swap(range, ranges.front());  // the next access is probably near
      return;
    }
  fail(std::string(action) + " of " + std::to_string(bytes) + " bytes of global memory outside of every tensor");
}

SharedSpan find_shared(const SharedKey& key, size_t bytes) {
  for (const auto& [k, span] : block.arrays)
    if (k == &key) return span;
  const size_t begin = (block.arena_used + 127) / 128 * 128;
  if (begin + bytes > kArenaBytes) fail("more shared memory than a block can have");
  const size_t first = block.arena_used / kCellBytes, last = (begin + bytes + kCellBytes - 1) / kCellBytes;
  std::fill(block.cells.begin() + first, block.cells.begin() + last, Cell{});
  block.arena_used = begin + bytes;
  block.arrays.push_back({&key, {key.name, block.arena.data(), begin, begin + bytes}});
  return block.arrays.back().second;
}

SharedSpan find_dynamic_shared() { return {"dynamic", block.arena.data(), 0, block.dynamic_bytes}; }

void check_shared(const SharedSpan& span, ptrdiff_t offset, size_t bytes, size_t alignment, bool write) {
  const auto begin = static_cast<ptrdiff_t>(span.begin), end = static_cast<ptrdiff_t>(span.end);
  const char* action = write ? "write" : "read";
  if (offset < begin || offset + static_cast<ptrdiff_t>(bytes) > end)
    fail(std::string(action) + " of shared `" + span.name + "` out of bounds: byte " + std::to_string(offset - begin) +
         " of " + std::to_string(end - begin));
  if (offset % static_cast<ptrdiff_t>(alignment)) fail(std::string("misaligned ") + action + " of shared memory");
  const int thread = static_cast<int>(block.running);
  const Fiber& f = block.fibers[block.running];
  const Access access{block.epoch, f.warp_epoch, thread};
  for (size_t c = offset / kCellBytes; c <= (offset + bytes - 1) / kCellBytes; ++c) {
    Cell& cell = block.cells[c];
    if (cell.in_flight)
      fail(std::string(action) + " of shared `" + span.name + "`, byte " +
           std::to_string(offset - static_cast<ptrdiff_t>(span.begin)) + ", while a copy to it is in flight");
    if (write) {
      if (!ordered(cell.write, f, thread)) race(span, offset, cell.write.thread, "written also by");
      if (!ordered(cell.read, f, thread)) race(span, offset, cell.read.thread, "written while read by");
      if (!ordered(cell.other_read, f, thread)) race(span, offset, cell.other_read.thread, "written while read by");
      cell.write = access;
    } else {
      if (cell.write.epoch == 0) fail(std::string("read of shared `") + span.name + "` before it was written");
      if (!ordered(cell.write, f, thread)) race(span, offset, cell.write.thread, "read after it was written by");
      const bool other_warp = cell.read.epoch == block.epoch && cell.read.thread / 32 != thread / 32;
      if (cell.read.thread != thread && (other_warp || cell.other_read.epoch != block.epoch))
        cell.other_read = cell.read;
      cell.read = access;
    }
  }
}

// ---- asynchronous copies

void copy_async(const Shared<Bytes16>& to, const void* from, bool valid) {
  Fiber& f = block.fibers[block.running];
  Copy copy{to.span, to.offset, {}, f.group};
  if (valid) copy.data = load_global(static_cast<const Bytes16*>(from));
  check_shared(to.span, to.offset, sizeof(Bytes16), alignof(Bytes16), true);
  for (int c = 0; c < 8; ++c) block.cells[to.offset / kCellBytes + c].in_flight = true;
  f.copies.push_back(copy);
}

void commit_copies() { ++block.fibers[block.running].group; }

void wait_copies(int left) {
  Fiber& f = block.fibers[block.running];
  auto arrived = [&](const Copy& copy) {
    if (copy.group + left >= f.group) return false;
    for (int c = 0; c < 8; ++c) block.cells[copy.offset / kCellBytes + c].in_flight = false;
    check_shared(copy.span, copy.offset, sizeof(Bytes16), alignof(Bytes16), true);
    std::memcpy(copy.span.base + copy.offset, copy.data.bytes, sizeof(Bytes16));
    return true;
  };
  f.copies.erase(std::remove_if(f.copies.begin(), f.copies.end(), arrived), f.copies.end());
}

// ---- matrices

void load_matrices(const Shared<Bytes16>& row, bool transposed, uint32_t (&words)[4]) {
  struct Load {
    Bytes16 row;
    bool transposed;
    uint32_t* words;
  } own{row[0], transposed, words};
  auto run = [](void* const* loads, uint32_t) {
    if (!loads[31]) fail("ldmatrix needs a whole warp");
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m) {
        const Load& own = *static_cast<Load*>(loads[l]);
        unsigned char* word = reinterpret_cast<unsigned char*>(&own.words[m]);
        for (int i = 0; i < 2; ++i) {
          const int r = own.transposed ? l % 4 * 2 + i : l / 4, c = own.transposed ? l / 4 : l % 4 * 2 + i;
          std::memcpy(word + 2 * i, &static_cast<Load*>(loads[8 * m + r])->row.bytes[2 * c], 2);
        }
      }
  };
  meet(0xffffffffu, &own, run, "ldmatrix", {__FILE__, __LINE__});
}

template <int InWord, class N, class Widen>
static void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2], N (&c)[4], Widen left, Widen right) {
  struct Product {
    const uint32_t *a, *b;
    N* c;
    Widen left, right;
  } own{a, b, c, left, right};
  auto run = [](void* const* products, uint32_t) {
    if (!products[31]) fail("mma needs a whole warp");
    N rows[16][8 * InWord], columns[8][8 * InWord];
    for (int l = 0; l < 32; ++l) {
      const Product& p = *static_cast<Product*>(products[l]);
      for (int w = 0; w < 4; ++w) p.left(p.a[w], &rows[l / 4 + w % 2 * 8][(l % 4 + w / 2 * 4) * InWord]);
      for (int w = 0; w < 2; ++w) p.right(p.b[w], &columns[l / 4][(l % 4 + w * 4) * InWord]);
    }
    for (int i = 0; i < 128; ++i) {
      const int l = i / 4, row = l / 4 + i % 4 / 2 * 8, column = l % 4 * 2 + i % 2;
      N sum = 0;
      for (int k = 0; k < 8 * InWord; ++k) sum += rows[row][k] * columns[column][k];
      static_cast<Product*>(products[l])->c[i % 4] += sum;
    }
  };
  meet(0xffffffffu, &own, run, "mma", {__FILE__, __LINE__});
}

template <class T>
static void widen_bytes(uint32_t word, int32_t* v) {
  for (int i = 0; i < 4; ++i) v[i] = static_cast<T>(word >> 8 * i);
}
static void widen_e4m3(uint32_t word, float* v) {
  for (int i = 0; i < 4; ++i, word >>= 8)
    v[i] = (word & 127) == 127 ? NAN : 256 * widen_half(static_cast<uint16_t>((word & 128) << 8 | (word & 127) << 7));
}
void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4], Widen2 widen) {
  auto pair = [widen](uint32_t word, float* v) { widen(word, v[0], v[1]); };
  multiply_add<2>(a, b, c, pair, pair);
}
void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2], int32_t (&c)[4]) {
  multiply_add<4>(a, b, c, widen_bytes<uint8_t>, widen_bytes<int8_t>);
}
void multiply_add_e4m3(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]) {
  multiply_add<4>(a, b, c, widen_e4m3, widen_e4m3);
}

uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selectors) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) {
    const int selector = selectors >> 4 * i & 15;
    const int8_t byte = static_cast<int8_t>(bytes >> 8 * (selector & 7));
    found |= static_cast<uint32_t>(static_cast<uint8_t>(selector & 8 ? byte >> 7 : byte)) << 8 * i;
  }
  return found;
}

float widen_half(uint16_t bits) { return qif::host::widen(qif::Half{bits}); }
uint16_t narrow_half(float value) {
  qif::Half h;
  qif::host::narrow(&h, value);
  return h.bits;
}
uint16_t narrow_bfloat16(float value) {
  qif::BFloat16 b;
  qif::host::narrow(&b, value);
  return b.bits;
}

}  // namespace emulator
