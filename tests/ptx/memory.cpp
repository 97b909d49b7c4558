#include "memory.h"

#include <algorithm>

namespace ptx {

Known join(const Known& a, const Known& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  static Known last_a, last_b, last;  // neighbouring threads ask the same
  if (a == last_a && b == last_b) return last;
  const size_t common = std::min(a->size(), b->size());
  bool a_more = a->size() > common, b_more = b->size() > common;
  for (size_t i = 0; i < common; ++i) {
    a_more |= (*a)[i] > (*b)[i];
    b_more |= (*b)[i] > (*a)[i];
  }
  if (!b_more) return a;
  if (!a_more) return b;
  auto sum = std::make_shared<std::vector<uint32_t>>(a->size() >= b->size() ? *a : *b);
  for (size_t i = 0; i < common; ++i) (*sum)[i] = std::max((*a)[i], (*b)[i]);
  last_a = a;
  last_b = b;
  return last = sum;
}

void add(Known& known, int agent, uint32_t count) {
  if (count_of(known.get(), agent) >= count) return;
  std::shared_ptr<std::vector<uint32_t>> more;
  if (!known)
    more = std::make_shared<std::vector<uint32_t>>();
  else if (known.use_count() == 1)
    more = std::const_pointer_cast<std::vector<uint32_t>>(known);
  else
    more = std::make_shared<std::vector<uint32_t>>(*known);
  if (more->size() <= static_cast<size_t>(agent)) more->resize(agent + 1);
  (*more)[agent] = count;
  known = more;
}

namespace {

bool same(const Cell& a, const Cell& b) {
  return a.write == b.write && a.read == b.read && a.other_read == b.other_read && a.undefined == b.undefined;
}

// Two readers that nothing orders are remembered, the first and the last.
Fault read_one(Cell& c, const Observer& o) {
  if (c.write == 0) return Fault::kUnwritten;
  if (!o.ordered(c.write)) return Fault::kReadAfterWrite;
  if (o.async && !o.visible(c.write)) return Fault::kProxy;
  if (o.ordered(c.read))
    c.read = o.record;
  else
    c.other_read = o.record;
  return Fault::kNone;
}

Fault write_one(Cell& c, const Observer& o, Stamp& other) {
  other = c.write;
  if (!o.ordered(c.write)) return Fault::kWriteAfterWrite;
  other = o.ordered(c.read) ? c.other_read : c.read;
  if (!o.ordered(other)) return Fault::kWriteAfterRead;
  c = {o.record, 0, 0, false};
  return Fault::kNone;
}

// Neighbouring bytes mostly have the same history.
template <class F>
Finding each(Cell* cells, size_t bytes, F one) {
  Cell before;
  size_t last = bytes;  // the last byte that was looked at
  Finding f;
  for (f.byte = 0; f.byte < bytes; ++f.byte) {
    Cell& c = cells[f.byte];
    if (last < bytes && same(c, before)) {
      c = cells[last];
      continue;
    }
    before = c;
    last = f.byte;
    f.other = c.write;
    f.fault = one(c, f.other);
    if (f) return f;
  }
  return {};
}

}  // namespace

Finding check_read(Cell* cells, size_t bytes, const Observer& o) {
  return each(cells, bytes, [&](Cell& c, Stamp&) { return read_one(c, o); });
}

Finding check_write(Cell* cells, size_t bytes, const Observer& o) {
  return each(cells, bytes, [&](Cell& c, Stamp& other) { return write_one(c, o, other); });
}

void Global::add(uint64_t address, size_t bytes, bool written) {
  if (bytes) ranges_.push_back({address, std::vector<Cell>(bytes, Cell{written ? kBefore : 0, 0, 0, false})});
}

void Global::new_launch() {
  for (Range& r : ranges_)
    for (Cell& c : r.cells) c = {c.write ? kBefore : 0, 0, 0, false};
}

Cell* Global::find(uint64_t address, size_t bytes) {
  for (Range& r : ranges_)
    if (address >= r.address && address + bytes <= r.address + r.cells.size()) {
      Cell* found = &r.cells[address - r.address];
      std::swap(r, ranges_.front());  // the next access is probably near
      return found;
    }
  return nullptr;
}

}  // namespace ptx
