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

void cluster_barrier_opens(Cluster& c);

Outcome leave(Warp& w, const Instruction& i, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) {
    end_of_thread(w, l, i);
    w.pc[l] = -1;
  });
  w.stop(lanes, State::kDone);
  if (w.block->cluster->arrived) cluster_barrier_opens(*w.block->cluster);
  return Outcome::kBlocked;
}

Outcome nothing(Warp&, const Instruction&, uint32_t&) { return Outcome::kNext; }

Outcome nothing_together(Warp& w, const Instruction&, uint32_t& lanes) {
  return meet(w, lanes) ? Outcome::kNext : Outcome::kBlocked;
}

// ---- warps --------------------------------------------------------------------------------------------------------

// The mask that is the last operand names the calling lane and lanes that exist.
bool meet_mask(Warp& w, const Instruction& i, uint32_t& lanes) {
  uint32_t needed = 0;
  for_lanes(lanes, [&](int l) {
    needed = static_cast<uint32_t>(w.value(i.operands.back(), l));
    if (!(needed >> l & 1)) fail(w, l, i, "the mask misses the calling lane");
  });
  return meet(w, lanes, needed);
}

Outcome shuffle(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_mask(w, i, lanes)) return Outcome::kBlocked;
  uint64_t values[kLanes];
  for_lanes(lanes, [&](int l) { values[l] = w.value(i.operands[1], l); });
  for_lanes(lanes, [&](int l) {
    const int b = static_cast<int>(w.value(i.operands[2], l)), c = static_cast<int>(w.value(i.operands[3], l));
    const int segment = c >> 8 & 31;
    int from = i.words[2] == "bfly" ? l ^ b : (l & segment) | (b & ~segment & 31);
    const bool inside = from <= ((l & segment) | (c & 31 & ~segment));
    if (!inside) from = l;
    if (!(lanes >> from & 1)) fail(w, l, i, "the value is taken from lane ", from, ", which is not in the mask");
    w.lanes(i.operands[0].slot)[l] = values[from];
    if (i.operands[0].second >= 0) w.lanes(i.operands[0].second)[l] = inside;
  });
  return Outcome::kNext;
}

Outcome elect(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_mask(w, i, lanes)) return Outcome::kBlocked;
  const int leader = __builtin_ctz(lanes);
  for_lanes(lanes, [&](int l) {
    if (i.operands[0].kind == Operand::kRegister) w.lanes(i.operands[0].slot)[l] = leader;
    if (i.operands[0].second >= 0) w.lanes(i.operands[0].second)[l] = l == leader;
  });
  return Outcome::kNext;
}

Outcome warp_barrier(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet_mask(w, i, lanes)) return Outcome::kBlocked;
  Order order;
  for_lanes(lanes, [&](int l) { publish(w, l, order); });
  for_lanes(lanes, [&](int l) { w.thread[l].order.join(order); });
  return Outcome::kNext;
}

void map_address(Warp& w, int l, const Instruction& i) {
  const uint64_t rank = w.value(i.operands[2], l);
  if (rank >= w.block->cluster->blocks.size()) fail(w, l, i, "the cluster has no block ", rank);
  w.lanes(i.operands[0].slot)[l] = (rank + 1) << kRankShift | w.address(i.operands[1], l);
}

// ---- barriers of a block --------------------------------------------------------------------------------------------

uint32_t one_value(const Warp& w, const Instruction& i, uint32_t lanes, const Operand& o) {
  const uint64_t v = w.value(o, __builtin_ctz(lanes));
  for_lanes(lanes, [&](int l) {
    if (w.value(o, l) != v) fail(w, l, i, "the threads of a warp differ in an operand");
  });
  return static_cast<uint32_t>(v);
}

