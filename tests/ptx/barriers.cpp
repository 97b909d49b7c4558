// Control flow, what the lanes of a warp do together, and every kind of barrier.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

// ---- control ------------------------------------------------------------------------------------------------------

Outcome branch(Warp& w, const Instruction& i, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) { w.pc[l] = i.target; });
  return Outcome::kJumped;
}

Outcome leave(Warp& w, const Instruction& i, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) { end_of_thread(w, l, i); });
  w.block_lanes(lanes, State::kDone);
  for_lanes(lanes, [&](int l) { w.pc[l] = -1; });
  if (w.block->cluster->arrived) cluster_barrier_opens(*w.block->cluster);
  return Outcome::kBlocked;
}

Outcome nothing(Warp&, const Instruction&, uint32_t&) { return Outcome::kNext; }

Outcome nothing_together(Warp& w, const Instruction& i, uint32_t& lanes) {
  return meet(w, i, lanes, ~0u) ? Outcome::kNext : Outcome::kBlocked;
}

// ---- warps --------------------------------------------------------------------------------------------------------

// The mask that is the last operand names the calling lane and lanes that exist.
bool meet_mask(Warp& w, const Instruction& i, uint32_t& lanes, const Operand& mask) {
  uint32_t needed = 0;
  for_lanes(lanes, [&](int l) {
    needed = static_cast<uint32_t>(w.value(mask, l));
    if (!(needed >> l & 1)) fail(w, l, i, "the mask misses the calling lane");
  });
  return meet(w, i, lanes, needed);
}

Outcome shuffle(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_mask(w, i, lanes, i.operands[4])) return Outcome::kBlocked;
  uint64_t values[kLanes];
  for_lanes(lanes, [&](int l) { values[l] = w.value(i.operands[1], l); });
  for_lanes(lanes, [&](int l) {
    const int b = static_cast<int>(w.value(i.operands[2], l)), c = static_cast<int>(w.value(i.operands[3], l));
    const int segment = c >> 8 & 31, clamp = c & 31, most = (l & segment) | (clamp & ~segment), least = l & segment;
    const std::string& kind = i.words[2];
    int from = kind == "idx" ? least | (b & ~segment & 31) : kind == "bfly" ? l ^ b : kind == "down" ? l + b : l - b;
    const bool inside = kind == "up" ? from >= most : from <= most;
    if (!inside) from = l;
    if (!(lanes >> from & 1))
      fail(w, l, i, "the value is taken from lane " + std::to_string(from) + ", which is not in the mask");
    w.lanes(i.operands[0].slot)[l] = values[from];
    if (i.operands[0].second >= 0) w.lanes(i.operands[0].second)[l] = inside;
  });
  return Outcome::kNext;
}

Outcome elect(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_mask(w, i, lanes, i.operands[1])) return Outcome::kBlocked;
  const int leader = __builtin_ctz(lanes);
  for_lanes(lanes, [&](int l) {
    if (i.operands[0].kind == Operand::kRegister) w.lanes(i.operands[0].slot)[l] = leader;
    if (i.operands[0].second >= 0) w.lanes(i.operands[0].second)[l] = l == leader;
  });
  return Outcome::kNext;
}

Outcome warp_barrier(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_mask(w, i, lanes, i.operands[0])) return Outcome::kBlocked;
  Known known, fenced;
  for_lanes(lanes, [&](int l) { publish(w, l, known, fenced); });
  for_lanes(lanes, [&](int l) { acquire(w, l, known, fenced); });
  return Outcome::kNext;
}

Outcome map_address(Warp& w, const Instruction& i, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) {
    const uint64_t rank = w.value(i.operands[2], l);
    if (rank >= w.block->cluster->blocks.size()) fail(w, l, i, "the cluster has no block " + std::to_string(rank));
    w.lanes(i.operands[0].slot)[l] = (rank + 1) << kRankShift | w.address(i.operands[1], l);
  });
  return Outcome::kNext;
}

// ---- barriers of a block --------------------------------------------------------------------------------------------

