// PTX text to instructions. What nvcc writes is regular: a statement ends in a semicolon, scopes are braces.
#include <algorithm>
#include <regex>

#include "program.h"

namespace ptx {
namespace {

std::string trim(const std::string& s) {
  const size_t first = s.find_first_not_of(" \t\r\n"), last = s.find_last_not_of(" \t\r\n");
  return first == std::string::npos ? "" : s.substr(first, last - first + 1);
}

// At commas outside of brackets and braces.
std::vector<std::string> split(const std::string& s, char separator = ',') {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (char c : s) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == separator && depth == 0)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  for (std::string& part : parts) part = trim(part);
  if (parts.back().empty()) parts.pop_back();
  return parts;
}

bool is_name(const std::string& s) {
  return !s.empty() && std::all_of(s.begin(), s.end(), [](char c) { return isalnum(c) || c == '_' || c == '$'; });
}

size_t align(size_t n, size_t to) { return (n + to - 1) / to * to; }

struct Declaration {  // .param .align 8 .b8 name[40], and so shared memory
  std::string name;
  size_t alignment, bytes;

  explicit Declaration(const std::string& text) {
    static const std::regex form(
        R"((?:\.align\s+(\d+)\s+)?\.[busf](\d+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d*)\])?)");
    std::smatch m;
    if (!std::regex_search(text, m, form)) throw std::runtime_error("`" + text + "` is not known");
    name = m[3];
    bytes = std::stoul(m[2]) / 8;
    alignment = m[1].matched ? std::stoul(m[1]) : bytes;
    if (m[4].matched) bytes *= m[4].length() ? std::stoul(m[4]) : 0;
  }
};

class Parser {
 public:
  Parser(Kernel& kernel, const std::string& text, size_t entry) : kernel_(kernel), text_(text), scopes_(1) {
    for (const char* name : {"%tid", "%ntid", "%ctaid", "%nctaid", "%cluster_ctaid"})
      for (const char* d : {".x", ".y", ".z"}) declare_register(words(name, d));
    for (const char* name : {"%laneid", "%cluster_ctarank"}) declare_register(name);
    // .extern .shared arrays stand before the kernels: all of them are the dynamic shared memory.
    std::vector<int> dynamic;
    for (size_t at = 0; (at = text.find("\n.extern .shared", at)) != std::string::npos; ++at)
      dynamic.push_back(declare_address(Declaration(text.substr(at, text.find(';', at) - at)).name, 0));
    const size_t open = text.find('(', entry), close = text.find(")\n", open), brace = text.find("\n{", close) + 1;
    size_t offset = 0;
    for (const std::string& p : split(text.substr(open + 1, close - open - 1))) {
      const Declaration d(p);
      offset = align(offset, d.alignment);
      kernel.params.push_back({offset, d.bytes});
      declare_address(d.name, kParamWindow + offset);
      offset += d.bytes;
    }
    line_ = 1 + static_cast<int>(std::count(text.begin(), text.begin() + brace, '\n'));
    body(brace);
    if (!dynamic.empty()) kernel.static_shared = static_cast<uint32_t>(align(kernel.static_shared, 128));
    for (int slot : dynamic) kernel.constants[slot].fill(kSharedWindow + kernel.static_shared);
    for (Instruction& i : kernel.code) finish(i);
  }

 private:
  struct Scope {
    std::map<std::string, Operand> names;               // registers and addresses; of labels, slots in the code
    std::vector<std::pair<size_t, std::string>> jumps;  // from the code to labels
  };

  Kernel& kernel_;
  const std::string& text_;
  std::vector<Scope> scopes_;
  int line_ = 1;

  [[noreturn]] void refuse(int line, const std::string& what) const {
    throw std::runtime_error(words("line ", line, " of ", kernel_.name, ": ", what));
  }

  void declare_register(const std::string& name) {
    scopes_.back().names[name] = {Operand::kRegister, kernel_.registers++};
  }

  int declare_address(const std::string& name, uint64_t address) {
    return (scopes_.back().names[name] = {Operand::kConstant, constant(address)}).slot;
  }

  int constant(uint64_t value) {
    kernel_.constants.emplace_back().fill(value);
    return static_cast<int>(kernel_.constants.size()) - 1;
  }

