// The state of a launch: a cluster of blocks at a time, their warps, threads and barriers, and what is on its way.
#pragma once
#include <deque>
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

enum class State { kRunning, kMeeting, kBarrier, kClusterBarrier, kMbarrier, kDone };

struct Thread {
  Known known, fenced;  // `fenced`: what is visible to the asynchronous proxy
  uint32_t now = 1;     // the count of its own accesses
  State state = State::kRunning;
  uint64_t waits_for = 0;                      // of an mbarrier: address in the cluster
  uint32_t cluster_arrivals = 0;               // at the cluster's barrier
  bool cluster_arrived = false;                // and has not waited since
  uint32_t copy_groups = 0, store_groups = 0;  // that are closed
};

struct CopyAsync {  // cp.async
  uint32_t to;
  uint64_t from;
  uint32_t bytes, valid, group;
};

struct BulkStore {
  TensorMap map;
  int32_t at[5];
  uint32_t from, group;
};

struct Warp {
  Block* block;
  int index;
  uint32_t exists = 0, running = 0;
  int pc[kLanes] = {};
  Thread thread[kLanes];
  std::vector<uint64_t> registers;
  std::deque<CopyAsync> copies[kLanes];
  std::deque<BulkStore> stores[kLanes];
  // for wgmma: until which group of its warp group it has a register, and when other instructions last used that
  uint32_t groups_waited = 0;
  std::vector<uint32_t> in_use, used;
  uint32_t steps = 0, fence = 0;
  // Of global memory: how often it has waited for loads, behind which wait a register has its value, and behind how
  // many a load stays where the compiler moves it up.
  uint32_t waits = 0, held = 0;
  bool behind_barrier = false;
  std::vector<uint32_t> arrives;
  bool watches_registers = false;
  // Whole tiles are loaded for the tensor cores, also rows and columns that a tile does not have and that nobody wrote.
  // Lanes by register whose value came of such bytes: none may reach global memory, an address or a branch.
  std::vector<uint32_t> undefined;
  bool any_undefined = false;
  uint32_t operands_undefined = 0;  // of the instruction that runs

  const uint64_t* lanes(const Operand& o) const;
  uint64_t* lanes(int slot) { return &registers[static_cast<size_t>(slot) * kLanes]; }
  uint64_t value(const Operand& o, int lane) const { return lanes(o)[lane] ^ (o.negated ? 1 : 0); }
  uint64_t address(const Operand& o, int lane) const { return lanes(o)[lane] + static_cast<uint64_t>(o.offset); }
  void block_lanes(uint32_t which, State state);
  void release(uint32_t which);  // they go on where they are
  void advance(uint32_t which);
  uint32_t at(int place, State state) const;  // lanes
};

struct NamedBarrier {
  uint32_t expected = 0, arrived = 0;
  bool all = true, any = false;
  Known known, fenced;
  std::vector<std::pair<Warp*, uint32_t>> waiting;  // and what a bar.red of theirs writes
  const Instruction* reduction = nullptr;
};

struct Mbarrier {
  uint32_t expected = 0, pending = 0, completed = 0;  // arrivals of a phase; phases
  int64_t bytes = 0;                                  // that are still to come
  int agent = 0;
  Known known, fenced;
  Stamp initialised = 0;
};

struct Multiply {  // wgmma.mma_async
  const Instruction* instruction;
  uint64_t left, right;
  bool accumulate;
};

struct WarpGroup {
  std::vector<Multiply> open;
  std::deque<std::vector<Multiply>> closed;
  uint32_t committed = 0, performed = 0;
  int agent = 0;
};

struct Block {
  Cluster* cluster;
  uint32_t rank;
  uint32_t id[3];
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  std::vector<Warp> warps;
  std::vector<WarpGroup> groups;
  NamedBarrier barriers[16];
  uint32_t waits = 0;  // of the warps that came to a barrier, the most
  std::map<uint32_t, Mbarrier> mbarriers;
};

struct BulkLoad {  // to one block; a multicast is several
  TensorMap map;
  int32_t at[5];
  Block* to;
  uint32_t address, barrier, phase;
  const Warp* by;
  int lane;
  const Instruction* instruction;
};

struct Launch {
  uint32_t grid[3], block[3], cluster[3];
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
  std::mt19937& random;
  uint64_t& steps_left;
  Counts& counts;
  std::vector<uint64_t> executed;  // by place in the code
  uint64_t number = 0;             // from 1
  std::vector<Block> blocks;
  std::vector<BulkLoad> loads;
  std::map<std::tuple<char, int, uint64_t>, int> agents;  // kind, block and which
  std::vector<std::string> agent_names;                   // behind the threads
  uint32_t arrived = 0, phase = 0;                        // at the cluster's barrier
  Known barrier_known, barrier_fenced;

  Cluster(const Kernel& k, const Launch& l, Global& g, std::mt19937& r, uint64_t& steps, Counts& c)
      : kernel(k), launch(l), global(g), random(r), steps_left(steps), counts(c), executed(k.code.size()) {}
  void reset(uint64_t number, uint32_t x, uint32_t y, uint32_t z);
  void run();
  void run(Warp& w, int steps);
  int threads() const { return static_cast<int>(launch.block[0] * launch.block[1] * launch.block[2]); }
  int agent(char kind, const Block& b, uint64_t which, const std::string& name);
  [[noreturn]] void deadlock();
};

// ---- what steps are made of -------------------------------------------------------------------------------------

std::string place(const Warp& w, int lane);
[[noreturn]] void fail(const Warp& w, int lane, const Instruction& i, const std::string& what);

int thread_agent(const Warp& w, int lane);
Observer observer(const Warp& w, int lane, bool async = false);
void check(const Warp& w, int lane, const Instruction& i, const Finding& f, const char* memory, uint64_t address);

// The bytes of shared memory at an address, which may be another block's, checked for bounds and alignment.
struct SharedPlace {
  Block* block;
  uint32_t address;
  unsigned char* bytes;
  Cell* cells;
};
SharedPlace shared_place(const Warp& w, int lane, const Instruction& i, uint64_t address, uint32_t bytes,
                         uint32_t alignment);
Cell* global_place(const Warp& w, int lane, const Instruction& i, uint64_t address, uint32_t bytes, uint32_t alignment,
                   const char* action);

// Waits until all of `needed` are at this instruction; then `lanes` are all that are there.
bool meet(Warp& w, const Instruction& i, uint32_t& lanes, uint32_t needed);

// Another thread will know what this one does now.
void publish(Warp& w, int lane, Known& known, Known& fenced);
void acquire(Warp& w, int lane, const Known& known, const Known& fenced);

Mbarrier& mbarrier_at(const Warp& w, int lane, const Instruction& i, const SharedPlace& p);
void mbarrier_opens(Block& block, uint32_t address);  // where its phase is complete
void cluster_barrier_opens(Cluster& c);
void end_of_thread(Warp& w, int lane, const Instruction& i);
void end_of_cluster(Cluster& c);
void perform(BulkLoad& load);

template <class F>
void for_lanes(uint32_t lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

// The step of an instruction, null where it is of another family; they fill in what their steps need.
Step arithmetic_step(const Instruction& i);
Step memory_step(Instruction& i);
Step matrix_step(Instruction& i);
Step barrier_step(Instruction& i);
Step async_step(Instruction& i);

}  // namespace ptx
