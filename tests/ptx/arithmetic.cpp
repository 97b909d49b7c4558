// Arithmetic, comparisons, conversions and moves: every lane for itself.
#include <cfenv>
#include <cmath>
#include <type_traits>
#include <unordered_map>

#include "machine.h"

namespace ptx {
namespace {

// d = F(a, b, ...), of the types of F's arguments.
template <const auto& F, class... A, size_t... N>
void apply(Warp& w, const Instruction& i, uint32_t lanes, std::index_sequence<N...>) {
  uint64_t* out = w.lanes(i.operands[0].slot);
  const uint64_t* in[] = {w.lanes(i.operands[N + 1])...};
  const uint64_t flip[] = {uint64_t{i.operands[N + 1].negated}...};
  if (lanes == ~0u) {
    for (int l = 0; l < kLanes; ++l) out[l] = pack(F(unpack<A>(in[N][l] ^ flip[N])...));
  } else {
    for_lanes(lanes, [&](int l) { out[l] = pack(F(unpack<A>(in[N][l] ^ flip[N])...)); });
  }
}
template <const auto& F, class... A>
Outcome each(Warp& w, const Instruction& i, uint32_t& lanes) {
  apply<F, A...>(w, i, lanes, std::index_sequence_for<A...>());
  return Outcome::kNext;
}

constexpr auto add = [](auto a, auto b) { return static_cast<decltype(a)>(a + b); };
constexpr auto sub = [](auto a, auto b) { return static_cast<decltype(a)>(a - b); };
constexpr auto mul = [](auto a, auto b) { return static_cast<decltype(a)>(a * b); };
constexpr auto mad = [](auto a, auto b, auto c) { return static_cast<decltype(a)>(a * b + c); };
constexpr auto fma = [](auto a, auto b, auto c) { return std::fma(a, b, c); };
constexpr auto least = [](auto a, auto b) { return b < a || a != a ? b : a; };  // the other where one is NaN
constexpr auto most = [](auto a, auto b) { return a < b || a != a ? b : a; };
constexpr auto bit_and = [](auto a, auto b) { return static_cast<decltype(a)>(a & b); };
constexpr auto bit_or = [](auto a, auto b) { return static_cast<decltype(a)>(a | b); };
constexpr auto bit_xor = [](auto a, auto b) { return static_cast<decltype(a)>(a ^ b); };
constexpr auto bit_not = [](auto a) { return static_cast<decltype(a)>(a ^ static_cast<decltype(a)>(-1)); };
constexpr auto negate = [](auto a) { return static_cast<decltype(a)>(-a); };
constexpr auto absolute = [](float a) { return std::fabs(a); };
constexpr auto keep = [](auto a) { return a; };
constexpr auto select = [](auto a, auto b, bool p) { return p ? a : b; };
constexpr auto left = [](auto a, uint32_t n) { return static_cast<decltype(a)>(n < 8 * sizeof(a) ? a << n : 0); };
constexpr auto right = [](auto a, uint32_t n) {
  if (n >= 8 * sizeof(a)) return static_cast<decltype(a)>(a < 0 ? -1 : 0);
  return static_cast<decltype(a)>(a >> n);
};
constexpr auto wide = [](auto a, auto b) {
  using T = decltype(a);
  using S = std::conditional_t<sizeof(T) == 2, int32_t, std::conditional_t<sizeof(T) == 4, int64_t, __int128>>;
  using U =
      std::conditional_t<sizeof(T) == 2, uint32_t, std::conditional_t<sizeof(T) == 4, uint64_t, unsigned __int128>>;
  using W = std::conditional_t<std::is_signed_v<T>, S, U>;
  return static_cast<W>(static_cast<W>(a) * static_cast<W>(b));
};
constexpr auto high = [](auto a, auto b) { return static_cast<decltype(a)>(wide(a, b) >> 8 * sizeof(a)); };
constexpr auto insert = [](uint32_t a, uint32_t b, uint32_t from, uint32_t count) {
  from &= 0xff, count &= 0xff;
  const uint32_t mask = static_cast<uint32_t>(((uint64_t{1} << std::min(count, 32u)) - 1) << std::min(from, 32u));
  return (b & ~mask) | (static_cast<uint32_t>(uint64_t{a} << std::min(from, 32u)) & mask);
};
constexpr auto permute = [](uint32_t low, uint32_t high, uint32_t selectors) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> 4 * i & 15, byte = bytes >> 8 * (selector & 7) & 255;
    found |= (selector & 8 ? 255 * (byte >> 7) : byte) << 8 * i;
  }
  return found;
};
constexpr auto root = [](float a) { return std::sqrt(a); };
constexpr auto reciprocal = [](float a) { return 1.0f / a; };
constexpr auto quotient = [](float a, float b) { return a / b; };
constexpr auto quotient_approximate = [](float a, float b) {
  return std::fabs(b) > 0x1p126f && std::fabs(b) < INFINITY ? a * 0.0f : a / b;
};
constexpr auto exp2 = [](float a) { return std::exp2(a); };
constexpr auto exp2_flushed = [](float a) { return a < -126.0f ? 0.0f : std::exp2(a); };

