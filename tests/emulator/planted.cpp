// Kernels for the emulator's own tests: right ones, and ones with a planted bug each. The first argument names the
// kernel; what the emulator reports is printed, or the result.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "common/mma.cuh"

using namespace qif::gpu;

static std::vector<float> in(256), out(256);

static void run(void (*kernel)(const float*, float*), dim3 grid, dim3 block, size_t shared = 0) {
  for (int i = 0; i < 256; ++i) in[i] = static_cast<float>(i);
  emulator::ranges.clear();
  for (const auto* v : {&in, &out})
    emulator::ranges.push_back({reinterpret_cast<uintptr_t>(v->data()), v->size() * sizeof(float)});
  launch(kernel, grid, block, shared, nullptr, in.data(), out.data());
}

// Every thread passes its value to the thread opposite; `Barrier` says what lies between write and read.
template <class Barrier>
static void opposite(const float* x, float* y, Barrier barrier) {
  QIF_SHARED(float, tile, 64);
  const int t = threadIdx.x;
  tile[t] = 0.0f;
  __syncthreads();
  tile[t] = load_global(x + t);
  barrier();
  store_global(y + t, static_cast<float>(tile[blockDim.x - 1 - t]));
}

// Two groups of asynchronous copies into two stages of 32 x 4 values; every thread then reads what the thread opposite
// copied into the first. `wait` stands before the read, `between` between two rounds.
template <class Wait, class Between>
static void staged(const float* x, float* y, Wait wait, Between between) {
  QIF_SHARED(float, stages, 256);
  const int t = threadIdx.x;
  for (int i = t; i < 256; i += 32) stages[i] = -1.0f;
  __syncthreads();
  for (int round = 0; round < 2; ++round) {
    copy_async(stages + 4 * t, x + 4 * t, true);
    commit_copies();
    copy_async(stages + 128 + 4 * t, x + 4 * t, t % 2 == 0);
    commit_copies();
    wait();
    for (int i = 0; i < 4; ++i) store_global(y + 4 * t + i, static_cast<float>(stages[4 * (31 - t) + i]));
    if (round == 0) between();
  }
  wait_copies<0>();
  for (int i = 0; i < 4; ++i) store_global(y + 128 + 4 * t + i, static_cast<float>(stages[128 + 4 * t + i]));
}
static void barrier_behind_all() {
  wait_copies<0>();
  __syncthreads();
}

// y[16][8] = A[16][16] B[16][8] on tensor cores, of values that no transposition leaves as they are; `Bug` says which
// fragment is wrong.
enum class Bug { kNone, kLeftTransposed, kRightTransposed, kResultTransposed, kRightOrder };
template <Bug bug, bool RowsOfColumns = false>
static void product(const float*, float* y) {
  QIF_SHARED(uint16_t, a, 256);
  QIF_SHARED(uint16_t, b, 128);  // [16][8], or its transpose [8][16]
  const int l = threadIdx.x;
  auto write = [](Shared<uint16_t> at, int value) {
    at[0] = static_cast<uint16_t>(narrow2(qif::BFloat16{}, static_cast<float>(value), 0.0f));
  };
  for (int i = l; i < 256; i += blockDim.x) write(a + i, (3 * (i / 16) + 5 * (i % 16)) % 11 - 4);
  for (int i = l; i < 128; i += 32) {
    const int k = RowsOfColumns ? i % 16 : i / 8, n = RowsOfColumns ? i / 16 : i % 8;
    write(b + i, (7 * k + 2 * n) % 13 - 5);
  }
  __syncwarp();
  uint32_t fa[4], fb[4];
  load_matrices<bug == Bug::kLeftTransposed>(a + l % 16 * 16 + l / 16 * 8, fa);
  if (RowsOfColumns)
    load_matrices<false>(b + l % 8 * 16 + l / 8 % 2 * 8, fb);
  else
    load_matrices<bug != Bug::kRightTransposed>(b + l % 16 * 8, fb);
  if (bug == Bug::kRightOrder) std::swap(fb[0], fb[1]);
  float c[4] = {};
  multiply_add<qif::BFloat16>(fa, fb[0], fb[1], c);
  for (int i = 0; i < 4; ++i) {
    const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
    store_global(y + (bug == Bug::kResultTransposed ? column * 16 + row : row * 8 + column), c[i]);
  }
}

