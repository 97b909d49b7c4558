// The scheduler: warps of a cluster in an order drawn from a seed, asynchronous loads as late as it takes.
#include "machine.h"

#include <cxxabi.h>

#include <algorithm>

namespace ptx {

// ---- warps --------------------------------------------------------------------------------------------------------

const uint64_t* Warp::lanes(const Operand& o) const {
  if (o.kind == Operand::kConstant) return block->cluster->kernel.constants[o.slot].data();
  return &registers[static_cast<size_t>(o.slot) * kLanes];
}

void Warp::block_lanes(uint32_t which, State state) {
  running &= ~which;
  for_lanes(which, [&](int l) { thread[l].state = state; });
}

void Warp::release(uint32_t which) {
  running |= which;
  for_lanes(which, [&](int l) { thread[l].state = State::kRunning; });
}

void Warp::advance(uint32_t which) {
  for_lanes(which, [&](int l) { ++pc[l]; });
}

uint32_t Warp::at(int place, State state) const {
  uint32_t found = 0;
  for (int l = 0; l < kLanes; ++l)
    if (exists >> l & 1 && pc[l] == place && thread[l].state == state) found |= 1u << l;
  return found;
}

// ---- words --------------------------------------------------------------------------------------------------------

std::string place(const Warp& w, int lane) {
  const Block& b = *w.block;
  return "block (" + std::to_string(b.id[0]) + ", " + std::to_string(b.id[1]) + ", " + std::to_string(b.id[2]) +
         ") thread " + std::to_string(w.index * kLanes + lane);
}

static std::string readable(const std::string& kernel) {
  int status = 0;
  char* name = abi::__cxa_demangle(kernel.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? name : kernel;
  std::free(name);
  return result.substr(0, 200);
}

void fail(const Warp& w, int lane, const Instruction& i, const std::string& what) {
  throw std::runtime_error(place(w, lane) + ", line " + std::to_string(i.line) + ", " + i.name + ": " + what + "; in " +
                           readable(w.block->cluster->kernel.name));
}

// ---- knowledge ------------------------------------------------------------------------------------------------------

int thread_agent(const Warp& w, int lane) {
  return static_cast<int>(w.block->rank) * w.block->cluster->threads() + w.index * kLanes + lane;
}

Observer observer(const Warp& w, int lane, bool async) {
  const Cluster& c = *w.block->cluster;
  const Thread& t = w.thread[lane];
  Observer o;
  o.cluster = c.number;
  o.self = thread_agent(w, lane);
  o.known = t.known.get();
  o.fenced = t.fenced.get();
  o.async = async;
  o.generic_agents = c.threads() * static_cast<int>(c.blocks.size());
  o.record = stamp(c.number, o.self, t.now);
  return o;
}

void publish(Warp& w, int lane, Known& known, Known& fenced) {
  Thread& t = w.thread[lane];
  known = join(known, t.known);
  add(known, thread_agent(w, lane), t.now++);
  fenced = join(fenced, t.fenced);
}

void acquire(Warp& w, int lane, const Known& known, const Known& fenced) {
  w.thread[lane].known = join(w.thread[lane].known, known);
  w.thread[lane].fenced = join(w.thread[lane].fenced, fenced);
}

int Cluster::agent(char kind, const Block& b, uint64_t which, const std::string& name) {
  const auto [entry, added] = agents.insert({{kind, static_cast<int>(b.rank), which}, 0});
  if (added) {
    entry->second = threads() * static_cast<int>(blocks.size()) + static_cast<int>(agent_names.size());
    agent_names.push_back(name + " of block " + std::to_string(b.rank) + " of the cluster");
  }
  return entry->second;
}

static std::string describe(const Cluster& c, Stamp s) {
  if (cluster_of(s) != c.number) return "another cluster of the launch";
  const int agent = agent_of(s), threads = c.threads(), all = threads * static_cast<int>(c.blocks.size());
  if (agent >= all) return c.agent_names[agent - all];
  return "thread " + std::to_string(agent % threads) + " of block " + std::to_string(agent / threads) +
         " of the cluster";
}

void check(const Warp& w, int lane, const Instruction& i, const Finding& f, const char* memory, uint64_t address) {
  if (!f) return;
  const std::string byte = std::string(memory) + " byte " + std::to_string(address + f.byte);
  const std::string other = describe(*w.block->cluster, f.other);
  switch (f.fault) {
    case Fault::kUnwritten:
      fail(w, lane, i, byte + " is read, but was never written");
    case Fault::kReadAfterWrite:
      fail(w, lane, i, "race: " + byte + " is read, and nothing orders that after its write by " + other);
    case Fault::kWriteAfterWrite:
      fail(w, lane, i, "race: " + byte + " is written, and nothing orders that after its write by " + other);
    case Fault::kWriteAfterRead:
      fail(w, lane, i, "race: " + byte + " is written, and nothing orders that after its read by " + other);
    default:
      fail(w, lane, i,
           byte + " is read by the asynchronous proxy, but no fence.proxy.async follows its write by " + other);
  }
}

// ---- places -----------------------------------------------------------------------------------------------------

SharedPlace shared_place(const Warp& w, int lane, const Instruction& i, uint64_t address, uint32_t bytes,
                         uint32_t alignment) {
  Cluster& c = *w.block->cluster;
  Block* b = w.block;
  if (const uint64_t rank = address >> kRankShift) {
    if (rank > c.blocks.size()) fail(w, lane, i, "shared address " + std::to_string(address) + " of no block");
    b = &c.blocks[rank - 1];
    address &= (1u << kRankShift) - 1;
  }
  const uint64_t offset = address - kSharedWindow;
  if (address < kSharedWindow || offset + bytes > b->shared.size())
    fail(w, lane, i,
         std::to_string(bytes) + " bytes at shared address " + std::to_string(address) +
             " are outside of the block's " + std::to_string(b->shared.size()));
  if (address % alignment) fail(w, lane, i, "misaligned shared address " + std::to_string(address));
  if (b != w.block &&
      std::all_of(b->warps.begin(), b->warps.end(), [](const Warp& v) { return v.at(-1, State::kDone) == v.exists; }))
    fail(w, lane, i, "shared memory of a block that has ended");
  return {b, static_cast<uint32_t>(address), &b->shared[offset], &b->cells[offset]};
}

Cell* global_place(const Warp& w, int lane, const Instruction& i, uint64_t address, uint32_t bytes, uint32_t alignment,
                   const char* action) {
  if (address % alignment)
    fail(w, lane, i, std::string("misaligned ") + action + " of " + std::to_string(bytes) + " bytes of global memory");
  Cell* cells = w.block->cluster->global.find(address, bytes);
  if (!cells)
    fail(w, lane, i,
         std::string(action) + " of " + std::to_string(bytes) + " bytes of global memory outside of every tensor");
  return cells;
}

// ---- a cluster ------------------------------------------------------------------------------------------------------

bool meet(Warp& w, const Instruction&, uint32_t& lanes, uint32_t needed) {
  const uint32_t here = lanes | w.at(w.pc[__builtin_ctz(lanes)], State::kMeeting);
  if ((here & needed) != (needed & w.exists)) {
    w.block_lanes(lanes, State::kMeeting);
    return false;
  }
  w.release(here);
  lanes = here;
  return true;
}

void Cluster::reset(uint64_t n, uint32_t x, uint32_t y, uint32_t z) {
  number = n;
  const uint32_t count = launch.cluster[0] * launch.cluster[1] * launch.cluster[2];
  blocks.resize(count);
  loads.clear();
  agents.clear();
  agent_names.clear();
  arrived = phase = 0;
  barrier_known = barrier_fenced = nullptr;
  for (uint32_t r = 0; r < count; ++r) {
    Block& b = blocks[r];
    const uint32_t in[3] = {r % launch.cluster[0], r / launch.cluster[0] % launch.cluster[1],
                            r / launch.cluster[0] / launch.cluster[1]};
    const uint32_t first[3] = {x, y, z};
    b.cluster = this;
    b.rank = r;
    for (int d = 0; d < 3; ++d) b.id[d] = first[d] * launch.cluster[d] + in[d];
    const size_t bytes = kernel.static_shared + launch.dynamic_shared;
    b.shared.assign(bytes, 0xff);  // NaN
    b.cells.assign(bytes, {});
    b.mbarriers.clear();
    for (NamedBarrier& n : b.barriers) n = {};
    b.waits = 0;
    const int warps = (threads() + kLanes - 1) / kLanes;
    b.groups.assign((warps + 3) / 4, {});
    b.warps.resize(warps);
    for (int v = 0; v < warps; ++v) {
      Warp& w = b.warps[v];
      std::vector<uint64_t> registers = std::move(w.registers);
      w = {};
      w.block = &b;
      w.index = v;
      w.registers = std::move(registers);
      w.registers.resize(static_cast<size_t>(kernel.registers) * kLanes);
      const int there = std::min(kLanes, threads() - v * kLanes);
      w.exists = w.running = there == kLanes ? ~0u : (1u << there) - 1;
      w.watches_registers = kernel.has_wgmma;
      w.undefined.assign(kernel.registers, 0);
      w.arrives.assign(kernel.registers, 0);
      if (kernel.has_wgmma) {
        w.in_use.assign(kernel.registers, 0);
        w.used.assign(kernel.registers, 0);
      }
      for (int l = 0; l < kLanes; ++l) {
        const uint32_t t = v * kLanes + l;
        const uint32_t values[kSpecials] = {t % launch.block[0],
                                            t / launch.block[0] % launch.block[1],
                                            t / launch.block[0] / launch.block[1],
                                            launch.block[0],
                                            launch.block[1],
                                            launch.block[2],
                                            b.id[0],
                                            b.id[1],
                                            b.id[2],
                                            launch.grid[0],
                                            launch.grid[1],
                                            launch.grid[2],
                                            static_cast<uint32_t>(l),
                                            r,
                                            in[0],
                                            in[1],
                                            in[2]};
        for (int s = 0; s < kSpecials; ++s) w.lanes(s)[l] = values[s];
      }
    }
  }
}

static void watch_registers(Warp& w, const Instruction& i) {
  if (i.words[0] == "wgmma") return;
  for (const auto* slots : {&i.reads, &i.writes})
    for (int s : *slots) {
      if (w.in_use[s] > w.groups_waited)
        fail(w, __builtin_ctz(w.exists), i, "a register is used before the wgmma that has it was waited for");
      w.used[s] = w.steps;
    }
}

// Warps run ahead of their loads until they need what these bring, and of each other until a barrier. ptxas moves loads
// up as far as their address, the last store, branch or barrier allows.
static void count_waits(Warp& w, const Instruction& i) {
  if (w.behind_barrier) w.held = w.waits = std::max(w.waits, w.block->waits);
  uint32_t operands = 0;
  for (int s : i.reads) operands = std::max(operands, w.arrives[s]);
  w.waits = std::max(w.waits, operands);
  const std::string& word = i.words[0];
  w.behind_barrier = word == "bar";
  if (w.behind_barrier || word == "ret") w.block->waits = std::max(w.block->waits, w.waits);
  if (word == "st" || word == "bra") w.held = w.waits;
  const bool load = word == "ld" && i.words[1] == "global";
  for (int s : i.writes) w.arrives[s] = load ? std::max(w.held, operands) + 1 : operands > w.held ? operands : 0;
}

// What an instruction makes of undefined operands; loads and products of matrices know better.
static void spread_undefined(Warp& w, const Instruction& i, uint32_t lanes) {
  w.operands_undefined = 0;
  for (int s : i.reads) w.operands_undefined |= w.undefined[s] & lanes;
  if (i.written == 0 && w.operands_undefined && i.words[0] != "st")
    fail(w, __builtin_ctz(w.operands_undefined), i, "depends on shared memory that was never written");
  for (int s : i.writes) w.undefined[s] = (w.undefined[s] & ~lanes) | w.operands_undefined;
}

void Cluster::run(Warp& w, int steps) {
  while (steps-- > 0 && w.running) {
    int pc = INT32_MAX;
    for (int l = 0; l < kLanes; ++l)
      if (w.running >> l & 1) pc = std::min(pc, w.pc[l]);
    uint32_t here = 0;
    for (int l = 0; l < kLanes; ++l) here |= static_cast<uint32_t>(w.pc[l] == pc) << l;
    here &= w.running;
    const Instruction& i = kernel.code[pc];
    if (steps_left-- == 0)
      throw std::runtime_error("the kernel has not ended within its limit of steps; " + place(w, __builtin_ctz(here)) +
                               " is at line " + std::to_string(i.line) + ", " + i.name + "; in " +
                               readable(kernel.name));
    ++executed[pc];
    ++w.steps;
    count_waits(w, i);
    uint32_t lanes = here;
    if (i.guard >= 0) {
      const uint64_t* guard = w.lanes(i.guard);
      if (w.undefined[i.guard] & here)
        fail(w, __builtin_ctz(here), i, "whether it runs depends on shared memory that was never written");
      for (int l = 0; l < kLanes; ++l)
        if ((guard[l] != 0) == i.guard_negated) lanes &= ~(1u << l);
      w.advance(here & ~lanes);
      if (!lanes) continue;
    }
    if (w.watches_registers) watch_registers(w, i);
    if (w.any_undefined && i.words[0] != "mma") spread_undefined(w, i, lanes);
    if (i.step(w, i, lanes) == Outcome::kNext) w.advance(lanes);
  }
}

void Cluster::run() {
  std::vector<Warp*> order;
  for (Block& b : blocks)
    for (Warp& w : b.warps) order.push_back(&w);
  for (;;) {
    bool progress = false;
    std::shuffle(order.begin(), order.end(), random);
    for (Warp* w : order) {
      if (!w->running) continue;
      progress = true;
      run(*w, 1 << random() % 10);
    }
    if (!loads.empty() && (!progress || random() % 64 == 0)) {
      std::swap(loads[random() % loads.size()], loads.back());
      BulkLoad load = std::move(loads.back());
      loads.pop_back();
      perform(load);
      continue;
    }
    if (!progress) break;
  }
  for (const Warp* w : order)
    for (int l = 0; l < kLanes; ++l)
      if (w->exists >> l & 1 && w->thread[l].state != State::kDone) deadlock();
  end_of_cluster(*this);
  counts.blocks += blocks.size();
  for (const Block& b : blocks) counts.waits += b.waits;
}

void Cluster::deadlock() {
  std::string text = "nothing can go on:";
  int named = 0;
  for (const Block& b : blocks)
    for (const Warp& w : b.warps) {
      std::map<int, uint32_t> waiting;
      for (int l = 0; l < kLanes; ++l)
        if (w.exists >> l & 1 && w.thread[l].state != State::kDone) waiting[w.pc[l]] |= 1u << l;
      for (const auto& [pc, lanes] : waiting)
        if (++named <= 12)
          text += " warp " + std::to_string(w.index) + " of block " + std::to_string(b.rank) + " (" +
                  std::to_string(__builtin_popcount(lanes)) + " threads) waits at line " +
                  std::to_string(kernel.code[pc].line) + ", " + kernel.code[pc].name + ";";
    }
  throw std::runtime_error(text + (named > 12 ? " and more;" : "") + " in " + readable(kernel.name));
}

void run(const Kernel& kernel, const Launch& launch, Global& global, unsigned seed, uint64_t step_limit,
         Counts& counts) {
  std::mt19937 random(seed);
  global.new_launch();
  Cluster cluster(kernel, launch, global, random, step_limit, counts);
  std::vector<uint32_t> order;
  uint32_t grid[3];
  for (int d = 0; d < 3; ++d) grid[d] = launch.grid[d] / launch.cluster[d];
  for (uint32_t n = 0; n < grid[0] * grid[1] * grid[2]; ++n) order.push_back(n);
  std::shuffle(order.begin(), order.end(), random);
  for (size_t n = 0; n < order.size(); ++n) {
    cluster.reset(n + 1, order[n] % grid[0], order[n] / grid[0] % grid[1], order[n] / grid[0] / grid[1]);
    cluster.run();
  }
  for (size_t n = 0; n < kernel.code.size(); ++n) {
    counts.instructions += cluster.executed[n];
    if (cluster.executed[n]) counts.by_name[kernel.code[n].name] += cluster.executed[n];
  }
}

}  // namespace ptx