__attribute__((noinline)) float round_down(float a, float b, float c) {
  std::fesetround(FE_DOWNWARD);
  volatile float x = a, result = std::fma(x, b, c);
  std::fesetround(FE_TONEAREST);
  return result;
}
constexpr auto fma_down = [](float a, float b, float c) { return round_down(a, b, c); };

template <class To>
constexpr auto to = [](auto a) { return static_cast<To>(a); };
constexpr auto to_bf16 = [](float a) -> uint16_t {
  const uint32_t bits = static_cast<uint32_t>(pack(a));
  return a != a ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
};
constexpr auto saturate = [](float a) { return a > 0.0f ? std::min(a, 1.0f) : 0.0f; };
constexpr auto to_f16_pair = [](float high, float low) {
  return static_cast<uint32_t>(pack(static_cast<_Float16>(high)) << 16 | pack(static_cast<_Float16>(low)));
};
constexpr auto to_bf16_pair = [](float high, float low) {
  return static_cast<uint32_t>(to_bf16(high)) << 16 | to_bf16(low);
};

// To the nearest number of 4 exponent and 3 mantissa bits, ties to even; at most 448.
uint8_t e4m3(float a) {
  const uint8_t sign = std::signbit(a) ? 0x80 : 0;
  if (a != a) return 0x7f;
  const float m = std::fabs(a);
  if (m >= 448.0f) return sign | 0x7e;
  int exponent = m < 0x1p-6f ? -6 : std::ilogb(m);
  const float steps = std::nearbyint(std::ldexp(m, 3 - exponent));  // 8 to 16, or 0 to 8 below 2^-6
  const int n = static_cast<int>(steps);
  return sign | static_cast<uint8_t>(m < 0x1p-6f ? n : (exponent + 7) * 8 + n - 8);
}
constexpr auto to_e4m3_pair = [](float high, float low) -> uint16_t {
  return static_cast<uint16_t>(e4m3(high) << 8 | e4m3(low));
};

constexpr auto eq = [](auto a, auto b) { return a == b; };
constexpr auto ne = [](auto a, auto b) { return a == a && b == b && a != b; };
constexpr auto lt = [](auto a, auto b) { return a < b; };
constexpr auto le = [](auto a, auto b) { return a <= b; };
constexpr auto gt = [](auto a, auto b) { return a > b; };
constexpr auto ge = [](auto a, auto b) { return a >= b; };
constexpr auto leu = [](auto a, auto b) { return !(a > b); };

// A vector of halves into a wider register, and the other way.
void move_vector(Warp& w, int l, const Instruction& i) {
  const bool out = i.operands[0].kind == Operand::kVector;
  const std::vector<Operand>& parts = i.operands[out ? 0 : 1].parts;
  const int bits = 8 * i.bytes / static_cast<int>(parts.size());
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  uint64_t v = out ? w.value(i.operands[1], l) : 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    if (!out) v |= (w.value(parts[p], l) & mask) << bits * p;
    if (out && parts[p].kind == Operand::kRegister) w.lanes(parts[p].slot)[l] = v >> bits * p & mask;
  }
  if (!out) w.lanes(i.operands[0].slot)[l] = v;
}

template <const auto& F, class T>
Outcome divide(Warp& w, const Instruction& i, uint32_t& lanes) {
  for_lanes(lanes, [&](int l) {
    if (unpack<T>(w.value(i.operands[2], l)) == 0) fail(w, l, i, "division by zero");
  });
  return each<F, T, T>(w, i, lanes);
}
constexpr auto whole = [](auto a, auto b) { return static_cast<decltype(a)>(a / b); };
constexpr auto rest = [](auto a, auto b) { return static_cast<decltype(a)>(a % b); };

using Table = std::unordered_map<std::string, Step>;
template <class... Rest>
void put(Table& t, const std::string& type, const char* name, Step step, Rest... rest) {
  t[name + type] = step;
  if constexpr (sizeof...(rest)) put(t, type, rest...);
}

