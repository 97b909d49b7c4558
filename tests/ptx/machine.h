// The state of a launch: a cluster of blocks at a time, their warps, threads and barriers, and what is on its way.
#pragma once
#include <map>
#include <random>
#include <set>
#include <tuple>

#include "memory.h"
#include "program.h"
#include "tensor_map.h"

namespace ptx {

struct Block;
struct Cluster;
using Size = std::array<uint32_t, 3>;

enum class State { kRunning, kMeeting, kBarrier, kClusterBarrier, kMbarrier, kDone };

struct CopyAsync {  // cp.async
  uint32_t group, to;
  uint64_t from;
  uint32_t bytes, valid;
};

struct BulkStore {
  uint32_t group, from;
  Box box;
};

struct Thread {
  Order order;
  uint32_t now = 1;  // the count of its own accesses
  State state = State::kRunning;
  uint64_t waits_for = 0;                      // of an mbarrier: address in the cluster
  uint32_t cluster_arrivals = 0;               // at the cluster's barrier
  bool cluster_arrived = false;                // and has not waited since
  uint32_t copy_groups = 0, store_groups = 0;  // that are closed
  std::vector<CopyAsync> copies;
  std::vector<BulkStore> stores;
};

struct Warp {
  Block* block;
  int index;
  uint32_t exists = 0, running = 0;
  int pc[kLanes] = {};
  Thread thread[kLanes];
  std::vector<uint64_t> registers;
  // for wgmma: until which group of its warp group it has a register, and when other instructions last used that
  uint32_t groups_waited = 0;
  std::vector<uint32_t> in_use, used;
  uint32_t steps = 0, fence = 0;
  // Of global memory: how often it has waited for loads, behind which wait a register has its value, and behind how
  // many a load stays where the compiler moves it up.
  uint32_t waits = 0, held = 0;
  bool behind_barrier = false;
  std::vector<uint32_t> arrives;
  // Whole tiles are loaded for the tensor cores, also rows and columns that a tile does not have and that nobody wrote.
  // Lanes by register whose value came of such bytes: none may reach global memory, an address or a branch.
  std::vector<uint32_t> undefined;
  bool any_undefined = false;
  uint32_t operands_undefined = 0;  // of the instruction that runs

  const uint64_t* lanes(const Operand& o) const;
  uint64_t* lanes(int slot) { return &registers[static_cast<size_t>(slot) * kLanes]; }
  uint64_t value(const Operand& o, int lane) const { return lanes(o)[lane] ^ (o.negated ? 1 : 0); }
  uint64_t address(const Operand& o, int lane) const { return lanes(o)[lane] + static_cast<uint64_t>(o.offset); }
  void set(int slot, int lane, uint64_t value, bool is_undefined) {
    lanes(slot)[lane] = value;
    undefined[slot] = (undefined[slot] & ~(1u << lane)) | static_cast<uint32_t>(is_undefined) << lane;
  }
  void stop(uint32_t which, State state);
  void release(uint32_t which);  // they go on where they are
  void advance(uint32_t which);
  uint32_t at(int place, State state) const;  // lanes
};

struct NamedBarrier {
  uint32_t expected = 0, arrived = 0;
  bool all = true, any = false;  // of what a bar.red is given
  Order order;
  std::vector<std::pair<Warp*, uint32_t>> waiting;
};

struct Mbarrier {
  uint32_t expected = 0, pending = 0, completed = 0;  // arrivals of a phase; phases
  int64_t bytes = 0;                                  // that are still to come
  int agent = 0;
  Order order;
  Stamp initialised = 0;
};

struct Multiply {  // wgmma.mma_async
  uint32_t group;
  const Instruction* instruction;
  uint64_t left, right;
  bool accumulate;
};

struct WarpGroup {
  std::vector<Multiply> products;
  uint32_t committed = 0;
};

struct Block {
  Cluster* cluster;
  uint32_t rank;
  Size id;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  std::vector<Warp> warps;
  std::vector<WarpGroup> groups;
  std::array<NamedBarrier, 16> barriers;
  uint32_t waits = 0;  // of the warps that came to a barrier, the most
  std::map<uint32_t, Mbarrier> mbarriers;
  bool ended() const;
  std::string name() const { return words("block (", id[0], ", ", id[1], ", ", id[2], ")"); }
};

struct BulkLoad {  // to one block; a multicast is several
  Box box;
  Block* to;
  uint32_t address, barrier, phase;
  const Warp* by;
  int lane;
  const Instruction* instruction;
};

struct Launch {
  Size grid, block, cluster;
  uint32_t dynamic_shared;
  std::vector<unsigned char> params;
};

struct Counts {
  uint64_t instructions = 0;         // of warps
  uint64_t loaded = 0, stored = 0;   // bytes of global memory, by instructions and bulk copies
  uint64_t blocks = 0, threads = 0;  // threads: of a block of the last launch
  uint64_t waits = 0;  // of a block for global memory: loads that are issued before one of them is used are one wait
  std::map<std::string, uint64_t> by_name;  // instructions
};

// Runs the clusters of a launch one after the other; throws std::runtime_error for the first thing that is wrong.
void run(const Kernel& kernel, const Launch& launch, Global& global, unsigned seed, uint64_t step_limit,
         Counts& counts);

struct Cluster {
  const Kernel& kernel;
  const Launch& launch;
  Global& global;
  Counts& counts;
  uint64_t steps_left;
  std::mt19937 random;
  std::vector<uint64_t> executed;  // by place in the code
  uint64_t number = 0;             // from 1
  std::vector<Block> blocks;
  std::vector<BulkLoad> loads;
  std::map<std::tuple<char, int, uint64_t>, int> agents;  // kind, block and which
  std::vector<std::string> agent_names;                   // behind the threads
  uint32_t arrived = 0, phase = 0;                        // at the cluster's barrier
  Order order;                                            // of those

