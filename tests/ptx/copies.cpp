// Asynchronous copies: cp.async, and bulk copies of boxes by tensor maps. Each is done as late as the program allows,
// and whoever reads its target before it was waited for reads NaN.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

// ---- cp.async -------------------------------------------------------------------------------------------------------

int copy_agent(const Warp& w, int lane) {
  const int thread = w.index * kLanes + lane;
  return w.block->cluster->agent('c', *w.block, thread, "a cp.async of thread " + std::to_string(thread));
}

Outcome copy_async(Warp& w, const Instruction& i, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) {
    CopyAsync c;
    c.bytes = static_cast<uint32_t>(w.value(i.operands[2], l));
    c.valid = i.operands.size() > 3 ? static_cast<uint32_t>(w.value(i.operands[3], l)) : c.bytes;
    c.from = w.address(i.operands[1], l);
    c.group = w.thread[l].copy_groups + 1;
    if (c.valid > c.bytes) fail(w, l, i, "more bytes are valid than are copied");
    const SharedPlace p = shared_place(w, l, i, w.address(i.operands[0], l), c.bytes, c.bytes);
    c.to = p.address;
    Observer o = observer(w, l);
    o.record = stamp(o.cluster, copy_agent(w, l), c.group);
    if (c.valid) {
      Cell* cells = global_place(w, l, i, c.from, c.valid, c.bytes, "read");
      check(w, l, i, check_read(cells, c.valid, o), "global", c.from);
      w.block->cluster->counts.loaded += c.valid;
    }
    check(w, l, i, check_write(p.cells, c.bytes, o), "shared", p.address);
    std::memset(p.bytes, 0xff, c.bytes);
    w.copies[l].push_back(c);
  });
  return Outcome::kNext;
}

void finish_copies(Warp& w, int lane, uint32_t upto) {
  auto& copies = w.copies[lane];
  for (; !copies.empty() && copies.front().group <= upto; copies.pop_front()) {
    const CopyAsync& c = copies.front();
    unsigned char* to = &w.block->shared[c.to - kSharedWindow];
    std::memset(to, 0, c.bytes);
    if (c.valid) std::memcpy(to, reinterpret_cast<const void*>(c.from), c.valid);
  }
  add(w.thread[lane].known, copy_agent(w, lane), upto);
}

Outcome commit_copies(Warp& w, const Instruction&, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) { ++w.thread[l].copy_groups; });
  return Outcome::kNext;
}

Outcome wait_copies(Warp& w, const Instruction& i, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) {
    Thread& t = w.thread[l];
    if (i.has("wait_all")) ++t.copy_groups;
    const uint32_t left = i.has("wait_all") ? 0 : static_cast<uint32_t>(w.value(i.operands[0], l));
    finish_copies(w, l, t.copy_groups > left ? t.copy_groups - left : 0);
  });
  return Outcome::kNext;
}

// ---- boxes --------------------------------------------------------------------------------------------------------

TensorMap map_at(const Warp& w, int lane, const Instruction& i, const Operand& o) {
  const std::vector<unsigned char>& params = w.block->cluster->launch.params;
  const uint64_t address = w.address(o, lane), offset = address - kParamWindow;
  TensorMap m = {};
  if (address >= kParamWindow && offset + sizeof(m) <= params.size()) std::memcpy(&m, &params[offset], sizeof(m));
  if (m.magic != TensorMap::kMagic || address % 64) fail(w, lane, i, "no tensor map is at its address");
  return m;
}

Outcome prefetch(Warp& w, const Instruction& i, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) { map_at(w, l, i, i.operands[0]); });
  return Outcome::kNext;
}

void read_coordinates(const Warp& w, int lane, const Instruction& i, const Operand& o, const TensorMap& m,
                      int32_t (&at)[5]) {
  if (o.parts.size() != m.rank) fail(w, lane, i, "the tensor map has " + std::to_string(m.rank) + " dimensions");
  for (size_t d = 0; d < 5; ++d) at[d] = d < m.rank ? static_cast<int32_t>(w.value(o.parts[d], lane)) : 0;
}

// f(address in shared memory, address in global memory or 0, bytes): pieces that a swizzle leaves whole.
template <class F>
void for_pieces(const TensorMap& m, const int32_t (&at)[5], uint32_t shared, F f) {
  for_rows(m, at, [&](uint32_t offset, uint64_t global, uint32_t bytes) {
    while (bytes) {
      const uint32_t n = std::min(bytes, 16 - offset % 16);
      f(swizzled(shared + offset, m.swizzle), global, n);
      offset += n;
      bytes -= n;
      if (global) global += n;
    }
  });
}