uint32_t one_value(const Warp& w, const Instruction& i, uint32_t lanes, const Operand& o) {
  const uint64_t v = w.value(o, __builtin_ctz(lanes));
  for_lanes(lanes, [&](int l) {
    if (w.value(o, l) != v) fail(w, l, i, "the threads of a warp differ in an operand");
  });
  return static_cast<uint32_t>(v);
}

void open(NamedBarrier& b) {
  for (auto& [w, lanes] : b.waiting) {
    for_lanes(lanes, [&, w = w](int l) {
      acquire(*w, l, b.known, b.fenced);
      const Instruction& i = w->block->cluster->kernel.code[w->pc[l]];
      if (i.has("red")) w->lanes(i.operands[0].slot)[l] = i.has("and") ? b.all : b.any;
    });
    w->advance(lanes);
    w->release(lanes);
  }
  b = {};
}

// bar.sync, bar.arrive and bar.red of a whole warp: operands are the barrier's number and how many threads it is for.
Outcome block_barrier(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, i, lanes, ~0u)) return Outcome::kBlocked;
  const bool arrive = i.has("arrive"), reduce = i.has("red");
  const size_t first = reduce ? 1 : 0;
  const uint32_t number = one_value(w, i, lanes, i.operands[first]);
  const int lane = __builtin_ctz(lanes);
  if (number > 15) fail(w, lane, i, "barrier " + std::to_string(number) + " of 16");
  const bool counted = i.operands.size() > first + 1 + (reduce ? 1 : 0);
  const uint32_t threads = w.block->cluster->threads();
  const uint32_t expected =
      counted ? one_value(w, i, lanes, i.operands[first + 1]) : (threads + kLanes - 1) / kLanes * kLanes;
  NamedBarrier& b = w.block->barriers[number];
  const std::string name = "barrier " + std::to_string(number);
  if (expected == 0 || expected % kLanes) fail(w, lane, i, name + " for " + std::to_string(expected) + " threads");
  if (b.arrived && b.expected != expected)
    fail(w, lane, i,
         name + " is for " + std::to_string(expected) + " threads here, for " + std::to_string(b.expected) +
             " where other threads wait");
  if (counted && expected > (threads + kLanes - 1) / kLanes * kLanes)
    fail(w, lane, i,
         name + " is for " + std::to_string(expected) + " threads, the block has " + std::to_string(threads));
  for (const auto& [other, which] : b.waiting)
    if (other == &w) fail(w, lane, i, "a warp comes to " + name + " twice");
  b.expected = expected;
  b.arrived += kLanes;
  for_lanes(lanes, [&](int l) {
    publish(w, l, b.known, b.fenced);
    if (!reduce) return;
    const bool p = w.value(i.operands.back(), l) != 0;
    b.all = b.all && p;
    b.any = b.any || p;
  });
  if (!arrive) {
    b.waiting.push_back({&w, lanes});
    w.block_lanes(lanes, State::kBarrier);
  }
  if (b.arrived == expected) open(b);
  return arrive ? Outcome::kNext : Outcome::kBlocked;
}

// ---- the barrier of a cluster ---------------------------------------------------------------------------------------

Outcome cluster_arrive(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, i, lanes, ~0u)) return Outcome::kBlocked;
  Cluster& c = *w.block->cluster;
  for_lanes(lanes, [&](int l) {
    Thread& t = w.thread[l];
    if (t.cluster_arrived) fail(w, l, i, "a thread arrives twice without waiting");
    t.cluster_arrived = true;
    t.cluster_arrivals = c.phase + 1;
    ++c.arrived;
    Known nothing_known;
    // A relaxed arrival hands on no more than a fence before it: that mbarriers are there.
    publish(w, l, i.has("relaxed") ? nothing_known : c.barrier_known, c.barrier_fenced);
  });
  w.advance(lanes);
  cluster_barrier_opens(c);
  return Outcome::kJumped;
}