template <class T>
void number(Table& t, const std::string& type) {  // what integers and floats have
  put(t, type, "add.", each<add, T, T>, "sub.", each<sub, T, T>, "min.", each<least, T, T>, "max.", each<most, T, T>,
      "neg.", each<negate, T>, "mov.", each<keep, T>, "selp.", each<select, T, T, bool>, "setp.eq.", each<eq, T, T>,
      "setp.ne.", each<ne, T, T>, "setp.lt.", each<lt, T, T>, "setp.le.", each<le, T, T>, "setp.gt.", each<gt, T, T>,
      "setp.ge.", each<ge, T, T>);
}

template <class T>
void integer(Table& t, const std::string& type) {
  number<T>(t, type);
  put(t, type, "mul.lo.", each<mul, T, T>, "mad.lo.", each<mad, T, T, T>, "shr.", each<right, T, uint32_t>, "div.",
      divide<whole, T>, "rem.", divide<rest, T>, "cvt.u16.", each<to<uint16_t>, T>, "cvt.s16.", each<to<int16_t>, T>,
      "cvt.u32.", each<to<uint32_t>, T>, "cvt.s32.", each<to<int32_t>, T>, "cvt.u64.", each<to<uint64_t>, T>,
      "cvt.s64.", each<to<int64_t>, T>, "cvt.rn.f32.", each<to<float>, T>);
  if constexpr (sizeof(T) < 8) t["mul.wide." + type] = each<wide, T, T>;
  t["mul.hi." + type] = each<high, T, T>;
}

template <class T>
void bits(Table& t, const std::string& type) {
  put(t, type, "and.", each<bit_and, T, T>, "or.", each<bit_or, T, T>, "xor.", each<bit_xor, T, T>, "not.",
      each<bit_not, T>, "mov.", each<keep, T>, "selp.", each<select, T, T, bool>, "setp.eq.", each<eq, T, T>,
      "setp.ne.", each<ne, T, T>);
  if constexpr (!std::is_same_v<T, bool>) t["shl." + type] = each<left, T, uint32_t>;
}

Table make_table() {
  Table t;
  number<float>(t, "f32");
  number<double>(t, "f64");
  integer<int16_t>(t, "s16");
  integer<uint16_t>(t, "u16");
  integer<int32_t>(t, "s32");
  integer<uint32_t>(t, "u32");
  integer<int64_t>(t, "s64");
  integer<uint64_t>(t, "u64");
  bits<bool>(t, "pred");
  bits<uint16_t>(t, "b16");
  bits<uint32_t>(t, "b32");
  bits<uint64_t>(t, "b64");
  put(t, "f32", "mul.rn.", each<mul, float, float>, "add.rn.", each<add, float, float>);
  put(t, "f32", "mul.", each<mul, float, float>, "fma.rn.", each<fma, float, float, float>, "fma.rm.",
      each<fma_down, float, float, float>, "abs.", each<absolute, float>, "sqrt.rn.", each<root, float>, "rcp.rn.",
      each<reciprocal, float>, "div.rn.", each<quotient, float, float>, "div.approx.",
      each<quotient_approximate, float, float>, "ex2.approx.", each<exp2, float>, "ex2.approx.ftz.",
      each<exp2_flushed, float>, "setp.leu.", each<leu, float, float>, "cvt.rn.bf16.", each<to_bf16, float>,
      "cvt.rn.f16.", each<to<_Float16>, float>, "cvt.rn.f16x2.", each<to_f16_pair, float, float>, "cvt.rn.bf16x2.",
      each<to_bf16_pair, float, float>, "cvt.rn.satfinite.e4m3x2.", each<to_e4m3_pair, float, float>, "cvt.sat.f32.",
      each<saturate, float>, "cvt.f64.", each<to<double>, float>);
  put(t, "", "cvt.f32.f16", each<to<float>, _Float16>, "cvt.rn.f32.f64", each<to<float>, double>, "bfi.b32",
      each<insert, uint32_t, uint32_t, uint32_t, uint32_t>, "prmt.b32", each<permute, uint32_t, uint32_t, uint32_t>);
  put(t, ".u64", "cvta.to.global", each<keep, uint64_t>, "cvta.param", each<keep, uint64_t>, "cvta.shared",
      each<keep, uint64_t>, "cvta.to.shared", each<keep, uint64_t>);
  return t;
}

}  // namespace

Step arithmetic_step(const Instruction& i) {
  if (i.words[0] == "mov" && (i.operands[0].kind == Operand::kVector || i.operands[1].kind == Operand::kVector))
    return each_lane<move_vector>;
  static const Table table = make_table();
  const auto found = table.find(i.name);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace ptx