  void reset(uint64_t number, const Size& place);
  void run();
  void run(Warp& w, int steps);
  int threads() const { return static_cast<int>(launch.block[0] * launch.block[1] * launch.block[2]); }
  int all_threads() const { return threads() * static_cast<int>(blocks.size()); }
  int agent(char kind, const Block& b, uint64_t which, const char* name);
  [[noreturn]] void deadlock();
  template <class F>
  void for_threads(F f) {  // that have not ended
    for (Block& b : blocks)
      for (Warp& w : b.warps)
        for (int l = 0; l < kLanes; ++l)
          if (w.exists >> l & 1 && w.thread[l].state != State::kDone) f(w, l);
  }
};

// ---- what steps are made of -------------------------------------------------------------------------------------

template <class T>
T unpack(uint64_t bits) {
  if constexpr (std::is_same_v<T, bool>) return bits != 0;
  T v;
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}
template <class T>
uint64_t pack(T v) {
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  return bits;
}

template <class F>
void for_lanes(uint32_t lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}
// The step that does F for one lane after another.
template <auto F>
Outcome each_lane(Warp& w, const Instruction& i, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) { F(w, l, i); });
  return Outcome::kNext;
}
// f for what belongs to groups up to one, in their order; that is taken away.
template <class T, class F>
void finish(std::vector<T>& open, uint32_t upto, F f) {
  size_t n = 0;
  for (; n < open.size() && open[n].group <= upto; ++n) f(open[n]);
  open.erase(open.begin(), open.begin() + static_cast<std::ptrdiff_t>(n));
}

[[noreturn]] void fail_with(const Warp& w, int lane, const Instruction& i, const std::string& what);
template <class... Words>
[[noreturn]] void fail(const Warp& w, int lane, const Instruction& i, const Words&... what) {
  fail_with(w, lane, i, words(what...));
}

// Bytes at an address of a warp's memory, checked for bounds and alignment. Shared memory may be another block's.
enum class Space { kParam, kShared, kGlobal };
struct Place {
  Space space;
  uint64_t address;
  unsigned char* data;
  Cell* cells;
  uint32_t bytes;
  Block* block;
};
Place locate(const Warp& w, int lane, const Instruction& i, Space space, Access access, uint64_t address,
             uint32_t bytes, uint32_t alignment);
// The same, and an access by `o` is recorded, or fails.
Place touch(const Warp& w, int lane, const Instruction& i, Space space, Access access, uint64_t address, uint32_t bytes,
            uint32_t alignment, const Observer& o);
void check(const Warp& w, int lane, const Instruction& i, const Place& p, Access access, const Observer& o);

int thread_agent(const Warp& w, int lane);
Observer observer(const Warp& w, int lane, bool async = false);
void publish(Warp& w, int lane, Order& order);  // another thread will know what this one does now

// Waits until all of `needed` are at this instruction; then `lanes` are all that are there.
bool meet(Warp& w, uint32_t& lanes, uint32_t needed = ~0u);

Mbarrier& mbarrier_at(const Warp& w, int lane, const Instruction& i, const Place& p);
void mbarrier_opens(Block& block, uint32_t address);  // where its phase is complete
void end_of_thread(Warp& w, int lane, const Instruction& i);
void end_of_cluster(Cluster& c);
void perform(const BulkLoad& load);

// The steps of a family of instructions by regular expressions of names, the first that fits, and how many of the
// operands at the front they write.
struct Form {
  const char* names;
  Step step;
  int written = 0;
};
using Forms = std::vector<Form>;
Forms memory_forms();
Forms barrier_forms();
Forms copy_forms();
Forms matrix_forms();
Step arithmetic_step(const Instruction& i);

}  // namespace ptx