Outcome cluster_wait(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, i, lanes, ~0u)) return Outcome::kBlocked;
  for_lanes(lanes, [&](int l) {
    if (!w.thread[l].cluster_arrived) fail(w, l, i, "a thread waits that has not arrived");
  });
  w.block_lanes(lanes, State::kClusterBarrier);
  cluster_barrier_opens(*w.block->cluster);
  return Outcome::kBlocked;
}

// ---- mbarriers ----------------------------------------------------------------------------------------------------

void wake(Cluster& c, uint64_t key) {
  for (Block& b : c.blocks)
    for (Warp& w : b.warps) {
      uint32_t which = 0;
      for (int l = 0; l < kLanes; ++l)
        if (w.exists >> l & 1 && w.thread[l].state == State::kMbarrier && w.thread[l].waits_for == key)
          which |= 1u << l;
      w.release(which);
    }
}

uint64_t key_of(const Block& b, uint32_t address) { return (uint64_t{b.rank} << 32) | address; }

Outcome mbarrier_init(Warp& w, const Instruction& i, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) {
    const SharedPlace p = shared_place(w, l, i, w.address(i.operands[0], l), 8, 8);
    check(w, l, i, check_write(p.cells, 8, observer(w, l)), "shared", p.address);
    const uint32_t count = static_cast<uint32_t>(w.value(i.operands[1], l));
    if (count == 0 || count >= 1u << 20) fail(w, l, i, "an mbarrier for " + std::to_string(count) + " arrivals");
    if (p.block->mbarriers.count(p.address)) fail(w, l, i, "an mbarrier is initialised twice");
    Mbarrier& b = p.block->mbarriers[p.address];
    b.expected = b.pending = count;
    b.agent = w.block->cluster->agent('m', *p.block, p.address,
                                      "a bulk copy that the mbarrier at " + std::to_string(p.address) + " waits for");
    b.initialised = observer(w, l).record;
  });
  return Outcome::kNext;
}

Outcome mbarrier_arrive(Warp& w, const Instruction& i, uint32_t& lanes) {
  const bool arrives = i.has("arrive"), expects = i.has("expect_tx");
  const Operand& where = i.operands[arrives ? 1 : 0];
  for_lanes(lanes, [&](int l) {
    const SharedPlace p = shared_place(w, l, i, w.address(where, l), 8, 8);
    Mbarrier& b = mbarrier_at(w, l, i, p);
    if (expects) b.bytes += static_cast<int64_t>(w.value(i.operands.back(), l) & 0xffffffff);
    if (arrives) {
      if (b.pending == 0) fail(w, l, i, "more arrivals than the mbarrier's " + std::to_string(b.expected));
      --b.pending;
      publish(w, l, b.known, b.fenced);
    }
    mbarrier_opens(*p.block, p.address);
  });
  return Outcome::kNext;
}

// Waits, or says no where the phase has not ended, as the seed will have it.
Outcome mbarrier_wait(Warp& w, const Instruction& i, uint32_t& lanes) {
  Cluster& c = *w.block->cluster;
  const bool early = i.words[1] == "test_wait" || c.random() % 4 == 0;
  uint32_t waiting = 0, through = 0;
  for_lanes(lanes, [&](int l) {
    const SharedPlace p = shared_place(w, l, i, w.address(i.operands[1], l), 8, 8);
    Mbarrier& b = mbarrier_at(w, l, i, p);
    const bool done = (b.completed & 1) != (w.value(i.operands[2], l) & 1);
    if (done) acquire(w, l, b.known, b.fenced);
    if (done || early) {
      w.lanes(i.operands[0].slot)[l] = done;
      through |= 1u << l;
    } else {
      w.thread[l].waits_for = key_of(*p.block, p.address);
      waiting |= 1u << l;
    }
  });
  w.advance(through);
  w.block_lanes(waiting, State::kMbarrier);
  return Outcome::kJumped;
}

// ---- fences -------------------------------------------------------------------------------------------------------