// bar.sync, bar.arrive and bar.red of a whole warp: operands are the barrier's number and how many threads it is for.
Outcome block_barrier(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, lanes)) return Outcome::kBlocked;
  const size_t reduce = i.has("red");  // a result before the others, a value behind them
  const int lane = __builtin_ctz(lanes);
  const uint32_t number = one_value(w, i, lanes, i.operands[reduce]);
  if (number > 15) fail(w, lane, i, "barrier ", number, " of 16");
  const bool counted = i.operands.size() > 1 + 2 * reduce;
  const uint32_t threads = w.block->cluster->threads(), most = (threads + kLanes - 1) / kLanes * kLanes;
  const uint32_t expected = counted ? one_value(w, i, lanes, i.operands[1 + reduce]) : most;
  NamedBarrier& b = w.block->barriers[number];
  if (expected == 0 || expected % kLanes || expected > most)
    fail(w, lane, i, "barrier ", number, " is for ", expected, " threads, the block has ", threads);
  if (b.arrived && b.expected != expected)
    fail(w, lane, i, "barrier ", number, " is for ", expected, " threads here, for ", b.expected,
         " where other threads wait");
  for (const auto& [other, which] : b.waiting)
    if (other == &w) fail(w, lane, i, "a warp comes to barrier ", number, " twice");
  b.expected = expected;
  b.arrived += kLanes;
  for_lanes(lanes, [&](int l) {
    publish(w, l, b.order);
    const bool p = reduce && w.value(i.operands.back(), l) != 0;
    b.all = b.all && p;
    b.any = b.any || p;
  });
  const bool arrive = i.has("arrive");
  if (!arrive) {
    b.waiting.push_back({&w, lanes});
    w.stop(lanes, State::kBarrier);
  }
  if (b.arrived == expected) {
    for (auto& [waiting, which] : b.waiting) {
      for_lanes(which, [&, w = waiting](int l) {
        w->thread[l].order.join(b.order);
        const Instruction& theirs = w->block->cluster->kernel.code[w->pc[l]];
        if (theirs.has("red")) w->lanes(theirs.operands[0].slot)[l] = theirs.has("and") ? b.all : b.any;
      });
      waiting->advance(which);
      waiting->release(which);
    }
    b = {};
  }
  return arrive ? Outcome::kNext : Outcome::kBlocked;
}

// ---- the barrier of a cluster ---------------------------------------------------------------------------------------

void cluster_barrier_opens(Cluster& c) {
  uint32_t alive = 0;
  c.for_threads([&](Warp&, int) { ++alive; });
  if (c.arrived && c.arrived >= alive) {
    c.arrived = 0;
    ++c.phase;
  }
  c.for_threads([&](Warp& w, int l) {
    Thread& t = w.thread[l];
    if (t.state != State::kClusterBarrier || t.cluster_arrivals > c.phase) return;
    t.cluster_arrived = false;
    t.order.join(c.order);
    w.advance(1u << l);
    w.release(1u << l);
  });
}

Outcome cluster_arrive(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, lanes)) return Outcome::kBlocked;
  Cluster& c = *w.block->cluster;
  for_lanes(lanes, [&](int l) {
    Thread& t = w.thread[l];
    if (t.cluster_arrived) fail(w, l, i, "a thread arrives twice without waiting");
    t.cluster_arrived = true;
    t.cluster_arrivals = c.phase + 1;
    ++c.arrived;
    // A relaxed arrival hands on no more than a fence before it: that mbarriers are there.
    const Known before = c.order.known;
    publish(w, l, c.order);
    if (i.has("relaxed")) c.order.known = before;
  });
  w.advance(lanes);
  cluster_barrier_opens(c);
  return Outcome::kJumped;
}

Outcome cluster_wait(Warp& w, const Instruction& i, uint32_t& lanes) {
  if (!meet(w, lanes)) return Outcome::kBlocked;
  for_lanes(lanes, [&](int l) {
    if (!w.thread[l].cluster_arrived) fail(w, l, i, "a thread waits that has not arrived");
  });
  w.stop(lanes, State::kClusterBarrier);
  cluster_barrier_opens(*w.block->cluster);
  return Outcome::kBlocked;
}

// ---- mbarriers ----------------------------------------------------------------------------------------------------

uint64_t key_of(const Block& b, uint64_t address) { return (uint64_t{b.rank} << 32) | address; }

Place locate_mbarrier(const Warp& w, int l, const Instruction& i, const Operand& o) {
  return locate(w, l, i, Space::kShared, Access::kRead, w.address(o, l), 8, 8);
}

void mbarrier_init(Warp& w, int l, const Instruction& i) {
  const Observer o = observer(w, l);
  const Place p = touch(w, l, i, Space::kShared, Access::kWrite, w.address(i.operands[0], l), 8, 8, o);
  const uint32_t count = static_cast<uint32_t>(w.value(i.operands[1], l));
  if (count == 0 || count >= 1u << 20) fail(w, l, i, "an mbarrier for ", count, " arrivals");
  const auto [entry, added] = p.block->mbarriers.insert({static_cast<uint32_t>(p.address), {}});
  if (!added) fail(w, l, i, "an mbarrier is initialised twice");
  Mbarrier& b = entry->second;
  b.expected = b.pending = count;
  b.agent = w.block->cluster->agent('m', *p.block, p.address, "a bulk copy that the mbarrier waits for at ");
  b.initialised = o.record;
}

