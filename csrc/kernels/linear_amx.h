// Products of float32 matrices on the tile unit (AMX) of x86 CPUs, which multiplies bfloat16 and sums in float32:
//   out[r][c] = sum_d a[r][d] b[c][d] + bias[c]
//
// Every number is the sum of three bfloat16 numbers, x = h + m + l, without a remainder; of the nine partial products
// six are summed, h h + (h m + m h) + (h l + m m + l h). The other three are below 2^-24 of the result's terms, what
// one rounding of float32 loses. (Dekker's splitting; Henry, Tang and Heinecke, arXiv 1904.06376.) Sums begin anew
// after 512 numbers of the depth, which keeps them short.
//
// What an element gives depends on its row of a and its row of b alone, not on the threads or on the other rows.
// Exceptions, for which the caller must take another way: numbers that are not finite, or that bfloat16 rounds to
// infinity; products of matrices whose largest numbers are so small that the parts are lost to flushing (the unit knows
// no subnormal numbers). Beside larger numbers, those below 2^-110 may lose all their bits but eight.
#pragma once
#include <cstdint>

namespace qif {

struct AmxProduct {
  // One stride of each matrix is 1; elements, not bytes.
  const float* a;  // [rows, depth]
  int64_t a_row, a_depth;
  const float* b;  // [columns, depth]
  int64_t b_row, b_depth;
  const float* bias;  // [columns] or null
  float* out;         // [rows, columns], contiguous
  int64_t rows, columns, depth;
};

// Whether this CPU has the unit and the operating system lets this process use it; asks for that at the first call.
bool amx_available();

// All products; false: an exception above, and the results are not to be used. The calling thread keeps up to 24 MB for
// its next call.
bool amx_products(const AmxProduct* products, int64_t count);

}  // namespace qif