Outcome bulk_load(Warp& w, const Instruction& i, uint32_t& lanes) {
  Cluster& c = *w.block->cluster;
  for_lanes(lanes, [&](int l) {
    BulkLoad load;
    load.map = map_at(w, l, i, i.operands[1]);
    load.by = &w;
    load.lane = l;
    load.instruction = &i;
    read_coordinates(w, l, i, i.operands[1], load.map, load.at);
    const bool multicast = i.has("multicast::cluster");
    const uint64_t mask = multicast ? w.value(i.operands[3], l) : 1u << w.block->rank;
    if (mask == 0 || mask >> c.blocks.size()) fail(w, l, i, "a copy to blocks that the cluster does not have");
    const uint64_t in_block = (uint64_t{1} << kRankShift) - 1, bytes = box_bytes(load.map);
    for (Block& to : c.blocks) {
      if (!(mask >> to.rank & 1)) continue;
      const uint64_t rank = uint64_t{to.rank + 1} << kRankShift;
      const uint64_t address = rank | (w.address(i.operands[0], l) & in_block);
      const SharedPlace p = shared_place(w, l, i, address, static_cast<uint32_t>(bytes), 128);
      const SharedPlace at = shared_place(w, l, i, rank | (w.address(i.operands[2], l) & in_block), 8, 8);
      const Mbarrier& b = mbarrier_at(w, l, i, at);
      Observer o = observer(w, l, true);
      if (!o.visible(b.initialised))
        fail(w, l, i, "no fence makes the initialisation of the mbarrier visible to the asynchronous proxy");
      load.to = &to;
      load.address = p.address;
      load.barrier = at.address;
      load.phase = b.completed;
      o.record = stamp(c.number, b.agent, b.completed + 1);
      check(w, l, i, check_write(p.cells, bytes, o), "shared", p.address);
      std::memset(p.bytes, 0xff, bytes);
      for_rows(load.map, load.at, [&](uint32_t, uint64_t global, uint32_t n) {
        if (!global) return;
        Cell* cells = global_place(w, l, i, global, n, load.map.element_bytes, "read");
        check(w, l, i, check_read(cells, n, o), "global", global);
        c.counts.loaded += n;
      });
      c.loads.push_back(load);
    }
  });
  return Outcome::kNext;
}

int store_agent(const Warp& w, int lane, char kind) {
  const int thread = w.index * kLanes + lane;
  return w.block->cluster->agent(kind, *w.block, thread, "a bulk store of thread " + std::to_string(thread));
}

// Lanes that store the same box from the same place store it once: the machine issues a copy for the warp as a whole.
uint32_t different_stores(const Warp& w, const Instruction& i, uint32_t lanes) {
  uint32_t first = 0;
  for_lanes(lanes, [&](int l) {
    bool repeated = false;
    for_lanes(first, [&](int f) {
      bool same = w.value(i.operands[0], f) == w.value(i.operands[0], l) &&
                  w.value(i.operands[1], f) == w.value(i.operands[1], l);
      for (const Operand& c : i.operands[0].parts) same = same && w.value(c, f) == w.value(c, l);
      repeated = repeated || same;
    });
    if (!repeated) first |= 1u << l;
  });
  return first;
}

Outcome bulk_store(Warp& w, const Instruction& i, uint32_t& lanes) {
  Cluster& c = *w.block->cluster;
  for_lanes(different_stores(w, i, lanes), [&](int l) {
    BulkStore s;
    s.map = map_at(w, l, i, i.operands[0]);
    read_coordinates(w, l, i, i.operands[0], s.map, s.at);
    s.from = shared_place(w, l, i, w.address(i.operands[1], l), box_bytes(s.map), 128).address;
    s.group = w.thread[l].store_groups + 1;
    Observer reads = observer(w, l, true), writes = reads;
    reads.record = stamp(c.number, store_agent(w, l, 'r'), s.group);
    writes.record = stamp(c.number, store_agent(w, l, 's'), s.group);
    for_pieces(s.map, s.at, s.from, [&](uint32_t shared, uint64_t global, uint32_t n) {
      if (!global) return;
      const SharedPlace p = shared_place(w, l, i, shared, n, 1);
      check(w, l, i, check_read(p.cells, n, reads), "shared", shared);
      Cell* cells = global_place(w, l, i, global, n, s.map.element_bytes, "write");
      check(w, l, i, check_write(cells, n, writes), "global", global);
      c.counts.stored += n;
    });
    w.stores[l].push_back(s);
  });
  return Outcome::kNext;
}