static const std::map<std::string, void (*)()> kernels = {
    // ---- right ----
    {"barrier", [] { run([](const float* x, float* y) { opposite(x, y, [] { __syncthreads(); }); }, 1, 64); }},
    {"warp_barrier", [] { run([](const float* x, float* y) { opposite(x, y, [] { __syncwarp(); }); }, 1, 32); }},
    {"shuffles",
     [] {
       run(
           [](const float* x, float* y) {
             float v = load_global(x + threadIdx.x);
             v = __shfl_xor_sync(kAllLanes, v, 16) + __shfl_down_sync(kAllLanes, v, 1, 8);
             v += __shfl_sync(kAllLanes, v, 3) + __shfl_up_sync(kAllLanes, v, 2);
             store_global(y + threadIdx.x, v);
           },
           1, 64);
     }},
    {"votes",
     [] {
       run(
           [](const float*, float* y) {
             const unsigned lane = threadIdx.x % 32;
             float v = static_cast<float>(__ballot_sync(kAllLanes, lane < 5));
             if (__any_sync(kAllLanes, lane == 7)) v += 100;
             if (__all_sync(kAllLanes, lane < 32)) v += 1000;
             store_global(y + threadIdx.x, v);
           },
           1, 32);
     }},
    {"half_warp",  // lanes past the end of a block do not exist; the mask may name them
     [] {
       run([](const float* x, float* y) { store_global(y + threadIdx.x, warp_sum<8>(load_global(x + threadIdx.x))); },
           1, 8);
     }},
    {"dynamic",
     [] {
       run(
           [](const float* x, float* y) {
             const Shared<float> tile = dynamic_shared<float>();
             const unsigned t = blockIdx.y * blockDim.x * blockDim.y + threadIdx.y * blockDim.x + threadIdx.x;
             tile[threadIdx.y * blockDim.x + threadIdx.x] = load_global(x + t);
             __syncthreads();
             const Shared<double> pairs = shared_cast<double>(tile);
             const double pair = pairs[threadIdx.y];
             store_global(y + t, emulator::bit_cast<std::pair<float, float>>(pair).second);
           },
           dim3(1, 2), dim3(2, 4), 32);
     }},
    {"block_sum",
     [] {
       run(
           [](const float* x, float* y) {
             QIF_SHARED(float, shared, 4 * kMaxWarps);
             float one[1] = {load_global(x + threadIdx.x)}, two[2] = {1.0f, 2.0f};
             block_sum(one, shared);
             block_sum(two, shared + 2 * kMaxWarps);
             store_global(y + threadIdx.x, one[0] + 100 * two[0] + 1000 * two[1]);
           },
           1, 96);
     }},
    {"async",
     [] { run([](const float* x, float* y) { staged(x, y, barrier_behind_all, barrier_behind_all); }, 1, 32); }},
    {"async_first_group",
     [] {
       run(
           [](const float* x, float* y) {
             staged(
                 x, y,
                 [] {
                   wait_copies<1>();
                   __syncthreads();
                 },
                 barrier_behind_all);
           },
           1, 32);
     }},
    {"product", [] { run(product<Bug::kNone>, 1, 32); }},
    {"product_of_rows", [] { run(product<Bug::kNone, true>, 1, 32); }},
    // ---- planted bugs ----
    {"async_missing_wait",
     [] { run([](const float* x, float* y) { staged(x, y, [] { __syncthreads(); }, barrier_behind_all); }, 1, 32); }},
    {"async_wait_for_the_wrong_group",
     [] {
       run(
           [](const float* x, float* y) {
             staged(
                 x, y,
                 [] {
                   wait_copies<2>();
                   __syncthreads();
                 },
                 barrier_behind_all);
           },
           1, 32);
     }},
    {"async_missing_commit",
     [] {
       run(
           [](const float* x, float* y) {
             QIF_SHARED(float, tile, 4);
             copy_async(tile, x, true);
             wait_copies<0>();
             store_global(y, static_cast<float>(tile[0]));
           },
           1, 1);
     }},
    {"async_missing_barrier",
     [] { run([](const float* x, float* y) { staged(x, y, [] { wait_copies<0>(); }, barrier_behind_all); }, 1, 32); }},
    {"async_stage_reused_too_early",
     [] { run([](const float* x, float* y) { staged(x, y, barrier_behind_all, [] {}); }, 1, 32); }},
    {"async_never_waited",
     [] {
       run(
           [](const float* x, float*) {
             QIF_SHARED(float, tile, 4);
             copy_async(tile, x, true);
             commit_copies();
           },
           1, 1);
     }},
    {"async_misaligned",
     [] {
       run(
           [](const float* x, float*) {
             QIF_SHARED(float, tile, 8);
             copy_async(tile + 1, x, true);
           },
           1, 1);
     }},
    {"product_left_transposed", [] { run(product<Bug::kLeftTransposed>, 1, 32); }},
    {"product_right_transposed", [] { run(product<Bug::kRightTransposed>, 1, 32); }},
    {"product_result_transposed", [] { run(product<Bug::kResultTransposed>, 1, 32); }},
    {"product_right_order", [] { run(product<Bug::kRightOrder>, 1, 32); }},
    {"product_of_half_a_warp", [] { run(product<Bug::kNone>, 1, 16); }},
    {"missing_barrier", [] { run([](const float* x, float* y) { opposite(x, y, [] {}); }, 1, 64); }},
    {"warp_barrier_is_not_enough",
     [] { run([](const float* x, float* y) { opposite(x, y, [] { __syncwarp(); }); }, 1, 64); }},
    {"write_after_read",
     [] {
       run(
           [](const float*, float*) {
             QIF_SHARED(float, tile, 64);
             tile[threadIdx.x] = 1.0f;
             __syncthreads();
             const float v = tile[(threadIdx.x + 1) % 64];
             tile[threadIdx.x] = v;
           },
           1, 64);
     }},
    {"two_writers",
     [] {
       run(
           [](const float* x, float*) {
             QIF_SHARED(float, tile, 64);
             tile[threadIdx.x / 2] = load_global(x + threadIdx.x);
           },
           1, 64);
     }},
    {"block_sum_on_one_buffer",
     [] {
       run(
           [](const float* x, float* y) {
             QIF_SHARED(float, shared, kMaxWarps);
             float one[1] = {load_global(x + threadIdx.x)};
             block_sum(one, shared);
             block_sum(one, shared);
             store_global(y + threadIdx.x, one[0]);
           },
           1, 64);
     }},
    {"divergent_barrier",
     [] {
       run(
           [](const float*, float*) {
             if (threadIdx.x < 40)
               __syncthreads();
             else
               __syncthreads();
           },
           1, 64);
     }},
    {"early_return",
     [] {
       run(
           [](const float*, float*) {
             if (threadIdx.x == 13) return;
             __syncthreads();
           },
           1, 64);
     }},
    {"missing_lane",
     [] {
       run(
           [](const float* x, float* y) {
             if (threadIdx.x % 32 != 9) store_global(y + threadIdx.x, warp_sum(load_global(x + threadIdx.x)));
           },
           1, 32);
     }},
    {"mask_without_caller",
     [] { run([](const float* x, float* y) { store_global(y, __shfl_sync(0xffffu, load_global(x), 0)); }, 1, 32); }},
    {"lane_outside_mask",
     [] {
       run(
           [](const float* x, float* y) {
             if (threadIdx.x < 16) store_global(y, __shfl_xor_sync(0xffffu, load_global(x), 16));
           },
           1, 32);
     }},
    {"shared_out_of_bounds",
     [] {
       run(
           [](const float*, float*) {
             QIF_SHARED(float, tile, 64);
             tile[threadIdx.x + 1] = 1.0f;
           },
           1, 64);
     }},
    {"shared_unwritten",
     [] {
       run(
           [](const float*, float* y) {
             QIF_SHARED(float, tile, 64);
             store_global(y, static_cast<float>(tile[threadIdx.x]));
           },
           2, 64);
     }},
    {"shared_of_another_block",  // what block 0 wrote is gone in block 1
     [] {
       run(
           [](const float*, float* y) {
             QIF_SHARED(float, tile, 64);
             if (blockIdx.x == 0) tile[threadIdx.x] = 1.0f;
             store_global(y, static_cast<float>(tile[threadIdx.x]));
           },
           2, 64);
     }},
    {"global_out_of_bounds",
     [] {
       run([](const float* x, float* y) { store_global(y + threadIdx.x, load_global(x + 4 * threadIdx.x)); }, 1, 65);
     }},
    {"misaligned_pack", [] { run([](const float* x, float*) { (void)load_pack<8>(x + 1); }, 1, 1); }},
    {"too_many_threads", [] { run([](const float*, float*) {}, 1, 1025); }},
    {"too_much_shared", [] { run([](const float*, float*) {}, 1, 32, 1 << 20); }},
    // ---- for AddressSanitizer: unchecked accesses ----
    {"raw_out_of_bounds", [] { run([](const float*, float* y) { y[256 + threadIdx.x] = 1.0f; }, 1, 64); }},
};

int main(int, char** argv) {
  try {
    kernels.at(argv[1])();
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  for (int i = 0; i < 256; ++i) std::printf("%.9g ", out[i]);
  return 0;
}
