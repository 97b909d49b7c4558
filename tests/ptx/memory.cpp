#include "memory.h"

#include <algorithm>
#include <tuple>

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
  const auto more = known && known.use_count() == 1
                        ? std::const_pointer_cast<std::vector<uint32_t>>(known)
                        : std::make_shared<std::vector<uint32_t>>(known ? *known : std::vector<uint32_t>());
  if (more->size() <= static_cast<size_t>(agent)) more->resize(agent + 1);
  (*more)[agent] = count;
  known = more;
}

static auto all_of(const Cell& c) { return std::tie(c.write, c.read, c.other_read, c.undefined); }

// Two readers that nothing orders are remembered, the first and the last.
static const char* read(Cell& c, const Observer& o) {
  if (c.write == 0) return "is read, but was never written";
  if (!o.ordered(c.write)) return "is read, and nothing orders that after its write by ";
  if (o.async && !o.visible(c.write))
    return "is read by the asynchronous proxy, but no fence.proxy.async follows its write by ";
  (o.ordered(c.read) ? c.read : c.other_read) = o.record;
  return nullptr;
}

static const char* write(Cell& c, const Observer& o, Stamp& other) {
  if (!o.ordered(c.write)) return "is written, and nothing orders that after its write by ";
  other = o.ordered(c.read) ? c.other_read : c.read;
  if (!o.ordered(other)) return "is written, and nothing orders that after its read by ";
  c = {o.record, 0, 0, false};
  return nullptr;
}

Finding find_fault(Cell* cells, size_t bytes, Access access, const Observer& o) {
  Cell before;  // neighbouring bytes mostly have the same history
  Cell* last = nullptr;
  for (Cell* c = cells; c != cells + bytes; ++c) {
    if (last && all_of(*c) == all_of(before)) {
      *c = *last;
      continue;
    }
    before = *c;
    last = c;
    Finding f = {nullptr, static_cast<size_t>(c - cells), c->write};
    f.fault = access == Access::kRead ? read(*c, o) : write(*c, o, f.other);
    if (f.fault) return f;
  }
  return {};
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
