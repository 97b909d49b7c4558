// The scheduler: warps of a cluster in an order drawn from a seed, asynchronous loads as late as it takes.
#include "machine.h"

#include <cxxabi.h>

#include <algorithm>
#include <regex>

namespace ptx {

// ---- warps --------------------------------------------------------------------------------------------------------

const uint64_t* Warp::lanes(const Operand& o) const {
  if (o.kind == Operand::kConstant) return block->cluster->kernel.constants[o.slot].data();
  return &registers[static_cast<size_t>(o.slot) * kLanes];
}

void Warp::stop(uint32_t which, State state) {
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
  for_lanes(exists, [&](int l) { found |= static_cast<uint32_t>(pc[l] == place && thread[l].state == state) << l; });
  return found;
}

bool meet(Warp& w, uint32_t& lanes, uint32_t needed) {
  const uint32_t here = lanes | w.at(w.pc[__builtin_ctz(lanes)], State::kMeeting);
  if ((here & needed) != (needed & w.exists)) {
    w.stop(lanes, State::kMeeting);
    return false;
  }
  w.release(here);
  lanes = here;
  return true;
}

bool Block::ended() const {
  return std::all_of(warps.begin(), warps.end(), [](const Warp& w) { return w.at(-1, State::kDone) == w.exists; });
}

// ---- words --------------------------------------------------------------------------------------------------------

static std::string place_of(const Warp& w, int lane) {
  return words(w.block->name(), " thread ", w.index * kLanes + lane);
}

static std::string in_kernel(const Kernel& kernel) {
  int status = 0;
  char* name = abi::__cxa_demangle(kernel.name.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? name : kernel.name;
  std::free(name);
  return "; in " + result.substr(0, 200);
}

void fail_with(const Warp& w, int lane, const Instruction& i, const std::string& what) {
  throw std::runtime_error(
      words(place_of(w, lane), ", line ", i.line, ", ", i.name, ": ", what, in_kernel(w.block->cluster->kernel)));
}

static std::string describe(const Cluster& c, Stamp s) {
  if (s == 0) return "";
  if (cluster_of(s) != c.number) return "another cluster of the launch";
  const int agent = agent_of(s), threads = c.threads();
  if (agent >= c.all_threads()) return c.agent_names[agent - c.all_threads()];
  return words("thread ", agent % threads, " of block ", agent / threads, " of the cluster");
}

// ---- knowledge ------------------------------------------------------------------------------------------------------

int thread_agent(const Warp& w, int lane) {
  return static_cast<int>(w.block->rank) * w.block->cluster->threads() + w.index * kLanes + lane;
}

Observer observer(const Warp& w, int lane, bool async) {
  const Cluster& c = *w.block->cluster;
  const Thread& t = w.thread[lane];
  const int self = thread_agent(w, lane);
  return {
      c.number, self, t.order.known.get(), t.order.fenced.get(), async, c.all_threads(), stamp(c.number, self, t.now)};
}

void publish(Warp& w, int lane, Order& order) {
  order.join(w.thread[lane].order);
  add(order.known, thread_agent(w, lane), w.thread[lane].now++);
}

int Cluster::agent(char kind, const Block& b, uint64_t which, const char* name) {
  const auto [entry, added] = agents.insert({{kind, static_cast<int>(b.rank), which}, 0});
  if (added) {
    entry->second = all_threads() + static_cast<int>(agent_names.size());
    agent_names.push_back(words(name, which, " of block ", b.rank, " of the cluster"));
  }
  return entry->second;
}

// ---- places -----------------------------------------------------------------------------------------------------

Place locate(const Warp& w, int lane, const Instruction& i, Space space, Access access, uint64_t address,
             uint32_t bytes, uint32_t alignment) {
  Cluster& c = *w.block->cluster;
  const char* action = access == Access::kRead ? "read" : "write";
  if (space == Space::kParam) {
    std::vector<unsigned char>& params = const_cast<Launch&>(c.launch).params;
    const uint64_t offset = address - kParamWindow;
    if (offset + bytes > params.size()) fail(w, lane, i, "read outside of the parameters");
    return {space, address, &params[offset], nullptr, bytes, w.block};
  }
  if (space == Space::kGlobal) {
    if (address % alignment) fail(w, lane, i, "misaligned ", action, " of ", bytes, " bytes of global memory");
    Cell* cells = c.global.find(address, bytes);
    if (!cells) fail(w, lane, i, action, " of ", bytes, " bytes of global memory outside of every tensor");
    return {space, address, reinterpret_cast<unsigned char*>(address), cells, bytes, w.block};
  }
  Block* b = w.block;
  if (const uint64_t rank = address >> kRankShift) {
    if (rank > c.blocks.size()) fail(w, lane, i, "shared address ", address, " of no block");
    b = &c.blocks[rank - 1];
    address &= (1u << kRankShift) - 1;
  }
  const uint64_t offset = address - kSharedWindow;
  if (address < kSharedWindow || offset + bytes > b->shared.size())
    fail(w, lane, i, bytes, " bytes at shared address ", address, " are outside of the block's ", b->shared.size());
  if (address % alignment) fail(w, lane, i, "misaligned shared address ", address);
  if (b != w.block && b->ended()) fail(w, lane, i, "shared memory of a block that has ended");
  return {space, address, &b->shared[offset], &b->cells[offset], bytes, b};
}

void check(const Warp& w, int lane, const Instruction& i, const Place& p, Access access, const Observer& o) {
  if (!p.cells) return;
  const Finding f = find_fault(p.cells, p.bytes, access, o);
  if (f.fault)
    fail(w, lane, i, std::strstr(f.fault, "nothing orders") ? "race: " : "",
         p.space == Space::kShared ? "shared" : "global", " byte ", p.address + f.byte, " ", f.fault,
         describe(*w.block->cluster, f.other));
}

Place touch(const Warp& w, int lane, const Instruction& i, Space space, Access access, uint64_t address, uint32_t bytes,
            uint32_t alignment, const Observer& o) {
  const Place p = locate(w, lane, i, space, access, address, bytes, alignment);
  check(w, lane, i, p, access, o);
  Counts& counts = w.block->cluster->counts;
  if (space == Space::kGlobal) (access == Access::kRead ? counts.loaded : counts.stored) += bytes;
  return p;
}

// ---- a cluster ------------------------------------------------------------------------------------------------------

static Size place_in(const Size& size, uint32_t n) {
  return {n % size[0], n / size[0] % size[1], n / size[0] / size[1]};
}

void Cluster::reset(uint64_t n, const Size& first) {
  number = n;
  blocks.resize(launch.cluster[0] * launch.cluster[1] * launch.cluster[2]);
  loads.clear();
  agents.clear();
  agent_names.clear();
  arrived = phase = 0;
  order = {};
  const int warps = (threads() + kLanes - 1) / kLanes;
  for (uint32_t r = 0; r < blocks.size(); ++r) {
    Block& b = blocks[r];
    const Size in = place_in(launch.cluster, r);
    std::vector<Warp> before = std::move(b.warps);
    b = {this, r};
    for (int d = 0; d < 3; ++d) b.id[d] = first[d] * launch.cluster[d] + in[d];
    b.shared.assign(kernel.static_shared + launch.dynamic_shared, 0xff);  // NaN
    b.cells.resize(b.shared.size());
    b.groups.resize((warps + 3) / 4);
    b.warps.resize(warps);
    before.resize(warps);
    for (int v = 0; v < warps; ++v) {
      Warp& w = b.warps[v];
      w.block = &b;
      w.index = v;
      w.registers = std::move(before[v].registers);  // whatever is in them
      w.registers.resize(static_cast<size_t>(kernel.registers) * kLanes);
      w.exists = w.running = ~0u >> std::max(0, (v + 1) * kLanes - threads());
      for (auto* of_registers : {&w.undefined, &w.arrives, &w.in_use, &w.used}) of_registers->resize(kernel.registers);
      for (int l = 0; l < kLanes; ++l) {
        const Size thread = place_in(launch.block, v * kLanes + l);
        int special = 0;
        for (const Size& size : {thread, launch.block, b.id, launch.grid, in})
          for (uint32_t value : size) w.lanes(special++)[l] = value;
        w.lanes(kLaneid)[l] = l;
        w.lanes(kClusterCtarank)[l] = r;
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
    for_lanes(w.running, [&](int l) { pc = std::min(pc, w.pc[l]); });
    uint32_t lanes = w.at(pc, State::kRunning);
    const int first = __builtin_ctz(lanes);
    const Instruction& i = kernel.code[pc];
    if (steps_left-- == 0)
      throw std::runtime_error(words("the kernel has not ended within its limit of steps; ", place_of(w, first),
                                     " is at line ", i.line, ", ", i.name, in_kernel(kernel)));
    ++executed[pc];
    ++w.steps;
    count_waits(w, i);
    if (i.guard >= 0) {
      if (w.undefined[i.guard] & lanes)
        fail(w, first, i, "whether it runs depends on shared memory that was never written");
      uint32_t through = 0;
      for_lanes(lanes, [&](int l) { through |= uint32_t{(w.lanes(i.guard)[l] != 0) != i.guard_negated} << l; });
      w.advance(lanes & ~through);
      if (!through) continue;
      lanes = through;
    }
    if (kernel.has_wgmma) watch_registers(w, i);
    if (w.any_undefined && i.words[0] != "mma") spread_undefined(w, i, lanes);
    if (i.step(w, i, lanes) == Outcome::kNext) w.advance(lanes);
  }
}

void Cluster::run() {
  std::vector<Warp*> warps;
  for (Block& b : blocks)
    for (Warp& w : b.warps) warps.push_back(&w);
  for (bool progress = true; progress;) {
    progress = false;
    std::shuffle(warps.begin(), warps.end(), random);
    for (Warp* w : warps) {
      if (!w->running) continue;
      progress = true;
      run(*w, 1 << random() % 10);
    }
    if (!loads.empty() && (!progress || random() % 64 == 0)) {
      std::swap(loads[random() % loads.size()], loads.back());
      const BulkLoad load = loads.back();
      loads.pop_back();
      perform(load);
      progress = true;
    }
  }
  for_threads([&](Warp&, int) { deadlock(); });
  end_of_cluster(*this);
  counts.blocks += blocks.size();
  for (const Block& b : blocks) counts.waits += b.waits;
}

void Cluster::deadlock() {
  std::map<std::tuple<uint32_t, int, int>, int> waiting;  // threads, by block, warp and place
  for_threads([&](Warp& w, int l) { ++waiting[{w.block->rank, w.index, w.pc[l]}]; });
  std::string text = "nothing can go on:";
  int named = 0;
  for (const auto& [where, count] : waiting) {
    const auto [block, warp, pc] = where;
    if (++named <= 12)
      text += words(" warp ", warp, " of block ", block, " (", count, " threads) waits at line ", kernel.code[pc].line,
                    ", ", kernel.code[pc].name, ";");
  }
  text.erase(text.size() - (named <= 12));
  throw std::runtime_error(text + (named > 12 ? " and more" : "") + in_kernel(kernel));
}

void run(const Kernel& kernel, const Launch& launch, Global& global, unsigned seed, uint64_t step_limit,
         Counts& counts) {
  global.new_launch();
  Cluster cluster{kernel, launch, global, counts, step_limit, std::mt19937(seed)};
  cluster.executed.resize(kernel.code.size());
  Size grid;
  for (int d = 0; d < 3; ++d) grid[d] = launch.grid[d] / launch.cluster[d];
  std::vector<uint32_t> order(grid[0] * grid[1] * grid[2]);
  for (uint32_t n = 0; n < order.size(); ++n) order[n] = n;
  std::shuffle(order.begin(), order.end(), cluster.random);
  for (size_t n = 0; n < order.size(); ++n) {
    cluster.reset(n + 1, place_in(grid, order[n]));
    cluster.run();
  }
  for (size_t n = 0; n < kernel.code.size(); ++n) {
    counts.instructions += cluster.executed[n];
    if (cluster.executed[n]) counts.by_name[kernel.code[n].name] += cluster.executed[n];
  }
}

// ---- instructions by name -----------------------------------------------------------------------------------------

void decode(Instruction& i) {
  static const auto families = [] {
    std::vector<std::pair<std::regex, Form>> made;
    for (const Forms& forms : {memory_forms(), barrier_forms(), copy_forms(), matrix_forms()})
      for (const Form& f : forms) made.push_back({std::regex(f.names), f});
    return made;
  }();
  static std::map<std::string, const Form*> known;
  const auto [entry, added] = known.insert({i.name, nullptr});
  if (added)
    for (const auto& [names, form] : families)
      if (!entry->second && std::regex_match(i.name, names)) entry->second = &form;
  const std::string& type = i.words.back();
  if (type.size() > 1 && isdigit(type[1])) i.bytes = std::atoi(type.c_str() + 1) / 8;
  i.count = i.has("v4") ? 4 : i.has("v2") ? 2 : 1;
  i.step = entry->second ? entry->second->step : arithmetic_step(i);
  i.written = entry->second ? entry->second->written : 1;
  if (!i.step) throw std::runtime_error("`" + i.name + "` is not known");
}

}  // namespace ptx
