// PTX text to instructions. What nvcc writes is regular: a statement ends in a semicolon, scopes are braces.
#include <algorithm>
#include <cctype>
#include <sstream>

#include "program.h"

namespace ptx {
namespace {

const char* const kSpecialNames[kSpecials] = {
    "%tid.x",   "%tid.y",           "%tid.z",           "%ntid.x",          "%ntid.y",         "%ntid.z",
    "%ctaid.x", "%ctaid.y",         "%ctaid.z",         "%nctaid.x",        "%nctaid.y",       "%nctaid.z",
    "%laneid",  "%cluster_ctarank", "%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_ctaid.z"};

std::string trim(const std::string& s) {
  const size_t first = s.find_first_not_of(" \t\r\n"), last = s.find_last_not_of(" \t\r\n");
  return first == std::string::npos ? "" : s.substr(first, last - first + 1);
}

// At commas outside of brackets and braces.
std::vector<std::string> split(const std::string& s, char separator = ',') {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char c : s) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == separator && depth == 0) {
      parts.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trim(part).empty()) parts.push_back(trim(part));
  return parts;
}

bool is_name(const std::string& s) {
  return !s.empty() && std::all_of(s.begin(), s.end(), [](char c) { return isalnum(c) || c == '_' || c == '$'; });
}

size_t align(size_t n, size_t to) { return (n + to - 1) / to * to; }

int type_bytes(const std::string& type) {  // "b64" -> 8
  const size_t digits = type.find_first_of("0123456789");
  return digits == std::string::npos ? 0 : std::stoi(type.substr(digits)) / 8;
}

class Parser {
 public:
  Parser(Kernel& kernel, const std::string& text, size_t entry) : kernel_(kernel), text_(text) {
    line_ = 1 + static_cast<int>(std::count(text.begin(), text.begin() + entry, '\n'));
    kernel_.registers = kSpecials;
    open_scope();
    for (int i = 0; i < kSpecials; ++i) scopes_.back().registers[kSpecialNames[i]] = i;
    module_shared();
    size_t at = entry;
    params(at);
    body(at);
    for (auto& [index, jump] : jumps_) resolve(kernel_.code[index], jump);
    if (!dynamic_.empty()) {
      kernel_.static_shared = static_cast<uint32_t>(align(kernel_.static_shared, 128));
      for (int slot : dynamic_) kernel_.constants[slot].fill(kSharedWindow + kernel_.static_shared);
    }
    for (Instruction& i : kernel_.code) finish(i);
  }

 private:
  struct Scope {
    int number;
    std::map<std::string, int> registers;
  };
  struct Jump {
    std::vector<int> scopes;
    std::string label;
  };

  Kernel& kernel_;
  const std::string& text_;
  int line_ = 1, scope_count_ = 0;
  std::vector<Scope> scopes_;
  std::map<std::pair<int, std::string>, int> labels_;
  std::vector<std::pair<size_t, Jump>> jumps_;
  std::map<std::string, int> symbols_;  // constants
  std::vector<int> dynamic_;            // constants that are the start of dynamic shared memory

  void open_scope() { scopes_.push_back({scope_count_++, {}}); }

  int constant(uint64_t value) {
    kernel_.constants.emplace_back();
    kernel_.constants.back().fill(value);
    return static_cast<int>(kernel_.constants.size()) - 1;
  }

  // .extern .shared arrays stand before the kernels: all of them are the dynamic shared memory.
  void module_shared() {
    for (size_t at = 0; (at = text_.find("\n.extern .shared", at)) != std::string::npos; ++at) {
      const std::string declaration = text_.substr(at, text_.find(';', at) - at);
      const size_t bracket = declaration.find('['), name = declaration.rfind(' ', bracket) + 1;
      dynamic_.push_back(symbols_[declaration.substr(name, bracket - name)] = constant(0));
    }
  }

  void params(size_t& at) {
    const size_t open = text_.find('(', at), close = text_.find(")\n", open);
    size_t offset = 0;
    for (const std::string& p : split(text_.substr(open + 1, close - open - 1))) {
      std::istringstream words(p);
      std::string word, name;
      size_t alignment = 0, bytes = 0;
      while (words >> word) {
        if (word == ".align")
          words >> alignment;
        else if (word != ".param" && word[0] == '.' && bytes == 0)
          bytes = type_bytes(word);
        else
          name = word;
      }
      if (const size_t bracket = name.find('['); bracket != std::string::npos) {
        bytes = std::stoul(name.substr(bracket + 1));
        name.resize(bracket);
      }
      offset = align(offset, alignment ? alignment : bytes);
      kernel_.params.push_back({offset, bytes});
      symbols_[name] = constant(kParamWindow + offset);
      offset += bytes;
    }
    line_ += static_cast<int>(std::count(text_.begin() + at, text_.begin() + close, '\n'));
    at = close + 1;
    const size_t brace = text_.find("\n{", at) + 1;
    line_ += static_cast<int>(std::count(text_.begin() + at, text_.begin() + brace, '\n'));
    at = brace;
  }