  void body(size_t at) {
    std::string statement;
    for (int depth = 0;; ++at) {  // of brackets and braces inside of operands
      const char c = text_[at];
      if (c == '\n') ++line_;
      const std::string said = c == '{' || c == '}' || c == ';' || c == ':' ? trim(statement) : "";
      if (c == '/' && text_[at + 1] == '/') {
        at = text_.find('\n', at) - 1;
      } else if (c == '{' && said.empty()) {
        scopes_.emplace_back();
      } else if (c == '}' && said.empty()) {
        close_scope();
        if (scopes_.size() == 1) return;
      } else if (c == ';' && depth == 0) {
        if (!said.empty()) add(said);
        statement.clear();
      } else if (c == ':' && depth == 0 && is_name(said)) {
        scopes_.back().names[said] = {Operand::kNothing, static_cast<int>(kernel_.code.size())};
        statement.clear();
      } else {
        depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        statement += c;
      }
    }
  }

  void close_scope() {
    const Scope closed = std::move(scopes_.back());
    scopes_.pop_back();
    for (const auto& [from, label] : closed.jumps) {
      if (const auto found = closed.names.find(label); found != closed.names.end())
        kernel_.code[from].target = found->second.slot;
      else if (scopes_.size() > 1)
        scopes_.back().jumps.push_back({from, label});
      else
        refuse(kernel_.code[from].line, "no label " + label);
    }
  }

  void add(std::string statement) {
    if (statement.rfind(".reg", 0) == 0) return declare_registers(statement.substr(statement.find_first_of(" \t", 5)));
    if (statement.rfind(".shared", 0) == 0) {
      const Declaration d(statement);
      const size_t offset = align(kernel_.static_shared, d.alignment);
      declare_address(d.name, kSharedWindow + offset);
      kernel_.static_shared = static_cast<uint32_t>(offset + d.bytes);
      return;
    }
    if (statement.rfind(".local", 0) == 0) refuse(line_, "local memory is not modelled");
    if (statement[0] == '.') return;  // .pragma and what only debuggers read
    Instruction i;
    i.line = line_;
    const auto next = [&statement] {  // the first word, which is taken away
      const size_t space = std::min(statement.find_first_of(" \t"), statement.size());
      const std::string word = statement.substr(0, space);
      statement = trim(statement.substr(space));
      return word;
    };
    if (statement[0] == '@') {
      const Operand guard = operand(next().substr(1));
      i.guard = guard.slot;
      i.guard_negated = guard.negated;
    }
    i.name = next();
    i.words = split(i.name, '.');
    if (i.words[0] == "bra")
      scopes_.back().jumps.push_back({kernel_.code.size(), statement});
    else
      for (const std::string& o : split(statement)) i.operands.push_back(operand(o));
    kernel_.code.push_back(std::move(i));
  }

  void declare_registers(const std::string& names) {  // %r<5>, or a name
    for (const std::string& name : split(names)) {
      const size_t angle = name.find('<');
      if (angle == std::string::npos) declare_register(name);
      for (int n = 0; angle != std::string::npos && n < std::stoi(name.substr(angle + 1)); ++n)
        declare_register(words(name.substr(0, angle), n));
    }
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
    if (s[0] == '[') {  // [%rd1+16], or a tensor map with coordinates
      const std::vector<std::string> parts = split(s.substr(1, s.size() - 2));
      const size_t plus = parts[0].find('+');
      o = operand(trim(parts[0].substr(0, plus)));
      if (plus != std::string::npos) o.offset = std::stoll(parts[0].substr(plus + 1));
      if (parts.size() > 1) o.parts = operand(parts[1]).parts;
      return o;
    }
    if (const size_t bar = s.find('|'); bar != std::string::npos) {
      o = operand(s.substr(0, bar));
      o.second = operand(s.substr(bar + 1)).slot;
      return o;
    }
    for (size_t n = scopes_.size(); n-- > 0;)
      if (const auto found = scopes_[n].names.find(s); found != scopes_[n].names.end()) return found->second;
    o.kind = Operand::kConstant;
    if (s[0] == '0' && s.size() > 2 && std::string("fFdD").find(s[1]) != std::string::npos)
      o.slot = constant(std::stoull(s.substr(2), nullptr, 16));  // the bits of a float or a double
    else if (isdigit(s[0]) || s[0] == '-')
      o.slot = constant(s[0] == '-' ? static_cast<uint64_t>(std::stoll(s)) : std::stoull(s, nullptr, 0));
    else
      refuse(line_, "`" + s + "` is not known");
    return o;
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
      refuse(i.line, e.what());
    }
    if (i.guard >= 0) i.reads.push_back(i.guard);
    for (size_t o = 0; o < i.operands.size(); ++o)
      registers_of(i.operands[o], static_cast<int>(o) < i.written ? i.writes : i.reads);
    kernel_.has_wgmma = kernel_.has_wgmma || i.words[0] == "wgmma";
  }
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