void mbarrier_arrive(Warp& w, int l, const Instruction& i) {
  const bool arrives = i.has("arrive");
  const Place p = locate_mbarrier(w, l, i, i.operands[arrives]);
  Mbarrier& b = mbarrier_at(w, l, i, p);
  if (i.has("expect_tx")) b.bytes += static_cast<int64_t>(w.value(i.operands.back(), l) & 0xffffffff);
  if (arrives) {
    if (b.pending == 0) fail(w, l, i, "more arrivals than the mbarrier's ", b.expected);
    --b.pending;
    publish(w, l, b.order);
  }
  mbarrier_opens(*p.block, static_cast<uint32_t>(p.address));
}

// Waits, or says no where the phase has not ended, as the seed will have it.
Outcome mbarrier_wait(Warp& w, const Instruction& i, uint32_t& lanes) {
  const bool early = w.block->cluster->random() % 4 == 0;
  uint32_t waiting = 0;
  for_lanes(lanes, [&](int l) {
    const Place p = locate_mbarrier(w, l, i, i.operands[1]);
    const Mbarrier& b = mbarrier_at(w, l, i, p);
    const bool done = (b.completed & 1) != (w.value(i.operands[2], l) & 1);
    if (done) w.thread[l].order.join(b.order);
    w.lanes(i.operands[0].slot)[l] = done;
    w.thread[l].waits_for = key_of(*p.block, p.address);
    if (!done && !early) waiting |= 1u << l;
  });
  w.advance(lanes & ~waiting);
  w.stop(waiting, State::kMbarrier);
  return Outcome::kJumped;
}

// What the thread knows, and has done, is visible to the asynchronous proxy.
void fence_proxy(Warp& w, int l, const Instruction&) {
  Thread& t = w.thread[l];
  Known own = t.order.known;
  add(own, thread_agent(w, l), t.now++);
  t.order.fenced = join(t.order.fenced, own);
}

}  // namespace

Mbarrier& mbarrier_at(const Warp& w, int lane, const Instruction& i, const Place& p) {
  const auto found = p.block->mbarriers.find(static_cast<uint32_t>(p.address));
  if (found == p.block->mbarriers.end()) fail(w, lane, i, "no mbarrier was initialised at shared address ", p.address);
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
  add(b.order.known, b.agent, b.completed);
  block.cluster->for_threads([&](Warp& w, int l) {
    const Thread& t = w.thread[l];
    if (t.state == State::kMbarrier && t.waits_for == key_of(block, address)) w.release(1u << l);
  });
}

void end_of_cluster(Cluster& c) {
  for (const Block& block : c.blocks)
    for (const auto& [address, b] : block.mbarriers)
      if (b.pending != b.expected || b.bytes)
        throw std::runtime_error(words(block.name(), " ends, and its mbarrier at ", address, " has ",
                                       b.expected - b.pending, " of ", b.expected, " arrivals and waits for ", b.bytes,
                                       " bytes"));
}

Forms barrier_forms() {
  return {{"bra|bra.uni", branch},
          {"ret|exit", leave},
          {"shfl.sync.(bfly|idx).b32", shuffle, 1},
          {"elect.sync", elect, 1},
          {"mapa.*", each_lane<map_address>, 1},
          {"setmaxnreg.*", nothing_together},
          {"bar.warp.sync", warp_barrier},
          {"bar.(sync|arrive)", block_barrier},
          {"bar.red.*", block_barrier, 1},
          {"barrier.cluster.arrive.*", cluster_arrive},
          {"barrier.cluster.wait.*", cluster_wait},
          {"fence.(proxy|mbarrier_init).*", each_lane<fence_proxy>},
          {"fence.*", nothing},
          {"mbarrier.init.*", each_lane<mbarrier_init>},
          {"mbarrier.(arrive|expect_tx).*", each_lane<mbarrier_arrive>},
          {"mbarrier.try_wait.*", mbarrier_wait, 1}};
}

}  // namespace ptx
