#include <algorithm>
#include <memory>
#include <vector>

#include "common/parallel.h"
#include "kernels/channel_norm_row.h"
#include "kernels/conv3x3.h"
#include "kernels/norm_row.h"
#include "kernels/panel_product.h"
#include "kernels/winograd_transform.h"

namespace qif {
namespace QIF_ISA {

static_assert(kPanel == kPanelWidth);

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Room for transformed inputs and products, in bytes: measured, about twice the second-level cache.
constexpr int64_t kBlockBytes = 2 << 20;
// Enough rows in each matrix product that its weights are not read too often.
constexpr int64_t kFewestTiles = 32;

// A block: `rows` x `columns` tiles of 4x4 pixels of one image, or all tiles of `images` images.
struct Blocks {
  int64_t tiles_y, tiles_x, rows, columns, images;
  int64_t down, across, groups;  // how many blocks there are
  int64_t tiles() const { return images * rows * columns; }
};

static Blocks plan(const Conv3x3& p, int64_t height, int64_t product_width, int64_t element) {
  Blocks b;
  b.tiles_y = divide_up(height, kOut);
  b.tiles_x = divide_up(p.width, kOut);
  const int64_t most = std::max(kFewestTiles, kBlockBytes / (kPoints * element * (p.in_channels + product_width)));
  // Wide rather than high: rows of x are contiguous. Then blocks of nearly equal size.
  b.across = divide_up(b.tiles_x, std::min(b.tiles_x, std::max<int64_t>(16, most / std::max<int64_t>(1, b.tiles_y))));
  b.columns = divide_up(b.tiles_x, b.across);
  b.across = divide_up(b.tiles_x, b.columns);
  b.down = divide_up(b.tiles_y, std::max<int64_t>(1, most / b.columns));
  b.rows = divide_up(b.tiles_y, b.down);
  b.down = divide_up(b.tiles_y, b.rows);
  b.images = b.down * b.across > 1 ? 1 : std::min(p.batch, std::max<int64_t>(1, most / (b.rows * b.columns)));
  b.groups = divide_up(p.batch, b.images);
  return b;
}

// One call: the arrays that its blocks share, and the four steps of a block.
template <class T>
class Convolution {
  using A = Accum<T>;

 public:
  explicit Convolution(const Conv3x3& p)
      : p_(p),
        phases_(p.upsample ? 4 : 1),
        panels_(divide_up(p.out_channels, kPanel)),
        product_width_(phases_ * panels_ * kPanel),
        height_(p.pad_rows ? p.height : p.height - 2),
        affine_(p.in_channels + p.out_channels) {
    if (p.gamma) widen_row(static_cast<const T*>(p.gamma), affine_.data(), p.in_channels);
    if (p.bias) widen_row(static_cast<const T*>(p.bias), affine_.data() + p.in_channels, p.out_channels);
  }

  void run() {
    blocks_ = plan(p_, height_, product_width_, sizeof(A));
    pad_rows_ = blocks_.rows * kOut + 2;
    pad_columns_ = blocks_.columns * kOut + 2;
    // 16 more elements from one point to the next: at a power of two all points would fall into the same cache sets.
    in_plane_ = blocks_.tiles() * p_.in_channels + 16;
    product_plane_ = blocks_.tiles() * product_width_ + 16;
    padded_.reset(new A[blocks_.images * pad_rows_ * pad_columns_ * p_.in_channels]);
    in_.reset(new A[kPoints * in_plane_]);
    products_.reset(new A[kPoints * product_plane_]);
    for (int64_t g = 0; g < blocks_.groups; ++g)
      for (int64_t y = 0; y < blocks_.down; ++y)
        for (int64_t x = 0; x < blocks_.across; ++x) block(g * blocks_.images, y * blocks_.rows, x * blocks_.columns);
  }

