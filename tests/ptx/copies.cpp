// Asynchronous copies: cp.async, and bulk copies of boxes by tensor maps. Each is done as late as the program allows,
// and whoever reads its target before it was waited for reads NaN.
#include "machine.h"

namespace ptx {
namespace {

// What does the asynchronous work of a thread: c, its cp.async; r and s, reads and writes of its bulk stores.
int agent_of_thread(const Warp& w, int lane, char kind) {
  const char* name = kind == 'c' ? "a cp.async of thread " : "a bulk store of thread ";
  return w.block->cluster->agent(kind, *w.block, w.index * kLanes + lane, name);
}

Observer async_observer(const Warp& w, int lane, char kind, uint32_t group) {
  Observer o = observer(w, lane, kind != 'c');
  o.record = stamp(o.cluster, agent_of_thread(w, lane, kind), group);
  return o;
}

// ---- cp.async -------------------------------------------------------------------------------------------------------

void copy_async(Warp& w, int l, const Instruction& i) {
  CopyAsync c;
  c.bytes = static_cast<uint32_t>(w.value(i.operands[2], l));
  c.valid = i.operands.size() > 3 ? static_cast<uint32_t>(w.value(i.operands[3], l)) : c.bytes;
  c.from = w.address(i.operands[1], l);
  c.group = w.thread[l].copy_groups + 1;
  if (c.valid > c.bytes) fail(w, l, i, "more bytes are valid than are copied");
  const Observer o = async_observer(w, l, 'c', c.group);
  if (c.valid) touch(w, l, i, Space::kGlobal, Access::kRead, c.from, c.valid, c.bytes, o);
  const uint64_t to = w.address(i.operands[0], l);
  const Place p = touch(w, l, i, Space::kShared, Access::kWrite, to, c.bytes, c.bytes, o);
  c.to = static_cast<uint32_t>(p.address);
  std::memset(p.data, 0xff, c.bytes);
  w.thread[l].copies.push_back(c);
}

void commit_copies(Warp& w, int l, const Instruction&) { ++w.thread[l].copy_groups; }

void wait_copies(Warp& w, int l, const Instruction& i) {
  Thread& t = w.thread[l];
  const bool all = i.has("wait_all");
  t.copy_groups += all;
  const uint32_t left = all ? 0 : static_cast<uint32_t>(w.value(i.operands[0], l));
  const uint32_t upto = t.copy_groups > left ? t.copy_groups - left : 0;
  finish(t.copies, upto, [&](const CopyAsync& c) {
    unsigned char* to = &w.block->shared[c.to - kSharedWindow];
    std::memset(to, 0, c.bytes);
    if (c.valid) std::memcpy(to, reinterpret_cast<const void*>(c.from), c.valid);
  });
  add(t.order.known, agent_of_thread(w, l, 'c'), upto);
}

// ---- boxes --------------------------------------------------------------------------------------------------------

// The box at the coordinates behind the address of a tensor map, or, for a prefetch, without.
Box box_of(const Warp& w, int lane, const Instruction& i, const Operand& o, bool coordinates = true) {
  const std::vector<unsigned char>& params = w.block->cluster->launch.params;
  const uint64_t address = w.address(o, lane), offset = address - kParamWindow;
  Box box = {};
  if (address >= kParamWindow && offset + sizeof(box.map) <= params.size())
    std::memcpy(&box.map, &params[offset], sizeof(box.map));
  if (box.map.magic != TensorMap::kMagic || address % 64) fail(w, lane, i, "no tensor map is at its address");
  if (coordinates && o.parts.size() != box.map.rank)
    fail(w, lane, i, "the tensor map has ", box.map.rank, " dimensions");
  for (size_t d = 0; d < o.parts.size(); ++d) box.at[d] = static_cast<int32_t>(w.value(o.parts[d], lane));
  return box;
}

void prefetch(Warp& w, int l, const Instruction& i) { box_of(w, l, i, i.operands[0], false); }

void bulk_load(Warp& w, int l, const Instruction& i) {
  Cluster& c = *w.block->cluster;
  const Box box = box_of(w, l, i, i.operands[1]);
  const uint64_t mask = i.has("multicast::cluster") ? w.value(i.operands[3], l) : 1u << w.block->rank;
  if (mask == 0 || mask >> c.blocks.size()) fail(w, l, i, "a copy to blocks that the cluster does not have");
  for (Block& to : c.blocks) {
    if (!(mask >> to.rank & 1)) continue;
    const auto there = [&](const Operand& o) {
      return uint64_t{to.rank + 1} << kRankShift | (w.address(o, l) & ((1u << kRankShift) - 1));
    };
    const Place at = locate(w, l, i, Space::kShared, Access::kRead, there(i.operands[2]), 8, 8);
    const Mbarrier& b = mbarrier_at(w, l, i, at);
    Observer o = observer(w, l, true);
    if (!o.visible(b.initialised))
      fail(w, l, i, "no fence makes the initialisation of the mbarrier visible to the asynchronous proxy");
    o.record = stamp(c.number, b.agent, b.completed + 1);
    const Place p = touch(w, l, i, Space::kShared, Access::kWrite, there(i.operands[0]), box.bytes(), 128, o);
    std::memset(p.data, 0xff, p.bytes);
    box.for_pieces(0, [&](uint32_t, uint32_t, uint32_t n, uint64_t global) {
      if (n) touch(w, l, i, Space::kGlobal, Access::kRead, global, n, box.map.element_bytes, o);
    });
    c.loads.push_back(
        {box, &to, static_cast<uint32_t>(p.address), static_cast<uint32_t>(at.address), b.completed, &w, l, &i});
  }
}

Outcome bulk_store(Warp& w, const Instruction& i, uint32_t& lanes) {
  std::set<std::vector<uint64_t>> issued;  // the machine stores the same box for all lanes of a warp once
  for_lanes(lanes, [&](int l) {
    std::vector<uint64_t> what = {w.address(i.operands[0], l), w.address(i.operands[1], l)};
    for (const Operand& o : i.operands[0].parts) what.push_back(w.value(o, l));
    if (!issued.insert(what).second) return;
    BulkStore s = {w.thread[l].store_groups + 1, 0, box_of(w, l, i, i.operands[0])};
    const Observer reads = async_observer(w, l, 'r', s.group), writes = async_observer(w, l, 's', s.group);
    const Place from = locate(w, l, i, Space::kShared, Access::kRead, what[1], s.box.bytes(), 128);
    s.from = static_cast<uint32_t>(from.address);
    s.box.for_pieces(s.from, [&](uint32_t shared, uint32_t first, uint32_t n, uint64_t global) {
      if (n == 0) return;
      touch(w, l, i, Space::kShared, Access::kRead, shared + first, n, 1, reads);
      touch(w, l, i, Space::kGlobal, Access::kWrite, global, n, s.box.map.element_bytes, writes);
    });
    w.thread[l].stores.push_back(s);
  });
  return Outcome::kNext;
}

void commit_stores(Warp& w, int l, const Instruction&) { ++w.thread[l].store_groups; }

void wait_stores(Warp& w, int l, const Instruction& i) {
  Thread& t = w.thread[l];
  const uint32_t left = static_cast<uint32_t>(w.value(i.operands[0], l));
  const uint32_t upto = t.store_groups > left ? t.store_groups - left : 0;
  finish(t.stores, upto, [&](const BulkStore& s) {
    s.box.for_pieces(s.from, [&](uint32_t shared, uint32_t first, uint32_t n, uint64_t global) {
      std::memcpy(reinterpret_cast<void*>(global), &w.block->shared[shared + first - kSharedWindow], n);
    });
  });
  add(t.order.known, agent_of_thread(w, l, 'r'), upto);
  if (!i.has("read")) add(t.order.known, agent_of_thread(w, l, 's'), upto);
}

}  // namespace

void perform(const BulkLoad& load) {
  Block& to = *load.to;
  if (to.ended()) fail(*load.by, load.lane, *load.instruction, "the copy arrives when its block has ended");
  load.box.for_pieces(load.address, [&](uint32_t shared, uint32_t first, uint32_t n, uint64_t global) {
    unsigned char* data = &to.shared[shared - kSharedWindow];
    std::memset(data, 0, 16);
    std::memcpy(data + first, reinterpret_cast<const void*>(global), n);
  });
  Mbarrier& b = to.mbarriers.at(load.barrier);
  if (b.completed != load.phase)
    fail(*load.by, load.lane, *load.instruction,
         "the copy arrives when the phase of its mbarrier has ended: fewer bytes were expected than come");
  b.bytes -= load.box.bytes();
  mbarrier_opens(to, load.barrier);
}

void end_of_thread(Warp& w, int lane, const Instruction& i) {
  if (!w.thread[lane].copies.empty()) fail(w, lane, i, "the thread ends before its cp.async were waited for");
  if (!w.thread[lane].stores.empty()) fail(w, lane, i, "the thread ends before its bulk stores were waited for");
  const WarpGroup& g = w.block->groups[w.index / 4];
  if (!g.products.empty() || w.groups_waited < g.committed)
    fail(w, lane, i, "the thread ends before its wgmma were waited for");
}

Forms copy_forms() {
  return {{"prefetch.tensormap", each_lane<prefetch>},
          {"cp.async.c[ag].*", each_lane<copy_async>},
          {"cp.async.commit_group", each_lane<commit_copies>},
          {"cp.async.wait_(group|all)", each_lane<wait_copies>},
          {"cp.async.bulk.tensor..d.shared::(cta|cluster).global.mbarrier::complete_tx::bytes.*", each_lane<bulk_load>},
          {"cp.async.bulk.tensor..d.global.shared::cta.bulk_group", bulk_store},
          {"cp.async.bulk.commit_group", each_lane<commit_stores>},
          {"cp.async.bulk.wait_group.*", each_lane<wait_stores>}};
}

}  // namespace ptx