// What the thread knows, and has done, is visible to the asynchronous proxy.
Outcome fence_proxy(Warp& w, const Instruction&, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) {
    Thread& t = w.thread[l];
    Known own = t.known;
    add(own, thread_agent(w, l), t.now++);
    t.fenced = join(t.fenced, own);
  });
  return Outcome::kNext;
}

}  // namespace

Mbarrier& mbarrier_at(const Warp& w, int lane, const Instruction& i, const SharedPlace& p) {
  const auto found = p.block->mbarriers.find(p.address);
  if (found == p.block->mbarriers.end())
    fail(w, lane, i, "no mbarrier was initialised at shared address " + std::to_string(p.address));
  const Observer o = observer(w, lane);
  if (!o.ordered(found->second.initialised) && !o.visible(found->second.initialised))
    fail(w, lane, i, "nothing orders this after the initialisation of the mbarrier");
  return found->second;
}

void mbarrier_opens(Block& block, uint32_t address) {
  Mbarrier& b = block.mbarriers.at(address);
  if (b.pending || b.bytes) return;
  ++b.completed;
  b.pending = b.expected;
  add(b.known, b.agent, b.completed);
  wake(*block.cluster, key_of(block, address));
}

void cluster_barrier_opens(Cluster& c) {
  uint32_t alive = 0;
  for (const Block& b : c.blocks)
    for (const Warp& w : b.warps)
      for (int l = 0; l < kLanes; ++l) alive += w.exists >> l & 1 && w.thread[l].state != State::kDone;
  if (c.arrived && c.arrived >= alive) {
    c.arrived = 0;
    ++c.phase;
  }
  for (Block& b : c.blocks)
    for (Warp& w : b.warps)
      for (int l = 0; l < kLanes; ++l) {
        Thread& t = w.thread[l];
        if (!(w.exists >> l & 1) || t.state != State::kClusterBarrier || t.cluster_arrivals > c.phase) continue;
        t.cluster_arrived = false;
        acquire(w, l, c.barrier_known, c.barrier_fenced);
        w.advance(1u << l);
        w.release(1u << l);
      }
}

void end_of_cluster(Cluster& c) {
  for (const Block& block : c.blocks)
    for (const auto& [address, b] : block.mbarriers)
      if (b.pending != b.expected || b.bytes)
        throw std::runtime_error("block (" + std::to_string(block.id[0]) + ", " + std::to_string(block.id[1]) + ", " +
                                 std::to_string(block.id[2]) + ") ends, and its mbarrier at " +
                                 std::to_string(address) + " has " + std::to_string(b.expected - b.pending) + " of " +
                                 std::to_string(b.expected) + " arrivals and waits for " + std::to_string(b.bytes) +
                                 " bytes");
}

Step barrier_step(Instruction& i) {
  const std::string& first = i.words[0];
  const std::string second = i.words.size() > 1 ? i.words[1] : "";
  if (first == "bra") return branch;
  if (first == "ret" || first == "exit") return leave;
  i.written =
      first == "shfl" || first == "elect" || first == "mapa" || i.has("red") || i.has("try_wait") || i.has("test_wait");
  if (first == "shfl") return shuffle;
  if (first == "elect") return elect;
  if (first == "mapa") return map_address;
  if (first == "setmaxnreg") return nothing_together;
  if (first == "bar" && second == "warp") return warp_barrier;
  if (first == "bar" && (second == "sync" || second == "arrive" || second == "red")) return block_barrier;
  if (first == "barrier" && second == "cluster") return i.has("arrive") ? cluster_arrive : cluster_wait;
  if (first == "fence" && (second == "proxy" || second == "mbarrier_init")) return fence_proxy;
  if (first == "fence" || first == "membar") return nothing;
  if (first != "mbarrier") return nullptr;
  if (second == "init") return mbarrier_init;
  if (second == "arrive" || second == "expect_tx") return mbarrier_arrive;
  if (second == "try_wait" || second == "test_wait") return mbarrier_wait;
  return nullptr;
}

}  // namespace ptx