Outcome commit_stores(Warp& w, const Instruction&, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) { ++w.thread[l].store_groups; });
  return Outcome::kNext;
}

Outcome wait_stores(Warp& w, const Instruction& i, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) {
    Thread& t = w.thread[l];
    const uint32_t left = static_cast<uint32_t>(w.value(i.operands[0], l));
    const uint32_t upto = t.store_groups > left ? t.store_groups - left : 0;
    auto& stores = w.stores[l];
    for (; !stores.empty() && stores.front().group <= upto; stores.pop_front()) {
      const BulkStore& s = stores.front();
      for_pieces(s.map, s.at, s.from, [&](uint32_t shared, uint64_t global, uint32_t n) {
        if (global) std::memcpy(reinterpret_cast<void*>(global), &w.block->shared[shared - kSharedWindow], n);
      });
    }
    add(t.known, store_agent(w, l, 'r'), upto);
    if (!i.has("read")) add(t.known, store_agent(w, l, 's'), upto);
  });
  return Outcome::kNext;
}

}  // namespace

void perform(BulkLoad& load) {
  Block& to = *load.to;
  const bool gone =
      std::all_of(to.warps.begin(), to.warps.end(), [](const Warp& w) { return w.at(-1, State::kDone) == w.exists; });
  if (gone) fail(*load.by, load.lane, *load.instruction, "the copy arrives when its block has ended");
  for_pieces(load.map, load.at, load.address, [&](uint32_t shared, uint64_t global, uint32_t n) {
    unsigned char* bytes = &to.shared[shared - kSharedWindow];
    if (global)
      std::memcpy(bytes, reinterpret_cast<const void*>(global), n);
    else
      std::memset(bytes, 0, n);
  });
  Mbarrier& b = to.mbarriers.at(load.barrier);
  if (b.completed != load.phase)
    fail(*load.by, load.lane, *load.instruction,
         "the copy arrives when the phase of its mbarrier has ended: fewer bytes were expected than come");
  b.bytes -= box_bytes(load.map);
  mbarrier_opens(to, load.barrier);
}

void end_of_thread(Warp& w, int lane, const Instruction& i) {
  if (!w.copies[lane].empty()) fail(w, lane, i, "the thread ends before its cp.async were waited for");
  if (!w.stores[lane].empty()) fail(w, lane, i, "the thread ends before its bulk stores were waited for");
  const WarpGroup& g = w.block->groups[w.index / 4];
  if (!g.open.empty() || w.groups_waited < g.committed)
    fail(w, lane, i, "the thread ends before its wgmma were waited for");
}

Step async_step(Instruction& i) {
  if (i.words[0] == "prefetch" && i.has("tensormap")) return prefetch;
  if (i.words[0] != "cp" || i.words[1] != "async") return nullptr;
  if (i.words[2] == "ca" || i.words[2] == "cg") return copy_async;
  if (i.words[2] == "commit_group") return commit_copies;
  if (i.words[2] == "wait_group" || i.words[2] == "wait_all") return wait_copies;
  if (i.words[2] != "bulk") return nullptr;
  if (i.words[3] == "commit_group") return commit_stores;
  if (i.words[3] == "wait_group") return wait_stores;
  if (i.words[3] != "tensor" || i.has("im2col")) return nullptr;
  return i.has("mbarrier::complete_tx::bytes") ? bulk_load : i.has("bulk_group") ? bulk_store : nullptr;
}

void decode(Instruction& i) {
  const std::string& type = i.words.back();
  if (type.size() > 1 && isdigit(type[1]) && type != "v2" && type != "v4") i.bytes = std::atoi(type.c_str() + 1) / 8;
  for (Step (*table)(Instruction&) : {memory_step, barrier_step, matrix_step, async_step})
    if ((i.step = table(i))) return;
  i.written = 1;
  if (!(i.step = arithmetic_step(i))) throw std::runtime_error("`" + i.name + "` is not known");
}

}  // namespace ptx