  void body(size_t at) {
    std::string statement;
    int depth = 0, braces = 0;  // inside of operands; of scopes
    for (;; ++at) {
      const char c = text_[at];
      if (c == '\n') ++line_;
      if (c == '/' && text_[at + 1] == '/') {
        at = text_.find('\n', at) - 1;
        continue;
      }
      const bool fresh = depth == 0 && trim(statement).empty();
      if (fresh && c == '{') {
        open_scope();
        ++braces;
      } else if (fresh && c == '}') {
        scopes_.pop_back();
        if (--braces == 0) return;
      } else if (c == ';' && depth == 0) {
        add(trim(statement));
        statement.clear();
      } else if (c == ':' && depth == 0 && is_name(trim(statement))) {
        labels_[{scopes_.back().number, trim(statement)}] = static_cast<int>(kernel_.code.size());
        statement.clear();
      } else {
        depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        statement += c;
      }
    }
  }

  void add(const std::string& statement) {
    if (statement.empty()) return;
    if (statement.rfind(".reg", 0) == 0) return declare_registers(statement);
    if (statement.rfind(".shared", 0) == 0) return declare_shared(statement);
    if (statement.rfind(".local", 0) == 0) throw std::runtime_error(where() + "local memory is not modelled");
    if (statement[0] == '.') return;  // .pragma and what only debuggers read
    Instruction i;
    i.line = line_;
    std::string rest = statement;
    if (rest[0] == '@') {
      const size_t space = rest.find_first_of(" \t");
      const Operand guard = operand(rest.substr(1, space - 1));
      i.guard = guard.slot;
      i.guard_negated = guard.negated;
      rest = trim(rest.substr(space));
    }
    const size_t space = std::min(rest.find_first_of(" \t"), rest.size());
    i.name = rest.substr(0, space);
    i.words = split(i.name, '.');
    rest = trim(rest.substr(space));
    if (i.words[0] == "bra") {
      Jump jump;
      for (const Scope& s : scopes_) jump.scopes.push_back(s.number);
      jump.label = rest;
      jumps_.push_back({kernel_.code.size(), jump});
    } else {
      for (const std::string& o : split(rest)) i.operands.push_back(operand(o));
    }
    kernel_.code.push_back(std::move(i));
  }

  void declare_registers(const std::string& statement) {  // .reg .b32 %r<5>
    std::istringstream words(statement);
    std::string word;
    words >> word >> word;
    std::getline(words, word);
    for (const std::string& name : split(word)) {
      const size_t angle = name.find('<');
      if (angle == std::string::npos) {
        scopes_.back().registers[name] = kernel_.registers++;
        continue;
      }
      const int count = std::stoi(name.substr(angle + 1));
      for (int i = 0; i < count; ++i)
        scopes_.back().registers[name.substr(0, angle) + std::to_string(i)] = kernel_.registers++;
    }
  }

  void declare_shared(const std::string& statement) {  // .shared .align 4 .b8 name[128]
    std::istringstream words(statement);
    std::string word, type, name;
    size_t alignment = 1;
    words >> word >> word >> alignment >> type >> name;
    const size_t bracket = name.find('[');
    size_t bytes = type_bytes(type);
    if (bracket != std::string::npos) bytes *= std::stoul(name.substr(bracket + 1));
    const size_t offset = align(kernel_.static_shared, alignment);
    symbols_[name.substr(0, bracket)] = constant(kSharedWindow + offset);
    kernel_.static_shared = static_cast<uint32_t>(offset + bytes);
  }

