// A kernel as read from PTX text: instructions whose operands are numbers of registers or constants.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
// Where addresses of a kernel lie: parameters and shared memory have windows of their own, anything else is global and
// the host's. An address in the shared memory of another block of the cluster carries its rank + 1 in the top byte.
constexpr uint64_t kParamWindow = 1 << 16, kSharedWindow = 1024;
constexpr uint32_t kSharedLimit = 227 * 1024, kRankShift = 24;

struct Warp;
struct Instruction;
enum class Outcome { kNext, kJumped, kBlocked };
// One instruction for the lanes of `lanes`, all at the same place; a step may add lanes that waited there for these.
using Step = Outcome (*)(Warp& warp, const Instruction& i, uint32_t& lanes);

struct Operand {
  enum Kind { kNothing, kRegister, kConstant, kVector } kind = kNothing;
  int slot = 0;          // of registers or constants
  int second = -1;       // the register behind the bar in %r1|%p1
  int64_t offset = 0;    // of an address
  bool negated = false;  // !%p1
  std::vector<Operand> parts;
  const Operand& part(int n) const { return kind == kVector ? parts[n] : *this; }
};

struct Instruction {
  std::string name;  // with all its modifiers
  std::vector<std::string> words;
  std::vector<Operand> operands;
  int line = 0, guard = -1;  // a predicate
  bool guard_negated = false;
  int target = -1;  // of a branch
  Step step = nullptr;
  int bytes = 0, count = 1;          // of what a load or a store moves: bytes of an element, elements of a vector
  int written = 0;                   // how many operands at the front are results
  std::vector<int> reads, writes;    // registers
  bool has(const char* word) const;  // among `words`
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  int registers = 0;
  std::vector<std::array<uint64_t, kLanes>> constants;
  std::vector<std::pair<size_t, size_t>> params;  // offset, bytes
  uint32_t static_shared = 0;                     // bytes; dynamic shared memory lies behind them
  bool has_wgmma = false;
};

// Registers with fixed numbers, set before a warp starts: %tid, %ntid, %ctaid, %nctaid and %cluster_ctaid, of three
// dimensions each, and these.
enum Special { kLaneid = 15, kClusterCtarank, kSpecials };

// The PTX of one source file.
class Program {
 public:
  // Throws where the text is of a version or for a GPU that is not modelled.
  explicit Program(std::string text);
  bool has(const std::string& kernel) const { return entries_.count(kernel) != 0; }
  const Kernel& kernel(const std::string& name);  // parsed when first asked for

 private:
  std::string text_;
  std::map<std::string, size_t> entries_;
  std::map<std::string, std::unique_ptr<Kernel>> kernels_;
};

// The step of an instruction, whose other fields are filled in as it needs; throws for one that is not known.
void decode(Instruction& i);

template <class... Words>
std::string words(const Words&... w) {
  std::ostringstream text;
  (text << ... << w);
  return text.str();
}

}  // namespace ptx