 private:
  void block(int64_t image, int64_t tile_y, int64_t tile_x) {
    image_ = image;
    tile_y_ = tile_y;
    tile_x_ = tile_x;
    images_ = std::min(blocks_.images, p_.batch - image);
    rows_ = std::min(blocks_.rows, blocks_.tiles_y - tile_y);
    columns_ = std::min(blocks_.columns, blocks_.tiles_x - tile_x);
    const int64_t tiles = images_ * rows_ * columns_, pixels = tiles * kOut * kOut;
    const int64_t pad_rows = rows_ * kOut + 2;
    parallel_ranges(images_ * pad_rows, pixels * p_.in_channels, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) fill_row(r / pad_rows, r % pad_rows);
    });
    parallel_ranges(tiles, pixels * p_.in_channels, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) transform_tile(t);
    });
    const int64_t jobs = phases_ * panels_;
    parallel_ranges(kPoints * jobs, pixels * p_.in_channels, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) multiply(j / jobs, j % jobs, tiles);
    });
    parallel_ranges(tiles * phases_, pixels * p_.out_channels, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) finish_tile(t / phases_, static_cast<int>(t % phases_));
    });
  }

  A* padded_row(int64_t image, int64_t row) {
    return padded_.get() + (image * pad_rows_ + row) * pad_columns_ * p_.in_channels;
  }

  // A row of the block's pixels with one more on each side, after f, zeros outside of the image.
  void fill_row(int64_t image, int64_t row) {
    const int64_t c = p_.in_channels, y = tile_y_ * kOut - (p_.pad_rows ? 1 : 0) + row, left = tile_x_ * kOut - 1,
                  n = columns_ * kOut + 2;
    A* dst = padded_row(image, row);
    const int64_t first = y < 0 || y >= p_.height ? n : std::max<int64_t>(0, -left);
    const int64_t last = std::max(first, std::min(n, p_.width - left));
    std::fill(dst, dst + first * c, A(0));
    std::fill(dst + last * c, dst + n * c, A(0));
    const T* src = static_cast<const T*>(p_.x) + (((image_ + image) * p_.height + y) * p_.width + left) * c;
    if (!p_.gamma) {
      if (first < last) widen_row(src + first * c, dst + first * c, (last - first) * c);
      return;
    }
    for (int64_t i = first; i < last; ++i)
      channel_norm_row<A>(src + i * c, affine_.data(), static_cast<const A*>(nullptr), dst + i * c, c, true);
  }

  void transform_tile(int64_t t) {
    const int64_t c = p_.in_channels, per_image = rows_ * columns_, within = t % per_image;
    const A* src = padded_row(t / per_image, within / columns_ * kOut) + within % columns_ * kOut * c;
    const int64_t row = pad_columns_ * c;
    A* dst = in_.get() + t * c;
    each<A>(c, [&](auto lane, int64_t i) {
      using V = typename decltype(lane)::type;
      transform_input<V>([&](int y, int x) { return load<V>(src + y * row + x * c + i); },
                         [&](int point, V v) { store(dst + point * in_plane_ + i, v); });
    });
  }

  void multiply(int64_t point, int64_t job, int64_t tiles) {
    if (vanishes(static_cast<int>(point), static_cast<int>(job / panels_))) return;
    const A* packed = static_cast<const A*>(p_.packed) + (point * phases_ * panels_ + job) * p_.in_channels * kPanel;
    panel_product<A>(in_.get() + point * in_plane_, p_.in_channels, packed,
                     products_.get() + point * product_plane_ + job * kPanel, product_width_, tiles);
  }

  // Whether the weights of a phase are zero at a point; nothing is computed or read there.
  bool vanishes(int point, int phase) const {
    if (!p_.upsample) return false;
    return point / kSide == (phase / 2 ? 0 : kSide - 1) || point % kSide == (phase % 2 ? 0 : kSide - 1);
  }

  void finish_tile(int64_t t, int phase) {
    const int64_t per_image = rows_ * columns_, within = t % per_image, n = p_.out_channels;
    const int64_t y0 = (tile_y_ + within / columns_) * kOut, x0 = (tile_x_ + within % columns_) * kOut;
    const int64_t scale = p_.upsample ? 2 : 1, width = p_.width * scale;
    const int64_t rows = std::min<int64_t>(kOut, height_ - y0), columns = std::min<int64_t>(kOut, p_.width - x0);
    const int64_t first =
        ((image_ + t / per_image) * height_ * scale + y0 * scale + phase / 2) * width + x0 * scale + phase % 2;
    const A* products = products_.get() + t * product_width_ + phase * panels_ * kPanel;
    const A* bias = p_.bias ? affine_.data() + p_.in_channels : nullptr;
    const T* residual = static_cast<const T*>(p_.residual);
    T* out = static_cast<T*>(p_.out);
    each<A>(n, [&](auto lane, int64_t i) {
      using V = typename decltype(lane)::type;
      transform_output<V>(
          [&](int point) { return vanishes(point, phase) ? V{} : load<V>(products + point * product_plane_ + i); },
          [&](int y, int x, V v) {
            if (y >= rows || x >= columns) return;
            const int64_t at = (first + y * scale * width + x * scale) * n + i;
            if (bias) v += load<V>(bias + i);
            if (residual) v += load<V>(residual + at);
            store(out + at, v);
          });
    });
  }

  const Conv3x3& p_;
  const int64_t phases_, panels_, product_width_, height_;  // height_: of the result, before upsampling
  std::vector<A> affine_;                                   // gamma, then bias
  Blocks blocks_;
  int64_t pad_rows_, pad_columns_, in_plane_, product_plane_;
  std::unique_ptr<A[]> padded_, in_, products_;
  int64_t image_, tile_y_, tile_x_, images_, rows_, columns_;  // the block at work
};

void conv3x3_forward(const Conv3x3& p) { QIF_DISPATCH(p.dtype, T, Convolution<T>(p).run()) }

}  // namespace QIF_ISA
}  // namespace qif