  Operand operand(const std::string& s) {
    Operand o;
    if (s == "_") return o;
    if (s[0] == '!') {
      o = operand(s.substr(1));
      o.negated = true;
      return o;
    }
    if (s[0] == '{') {
      o.kind = Operand::kVector;
      for (const std::string& part : split(s.substr(1, s.size() - 2))) o.parts.push_back(operand(part));
      return o;
    }
    if (s[0] == '[') return address(s.substr(1, s.size() - 2));
    if (const size_t bar = s.find('|'); bar != std::string::npos) {
      o = operand(s.substr(0, bar));
      o.second = operand(s.substr(bar + 1)).slot;
      return o;
    }
    for (size_t i = scopes_.size(); i-- > 0;) {
      const auto found = scopes_[i].registers.find(s);
      if (found == scopes_[i].registers.end()) continue;
      o.kind = Operand::kRegister;
      o.slot = found->second;
      return o;
    }
    o.kind = Operand::kConstant;
    if (const auto found = symbols_.find(s); found != symbols_.end())
      o.slot = found->second;
    else if (s[0] == '0' && s.size() > 2 && std::string("fFdD").find(s[1]) != std::string::npos)
      o.slot = constant(std::stoull(s.substr(2), nullptr, 16));  // the bits of a float or a double
    else if (isdigit(s[0]))
      o.slot = constant(std::stoull(s, nullptr, 0));
    else if (s[0] == '-')
      o.slot = constant(static_cast<uint64_t>(std::stoll(s)));
    else
      throw std::runtime_error(where() + "`" + s + "` is not known");
    return o;
  }

  Operand address(const std::string& s) {  // [%rd1+16], or a tensor map with coordinates
    const std::vector<std::string> parts = split(s);
    const size_t plus = parts[0].find('+');
    Operand o = operand(trim(parts[0].substr(0, plus)));
    if (plus != std::string::npos) o.offset = std::stoll(parts[0].substr(plus + 1));
    for (size_t i = 1; i < parts.size(); ++i) o.parts = operand(parts[i]).parts;
    return o;
  }

  void resolve(Instruction& i, const Jump& jump) {
    for (size_t s = jump.scopes.size(); s-- > 0 && i.target < 0;) {
      const auto found = labels_.find({jump.scopes[s], jump.label});
      if (found != labels_.end()) i.target = found->second;
    }
    if (i.target < 0) throw std::runtime_error("line " + std::to_string(i.line) + ": no label " + jump.label);
  }

  static void registers_of(const Operand& o, std::vector<int>& into) {
    if (o.kind == Operand::kRegister) into.push_back(o.slot);
    if (o.second >= 0) into.push_back(o.second);
    for (const Operand& part : o.parts) registers_of(part, into);
  }

  void finish(Instruction& i) {
    try {
      decode(i);
    } catch (const std::exception& e) {
      throw std::runtime_error("line " + std::to_string(i.line) + " of " + kernel_.name + ": " + e.what());
    }
    if (i.guard >= 0) i.reads.push_back(i.guard);
    for (size_t o = 0; o < i.operands.size(); ++o)
      registers_of(i.operands[o], static_cast<int>(o) < i.written ? i.writes : i.reads);
    kernel_.has_wgmma = kernel_.has_wgmma || i.words[0] == "wgmma";
  }

  std::string where() const { return "line " + std::to_string(line_) + " of " + kernel_.name + ": "; }
};

}  // namespace

bool Instruction::has(const char* word) const { return std::find(words.begin(), words.end(), word) != words.end(); }

Program::Program(std::string text) : text_(std::move(text)) {
  const auto directive = [&](const std::string& name) {
    const size_t at = text_.find(name), value = at + name.size();
    return at == std::string::npos ? "none" : trim(text_.substr(value, text_.find('\n', value) - value));
  };
  const std::string version = directive("\n.version "), target = directive("\n.target ");
  if (std::atof(version.c_str()) < 8.0 || std::atof(version.c_str()) >= 10.0)
    throw std::runtime_error("PTX of version " + version + ": versions 8 and 9 are modelled, of CUDA 12 and 13");
  if (target != "sm_80" && target != "sm_90a")
    throw std::runtime_error("PTX for " + target + ": sm_80 and sm_90a are modelled");
  for (size_t at = 0; (at = text_.find(".entry ", at)) != std::string::npos;) {
    at += 7;
    entries_[text_.substr(at, text_.find('(', at) - at)] = at;
  }
}

const Kernel& Program::kernel(const std::string& name) {
  std::unique_ptr<Kernel>& k = kernels_[name];
  if (!k) {
    auto parsed = std::make_unique<Kernel>();
    parsed->name = name;
    Parser(*parsed, text_, entries_.at(name));
    k = std::move(parsed);
  }
  return *k;
}

}  // namespace ptx
