// Bytes, who touched them, and what orders one access before another.
//
// Everything that touches memory is an agent with a count of its own: a thread, or what does asynchronous work: a
// thread's cp.async groups, its bulk groups, a warp group's wgmma groups, the copies that an mbarrier waits for. A
// thread knows of every agent up to which count its accesses lie before what the thread does next; barriers, mbarriers
// and waits pass this knowledge on. An access that the next one does not know of is a race.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace ptx {

using Known = std::shared_ptr<const std::vector<uint32_t>>;  // count by agent; null: nothing

Known join(const Known& a, const Known& b);  // one of the two where it knows all
void add(Known& known, int agent, uint32_t count);
inline uint32_t count_of(const std::vector<uint32_t>* known, int agent) {
  return known && static_cast<size_t>(agent) < known->size() ? (*known)[agent] : 0;
}

struct Order {
  Known known, fenced;  // `fenced`: what is visible to the asynchronous proxy
  void join(const Order& o) {
    known = ptx::join(known, o.known);
    fenced = ptx::join(fenced, o.fenced);
  }
};

// An access: cluster (of the launch, from 1), agent, count. 0 is none, 1 one before the launch.
using Stamp = uint64_t;
constexpr Stamp kBefore = 1;
inline Stamp stamp(uint64_t cluster, int agent, uint32_t count) {
  return cluster << 44 | static_cast<uint64_t>(agent) << 28 | count;
}
inline uint64_t cluster_of(Stamp s) { return s >> 44; }
inline int agent_of(Stamp s) { return static_cast<int>(s >> 28 & 0xffff); }
inline uint32_t count_of(Stamp s) { return static_cast<uint32_t>(s & 0xfffffff); }

struct Cell {  // of a byte
  Stamp write = 0, read = 0, other_read = 0;
  bool undefined = false;  // written, with what came of bytes never written
};

// Who accesses: what it knows, and how its access is recorded. `fenced` is what a thread knows to have been made
// visible to the asynchronous proxy.
struct Observer {
  uint64_t cluster = 0;
  int self = -1;  // an agent whose accesses are always before; -1: none
  const std::vector<uint32_t>*known = nullptr, *fenced = nullptr;
  bool async = false;
  int generic_agents = 0;  // agents below use the generic proxy
  Stamp record = 0;

  bool ordered(Stamp s) const {
    if (cluster_of(s) == 0) return true;
    return cluster_of(s) == cluster && (agent_of(s) == self || count_of(s) <= count_of(known, agent_of(s)));
  }
  bool visible(Stamp s) const {  // a write, to reads by the asynchronous proxy
    return cluster_of(s) == 0 || agent_of(s) >= generic_agents || count_of(s) <= count_of(fenced, agent_of(s));
  }
};

enum class Access { kRead, kWrite };
struct Finding {
  const char* fault = nullptr;  // what is wrong with an access, which ends in the other one; null: nothing
  size_t byte = 0;
  Stamp other = 0;
};
Finding find_fault(Cell* cells, size_t bytes, Access access, const Observer& o);

// Memory of the host that a launch may touch.
class Global {
 public:
  void add(uint64_t address, size_t bytes, bool written);
  void clear() { ranges_.clear(); }
  void new_launch();                           // what was written before is so for everybody
  Cell* find(uint64_t address, size_t bytes);  // null: outside of every range

 private:
  struct Range {
    uint64_t address;
    std::vector<Cell> cells;
  };
  std::vector<Range> ranges_;
};

}  // namespace ptx
